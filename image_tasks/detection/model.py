"""DETR-family detectors: where they come from, their class head for new classes, where adapters go, saving and loading."""

import copy
import math
from pathlib import Path

import torch

# needs: timm, scipy, torchvision  (timm: backbones of DETR; scipy: the matching in its loss; torchvision: image processors)
from common.bases import base_source, class_tensors, describe_base, load_pretrained, train_mode
from common.config import UserError
from common.lora import is_within
from common.lora_targets import choose_targets
from common.peft_adapters import without_word_embeddings
from common.runtime import process_index, quiet, say
from common.saved_models import load_under, make_origin, open_checkpoint, plain_model, take_over, with_saved_adapter
from common.trial import without_trace
from common.vision.preprocess import example_picture, trained_shape

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"

# Parts that predict classes and boxes, over the family's architectures. They train whole beside an adapter.
HEADS = (
    "class_labels_classifier", "bbox_predictor",  # DETR, Conditional DETR, YOLOS
    "class_embed", "bbox_embed",  # Deformable DETR, RT-DETR, D-FINE
    "enc_score_head", "enc_bbox_head", "denoising_class_embed",  # RT-DETR, D-FINE
    "enc_out_class_embed", "enc_out_bbox_embed",  # LW-DETR, RF-DETR: the same of their first stage
    "pre_bbox_head", "lqe_layers",  # D-FINE: the first guess of the boxes, and how well a box fits (part of the score)
)  # fmt: skip


def lora_targets(model, which: str, last_k: int = 0, r: int = 1) -> list[str]:
    """Names of the layers that get adapters of rank r, none with 0, and never in the heads; see choose_targets."""
    return choose_targets(model, which, HEADS, last_k, lesson, r)


