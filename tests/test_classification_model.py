"""Seven classifier architectures, tiny and random: heads, adapters, preprocessing, saving and loading do what they promise."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSIFICATION, use_task

TASK = CLASSIFICATION
use_task(TASK)

from common.bases import save_adapter, save_model, train_mode  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import train_whole  # noqa: E402
from data import Preprocess  # noqa: E402
from model import class_layers, load_adapter, load_base, load_model, lora_targets, origin, with_classes  # noqa: E402

CLASSES = ["cat", "dog", "fish"]
KINDS = ["vit", "deit", "swin", "dinov2", "convnext", "mobilevit", "timm"]
FACTS = SimpleNamespace(batch_size=4, data_dir="", seed=0)


def save_base(folder, kind="vit", classes=CLASSES, seed=0):
    """Writes a random base of some 10,000 parameters for 32 x 32 pictures, with its image processor, as one would find it on a hub."""
    import transformers as hf

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 32, "patch_size": 8, **names}
    size, crop = {"height": 32, "width": 32}, {"crop_size": {"height": 32, "width": 32}}
    torch.manual_seed(seed)
    if kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(**vit))
        processor = hf.ViTImageProcessor(size=size)
    elif kind == "deit":
        model = hf.DeiTForImageClassification(hf.DeiTConfig(**vit))
        processor = hf.DeiTImageProcessor(size={"height": 37, "width": 37}, **crop)
    elif kind == "swin":
        small = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        model = hf.SwinForImageClassification(hf.SwinConfig(**small, **names))
        processor = hf.ViTImageProcessor(size=size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    elif kind == "dinov2":
        model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**vit))
        processor = hf.BitImageProcessor(size={"shortest_edge": 36}, **crop)
    elif kind == "convnext":
        model = hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **names))
        processor = hf.ConvNextImageProcessor(size={"shortest_edge": 32})
    elif kind == "mobilevit":
        small = {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 8, 8, 12, 16, 16]}
        small |= {"num_attention_heads": 2, "last_layer_dropout": 0.0, "classifier_dropout_prob": 0.0}
        model = hf.MobileViTForImageClassification(hf.MobileViTConfig(**small, **names))
        processor = hf.MobileViTImageProcessor(size={"shortest_edge": 36}, **crop)
        for name, tensor in model.named_buffers():  # statistics as a trained BatchNorm has them, not 0 and 1
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    elif kind == "timm":
        facts = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
        facts |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "first_conv": "patch_embed.proj", "classifier": "head"}
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        config = hf.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", pretrained_cfg=facts, model_args=shape, do_pooling=True, **names
        )
        model = hf.TimmWrapperForImageClassification(config)
        processor = None
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)  # as of a trained net: outputs that differ from picture to picture
    model.eval().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
