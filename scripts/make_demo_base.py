"""Makes the small base models that come with the tasks, from scratch, each on a synthetic source domain.

    python scripts/make_demo_base.py detection                             # writes image_tasks/detection/demo_base/
    python scripts/make_demo_base.py detection --steps 4 --output_dir /tmp/base      # a smoke run, seconds

You need this only to change a base: they are part of the project. A base is made in a fixed number of steps from a fixed seed,
so on one machine with one thread the same call gives the same weights.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli, parse  # noqa: E402

# Detection -----------------------------------------------------------------------------------------------------------------
#
# A DETR of 0.4 million weights for 96 x 96 pictures of coloured circles, squares and triangles. Trained plainly from scratch, a
# DETR of this size stays for very long on a plateau where it predicts the same boxes for every picture. Two helpers get it off,
# and neither is in the saved file:
#   1. warm-up of the backbone alone: a 1 x 1 convolution on its feature map says for each cell what shape covers it and where
#      that shape's sides are (what ImageNet weights do for a large DETR);
#   2. while DETR trains, a linear layer on the encoder's output tokens says class and *absolute* box of the shape that covers
#      the token. Position enters attention only through queries and keys, never through values; this makes the tokens carry
#      the box, so the decoder has something to read off.


@dataclass
class DetectionConfig:
    output_dir: str = str(ROOT / "image_tasks" / "detection" / "demo_base")  # folder to write
    seed: int = 0  # of weights, pictures and augmentation
    steps: int = 5000  # optimizer steps of DETR; the warm-up of its backbone takes a third of that before
    batch_size: int = 16  # pictures a step
    lr: float = 1e-3  # of the transformer; the backbone takes half of it
    pictures: int = 8000  # source pictures drawn for training, fewer where fewer are seen


def make_detection(config):
    import torch
    from torch import nn
    from tqdm import tqdm
    from transformers import AutoModelForObjectDetection

    if min(config.steps, config.batch_size, config.pictures) < 1:
        raise UserError("steps, batch_size and pictures must be at least 1")
    sys.path.insert(0, str(ROOT / "image_tasks" / "detection"))
    from synthetic import SOURCE_CLASSES

    torch.manual_seed(config.seed)
    torch.set_num_threads(1)     # sums come in one order, and on a busy machine two threads are slower than one
    started = time.time()
    model = detr_from_scratch(SOURCE_CLASSES)
    thaw_batch_norm(model)
    model.to(memory_format=torch.channels_last)          # narrow convolutions take half as long again without it
    warmup_steps = max(config.steps // 3, 1)
    count = min(config.pictures, (config.steps + warmup_steps) * config.batch_size)
    pictures, boxes, classes = draw_source("train", count, config.seed)
    generator = torch.Generator().manual_seed(config.seed)

    def batches(steps, name):
        order = torch.empty(0, dtype=torch.long)
        bar = tqdm(range(steps), desc=name, mininterval=5)
        for step in bar:
            while len(order) < config.batch_size:
                order = torch.cat([order, torch.randperm(count, generator=generator)])
            rows, order = order[:config.batch_size], order[config.batch_size:]
            x, boxes_b, classes_b = augment(pictures[rows], boxes[rows], classes[rows], generator)
            yield step, bar, (x.contiguous(memory_format=torch.channels_last), boxes_b, classes_b)

    def step_with(optimizer, scheduler, loss, parameters):
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    # 1. The backbone alone: 12 x 12 cells, each with class logits and the distances from the cell to the four sides of its shape.
    backbone = model.model.backbone.model
    cell_head = nn.Conv2d(64, model.config.num_labels + 1 + 4, 1)
    parameters = [*backbone.parameters(), *cell_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-4, fused=True)
    scheduler = warmup_cosine(optimizer, warmup_steps, warmup=50, constant=0)
    model.train()
    for step, bar, (x, boxes_b, classes_b) in batches(warmup_steps, "1/2 backbone"):
        out = cell_head(backbone(x).feature_maps[-1]).flatten(2).transpose(1, 2)      # (B, 144, classes + 1 + 4)
        cell_class, cell_box, centre = cell_targets(boxes_b, classes_b, model.config.num_labels)
        middle, half = cell_box[..., :2], cell_box[..., 2:] / 2
        sides = torch.cat([centre - (middle - half), middle + half - centre], dim=-1)     # left, top, right, bottom
        loss = dense_loss(out, cell_class, sides, model.config.num_labels)
        step_with(optimizer, scheduler, loss, parameters)
        if step % 50 == 0:
            right = (out[..., :-5].argmax(-1) == cell_class)[cell_class < model.config.num_labels].float().mean()
            bar.set_postfix(loss=f"{loss.item():.3f}", right_shape=f"{right.item():.2f}")

    # 2. DETR with its own loss, and the helper on the encoder's tokens. BatchNorm learns for three quarters of the way; the
    #    last quarter runs with its statistics frozen, as the saved model will.
    token_head = nn.Linear(64, model.config.num_labels + 1 + 4)
    slow = list(backbone.parameters())
    fast = [p for p in model.parameters() if all(p is not q for q in slow)] + list(token_head.parameters())
    groups = [{"params": fast, "lr": config.lr}, {"params": slow, "lr": config.lr / 2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
    scheduler = warmup_cosine(optimizer, config.steps, warmup=100, constant=0.4)
    for step, bar, (x, boxes_b, classes_b) in batches(config.steps, "2/2 detr"):
        if step == config.steps * 3 // 4:
            backbone.eval()
        labels = [{"class_labels": c[c >= 0], "boxes": b[c >= 0]} for b, c in zip(boxes_b, classes_b, strict=True)]
        out = model(pixel_values=x, labels=labels)
        tokens = token_head(out.encoder_last_hidden_state)
        tokens = torch.cat([tokens[..., :-4], tokens[..., -4:].sigmoid()], dim=-1)
        cell_class, cell_box, _ = cell_targets(boxes_b, classes_b, model.config.num_labels)
        loss = out.loss + dense_loss(tokens, cell_class, cell_box, model.config.num_labels)
        step_with(optimizer, scheduler, loss, fast + slow)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{out.loss.item():.3f}", loss_ce=f"{out.loss_dict['loss_ce'].item():.3f}")

    # 3. Into a plain model with frozen BatchNorm, to disk, back from there, and measured on pictures that nobody has seen.
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    plain = detr_from_scratch(SOURCE_CLASSES)
    plain.load_state_dict(weights)
    plain.eval(), model.eval()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder)
    detection_processor().save_pretrained(folder)
    seconds = time.time() - started
    held_out = draw_source("test", min(300, count), config.seed + 1)
    reloaded, report = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    trained, loaded = (detection_map(m, *held_out) for m in (model, reloaded.eval()))
    assert all(abs(a - b) < 1e-3 for a, b in zip(trained, loaded, strict=True)), f"trained {trained}, reloaded {loaded}"
    (folder / "README.md").write_text(DETECTION_CARD.format(
        weights=sum(p.numel() for p in plain.parameters()), steps=config.steps, warmup=warmup_steps, batch=config.batch_size,
        seed=config.seed, minutes=seconds / 60, count=count, held_out=len(held_out[0]), map50=loaded[0], map=loaded[1]))
    print(f"{folder}: mAP50 {loaded[0]:.3f}, mAP {loaded[1]:.3f} on {len(held_out[0])} fresh source pictures, {seconds:.0f} s")


DETECTION_CARD = """\
# Small DETR, the base of the detection demo

