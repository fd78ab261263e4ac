"""Image classifiers: where they come from, their head for new classes, where adapters go, loading."""

import copy
import re
from pathlib import Path

import torch

# needs: timm, torchvision  (timm: bases called timm/<name>; torchvision: image processors)
from common.bases import base_source, class_tensors, describe_base, load_pretrained
from common.lora import is_within
from common.lora_targets import choose_targets
from common.peft_adapters import without_word_embeddings
from common.runtime import quiet, say
from common.saved_models import load_under, make_origin, open_checkpoint, plain_model, take_over, with_saved_adapter
from common.vision.preprocess import example_picture, trained_shape

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
# Weights of bases without a classifier that belong to other heads (masked patches, an image's vector, texts): no fault.
OTHER_HEADS = ("pooler", "decoder", "lm_head", "predictor", "vision_model.head", "visual_projection")
TEXT_SIDE = ("text_model", "text_projection", "logit_scale", "logit_bias")  # of CLIP and SigLIP


def lora_targets(model, which: str, last_k: int = 0, r: int = 1) -> list[str]:
    """Names of the layers that get adapters of rank r, none with 0, and never in the head; see choose_targets."""
    return choose_targets(model, which, class_layers(model), last_k, answer, r)


def answer(model) -> torch.Tensor:
    """The logits (1, K) for one picture of noise, to find out what they depend on; see common/trial.py."""
    return model.eval()(pixel_values=example_picture(*trained_shape(model.config)).to(model.device)).logits


class AnyClassifier:
    """Stands in for a library class in `load_pretrained`: a base without a classifier, as DINOv2 and ViT on ImageNet-21k are, has
    one of zeros, and what else it holds instead (a pooler, a decoder) is left aside.
    """

    @staticmethod
    def from_pretrained(source, **options):
        from transformers import AutoConfig, AutoModelForImageClassification

        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        if config.model_type == "timm_wrapper":  # whose model_args go into timm.create_model as they are
            args = config.model_args or {}
            odd = [key for key in args if re.search("pretrained|checkpoint|cache|file|script", key)]
            if odd or ":" in config.architecture:
                raise ValueError(f"its config.json would have timm load {odd[0] if odd else config.architecture}")
            config.model_args = {key: value for key, value in args.items() if key != "num_classes"}  # stands in the config, too
            config.num_labels = config.num_labels or 2  # of a base without a head; the library builds none for 0
        model, info = AutoModelForImageClassification.from_pretrained(source, config=config, **options)
        if model.main_input_name != "pixel_values" or config.model_type == "siglip2":  # siglip2 wants pictures cut into patches
            raise ValueError(f"a {config.model_type} takes no plain pictures")
        layers = class_layers(model)
        head = {key for key in model.state_dict() if is_within(key, layers)}
        if head and head <= set(info["missing_keys"]):
            for key in head:
                model.get_parameter(key).data.zero_()  # not at random: the base's sha256 is that of its tensors
            strays = [key for key in info["unexpected_keys"] if not is_within(key, OTHER_HEADS + TEXT_SIDE)]
            info = {**info, "missing_keys": set(info["missing_keys"]) - head, "unexpected_keys": strays}
        return model, info


def load_base(name: str, download: bool = True):
    """(model, image processor, {"name", "sha256"}) of a base: "demo", a local folder, or a hub name (timm/<name>, too).

    float32 and safetensors only; UserError where a weight is missing or left over.
    """
    from transformers import AutoImageProcessor

    source = base_source(name, DEMO_BASE, "google/vit-base-patch16-224", download)
    model, processor = load_pretrained(name, source, AnyClassifier, AutoImageProcessor)
    return model, processor, describe_base(name, model)


def build(config):
    """A classifier with new weights."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_config(config, trust_remote_code=False)


def class_layers(model) -> list[str]:
    """Names of the layers whose size is the number of classes (classifier, timm_model.head ...). They train whole."""
    with torch.device("meta"):  # shapes without weights
        return sorted({name.rsplit(".", 1)[0] for name in class_tensors(build, model)})


def with_classes(base, classes: list[str]):
    """The base with a head for `classes`, to train: which head it got, and what the model has no use for, is said."""
    known = known_classes(base)
    model = with_class_head(base, classes)
    if known != classes:
        how = "rows of the base, by name" if set(classes) <= set(known) else "new weights"
        say(f"head for {len(classes)} classes: {how} ({', '.join(class_layers(model))})")
    return model


def known_classes(model) -> list[str]:
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def with_class_head(base, classes: list[str]):
    """The base with a head for `classes`; every other weight is kept.

    A base that knows all of the classes keeps its rows for them. Else the head is new: a few old rows among new ones would
    outweigh them. model.new_layers: the names of the head's layers where it is new, for build_optimizer; else empty.
    """
    known = known_classes(base)
    model, base.new_layers = base, []
    if known != classes:
        config = copy.deepcopy(base.config)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
        if hasattr(config, "label_names"):  # what timm's wrapper writes in place of the two
            config.label_names = classes
        model = build(config)
        heads = class_layers(model)
        kept = set(classes) <= set(known)
        model.new_layers = [] if kept else heads
        tensors = base.state_dict()
        for key, new in model.state_dict().items():  # a base of timm may have no head at all
            if key.rsplit(".", 1)[0] in heads:
                tensors[key] = tensors[key][[known.index(name) for name in classes]] if kept else new
        model.load_state_dict(tensors)
    return without_word_embeddings(model)  # so that plain PEFT loads adapters onto it, too


def origin(method: str, model, base: dict, config) -> dict:
    """What origin.json says of a checkpoint of the model."""
    return make_origin("classification", method, base, config, classes=known_classes(model))


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(model in eval mode on the device, image processor, origin) of a checkpoint, fully trained or an adapter.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights.
    """
    folder, about = open_checkpoint(folder, "classification")
    model, processor = load_under(folder, about, load_base, base)
    if about["method"] != "full":
        with quiet():
            model = with_class_head(model, about["classes"])
        model = with_saved_adapter(model, folder, class_layers(model), merge, answer)
    return model.eval().to(device), processor, about


def start_from(folder: str, model) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none. The head, if it has these classes."""
    if folder:
        saved, _, about = load_checkpoint(folder, merge=False)
        plain = plain_model(model)
        same = plain.config.id2label == saved.config.id2label
        take_over(model, saved, about, folder, () if same else class_layers(plain))


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card: how the libraries alone do it."""
    start = """
import json

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "path/to/this/folder"
classes = json.load(open(f"{folder}/origin.json"))["classes"]
"""
    whole = "model = AutoModelForImageClassification.from_pretrained(folder)\n"
    adapter = f'''from peft import PeftModel

base = "{about["base"]["name"]}"  # a new head for the classes goes on it, which the adapter's folder fills
model = AutoModelForImageClassification.from_pretrained(base, num_labels=len(classes), ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, folder)
'''
    head = f'''from safetensors.torch import load_file

base = "{about["base"]["name"]}"  # a new head for the classes goes on it, which the file fills
model = AutoModelForImageClassification.from_pretrained(base, num_labels=len(classes), ignore_mismatched_sizes=True)
model.load_state_dict(load_file(f"{{folder}}/head.safetensors"), strict=False)
'''
    source = "folder" if about["method"] == "full" else "base"
    use = f"""
processor = AutoImageProcessor.from_pretrained({source})
picture = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    probabilities = model.eval()(**picture).logits[0].softmax(0)
print(classes[probabilities.argmax()], probabilities.max())
"""
    return {"code": start + {"full": whole, "lora": adapter, "head": head}[about["method"]] + use}
