"""What is saved of a trained model: checkpoint folders, each with an origin.json that says what it is of; loaded strictly."""

import copy
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from common.checkpoint import atomic_folder, check_holds, moving_state, open_model_folder, read_json, write_json, write_text
from common.config import BatchSize, PictureSize, Range, Seed, Share, UserError
from common.folders import best_of, newest_best
from common.lora import ADAPTER_FILE, adapted_layers, is_within, merge_lora, settle_lora, unmerge_lora
from common.lora_files import load_adapter, write_adapter
from common.peft_adapters import load_adapter_files, merged, save_adapter_files, whole_tensors
from common.runtime import quiet, say
from common.schema import check_fields
from common.tensor_files import load_tensors, misfit, shapes_of
from common.trial import keeps_answers

CARD = "README.md"
ORIGIN = "origin.json"  # beside every checkpoint: task, method, base and its hash, and what else loading needs
TRAINED_PART = "head.safetensors"  # of a run without adapters (--lora_r 0): the tensors that trained, by their names
# What origin.json must say (as make_origin writes it), and what it may say besides: of some tasks, or not in older ones.
ORIGIN_FIELDS = {
    "base": {"name": Annotated[str, Range(1, 4096)], "sha256": str},
    "data_dir": str,
    "batch_size": BatchSize,
    "seed": Seed,
}
OF_SOME = {
    "exclude": str,
    "data_format": str,
    "latents_dir": str,
    "organs": str,
    "prompts": str,
    "tower": str,
    "classes": Annotated[list[str], Range(1, 10**6)],
    "image_size": PictureSize,
    "scale": Annotated[float, Range(1e-6, 1e6)],  # of CLIP's features
    "threshold": Share | None,
    "quantize": Literal["none", "4bit"],
    "speakers": Literal["auto", "one", "folders"],
    "modality": Literal["auto", "ct", "mr"],
    "whole": list[Annotated[str, Range(1, 1000)]],  # what an adapter carries beside what its task trains whole
}
WEIGHTS = {"full": "model.safetensors", "lora": ADAPTER_FILE, "head": TRAINED_PART}  # what a checkpoint of a method must hold


def make_origin(task: str, method: str, base: dict, config, **details) -> dict:
    """The content of origin.json. details: what else the task needs to load and score the checkpoint, such as classes."""
    places = {key: getattr(config, key, "") for key in ("data_dir", "exclude")}
    places = {key: str(Path(place).expanduser().resolve()) if place else "" for key, place in places.items()}
    shared = {**places, "batch_size": config.batch_size, "seed": config.seed}
    return {"task": task, "method": method, "base": base, **details, **shared}


def save_model(folder: Path, model, processor, origin: dict, card: str = "") -> None:
    """A folder for from_pretrained: weights, config, image processor, origin.json, and the model card as README.md."""
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        write_json(aside / ORIGIN, origin)
        write_text(aside / CARD, card)


def save_lora(folder: Path, model, processor, origin: dict, card: str = "") -> None:
    """A PEFT adapter folder with the parts that trained whole in it, image processor, origin.json, the model card as README.md.

    The adapter is PEFT's, or one of common/lora.py, in the same format. A model without adapters has head.safetensors with the
    parts alone in place of PEFT's two files.
    A model that needs more than its adapter to be built again has a method save_extra(folder), which writes it.
    """
    with atomic_folder(folder) as aside:
        plain = plain_model(model)
        if adapted_layers(model):
            write_adapter(model, aside, origin["base"]["name"])
        elif plain is model:
            save_trained(model, aside / TRAINED_PART)
        else:
            model.peft_config["default"].base_model_name_or_path = origin["base"]["name"]
            save_adapter_files(model, aside)
        processor.save_pretrained(aside)
        if hasattr(plain, "save_extra"):
            plain.save_extra(aside)
        write_json(aside / ORIGIN, origin)
        write_text(aside / CARD, card)  # in place of PEFT's template


