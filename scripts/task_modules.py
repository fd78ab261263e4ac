"""What a script that works on any task needs of one: its folder, its checkpoints, real samples, answers by name, its metrics.

Tasks name their modules alike (model, data, metrics, predictor), so a process works on one task: enter_task puts its folder on
the path, and a script over several tasks starts a process for each. Nothing here is imported by a task.
"""

import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402

FOLDERS = {  # task, as origin.json and summary.json name it -> its folder
    "classification": ROOT / "image_tasks" / "classification",
    "detection": ROOT / "image_tasks" / "detection",
    "pose": ROOT / "image_tasks" / "pose",
    "clip": ROOT / "fine_tuning",
    "voice_rvc": ROOT / "voice_rvc",
    "medical_sam3d": ROOT / "medical_sam3d",
}
METRICS = {  # task -> (the metric that chooses its best epoch, whether more of it is better)
    "classification": ("balanced_accuracy", True),
    "detection": ("map", True),
    "pose": ("pixel_error", False),
    "clip": ("balanced_accuracy", True),
    "voice_rvc": ("mcd", False),
    "medical_sam3d": ("dice", True),
}


class EvalData(NamedTuple):
    """A split as a task scores it. facts: classes or keypoints, where its `evaluate` wants them; name: whose data it is."""

    loader: object
    facts: tuple
    name: str


def enter_task(task: str) -> None:
    """Makes `from model import ...` mean this task's model.py in this process. UserError where another's is in already."""
    if task not in FOLDERS:
        raise UserError(f"there is no task {task!r}; there are {', '.join(FOLDERS)}")
    others = {folder for name, folder in FOLDERS.items() if name != task}
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent in others:
            raise UserError(f"one task a process: {task} was asked for, and {module.__file__} is imported as {name} already")
    sys.path[:] = [str(FOLDERS[task]), *(path for path in sys.path if Path(path) not in FOLDERS.values())]


def task_of(checkpoint: Path | str) -> tuple[Path, dict]:
    """(folder, origin) of a run folder or a checkpoint of any task and method, checked as open_checkpoint does."""
    from common.checkpoint import read_json
    from common.folders import best_of
    from common.saved_models import ORIGIN, open_checkpoint

    folder = best_of(Path(checkpoint).expanduser())
    origin = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else None
    task = str(origin.get("task")) if isinstance(origin, dict) else ""
    return open_checkpoint(folder, task if task in FOLDERS else f"one of {', '.join(FOLDERS)}")


def load(folder: Path | str, base: str = "", merge: bool = True, device="cpu"):
    """(model in eval mode, processor, origin): the load_checkpoint of the checkpoint's task, which is entered."""
    folder, origin = task_of(folder)
    enter_task(origin["task"])
    from model import load_checkpoint

    return load_checkpoint(folder, base, merge, device)


# ---- data ------------------------------------------------------------------------------------------------------------


def open_data(folder: Path, processor, origin: dict, data_dir: str = "", split: str = "val", batch_size: int = 0) -> EvalData:
    """A split of data_dir, or of the data that the checkpoint was trained on, to be scored as often as one likes.

    batch_size: 0 as in training. Classes that the checkpoint knows may be missing. UserError where there is no such data.
    """
    from common.folders import check_data_dir

    enter_task(origin["task"])
    check_data_dir(data_dir, origin)
    config = SimpleNamespace(
        data_dir=data_dir, data_format="auto", split=split, subset=True, batch_size=batch_size, num_workers=0
    )
    from data import load_for_eval

    if origin["task"] != "pose":
        loader, *facts, name = load_for_eval(config, processor, origin)
        return EvalData(loader, tuple(facts), name)
    from data import Preprocess
    from model import read_facts

    known = read_facts(folder)
    loader, points, name = load_for_eval(config, Preprocess(processor, known["input_size"]), known, origin)
    return EvalData(loader, (points,), name)


def real_batches(folder: Path, processor, origin: dict, data_dir: str = "", split: str = "val", most: int = 16) -> list:
    """Batches with at most so many real samples, on the CPU. data_dir, split: as of open_data."""
    data = open_data(folder, processor, origin, data_dir, split, min(most, origin["batch_size"]))
    return first_batches(origin["task"], data, most)


