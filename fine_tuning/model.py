"""CLIP and SigLIP image towers with a classifier: where bases come from, zero-shot heads, where adapters go, loading."""

import re
from pathlib import Path

import torch
from torch import nn

# needs: torchvision, sentencepiece  (image processors; sentencepiece: the tokenizer of SigLIP)
from common.bases import base_source, describe_base, load_pretrained
from common.config import UserError
from common.lora import is_within
from common.lora_targets import choose_targets
from common.runtime import quiet, say
from common.saved_models import TRAINED_PART, load_under, make_origin, open_checkpoint, plain_model, take_over, with_saved_adapter
from common.tensor_files import load_tensors, misfit, shapes_of
from common.vision.preprocess import example_picture, trained_shape
from peft_methods import quantized

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
EXAMPLE = "openai/clip-vit-base-patch32"
HEAD = "classifier"
HEAD_FILE = "classifier.safetensors"
# model_type in config.json -> the library's class for the image tower alone.
TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
# What else such a file holds: the text tower, and what scales and shifts similarities. Not taken, and no fault.
TEXT_SIDE = ("text_model", "text_projection", "logit_scale", "logit_bias")
SCALE = 100.0  # features' length in front of a head that starts anew: where CLIP's own temperature ended, and its upper bound


class ClipClassifier(nn.Module):
    """pixel_values (B, 3, H, W) -> an output with .logits (B, K): classes = W (scale * feature / |feature|) + b.

    feature: what the tower compares with texts (CLIP: after its projection). With texts' unit vectors as the rows of W, scale =
    exp(logit_scale) and b = 0 the softmax of the logits is the base's own zero-shot answer.
    """

    def __init__(self, tower, classes: list[str], scale: float):
        super().__init__()
        self.tower, self.classes, self.scale = tower, classes, scale
        self.new_layers = []  # those with new weights, for build_optimizer
        width = tower.config.projection_dim if hasattr(tower, "visual_projection") else tower.config.hidden_size
        self.classifier = nn.Linear(width, len(classes))
        nn.init.normal_(self.classifier.weight, std=0.1 / scale)  # at first every class is about as likely as any other
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values):
        from transformers.modeling_outputs import ImageClassifierOutput

        features = nn.functional.normalize(image_features(self.tower, pixel_values), dim=-1)
        return ImageClassifierOutput(logits=self.classifier(self.scale * features))

    def save_pretrained(self, folder: Path) -> None:
        """config.json and model.safetensors are the tower in the library's own format; the head lies beside it."""
        from safetensors.torch import save_file

        self.tower.save_pretrained(folder)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.classifier.state_dict().items()}
        save_file(tensors, folder / HEAD_FILE)


def image_features(tower, pixel_values) -> torch.Tensor:
    """(B, D): what the tower says of each picture, in the space that it shares with texts."""
    out = tower(pixel_values=pixel_values)
    return out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output


# ---- bases -----------------------------------------------------------------------------------------------------------


class AnyTower:
    """Stands in for a library class in `load_pretrained`: the image tower of a CLIP or SigLIP, its text side left on the disk."""

    @staticmethod
    def from_pretrained(source, **options):
        import transformers

        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        if config.model_type not in TOWERS:
            raise ValueError(f"a {config.model_type} model; expected {', '.join(TOWERS)}")
        tower_config = getattr(config, "vision_config", config)
        if hasattr(config, "projection_dim"):  # stands in both configs, and only this one is right in all files
            tower_config.projection_dim = config.projection_dim
        kind = getattr(transformers, TOWERS[config.model_type])
        model, info = kind.from_pretrained(source, config=tower_config, **options)
        if info["missing_keys"] and all(is_within(key, ["visual_projection"]) for key in info["missing_keys"]):
            model, info = transformers.CLIPVisionModel.from_pretrained(source, config=tower_config, **options)
        strays = [key for key in info["unexpected_keys"] if not is_within(key, TEXT_SIDE)]
        return model, {**info, "unexpected_keys": strays}


def load_base(name: str, download: bool = True):
    """(image tower, image processor, {"name", "sha256"}) of "demo", a local folder, or a hub name.

    float32 only, nothing that runs code; UserError where a weight is missing or left over. The sha256 is the tower's.
    """
    from transformers import AutoImageProcessor

    source = base_source(name, DEMO_BASE, EXAMPLE, download)
    tower, processor = load_pretrained(name, source, AnyTower, AutoImageProcessor)
    return tower, processor, describe_base(name, tower)


def label_words(label: str) -> str:
    """A class name as it would stand in a sentence: n02088364-German_shepherd -> German shepherd."""
    return re.sub(r"^n\d{8}-", "", label).replace("_", " ")


