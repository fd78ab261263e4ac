"""Trains the small base of the detection demo from scratch; called by make_demo_base.py.

An RT-DETR of half a million weights for 96 x 96 pictures of coloured circles, squares and triangles. Its decoder starts from
the encoder's own best guesses and is taught to denoise boxes, too, so it learns from scratch in minutes; a plain DETR of this
size stays for very long on a plateau where it predicts the same boxes for every picture.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base_training import reload, start, train, write_card
from common.config import BatchSize, Count, Rate, Seed

DETECTION = Path(__file__).resolve().parents[1] / "image_tasks" / "detection"


@dataclass
class DetectionConfig:
    output_dir: str = str(DETECTION / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, pictures and augmentation
    steps: Count = 1600  # optimizer steps
    batch_size: BatchSize = 16  # pictures a step
    lr: Rate = 1e-3  # constant for four tenths of the steps, then down by a cosine
    pictures: Count = 8000  # source pictures drawn for training, fewer where fewer are seen


def make_detection(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on pictures that nobody has seen."""
    from transformers import AutoModelForObjectDetection

    start(config)
    sys.path.insert(0, str(DETECTION))
    from synthetic import SOURCE_CLASSES

    started = time.time()
    model = detector_from_scratch(SOURCE_CLASSES).train()
    count = min(config.pictures, config.steps * config.batch_size)
    train_detector(model, config, *draw_source("train", count, config.seed))

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    detection_processor().save_pretrained(folder)
    seconds = time.time() - started
    held_out = draw_source("test", min(300, count), config.seed + 1)
    reloaded = reload(AutoModelForObjectDetection, folder)
    trained, loaded = (detection_map(m, *held_out) for m in (model, reloaded))
    assert all(abs(a - b) < 1e-6 for a, b in zip(trained, loaded, strict=True)), f"trained {trained}, reloaded {loaded}"
    facts = {"count": count, "held_out": len(held_out[0]), "map50": loaded[0], "map": loaded[1]}
    write_card(folder, DETECTION_CARD, model, config, seconds, **facts)
    print(f"{folder}: mAP50 {loaded[0]:.3f}, mAP {loaded[1]:.3f} on {len(held_out[0])} fresh source pictures, {seconds:.0f} s")


def train_detector(model, config, pictures, boxes, classes):
    """Trains on pictures uint8 (N, 3, 96, 96), boxes (N, 4, 4) as cx, cy, w, h in 0..1, and classes (N, 4), -1 for no shape."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4, fused=True)

    def loss_of(step, rows):
        if step == config.steps * 3 // 4:  # the last quarter runs with BatchNorm's statistics fixed, as all that follows will
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        pixels, boxes_b, classes_b = augment(pictures[rows], boxes[rows], classes[rows], generator)
        labels = [{"class_labels": c[c >= 0], "boxes": b[c >= 0]} for b, c in zip(boxes_b, classes_b, strict=True)]
        return model(pixel_values=pixels, labels=labels).loss

    train(model, optimizer, config, len(pictures), generator, loss_of)


DETECTION_CARD = """\
# Small RT-DETR, the base of the detection demo

An `RTDetrForObjectDetection` with {weights:,} weights for 96 x 96 pictures: a ResNet of three basic blocks, feature maps
of stride 8 and 16, two decoder layers of width 64, thirty queries. It knows `circle`, `square` and `triangle` on synthetic
pictures (saturated shapes on blotchy colour: domain "source" of `image_tasks/detection/synthetic.py`) and nothing else.
It is there to learn and to test with.

Made from scratch by `python scripts/make_demo_base.py detection`: {steps} steps in batches of {batch} from {count} pictures,
seed {seed}; {minutes:.0f} minutes on one CPU thread of a busy machine.

On {held_out} fresh pictures of the source domain: mAP50 {map50:.3f}, mAP50:95 {map:.3f}.
"""


def detector_from_scratch(names):
    """A small RTDetrForObjectDetection with random weights for these classes."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 64], depths=[1, 1, 1], layer_type="basic", out_features=["stage2", "stage3"]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[48, 64],
        feat_strides=[8, 16],
        encode_proj_layers=[1],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=64,
        num_queries=30,
        num_feature_levels=2,
        decoder_in_channels=[64, 64],
        decoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=10,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return RTDetrForObjectDetection(config).requires_grad_(True)


