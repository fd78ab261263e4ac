"""What the benchmark trains of each task: a model with its head, one sample, the loss; and the ways that most tasks go.

The imports of a task's modules wait until scripts/benchmark.py has put its folder on the path.
"""

import copy
from pathlib import Path

from benchmark_medical import adapt_organ, build_organ, compare_convolutions, decode, organ_loader
from benchmark_voice import adapt_voice, build_voice, convert_clip, seconds_of_sound, train_voice, voice_loader

# build(real) -> (model with its head, heads, {name: tensor or value} of one sample, loss(model, batch)).


def classification(real: bool):
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import ViTConfig, ViTForImageClassification

    from model import class_layers, load_base, with_classes

    model = ViTForImageClassification(ViTConfig(num_labels=2)) if real else load_base("demo")[0]
    model = with_classes(model, [f"class {i}" for i in range(10)])
    sample = {"pixel_values": torch.randn(3, *[model.config.image_size] * 2), "target": torch.tensor(3)}
    return model, class_layers(model), sample, lambda m, b: cross_entropy(m(pixel_values=b["pixel_values"]).logits, b["target"])


def clip(real: bool):
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from model import HEAD, SCALE, ClipClassifier, load_base

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig()) if real else load_base("demo")[0]  # defaults: ViT-B/32
    sample = {"pixel_values": torch.randn(3, *[tower.config.image_size] * 2), "target": torch.tensor(3)}
    model = ClipClassifier(tower, [f"class {i}" for i in range(10)], SCALE)
    return model, [HEAD], sample, lambda m, b: cross_entropy(m(pixel_values=b["pixel_values"]).logits, b["target"])


def detection(real: bool):
    import torch
    from transformers import DetrConfig, DetrForObjectDetection

    from model import HEADS, load_base, with_classes

    # defaults: ResNet-50, six layers each way
    model = DetrForObjectDetection(DetrConfig(use_pretrained_backbone=False)) if real else load_base("demo")[0]
    model, side = with_classes(model, ["a", "b", "c"]), 320 if real else 96
    target = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.6, 0.5, 0.3, 0.3]])}
    sample = {"pixel_values": torch.randn(3, side, side), "pixel_mask": torch.ones(side, side).long(), "labels": target}
    return model, HEADS, sample, lambda m, b: m(**b).loss


def pose(real: bool):
    import torch
    from transformers import ViTConfig, ViTModel

    from keypoints import KeypointSet
    from model import HEAD, KeypointModel, keypoint_loss, load_base, with_head

    side = 224 if real else 64
    base = KeypointModel(ViTModel(ViTConfig(), add_pooling_layer=False), None, {}) if real else load_base("demo")[0]
    points = KeypointSet([f"point {i}" for i in range(17)], [], [], [0.05] * 17, True)
    model = with_head(base, points, "heatmap", (side, side))
    sample = {"pixel_values": torch.randn(3, side, side), "target": torch.rand(17, 2), "visible": torch.ones(17).bool()}

    def loss(m, batch):
        coords, _, heatmaps = m(batch["pixel_values"])
        return keypoint_loss(coords, batch["target"], batch["visible"], heatmaps)

    return model, [HEAD], sample, loss


def labelled_loader(config):
    from data import build_loaders, read_tables
    from model import load_base

    return build_loaders(config, load_base("demo")[1], read_tables(config.data_dir, config.seed))[0]


def detection_loader(config):
    from data import build_loaders, read_tables
    from model import load_base

    tables = read_tables(config.data_dir, config.data_format, config.seed)
    return build_loaders(config, load_base("demo")[1], tables)[0]


def pose_loader(config):
    from data import Preprocess, build_loaders, read_tables
    from model import input_size, load_base

    base, processor, _ = load_base("demo")
    tables = read_tables(config.data_dir, config.data_format, config.seed)
    return build_loaders(config, Preprocess(processor, input_size(base, 0)), tables)[0]


