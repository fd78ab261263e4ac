"""What a script that works on any task needs of one: its folder, its checkpoints, real samples, answers by name, its metrics.

Tasks name their modules alike (model, data, metrics, predictor), so a process works on one task: enter_task puts its folder on
the path, and a script over several tasks starts a process for each. Nothing here is imported by a task.
"""

import sys
from pathlib import Path
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
    from common.bases import ORIGIN, open_checkpoint
    from common.checkpoint import read_json
    from common.folders import best_of

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
    batches, there = [], 0
    for batch in data.loader:
        there += len(batch["labels"] if origin["task"] == "detection" else batch["index"])
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


def evaluate(folder: Path, model, processor, origin: dict, data_dir: str = "", split: str = "val") -> dict:
    """The task's own metrics of a model, on the checkpoint's data or on data_dir; several models share one open_data."""
    return score(origin["task"], model, processor, open_data(folder, processor, origin, data_dir, split))


# ---- answers ---------------------------------------------------------------------------------------------------------


def outputs(task: str, model, batch) -> dict:
    """{name: tensor} of what a model in eval mode says of a batch, before it is turned into boxes, sounds or meshes.

    The same for the same weights: nothing in it is drawn at random. Images: logits (B, K). Detection: logits (B, Q, K) and
    pred_boxes (B, Q, 4), in order of size where the model chooses and orders its queries itself. Pose: keypoints (B, K, 2) and
    heatmaps (B, K, h, w). Voice: wave, the samples of all clips in one row. Medical: sdf, deform and weights of M cubes.
    """
    import torch

    from common.batches import to_device

    batch = to_device(batch, next(model.parameters()).device)
    with torch.inference_mode():
        if task in ("classification", "clip"):
            return {"logits": model(pixel_values=batch["pixel_values"]).logits}
        if task == "detection":
            return boxes_of(model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"]))
        if task == "pose":
            coords, _, heatmaps = model(batch["pixel_values"])  # scores are left out: they jump where a cell's edge is crossed
            return {"keypoints": coords} | ({} if heatmaps is None else {"heatmaps": heatmaps})
        if task == "voice_rvc":
            from metrics import speak

            return {"wave": torch.cat([speak(model, batch, row) for row in range(len(batch["index"]))])}
        cubes = model(batch["coords"], batch["inputs"])
        return {"sdf": cubes.sdf, "deform": cubes.deform, "weights": cubes.weights}


def boxes_of(found) -> dict:
    """Logits and boxes of a DETR-family model's output, in an order that rounding does not change.

    Those with two stages order their queries by score, and of two that score alike either may come first.
    """
    chosen = any(key.startswith("enc_") and value is not None for key, value in found.items())
    parts = {"logits": found.logits, "pred_boxes": found.pred_boxes}
    return {name: part.sort(dim=1).values for name, part in parts.items()} if chosen else parts