A `DetrForObjectDetection` with {weights:,} weights for 96 x 96 pictures: a ResNet of three basic blocks (stride 8,
144 tokens), two encoder and two decoder layers of width 64, ten queries. It knows `circle`, `square` and `triangle` on
synthetic pictures (saturated shapes on blotchy colour: domain "source" of `image_tasks/detection/synthetic.py`) and
nothing else. It is there to learn and to test with.

Made from scratch by `python scripts/make_demo_base.py detection`: {warmup} steps of the backbone alone, then {steps}
steps of DETR, in batches of {batch} from {count} pictures, seed {seed}; {minutes:.0f} minutes on one CPU thread.

On {held_out} fresh pictures of the source domain: mAP50 {map50:.3f}, mAP50:95 {map:.3f}.
"""


def detr_from_scratch(names):
    """A plain DetrForObjectDetection with random weights for these classes. Its BatchNorms are frozen, nothing else is."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="basic", out_features=["stage2"])
    model = DetrForObjectDetection(DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, d_model=64, num_queries=10, dropout=0.0,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256,
        decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=256,
        auxiliary_loss=True, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    ))
    model.requires_grad_(True)   # built from a config, the library freezes the whole backbone
    return model


def detection_processor():
    """What turns a picture into `pixel_values`: 96 x 96, ImageNet mean and standard deviation, no padding."""
    from transformers import DetrImageProcessor

    return DetrImageProcessor(size={"height": 96, "width": 96}, do_pad=False,
                              image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def thaw_batch_norm(model):
    """Puts trainable nn.BatchNorm2d where DETR has frozen ones. Both have the same four tensors, so weights fit either way."""
    from torch import nn

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "DetrFrozenBatchNorm2d":
                setattr(module, name, nn.BatchNorm2d(len(child.weight)))


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


def normalise(pictures):
    """uint8 (B, 3, H, W), or floats in 0..1, to what the model takes: the same numbers as detection_processor's."""
    import torch

    pixels = pictures / 255 if pictures.dtype == torch.uint8 else pictures
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


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
    pixels = grey + (pixels - grey) * uniform(0.1, 1)
    average = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = (pixels - average) * uniform(0.7, 1.3) + average + uniform(-0.15, 0.15)
    pixels = pixels + uniform(0, 0.03) * torch.randn(pixels.shape, generator=generator)
    return normalise(pixels.clamp(0, 1)), boxes, classes


def cell_targets(boxes, classes, num_classes, grid=12):
    """What the cells of the feature map should say, for boxes (B, n, 4) as cx, cy, w, h and classes (B, n), -1 for none.

    Returns class (B, 144), box (B, 144, 4) as cx, cy, w, h and the cells' centres (144, 2) as x, y, all in 0..1.
    A cell belongs to the smallest shape whose box holds the cell's centre; cells of no shape have class `num_classes`.
    """
    import torch

    ticks = (torch.arange(grid) + 0.5) / grid
    centre = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(-1, 2)          # x, y; row by row
    inside = ((centre[None, :, None] - boxes[:, None, :, :2]).abs() < boxes[:, None, :, 2:] / 2).all(-1)   # (B, 144, n)
    size = torch.where(inside & (classes >= 0)[:, None], boxes[..., 2:].prod(-1)[:, None], 2.0)
    area, owner = size.min(dim=-1)                                                                     # (B, 144)
    cell_class = classes.gather(1, owner).masked_fill(area > 1, num_classes)
    return cell_class, boxes.gather(1, owner[..., None].expand(-1, -1, 4)), centre


def dense_loss(out, cell_class, cell_box, num_classes):
    """Cross-entropy of every cell's class, and five times the L1 distance of the box numbers in cells with a shape.

    Most cells are ground. At equal weights the network learns where shapes are and then, for very long, not which: so ground
    counts a tenth, as "no object" does in DETR's own loss.
    """
    from torch.nn import functional as F

    weight = out.new_ones(num_classes + 1)
    weight[num_classes] = 0.1
    shape = cell_class < num_classes
    loss = F.cross_entropy(out[..., :-4].flatten(0, 1), cell_class.flatten(), weight)
    return loss + 5 * (out[..., -4:] - cell_box).abs()[shape].sum() / (4 * shape.sum().clamp(min=1))


def warmup_cosine(optimizer, steps, warmup, constant):
    """Linear rise over `warmup` steps, full rate up to the share `constant` of all steps, then a half cosine down to nought."""
    import math

    from torch.optim.lr_scheduler import LambdaLR

    def factor(step):
        done = max(step / steps - constant, 0) / (1 - constant)
        return min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * min(done, 1))) / 2

    return LambdaLR(optimizer, factor)