def lesson(model) -> torch.Tensor:
    """The loss () for one picture of noise with a box in it, to find out what can learn from one; see common/trial.py.

    In training mode, in which some detectors run parts that they do without later.
    """
    train_mode(model)
    label = {"class_labels": torch.zeros(1, dtype=torch.long), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    return model(pixel_values=example_picture(*trained_shape(model.config)), labels=[label]).loss


def answer(model) -> torch.Tensor:
    """All class logits for one picture of noise, sorted: detectors that choose their queries swap some that score alike."""
    return model.eval()(pixel_values=example_picture(*trained_shape(model.config))).logits.flatten().sort().values


def load_base(name: str, download: bool = True):
    """(model, image processor, {"name", "sha256"}) of a base: "demo", a local folder, or a hub name.

    float32 and safetensors only; UserError where a weight is missing or left over.
    """
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    source = base_source(name, DEMO_BASE, "facebook/detr-resnet-50", download)
    model, processor = load_pretrained(name, source, AutoModelForObjectDetection, AutoImageProcessor)
    return model, processor, describe_base(name, model)


def check_size(base, processor, image_size: int) -> None:
    """UserError where the base fails on pictures of the size that it will get, as where it halves a side that is odd.

    image_size: the side in pixels; 0: as the processor makes them (a square of the shorter side, where others may be longer).
    """
    size = dict(processor.size)
    height, width = (image_size or size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    with without_trace(base), torch.no_grad():
        try:
            base.eval()(pixel_values=example_picture(3, height, width))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"this base cannot take pictures of {height} x {width} pixels ({reason}); "
                "give an --image_size that it can, for most bases a multiple of 32"
            ) from None


def build(config):
    """A detector with new weights."""
    from transformers import AutoModelForObjectDetection

    return AutoModelForObjectDetection.from_config(config, trust_remote_code=False)


def with_classes(base, classes: list[str], most_boxes: int = 0):
    """The base with a class head for `classes`, to train: what is new in it, and what the model has no use for, is said.

    most_boxes: in one picture, to warn of too many.
    """
    queries = getattr(base.config, "num_queries", most_boxes)
    if queries < most_boxes:
        say(f"note: this base finds at most {queries} objects in a picture, and one of yours has {most_boxes}")
    model = with_class_head(base, classes)
    if known_classes(base) != classes:
        new = [c for c, row in zip(classes, matching_rows(base, classes), strict=True) if row is None]
        say(
            f"head for {len(classes)} classes: {len(classes) - len(new)} rows of the base, by name"
            + (f"; new: {', '.join(new[:5])}{' ...' if len(new) > 5 else ''}" if new else "")
        )
    return model


def known_classes(model) -> list[str]:
    return [model.config.id2label[i] for i in range(len(model.config.id2label))]


def matching_rows(base, classes: list[str]) -> list[int | None]:
    """For each class the place of the base's class of that name, whatever its case; None where it has none."""
    lowered = [label.lower() for label in known_classes(base)]
    return [lowered.index(c.lower()) if c.lower() in lowered else None for c in classes]


def with_class_head(base, classes: list[str]):
    """The base with a class head for `classes`; every other weight is kept.

    Rows of class layers are copied by class name; a class that the base does not know starts as the mean of those that it
    does: the head keeps its notion of "some object" against "no object". model.new_layers: the names of the class layers where
    some class is new, for build_optimizer; else empty.
    """
    model, base.new_layers = base, []
    if known_classes(base) != classes:
        config = copy.deepcopy(base.config)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
        model = build(config)
        tensors, rows, changed = base.state_dict(), matching_rows(base, classes), class_tensors(build, base)
        for name in changed:
            tensors[name] = pick_rows(tensors[name], rows, len(known_classes(base)))
        model.load_state_dict(tensors)
        model.new_layers = sorted({name.rsplit(".", 1)[0] for name in changed}) if None in rows else []
    for name, parameter in model.named_parameters():
        if is_within(name, ("backbone",)):
            parameter.requires_grad_(True)  # transformers freezes a DETR's backbone in some ways of building it
    if not hasattr(model.loss_function, "weighed"):
        model.loss_function = weighed_over_processes(model.loss_function)
    return without_word_embeddings(model)  # so that plain PEFT loads adapters onto it, too


def weighed_over_processes(family_loss):
    """A DETR-family loss, such that its mean over processes is what one process would get for all their pictures.

    Box terms (and the class terms of DETR's successors) are sums divided by a batch's number of boxes, plain DETR's class
    term is a mean over queries in which no object weighs eos_coefficient: a process with few boxes would count too much.
    Without gradient, in evaluation, the loss is that of this process's own pictures.
    """
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    softmax = family_loss is ForObjectDetectionLoss  # plain DETR's, the one with a class term that is no sum over boxes

    def loss_function(logits, labels, device, pred_boxes, config, *args, **kwargs):
        if logits.isfinite().all() and pred_boxes.isfinite().all():  # what matches boxes waits for the device anyway
            loss, parts, auxiliary = family_loss(logits, labels, device, pred_boxes, config, *args, **kwargs)
        else:  # it would end in a traceback: the run stops at a loss of NaN, and says at which step and pictures
            loss, parts, auxiliary = (logits.sum() + pred_boxes.sum()) * math.nan, {}, None
        world = process_index()[1]
        if world == 1:
            return loss, parts, auxiliary
        boxes = float(sum(len(label["class_labels"]) for label in labels))
        matched = float(sum(min(len(label["class_labels"]), logits.shape[1]) for label in labels))
        unmatched = config.eos_coefficient * (logits.shape[0] * logits.shape[1] - matched) if softmax else 0.0
        own = torch.tensor([boxes, matched + unmatched], device=logits.device)
        mean = own.clone()
        torch.distributed.all_reduce(mean)
        mean = mean / world
        wanted = (mean if torch.is_grad_enabled() else own).clamp(min=1)
        by_boxes = library_divisor(family_loss, own[0], mean[0], world).clamp(min=1) / wanted[0]
        by_queries = own[1].clamp(min=1) / wanted[1]
        share = {name: by_queries if softmax and name.startswith("loss_ce") else by_boxes for name in parts}
        classes = sum(value for name, value in parts.items() if softmax and name.startswith("loss_ce"))
        loss = by_boxes * (loss - classes) + by_queries * classes
        return loss, {name: share[name] * value for name, value in parts.items()}, auxiliary

    loss_function.weighed = True
    return loss_function


def library_divisor(family_loss, own, mean, world: int):
    """What transformers (5.17 to 5.24) divides box terms by with several processes, before it takes at least 1.

    own: this batch's number of boxes; mean: that of all processes. Three ways, by the file that holds the family's loss: the
    first two as one would expect, the third divides the mean by the number of processes once more.
    """
    family = family_loss.__module__.rpartition(".")[2]
    if family in ("loss_rt_detr", "loss_d_fine", "loss_deimv2"):
        return own
    return mean if family in ("loss_lw_detr", "loss_rf_detr") else mean / world


def denoises(model) -> bool:
    """Whether it also learns to repair noisy boxes, as RT-DETR and D-FINE do: a batch without boxes has no use for that part."""
    return any("denoising" in name for name, _ in model.named_parameters())


def pick_rows(tensor: torch.Tensor, rows: list[int | None], known: int) -> torch.Tensor:
    """Rows of a class layer (known or more, ...) for the wanted classes, then what comes after the known (no object)."""
    mean = tensor[:known].mean(dim=0)
    return torch.stack([mean if row is None else tensor[row] for row in rows] + list(tensor[known:]))


def backbone_groups(model, lr: float, lr_backbone: float) -> list[dict]:
    """Optimizer groups: the convolutional backbone learns at a lower rate, as in DETR."""
    groups = {lr: [], lr_backbone: []}
    for name, parameter in model.named_parameters():
        groups[lr_backbone if is_within(name, ("backbone",)) else lr].append(parameter)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


def origin(method: str, model, base: dict, config) -> dict:
    """What origin.json says of a checkpoint of the model."""
    classes = known_classes(model)
    data = {"image_size": config.image_size, "data_format": config.data_format}
    return make_origin("detection", method, base, config, classes=classes, **data)


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(model in eval mode on the device, image processor, origin) of a checkpoint, fully trained or an adapter.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights.
    """
    folder, about = open_checkpoint(folder, "detection")
    model, processor = load_under(folder, about, load_base, base)
    if about["method"] != "full":
        with quiet():
            model = with_class_head(model, about["classes"])
        model = with_saved_adapter(model, folder, HEADS, merge, answer)
    return model.eval().to(device), processor, about


def start_from(folder: str, model) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none. Class layers, too, where they are for these."""
    if folder:
        saved, _, about = load_checkpoint(folder, merge=False)
        plain = plain_model(model)
        same = plain.config.id2label == saved.config.id2label
        take_over(model, saved, about, folder, () if same else sorted(n.rsplit(".", 1)[0] for n in class_tensors(build, plain)))


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card: how the libraries alone do it."""
    start = """
import json

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

folder = "path/to/this/folder"
classes = json.load(open(f"{folder}/origin.json"))["classes"]
"""
    whole = "model = AutoModelForObjectDetection.from_pretrained(folder)\n"
    adapter = f'''from peft import PeftModel

base = "{about["base"]["name"]}"  # a new class head goes on it, which the adapter's folder fills
model = AutoModelForObjectDetection.from_pretrained(base, num_labels=len(classes), ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, folder)
'''
    head = f'''from safetensors.torch import load_file

base = "{about["base"]["name"]}"  # a new head for the classes goes on it, which the file fills
model = AutoModelForObjectDetection.from_pretrained(base, num_labels=len(classes), ignore_mismatched_sizes=True)
model.load_state_dict(load_file(f"{{folder}}/head.safetensors"), strict=False)
'''
    side = about["image_size"]
    size = f', size={{"height": {side}, "width": {side}}}' if side else ""
    source = "folder" if about["method"] == "full" else "base"
    use = f'''
processor = AutoImageProcessor.from_pretrained({source})
picture = Image.open("photo.jpg").convert("RGB")
with torch.inference_mode():
    outputs = model.eval()(**processor(picture, return_tensors="pt"{size}))
sizes = [(picture.height, picture.width)]
found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=sizes)[0]
for label, score, box in zip(found["labels"], found["scores"], found["boxes"]):
    print(classes[label], float(score), box.tolist())  # x1, y1, x2, y2 in pixels
'''
    return {"code": start + {"full": whole, "lora": adapter, "head": head}[about["method"]] + use}