# A voice has no PEFT model beside it to compare with: PEFT has no exact layers for what it is made of.
VOICE = {
    "folder": "voice_rvc",
    "build": build_voice,
    "targets": ("default",),
    "batch": {"real": 1, "demo": 8},
    "loader": voice_loader,
    "variants": ("full", "lora", "bf16", "ema"),
    "adapt": adapt_voice,
    "train": train_voice,
    "answer": convert_clip,
    "sound": seconds_of_sound,
}
# A new task joins with a row: its folder, what it trains, of --lora_targets what is measured (the script's own first), samples in
# a batch by size, and settings -> the demo's train loader. Where it goes other ways: variants that it has, flags, and functions
# for adapters (adapt), the training loop (train), an answer, the seconds of sound in a sample, and convolutions to compare.
TASKS = {
    "classification": {
        "folder": "image_tasks/classification",
        "build": classification,
        "targets": ("all-linear",),
        "batch": {"real": 4, "demo": 32},
        "loader": labelled_loader,
    },
    "detection": {
        "folder": "image_tasks/detection",
        "build": detection,
        "targets": ("all-linear", "all"),
        "batch": {"real": 2, "demo": 16},
        "loader": detection_loader,
    },
    "pose": {
        "folder": "image_tasks/pose",
        "build": pose,
        "targets": ("all-linear",),
        "batch": {"real": 4, "demo": 16},
        "loader": pose_loader,
    },
    "clip": {
        "folder": "fine_tuning",
        "build": clip,
        "targets": ("qv", "all-linear"),
        "batch": {"real": 8, "demo": 32},
        "loader": labelled_loader,
    },
    "voice": {**VOICE, "flags": ("--gan",)},
    "voice_no_gan": {**VOICE, "flags": ("--no_gan",)},
    "medical": {
        "folder": "medical_sam3d",
        "build": build_organ,
        "targets": ("default",),
        "batch": {"real": 1, "demo": 2},
        "loader": organ_loader,
        "variants": ("full", "lora", "bf16", "ema"),
        "adapt": adapt_organ,
        "answer": decode,
        "convolution": compare_convolutions,
    },
}


class Copies:
    """As many samples as steps need, all the same one."""

    def __init__(self, sample: dict, length: int):
        self.sample, self.length = sample, length

    def __len__(self):
        return self.length

    def name(self, index: int) -> str:
        return f"sample {index}"

    def __getitem__(self, _):
        return self.sample


def stack(items: list[dict]) -> dict:
    import torch

    return {key: torch.stack([i[key] for i in items]) if key != "labels" else [dict(i[key]) for i in items] for key in items[0]}


def adapt_by_peft(model, config, heads):
    from peft import LoraConfig

    from common.peft_adapters import add_adapter
    from model import lora_targets

    names = lora_targets(model, config.lora_targets, config.lora_last_k)
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names)
    return add_adapter(model, lora, heads, frozen_dtype=config.frozen_dtype)


def train_one(bench, run, model, config, loader) -> None:
    """The loop of a train script with one model, with a tick before each step and after the last."""
    from common.bases import train_mode
    from common.optim import build_optimizer

    optimizer, scheduler = build_optimizer(model, config, run.total_steps(loader))
    model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)
    train_mode(model)
    for batch in run.batches(loader, 1):
        bench.tick()
        run.backward(bench.loss(model, batch))
        run.step_optimizer(optimizer, scheduler)
    bench.tick()


def answer_picture(model, batch):
    return model(batch["pixel_values"])


def write_adapter_of(model, folder: Path) -> None:
    """The adapter's files alone, of PEFT's layers or of ours."""
    from common.lora_files import save_adapter
    from common.peft_adapters import save_adapter_files

    (save_adapter_files if hasattr(model, "peft_config") else save_adapter)(model, folder)


def merged_copy(model):
    from common.lora import merge_lora

    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "peft_config") else merge_lora(model, inplace=False)