def zero_shot_rows(name: str, classes: list[str], prompts: str):
    """(unit vectors of the classes' texts (K, D), scale) by a base's text tower, which is used here and then let go.

    prompts: sentences with {label}, separated by |. A class' vector is the mean of its sentences' unit vectors (CLIP,
    arXiv:2103.00020, section 3.1.4). UserError where the base has no text tower or no tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    sentences = [text.strip() for text in prompts.split("|")]
    if not all(re.search(r"\{label\}", text) and not re.search(r"\{(?!label\})", text) for text in sentences):
        raise UserError('--prompts: every sentence needs {label}, as in "a photo of a {label}|a drawing of a {label}"')
    if reason := why_no_texts(name):
        raise UserError(f"no zero-shot head from {name}: {reason}; --head random needs no texts")
    logging.set_verbosity_error()
    model, tokenizer = load_pretrained(name, base_source(name, DEMO_BASE, EXAMPLE), AutoModel, AutoTokenizer)
    padding = "max_length" if model.config.model_type == "siglip" else True  # as each was trained
    rows = []
    for label in classes:
        texts = [text.replace("{label}", label_words(label)) for text in sentences]
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=text_length(model), return_tensors="pt")
        with torch.no_grad():
            vectors = model.get_text_features(**tokens).pooler_output
        rows.append(nn.functional.normalize(nn.functional.normalize(vectors, dim=1).mean(dim=0), dim=0))
    return torch.stack(rows), float(model.logit_scale.detach().exp())


def text_length(model) -> int:
    return model.config.text_config.max_position_embeddings


def why_no_texts(name: str) -> str:
    """Why a base cannot read texts, or "" if it can: it needs a text tower and a tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    source = base_source(name, DEMO_BASE, EXAMPLE)
    safely = {"local_files_only": True, "trust_remote_code": False}
    if not hasattr(AutoConfig.from_pretrained(source, **safely), "text_config"):
        return "the base has no text tower"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **safely)
    except (OSError, ValueError, ImportError) as error:
        return f"the base has no tokenizer that can be read ({' '.join(str(error).split())[-150:]})"
    # Where there are no files, transformers makes up one that has no words.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        return "the base has no tokenizer"
    return ""


def with_head(tower, classes: list[str], base: str, head: str, prompts: str) -> ClipClassifier:
    """The tower with a classifier for `classes`. head: zero_shot, random, or auto (zero_shot where the base can read texts)."""
    reason = why_no_texts(base) if head == "auto" else ""
    if head == "random" or reason:
        say(f"head for {len(classes)} classes: random" + (f", since {reason}" if reason else ""))
        model = ClipClassifier(tower, classes, SCALE)
        model.new_layers = [HEAD]
    else:
        rows, scale = zero_shot_rows(base, classes, prompts)
        say(f"head for {len(classes)} classes: zero-shot, from {prompts!r} with {label_words(classes[0])}, ...")
        model = zero_shot_classifier(tower, classes, rows, scale)
    return model


def zero_shot_classifier(tower, classes: list[str], rows, scale: float) -> ClipClassifier:
    """The classifier that answers as the base itself does: by the nearest text, whose unit vectors are the rows."""
    model = ClipClassifier(tower, classes, scale)
    with torch.no_grad():
        model.classifier.weight.copy_(rows)
    return model


def zero_shot_model(name: str, sha256: str, classes: list[str], prompts: str) -> ClipClassifier:
    """A base as it is, answering by the nearest text, in eval mode.

    UserError where it is not at hand (nothing is fetched), or not the one with this sha256.
    """
    with quiet():
        tower, _, found = load_base(name, download=False)
    if found["sha256"] != sha256:
        raise UserError(f"{name} is not the base of the training: its sha256 is {found['sha256'][:12]}, not {sha256[:12]}")
    return zero_shot_classifier(tower, classes, *zero_shot_rows(name, classes, prompts)).eval()


# ---- what trains ---------------------------------------------------------------------------------------------------


def layer_groups(model: ClipClassifier, lr: float, decay: float) -> list[dict]:
    """Parameter groups for the optimizer: the head and what follows the blocks learn at lr, each block at decay times the next's.

    Early layers know what all pictures have in common, so they should move least (ELECTRA, arXiv:2003.10555).
    """
    depth = model.tower.config.num_hidden_layers
    groups = {}
    for name, parameter in model.named_parameters():
        block = re.search(r"\.layers\.(\d+)\.", name)
        early = "embedding" in name or "pre_layrnorm" in name
        level = 0 if early else int(block[1]) + 1 if block else depth + 1
        groups.setdefault(level, []).append(parameter)
    return [{"params": params, "lr": lr * decay ** (depth + 1 - level)} for level, params in sorted(groups.items())]