def first_batches(task: str, data: EvalData, most: int = 16) -> list:
    """The data's first batch, and those after it as long as all together have at most so many samples."""
    batches, there = [], 0
    for batch in data.loader:
        there += len(batch["labels"] if task == "detection" else batch["index"])
        if batches and there > most:
            break
        batches.append(batch)
    return batches


def score(task: str, model, processor, data: EvalData) -> dict:
    """The task's own metrics of a model on the data."""
    enter_task(task)
    if task in ("classification", "clip"):
        from common.vision.scoring import evaluate
    else:
        from metrics import evaluate
    return evaluate(model, *([processor] if task == "detection" else []), data.loader, *data.facts)


def samples_of(task: str, model, processor, data: EvalData, metric: str) -> dict:
    """What samples.json would hold of a model on the data (see bootstrap.read_samples)."""
    from bootstrap import read_samples

    enter_task(task)
    dataset = data.loader.dataset
    with TemporaryDirectory() as folder:
        path = Path(folder) / "samples.json"
        if task in ("classification", "clip"):
            from common.vision.scoring import predict, save_samples

            save_samples(dataset, *predict(model, data.loader), path.parent)
        elif task == "detection":
            from metrics import coco_eval, predict, save_samples

            found, _ = predict(model, processor, data.loader)
            save_samples(coco_eval(dataset.samples, found, *data.facts), dataset.samples, *data.facts, path)
        else:
            from metrics import predict, save_samples

            found = predict(model, data.loader)
            save_samples(dataset, found[0] if task == "pose" else found, path)
        return read_samples(path.parent, metric)


def evaluate(folder: Path, model, processor, origin: dict, data_dir: str = "", split: str = "val") -> dict:
    """The task's own metrics of a model, on the checkpoint's data or on data_dir; several models share one open_data."""
    return score(origin["task"], model, processor, open_data(folder, processor, origin, data_dir, split))


# ---- parts -----------------------------------------------------------------------------------------------------------


def base_below(folder: Path, origin: dict, model, base: str = ""):
    """(a copy of a checkpoint's plain model with its base's weights, names of the parts that train whole and stay as they are).

    That is the model which an adapter on this base would start from, with the checkpoint's heads on it. base: where the base
    is, if not under its recorded name. UserError where it is not the base of the training, or not at hand.
    """
    from common.lora import is_within
    from common.saved_models import load_under

    enter_task(origin["task"])
    from model import load_base

    untrained, _ = load_under(folder, origin | {"method": "lora"}, load_base, base)
    whole = whole_parts(origin["task"], model, untrained)
    prefix = "tower." if origin["task"] == "clip" else ""  # whose base is the image tower alone
    theirs = {f"{prefix}{name}": tensor for name, tensor in untrained.state_dict().items()}
    copy = deepcopy(model)
    mine = {name: tensor for name, tensor in copy.state_dict().items() if not is_within(name, whole)}
    odd = [name for name, tensor in mine.items() if name not in theirs or theirs[name].shape != tensor.shape]
    if odd:
        raise UserError(f"{folder} is not of this base's architecture: {odd[0]} {tuple(mine[odd[0]].shape)} is no tensor of it")
    copy.load_state_dict({name: theirs[name] for name in mine}, strict=False)
    return copy.eval(), whole


def whole_parts(task: str, model, base) -> tuple[str, ...]:
    """Names of the parts that train whole beside an adapter, as the task's train_lora.py has them. base: as load_base gave it."""
    if task == "classification":
        from model import class_layers

        return tuple(class_layers(model))
    if task == "detection":
        from model import HEADS

        return HEADS
    if task == "voice_rvc":
        from model import VOICE_ROWS

        return (VOICE_ROWS,)
    if task == "medical_sam3d":
        from model import OUT_LAYER

        return (OUT_LAYER, *base.new_layers)
    from model import HEAD

    return (HEAD,)


