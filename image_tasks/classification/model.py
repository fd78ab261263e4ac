"""Image classifiers: where they come from, their head for new classes, where adapters go, loading."""

import copy
from pathlib import Path

import torch
from torch import nn

# needs: timm, torchvision  (timm: bases called timm/<name>; torchvision: image processors)
from common.bases import base_source, check_same_base, describe_base, load_pretrained, make_origin, open_checkpoint
from common.peft_adapters import find_targets, load_adapter_files
from common.runtime import say

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
# The names of attention's query and value projections differ between architectures: the first set that is there counts.
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))  # qkv: timm's ViT computes all three in one layer


def lora_targets(model, which: str) -> list[str]:
    """Names of the layers that get adapters. which: qv, all-linear, all (convolutions, too), or a regular expression."""
    heads = class_layers(model)
    if which == "qv":
        ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        fitting = next((names for names in QUERY_VALUE if set(names) <= ends), QUERY_VALUE[0])
        return find_targets(model, fitting, nn.Linear, heads)
    if which == "all-linear":
        return find_targets(model, "*", nn.Linear, heads)
    # A grouped convolution has no low-rank pair in PEFT unless the rank divides into its groups; it stays frozen.
    frozen = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    return find_targets(model, "*" if which == "all" else [which], (nn.Linear, nn.Conv2d), (*heads, *frozen))


def load_base(name: str):
    """(model, image processor, {"name", "sha256"}) of a base: "demo", a local folder, or a hub name (timm/<name>, too).

    float32 and safetensors only; UserError where a weight is missing or left over.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = base_source(name, DEMO_BASE, "google/vit-base-patch16-224")
    model, processor = load_pretrained(name, source, AutoModelForImageClassification, AutoImageProcessor)
    return model, processor, describe_base(name, model)


def class_layers(model) -> list[str]:
    """Names of the layers whose size is the number of classes (classifier, timm_model.head ...). They train whole."""
    from transformers import AutoModelForImageClassification

    shapes = []
    for more in (0, 1):
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(map(str, range(model.config.num_labels + more))))
        with torch.device("meta"):  # shapes without weights
            tensors = AutoModelForImageClassification.from_config(config).state_dict()
        shapes.append({key: tensor.shape for key, tensor in tensors.items()})
    return sorted({key.rsplit(".", 1)[0] for key, shape in shapes[0].items() if shape != shapes[1][key]})


def with_classes(base, classes: list[str]):
    """The base with a head for `classes`; every other weight is kept.

    A base that knows all of the classes keeps its rows for them. Else the head is new: a few old rows among new ones would
    outweigh them.
    """
    from transformers import AutoModelForImageClassification

    known = [base.config.id2label[i] for i in range(base.config.num_labels)]
    model = base
    if known != classes:
        heads = class_layers(base)
        config = copy.deepcopy(base.config)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
        if hasattr(config, "label_names"):  # what timm's wrapper writes in place of the two
            config.label_names = classes
        model = AutoModelForImageClassification.from_config(config)
        tensors, new = base.state_dict(), model.state_dict()
        for key in tensors:
            if key.rsplit(".", 1)[0] in heads:
                kept = set(classes) <= set(known)
                tensors[key] = tensors[key][[known.index(name) for name in classes]] if kept else new[key]
        model.load_state_dict(tensors)
        how = "rows of the base, by name" if set(classes) <= set(known) else "new weights"
        say(f"head ({', '.join(heads)}) for {len(classes)} classes: {how}")
    try:
        model.get_input_embeddings()
    except NotImplementedError:  # PEFT looks what shares weights with the word embeddings; here there are none
        model.get_input_embeddings = nn.Identity
    return model


def origin(method: str, classes: list[str], base: dict, config) -> dict:
    """What origin.json says of a checkpoint."""
    return make_origin("classification", method, base, config, classes=classes)


def load_model(folder: Path):
    """(model in eval mode, image processor, origin) of a fully trained checkpoint."""
    folder, facts = open_checkpoint(folder, "classification", "full")
    model, processor, _ = load_base(str(folder.resolve()))
    return model.eval(), processor, facts


def load_adapter(folder: Path, base: str = "", merge: bool = True):
    """(base with its adapter in eval mode, image processor, origin); base: where it is, if not under its recorded name.

    merge: the adapter is added into the weights, which gives the same outputs without the detour through A and B.
    """
    folder, facts = open_checkpoint(folder, "classification", "lora")
    model, processor, found = load_base(base or facts["base"]["name"])
    check_same_base(folder, facts, found)
    model = with_classes(model, facts["classes"])
    model = load_adapter_files(model, folder, class_layers(model))
    return (model.merge_and_unload() if merge else model).eval(), processor, facts