def plain_model(model):
    """The model itself, in its own class, where PEFT's is around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def save_trained(model, file: Path) -> None:
    """The parts that train, by their names."""
    from safetensors.torch import save_file

    save_file({name: t.cpu().contiguous().clone() for name, t in whole_tensors(model).items()}, file)


def load_trained(model, file: Path, whole):
    """The model, in eval mode, with the parts `whole` from a file of save_trained. UserError where not all fits."""
    tensors = load_tensors(file)
    expected = shapes_of({name: p for name, p in model.named_parameters() if is_within(name, whole)})
    if wrong := misfit(expected, tensors):
        raise UserError(f"{file} does not fit this base: {wrong}")
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def open_checkpoint(folder: Path | str, task: str, method: str = "") -> tuple[Path, dict]:
    """(folder, origin) of a checkpoint, checked: whole, and of this task and method (of WEIGHTS; "": any).

    Of a run folder it is checkpoints/best. Else UserError.
    """
    folder = open_model_folder(best_of(Path(folder).expanduser()))
    if not (folder / ORIGIN).is_file():
        raise UserError(f"{folder} holds no {ORIGIN}: only checkpoints that these scripts saved say what they were trained for")
    origin = read_json(folder / ORIGIN)
    its_task, its_method = (origin.get("task"), origin.get("method")) if isinstance(origin, dict) else (None, None)
    if its_task != task or its_method not in ([method] if method else list(WEIGHTS)):
        wanted = f"{task} ({method})" if method else task
        raise UserError(f"{folder} is a checkpoint of {its_task} ({its_method}), not of {wanted}")
    check_holds(folder, WEIGHTS[its_method])
    check_fields(origin, ORIGIN_FIELDS, folder / ORIGIN, OF_SOME)
    return folder, Origin(origin, folder / ORIGIN)


def choose_checkpoint(named: str, task: str, method: str) -> tuple[str, dict]:
    """(folder, origin) of the checkpoint that eval or infer uses, which one printed line says.

    named: --checkpoint, of either method; empty: the newest of `method`. UserError as in open_checkpoint and newest_best.
    """
    folder, origin = open_checkpoint(named or newest_best(task, method), task)
    made = datetime.fromtimestamp((folder / ORIGIN).stat().st_mtime)
    kind = "the head alone, without adapters" if origin["method"] == "head" else origin["method"]
    say(f"checkpoint: {folder} ({kind}, made {made:%Y-%m-%d %H:%M}, base {origin['base']['name']})")
    return str(folder), origin


class Origin(dict):
    """The content of a checkpoint's origin.json. Asked for what a task needs and it does not hold, it says that in one line."""

    def __init__(self, content: dict, file: Path):
        super().__init__(content)
        self.file = file

    def __missing__(self, key):
        raise UserError(f"{self.file} is damaged: its {key} is missing")


def load_under(folder: Path, origin: dict, load_base, name: str | tuple = ""):
    """(model, processor) that a checkpoint is loaded from: its own folder, or the base that its adapter goes on.

    load_base: the task's, a name -> (model, processor, {"name", "sha256"}). name: where an adapter's base is, if not under
    its recorded name, which is a stranger's word: nothing is fetched for it; or what load_base gave before, of which a copy
    comes back. UserError where that is not the base that the adapter was trained on.
    """
    with quiet():  # whoever uses a checkpoint has said which base it is of
        if origin["method"] == "full":  # it is its own base
            return load_base(str(folder.resolve()))[:2]
        loaded = name if isinstance(name, tuple) else None
        model, processor, base = loaded or load_base(name or origin["base"]["name"], download=bool(name))
    if base["sha256"] != origin["base"]["sha256"]:
        raise UserError(
            f"{folder} was trained on the base {origin['base']['name']} (sha256 {origin['base']['sha256'][:12]}), but "
            f"{base['name']} has sha256 {base['sha256'][:12]}: an adapter fits no other base"
        )
    return copy.deepcopy(model) if loaded else model, processor