def detection_processor():
    """What turns a picture into `pixel_values`: 96 x 96, values from 0 to 1."""
    from transformers import RTDetrImageProcessor

    return RTDetrImageProcessor(size={"height": 96, "width": 96})


def draw_source(split, count, seed):
    """Draws source pictures. Returns pictures uint8 (N, 3, 96, 96), boxes (N, 4, 4) as cx, cy, w, h in 0..1, classes (N, 4).

    Rows without a shape have class -1. A picture depends on (seed, split, its number) alone.
    """
    import torch
    from tqdm import tqdm

    from synthetic import SCENE_SIZE, SOURCE_CLASSES, draw_scene, scene_rng

    pictures = torch.empty(count, 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8)
    boxes, classes = torch.zeros(count, 4, 4), torch.full((count, 4), -1)
    for number in tqdm(range(count), desc=f"drawing ({split})", mininterval=5):
        picture, shapes = draw_scene(scene_rng(seed, "source", split, number), "source")
        pictures[number] = torch.from_numpy(picture).permute(2, 0, 1)
        for row, (name, x, y, w, h) in enumerate(shapes):
            boxes[number, row] = torch.tensor([x + w / 2, y + h / 2, w, h]) / SCENE_SIZE
            classes[number, row] = SOURCE_CLASSES.index(name)
    return pictures, boxes, classes


def augment(pictures, boxes, classes, generator):
    """Random flips, colours, light and noise of a batch: features that see shapes, not the colours of one domain.

    pictures uint8 (B, 3, H, W), boxes (B, 4, 4) cx, cy, w, h in 0..1. Returns (pixel_values float (B, 3, H, W), boxes, classes).
    """
    import torch

    def uniform(low, high):
        return torch.rand(len(pictures), 1, 1, 1, generator=generator) * (high - low) + low

    pixels, boxes = pictures / 255, boxes.clone()
    flip = uniform(0, 1) < 0.5
    pixels = torch.where(flip, pixels.flip(3), pixels)
    boxes[..., 0] = torch.where(flip[:, 0, 0], 1 - boxes[..., 0], boxes[..., 0])
    channels = torch.rand(len(pixels), 3, generator=generator).argsort(dim=1)
    pixels = pixels.gather(1, channels[:, :, None, None].expand_as(pixels))
    # Without paler pictures the network finds shapes by their saturation alone, and sees nothing in a greyish domain.
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * uniform(0.4, 1)
    average = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = (pixels - average) * uniform(0.7, 1.3) + average + uniform(-0.15, 0.15)
    pixels = pixels + uniform(0, 0.03) * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(0, 1), boxes, classes


def detection_map(model, pictures, boxes, classes):
    """(mAP50, mAP50:95) by pycocotools of a DETR on pictures uint8 (N, 3, H, W), boxes cx, cy, w, h in 0..1."""
    import contextlib
    import io

    import torch
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    size, processor = pictures.shape[-1], detection_processor()
    truth = {
        "info": {},
        "images": [{"id": i} for i in range(len(pictures))],
        "annotations": [],
        "categories": [{"id": i} for i in model.config.id2label],
    }
    for i, k in (classes >= 0).nonzero().tolist():
        cx, cy, w, h = (boxes[i, k] * size).tolist()
        truth["annotations"].append(
            {
                "id": len(truth["annotations"]) + 1,
                "image_id": i,
                "category_id": classes[i, k].item(),
                "bbox": [cx - w / 2, cy - h / 2, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
        )
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), 50):
            out = model(pixel_values=pictures[start : start + 50] / 255)
            sizes = torch.full((len(out.logits), 2), size)
            results = processor.post_process_object_detection(out, threshold=0.0, target_sizes=sizes)
            for i, result in enumerate(results, start):
                for score, label, (x1, y1, x2, y2) in zip(
                    *(result[k].tolist() for k in ("scores", "labels", "boxes")), strict=True
                ):
                    box = [x1, y1, x2 - x1, y2 - y1]
                    found.append({"image_id": i, "category_id": label, "score": score, "bbox": box})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints tables
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])