def detection_map(model, pictures, boxes, classes):
    """(mAP50, mAP50:95) by pycocotools of a DETR on pictures uint8 (N, 3, H, W), boxes cx, cy, w, h in 0..1."""
    import contextlib
    import io

    import torch
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    size = pictures.shape[-1]
    truth = {"info": {}, "images": [{"id": i} for i in range(len(pictures))], "annotations": [],
             "categories": [{"id": i} for i in model.config.id2label]}
    for i, k in (classes >= 0).nonzero().tolist():
        cx, cy, w, h = (boxes[i, k] * size).tolist()
        truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": i, "category_id": classes[i, k].item(),
                                     "bbox": [cx - w / 2, cy - h / 2, w, h], "area": w * h, "iscrowd": 0})
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), 50):
            out = model(pixel_values=normalise(pictures[start:start + 50]))
            score, label = out.logits.softmax(-1)[..., :-1].max(-1)
            for i, q in torch.cartesian_prod(torch.arange(score.shape[0]), torch.arange(score.shape[1])).tolist():
                cx, cy, w, h = (out.pred_boxes[i, q] * size).tolist()
                found.append({"image_id": start + i, "category_id": label[i, q].item(), "score": score[i, q].item(),
                              "bbox": [cx - w / 2, cy - h / 2, w, h]})
    with contextlib.redirect_stdout(io.StringIO()):      # pycocotools prints tables
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])


# Which task ----------------------------------------------------------------------------------------------------------------

TASKS = {"detection": (DetectionConfig, make_detection)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nTasks: {', '.join(TASKS)}. Their settings: python scripts/make_demo_base.py TASK --help")
        return
    if not argv or argv[0] not in TASKS:
        raise UserError(f"name a task first: {', '.join(TASKS)}")
    config, make = TASKS[argv[0]]
    make(parse(config, argv[1:]))


if __name__ == "__main__":
    cli(main)