def with_saved_adapter(model, folder: Path, whole, merge: bool, answer, own_layers: bool = False):
    """The model with the adapter of `folder`, and the parts that trained `whole`, in its own class.

    merge: the adapter is added into the weights, which gives the same outputs without the detour through A and B. answer: by
    which that is checked, see common/trial.py. A folder without an adapter has the parts alone. own_layers: the adapter is of
    common/lora.py, whose layers are exact where PEFT's are not. What else an adapter carries whole (norms and biases, by
    scripts/extract_lora.py), its origin.json names.
    """
    whole = (*whole, *read_json(folder / ORIGIN).get("whole", []))
    if (folder / TRAINED_PART).is_file():
        return load_trained(model, folder / TRAINED_PART, whole)
    if own_layers:
        load_adapter(model, folder)
        lacking = [n for n, _ in model.named_parameters() if is_within(n, whole) and n not in model.lora_whole]
        if lacking:
            raise UserError(f"{folder} is damaged: its adapter lacks {lacking[0]}, which trained whole beside it")
        if merge and keeps_answers(model, answer, partial(merge_lora, model), partial(unmerge_lora, model)):
            settle_lora(model)
        return model
    model = load_adapter_files(model, folder, whole)
    return merged(model, answer) if merge else model.get_base_model()


def take_over(model, saved, origin: dict, folder: str, class_parts) -> None:
    """Copies all that trains in `model` from the model of a checkpoint, for a run that starts where another ended; says so.

    model: as it is about to train, with its adapter on it. saved, origin: what load_checkpoint(folder, merge=False) gave.
    class_parts: the parts that belong to the classes, where those are others now: they stay as new as they are. UserError for
    a checkpoint of the other method, and for another adapter than this run's. What trained as a head alone starts either: it
    brings its head, and the rest is the base's.
    """
    plain = plain_model(model)
    if origin["method"] == "head":
        return take_head(plain, saved, folder, class_parts)
    # Without adapters a part of the model trains, or nearly all of it.
    trains_whole = sum(p.numel() * (2 * p.requires_grad - 1) for p in model.parameters()) > 0
    if (origin["method"] == "full") != trains_whole:
        script, kind = ("train.py", "a whole model") if origin["method"] == "full" else ("train_lora.py", "an adapter")
        raise UserError(f"--start_from {folder} is {kind}: {script} goes on with it (and --model takes a whole model as a base)")
    mine = {name: t for name, t in moving_state(plain).items() if not is_within(name, class_parts)}
    theirs = {name: t for name, t in saved.state_dict().items() if name in mine}
    odd = sorted(name for name, t in mine.items() if name not in theirs or theirs[name].shape != t.shape)
    # Layer -> alpha / r, of all layers with an adapter.
    adapted = [{name: m.scaling for name, m in each.named_modules() if hasattr(m, "base_layer")} for each in (plain, saved)]
    if origin.get("whole"):
        raise UserError(
            f"--start_from {folder} does not fit this run: it carries norms and biases, which no run trains beside an adapter"
        )
    if odd or adapted[0] != adapted[1]:
        what = f"it has no {odd[0]} {tuple(mine[odd[0]].shape)}" if odd else "its adapter is on other layers, or scaled otherwise"
        raise UserError(f"--start_from {folder} does not fit this run: {what}; give --lora_r, --lora_alpha and the like as then")
    plain.load_state_dict(theirs, strict=False)
    if not class_parts:
        plain.new_layers = []
    say(
        f"starts from {folder}"
        + (f"; its classes are others, so new here: {', '.join(class_parts)}" if class_parts else ", head included")
    )


def take_head(model, saved, folder: str, class_parts) -> None:
    """take_over of a checkpoint whose head alone trained. UserError where that has no place in this model."""
    from safetensors import safe_open

    with safe_open(best_of(Path(folder).expanduser()) / TRAINED_PART, "pt") as file:
        names = [name for name in file.keys() if not is_within(name, class_parts)]  # noqa: SIM118
    own, theirs = model.state_dict(), saved.state_dict()
    odd = [name for name in names if name not in own or own[name].shape != theirs[name].shape]
    if odd:
        here = tuple(own[odd[0]].shape) if odd[0] in own else "missing"
        raise UserError(
            f"--start_from {folder} does not fit this run: its {odd[0]} is {tuple(theirs[odd[0]].shape)}, and here it is {here}"
        )
    model.load_state_dict({name: theirs[name] for name in names}, strict=False)
    if not class_parts:
        model.new_layers = []
    new = f", but for {', '.join(class_parts)}, which are new here" if class_parts else ""
    say(f"starts from {folder}, the head alone{new}")