def lora_targets(model, which: str, last_k: int = 0, r: int = 1) -> list[str]:
    """Names of the layers that get adapters of rank r, none with 0, and never in the head; see choose_targets."""
    return choose_targets(model, which, (HEAD,), last_k, answer, r)


def answer(model) -> torch.Tensor:
    """The logits (1, K) for one picture of noise, to find out what they depend on; see common/trial.py."""
    picture = example_picture(*trained_shape(model.tower.config))
    return model.eval()(pixel_values=picture.to(next(model.parameters()).device)).logits


def describe_trainable(model, method: str) -> None:
    """Prints how many parameters of a PEFT model train in the adapter, and how many in the head."""
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        sizes[is_within(name, [HEAD])] += parameter.numel() * parameter.requires_grad
    say(f"{method}: {sizes[False]:,} parameters train in the adapter, {sizes[True]:,} in the head")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def origin(method: str, classes: list[str], model: ClipClassifier, base: dict, config) -> dict:
    """What origin.json says of a checkpoint of the model. classes: in the order of its logits."""
    details = {"classes": classes, "scale": model.scale, "prompts": config.prompts, "tower": type(model.tower).__name__}
    return make_origin("clip", method, base, config, **details, quantize=getattr(config, "quantize", "none"))


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(model in eval mode on the device, image processor, origin) of a checkpoint, fully trained or an adapter.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights. An
    adapter that was trained on a 4-bit base gets one again where `device` is a GPU, unmerged; else the base as it is, and a note.
    """
    folder, about = open_checkpoint(folder, "clip")
    tower, processor = load_under(folder, about, load_base, base)
    model = ClipClassifier(tower, about["classes"], about["scale"])
    if about["method"] == "full":
        load_head(model, folder)
        return model.eval().to(device), processor, about
    small = about.get("quantize", "none") != "none"
    if small and torch.device(device).type == "cuda":
        model, merge = quantized(model, about["quantize"], device), False
    elif small:
        say("note: this adapter was trained on a 4-bit base; here it goes on the base itself, so answers differ a little")
    return with_saved_adapter(model, folder, (HEAD,), merge, answer).eval().to(device), processor, about


def start_from(folder: str, model) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none. The head, if it has these classes."""
    if folder:
        saved, _, about = load_checkpoint(folder, merge=False)
        plain = plain_model(model)
        same = saved.classes == plain.classes
        take_over(model, saved, about, folder, () if same else (HEAD,))
        plain.scale = saved.scale if same else plain.scale  # it goes with the head


def load_head(model: ClipClassifier, folder: Path) -> None:
    """Puts the classifier of a checkpoint folder into the model; UserError unless all of it fits."""
    tensors = load_tensors(folder / HEAD_FILE)
    if wrong := misfit(shapes_of(model.classifier.state_dict()), tensors):
        raise UserError(f"{folder / HEAD_FILE} does not fit the {len(model.classes)} classes of origin.json: {wrong}")
    model.classifier.load_state_dict(tensors)


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card: how the libraries alone do it."""
    kind, feature = about["tower"], "image_embeds" if "Projection" in about["tower"] else "pooler_output"
    start = f"""
import json

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, {kind}

folder = "path/to/this/folder"
about = json.load(open(f"{{folder}}/origin.json"))


class Classifier(nn.Module):  # its names are those in the file: tower. and classifier.
    def __init__(self, tower):
        super().__init__()
        width = getattr(tower.config, "projection_dim", tower.config.hidden_size)
        self.tower, self.classifier = tower, nn.Linear(width, len(about["classes"]))

    def forward(self, pixel_values):
        feature = self.tower(pixel_values=pixel_values).{feature}
        return self.classifier(about["scale"] * nn.functional.normalize(feature, dim=-1))


"""
    base = f"""
base = "{about["base"]["name"]}"
model = Classifier({kind}.from_pretrained(base))
"""
    file = f'folder + "/{TRAINED_PART}"'
    ways = {
        "full": f"""from safetensors.torch import load_file

model = Classifier({kind}.from_pretrained(folder))
model.classifier.load_state_dict(load_file(f"{{folder}}/{HEAD_FILE}"))
""",
        "lora": "from peft import PeftModel\n" + base + "model = PeftModel.from_pretrained(model, folder)\n",
        "head": f"from safetensors.torch import load_file\n{base}model.load_state_dict(load_file({file}), strict=False)\n",
    }
    source = "folder" if about["method"] == "full" else "base"
    use = f"""
processor = AutoImageProcessor.from_pretrained({source})
picture = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    probabilities = model.eval()(picture["pixel_values"])[0].softmax(0)
print(about["classes"][probabilities.argmax()], probabilities.max())
"""
    return {"code": start + ways[about["method"]] + use}