def is_adapter_beside(model) -> bool:
    """Whether layers of the model have an adapter beside them, of PEFT's or of common/lora.py: it is not a plain model."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def card_of(origin: dict, title: str, facts: dict[str, str], measured: dict[str, float] | None = None) -> str:
    """A model card for what a script made of a checkpoint: what it is (facts), its metric by form, and how it is loaded."""
    from common.card import ON_A_PICTURE, base_rows, front_matter, loading, spoken

    enter_task(origin["task"])
    from model import card_code

    base, how = origin["base"]["name"], {"code": "", "use": ON_A_PICTURE} | card_code(origin)
    lines = [*front_matter(origin["task"], origin["method"], base, how["code"]), f"# {title}", "", "| | |", "| --- | --- |"]
    lines += base_rows(origin["base"])
    lines += [f"| {key} | {spoken(value)} |" for key, value in facts.items()]
    if measured:
        lines += ["", "## Measured", "", f"| model | {METRICS[origin['task']][0]} |", "| --- | ---: |"]
        lines += [f"| {name} | {'absent' if value is None else f'{value:.4f}'} |" for name, value in measured.items()]
    return "\n".join([*lines, "", "## Load it", "", *loading(origin["method"], base, how["code"], how["use"]), ""])


def place_for(named: str, folder: Path, ending: str, overwrite: bool) -> Path:
    """Where a script puts what it makes of a checkpoint: output_dir, or beside the run.

    UserError where that holds anything; with --overwrite, anything but a checkpoint, which alone is replaced.
    """
    from common.folders import check_place
    from common.saved_models import ORIGIN

    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    out = Path(named).expanduser() if named else run.with_name(f"{run.name}_{ending}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if not (out / ORIGIN).is_file():
            raise UserError(f"{out} is there already and is no checkpoint: --output_dir names another place")
        if not overwrite:
            raise UserError(f"{out} is there already; --overwrite replaces it, and --output_dir names another place")
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--output_dir {out} holds the checkpoint itself: name another place")
    if folder.resolve() in out.resolve().parents:
        raise UserError(f"--output_dir {out} lies in the checkpoint itself, which is then whole no more: name another place")
    check_place("--output_dir", out)
    return out


def checkpoint_first(argv) -> list[str]:
    """The arguments of a script whose first word may be the checkpoint, without its flag."""
    words = sys.argv[1:] if argv is None else list(map(str, argv))
    return ["--checkpoint", *words] if words and not words[0].startswith("-") else words


# ---- answers ---------------------------------------------------------------------------------------------------------


def outputs(task: str, model, batch) -> dict:
    """{name: tensor} of what a model in eval mode says of a batch, before it is turned into boxes, sounds or meshes.

    The same for the same weights: nothing in it is drawn at random. Images: logits (B, K). Detection: logits (B, Q, K) and
    pred_boxes (B, Q, 4); their order, see orders_queries. Pose: keypoints (B, K, 2) and heatmaps (B, K, h, w). Voice: wave, the
    samples of all clips in one row. Medical: sdf, deform and weights of M cubes.
    """
    import torch

    from common.batches import to_device

    batch = to_device(batch, next(model.parameters()).device)
    with torch.inference_mode():
        if task in ("classification", "clip"):
            return {"logits": model(pixel_values=batch["pixel_values"]).logits}
        if task == "detection":
            found = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
            return {"logits": found.logits, "pred_boxes": found.pred_boxes}
        if task == "pose":
            coords, _, heatmaps = model(batch["pixel_values"])  # scores are left out: they jump where a cell's edge is crossed
            return {"keypoints": coords} | ({} if heatmaps is None else {"heatmaps": heatmaps})
        if task == "voice_rvc":
            from metrics import speak

            return {"wave": torch.cat([speak(model, batch, row) for row in range(len(batch["index"]))])}
        cubes = model(batch["coords"], batch["inputs"])
        return {"sdf": cubes.sdf, "deform": cubes.deform, "weights": cubes.weights}


def answers_of(task: str, models: dict) -> dict:
    """{name: function batch -> outputs} of several models, for parity.check."""
    return {name: partial(outputs, task, model) for name, model in models.items()}


def orders_queries(task: str, model) -> bool:
    """Whether it is a detector of two stages, which orders its queries by the score that the first (enc_score_head ...) gives.

    Of two that score alike rounding says which comes first, so the rows of two models are compared in any order.
    """
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    return task == "detection" and any(part.startswith("enc_") for part in parts)
