"""Pictures and boxes for a detector: decoding, checking, a cache in memory, augmentation, batches."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

from boxes import Sample, make_sample
from common.batches import EpochBatches, build_loader, eval_loader, seeded

# needs: torchvision
from common.config import UserError
from common.exclude import exclude_for_eval, exclude_from
from common.folders import make_once
from common.runtime import counted, process_index, say
from common.sample_cache import CachedSamples, SampleCache, cache_limit, first_readable
from common.samples import Faults, chosen_split
from common.scan import check_files
from common.vision.pictures import decode, header_size, picture_reader
from common.vision.preprocess import mean_and_std
from formats import read_dataset

HERE = Path(__file__).resolve().parent
NO_AREA = "box without area inside its picture"
BEYOND = "part of a box that lay outside its picture"
BOX_FORMATS = "x, y, width, height (COCO) or corners (VOC) in pixels, or middle, width and height in fractions (YOLO)"
SLIVER = 3  # pixels: where the crop leaves less of an object, there is nothing to see


def demo_data() -> Path:
    """The folder of the synthetic target data, drawn at the first call (about three seconds)."""
    from synthetic import make_demo_data

    return make_once(HERE / "data" / "demo", make_demo_data)


class Preprocess:
    """How a base wants its pictures: size, mean and standard deviation, read from its image processor."""

    def __init__(self, processor, image_size: int = 0):
        self.size = {"height": image_size, "width": image_size} if image_size else dict(processor.size)
        self.mean, self.std = mean_and_std(processor)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture as the model sees it: fixed, or by shortest and longest edge, keeping the ratio."""
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        short, long = self.size["shortest_edge"], self.size.get("longest_edge") or 10**9
        exact = min(short, long * min(height, width) / max(height, width))
        short = max(1, round(exact))  # rounded here, cut off for the longer side: to the pixel what the library does
        if min(height, width) == short:
            return height, width
        return (int(exact * height / width), short) if width < height else (short, int(exact * width / height))

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> (3, h, w) uint8, bilinear with antialiasing, as the base's own processor does."""
        from torchvision.transforms.v2 import functional

        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        return functional.resize(tensor, list(self.target_size(*pixels.shape[:2])), antialias=True)

    def normalize(self, tensor: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> float32 with the base's mean and standard deviation."""
        return (tensor.float() / 255 - self.mean) / self.std


class DetectionData(CachedSamples):
    """Item (epoch, index) -> {"pixels": (3, h, w) float, "target": dict of what transformers calls a label}.

    With augment, the item is a function of (seed, epoch, index): workers and resumed runs see the same pixels. Where a
    training picture turns out to be bad, another one takes its place.
    """

    def __init__(self, samples: list[Sample], preprocess: Preprocess, cache: SampleCache, augment=False, seed=0):
        self.samples, self.preprocess, self.cache, self.seed = samples, preprocess, cache, seed
        self.augment = make_augmentation() if augment else None

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return str(self.samples[index].path)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture as the model sees it."""
        return [self.preprocess.target_size(height, width) for width, height in (sample.size for sample in self.samples)]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        from torchvision import tv_tensors

        epoch, index = key
        chosen, pixels = first_readable(self, self.cache.__getitem__, index, self.seed, epoch)
        sample, pixels = self.samples[chosen], torch.from_numpy(pixels)
        width, height = sample.size
        h, w = pixels.shape[1:]
        keep = ~sample.crowd  # a crowd box is a region, not an object: it is scored around, never trained on
        scale = torch.tensor([w / width, h / height, w / width, h / height])
        boxes = torch.from_numpy(sample.boxes[keep]).float() * scale
        labels = torch.from_numpy(sample.labels[keep])
        if self.augment:
            with seeded(self.seed, epoch, index):
                framed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w))
                item = self.augment({"image": tv_tensors.Image(pixels), "boxes": framed})
            pixels, moved = (item[key].as_subclass(torch.Tensor) for key in ("image", "boxes"))
            before, after = (b[:, 2:] - b[:, :2] for b in (boxes, moved))
            least = before.clamp(max=SLIVER)  # what was smaller before stays as long as it is whole
            seen = ((after > 0) & (after >= least)).all(dim=1)
            boxes, labels = moved[seen], labels[seen]
        x1, y1, x2, y2 = (boxes / torch.tensor([w, h, w, h])).clamp(0, 1).unbind(1)
        target = {
            "class_labels": labels,
            "boxes": torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1),  # cxcywh, fractions
            "orig_size": torch.tensor([height, width]),
            "image_id": torch.tensor([index]),
        }
        return {"pixels": self.preprocess.normalize(pixels), "target": target}


def make_augmentation():
    """Flip, crop to between 40 % and all of the picture, colour. Keys: image, boxes, which follow and keep their order."""
    from torchvision.transforms import v2

    class CropAndScaleBack(v2.Transform):
        """A random part of the picture, at the picture's own size again."""

        def forward(self, item):
            h, w = item["image"].shape[-2:]
            return v2.RandomResizedCrop((h, w), scale=(0.4, 1.0), ratio=(0.75 * w / h, 1.33 * w / h))(item)

    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([CropAndScaleBack()], p=0.5),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
            v2.ClampBoundingBoxes(),
        ]
    )


def collate(items: list[dict]) -> dict:
    """Items -> what a DETR-family model takes: pixel_values (B, 3, H, W), pixel_mask (B, H, W), labels (list of dict).

    Smaller pictures are padded at the right and below, with 0 in the mask; box fractions are of the unpadded picture.
    """
    height, width = (max(item["pixels"].shape[side] for item in items) for side in (1, 2))
    values = torch.zeros(len(items), 3, height, width)
    mask = torch.zeros(len(items), height, width, dtype=torch.long)
    for i, item in enumerate(items):
        h, w = item["pixels"].shape[1:]
        values[i, :, :h, :w] = item["pixels"]
        mask[i, :h, :w] = 1
    return {"pixel_values": values, "pixel_mask": mask, "labels": [item["target"] for item in items]}


def check_samples(samples: list[Sample], preprocess: Preprocess, faults: Faults, cache_bytes: int, text: str, whole=True):
    """(samples that are usable, cache of their resized pictures, number of tiny objects): see check_files.

    Boxes are clipped to the picture; those without area, or not finite, are dropped. Tiny: a side below SLIVER pixels as the
    model sees the picture.
    """

    def measure(sample: Sample, header):
        sample.size = width, height = header_size(header, sample.size)
        return (3, *preprocess.target_size(height, width))

    load, text = partial(load_resized, preprocess), f"{text} pictures"
    good, cache = check_files(samples, picture_reader(), measure, load, faults, cache_bytes, text, whole)
    samples = [samples[number] for number in good]
    tiny = 0
    for sample in samples:
        clean_boxes(sample, *sample.size, faults)
        (width, height), (h, w) = sample.size, preprocess.target_size(*sample.size[::-1])
        sides = (sample.boxes[:, 2:] - sample.boxes[:, :2]) * [w / width, h / height]
        tiny += int((sides < SLIVER).any(axis=1).sum())
    return samples, cache, tiny


def load_resized(preprocess: Preprocess, sample: Sample) -> np.ndarray:
    """The sample's picture as the cache keeps it, (3, h, w) uint8."""
    return preprocess.resize(decode(sample.path, sample.size)).numpy()


def clean_boxes(sample: Sample, width: int, height: int, faults: Faults) -> None:
    """Puts the sample's boxes inside its picture, in place, each once."""
    if sample.relative:
        sample.boxes, sample.relative = sample.boxes * [width, height, width, height], False
    sample.size = (width, height)
    clipped = sample.boxes.clip(0, [width, height, width, height])
    sides = clipped[:, 2:] - clipped[:, :2]
    bad = ~np.isfinite(sample.boxes).all(axis=1) | (np.nan_to_num(sides) <= 0).any(axis=1)
    moved = ~bad & (np.abs(clipped - sample.boxes) > 1).any(axis=1)
    _, first = np.unique(np.column_stack([clipped, sample.labels, sample.crowd]), axis=0, return_index=True)
    twice = ~bad & ~np.isin(np.arange(len(bad)), first)
    for fault, which in ((NO_AREA, bad), ("box that is given twice", twice)):
        for i in np.flatnonzero(which):
            faults.add(fault, f"{sample.path.name} box {i + 1}")
    for _ in np.flatnonzero(moved & ~twice):
        faults.add(BEYOND, sample.path.name)
    keep = ~bad & ~twice
    sample.area = np.where(np.isnan(sample.area) | moved, sides.prod(axis=1), sample.area)[keep]
    sample.boxes, sample.labels, sample.crowd = clipped[keep], sample.labels[keep], sample.crowd[keep]


def read_tables(data_dir: str, data_format: str, seed: int, to_train: bool = True, exclude: str = ""):
    """(splits, classes, format, faults) of a folder, or of the demo data where data_dir is empty. Opens no picture.

    exclude: a list of pictures to leave out.
    """
    folder = Path(data_dir).expanduser() if data_dir else demo_data()
    with Faults() as faults:
        splits, classes, data_format = read_dataset(folder, data_format, seed, faults, to_train)
        return exclude_from(splits, exclude, folder, faults), classes, data_format, faults


def build_loaders(config, processor, tables):
    """(train loader, validation loader, class names, facts for the summary); tables: what read_tables gave.

    With --cache off no training picture is decoded before it is used. Validation pictures always are: what is scored stays.
    """
    rank, world = process_index()
    splits, classes, data_format, faults = tables
    preprocess, limit = Preprocess(processor, config.image_size), cache_limit(config.cache)
    with faults:
        training = usable("train", splits["train"], preprocess, faults, limit, whole=config.cache != "off")
        train = DetectionData(*training, config.augment, config.seed)
        if all(sample.crowd.all() for sample in train.samples):
            raise UserError(f"{config.data_dir or 'demo'} ({data_format}): none of the {len(train)} training pictures has a box")
        val = DetectionData(*usable("val", splits["val"], preprocess, faults, limit - train.cache.bytes))
    facts = {
        "name": config.data_dir or "demo",
        "format": data_format,
        "sha256": data_sha256(train.samples, val.samples, classes),
        "train": len(train),
        "val": len(val),
        "most_boxes": max(len(s.boxes) for s in train.samples + val.samples),
        "left_out": faults.counts(),
    }
    if rank == 0:
        faults.report()
        counts = np.bincount(np.concatenate([s.labels for s in train.samples]), minlength=len(classes))
        boxes = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
            many = f"{len(missing)} of {len(classes)} classes"
            say(f"no training picture has a box of {', '.join(missing[:5])} ({many}): no such object will be found")
        many = f"{len(train)} training and {counted(len(val), 'validation picture')}"
        say(f"data: {facts['name']} ({data_format}), {many}; boxes: {boxes}")
        say(f"{train.cache.kept + val.cache.kept} of {len(train) + len(val)} decoded pictures stay in memory")
    batches = EpochBatches(len(train), config.batch_size, config.seed, rank, world)
    train_loader = build_loader(train, batches, collate, config.num_workers)
    val_loader = eval_loader(val, collate, config.batch_size, config.num_workers, val.shapes)
    return train_loader, val_loader, classes, facts


def usable(split: str, samples: list[Sample], preprocess: Preprocess, faults: Faults, limit: int, whole=True):
    """(samples, preprocess, cache) for DetectionData; UserError where no picture is left."""
    known = faults.counts()
    samples, cache, tiny = check_samples(samples, preprocess, faults, limit, split, whole)
    outside, beyond = (faults.counts().get(fault, 0) - known.get(fault, 0) for fault in (NO_AREA, BEYOND))
    every = sum(len(s.boxes) for s in samples) + outside
    if outside > max(9, every / 2):
        raise UserError(f"{outside} of {every} {split} boxes have no area inside their pictures; expected {BOX_FORMATS}")
    if outside + beyond > max(2, every / 5):
        say(f"{outside + beyond} of {every} {split} boxes reach beyond their pictures: are they {BOX_FORMATS}?")
    if not samples:
        where = "--input" if split == "input" else f"the {split} split"
        raise UserError(f"{where} has no picture that can be used{faults.reason()}")
    if tiny:
        size = " x ".join(str(side) for side in preprocess.size.values())
        say(
            f"{tiny} of {every - outside} {split} objects are less than {SLIVER} pixels wide or high as the model sees them "
            f"({size}): --image_size makes them larger"
        )
    return samples, preprocess, cache


def load_for_eval(config, processor, origin: dict):
    """(loader, classes, name of the data) for eval: config.data_dir, or the data that the checkpoint was trained on.

    The checkpoint's classes count; the data's labels are matched to them by name. UserError where the data has others.
    """
    chosen = {"data_dir": config.data_dir, "data_format": config.data_format} if config.data_dir else origin
    data_dir = chosen["data_dir"]
    exclude = exclude_for_eval(config, origin)
    splits, classes, _, faults = read_tables(data_dir, chosen["data_format"], origin["seed"], to_train=False, exclude=exclude)
    samples = chosen_split(splits, config.split, data_dir or "the demo data")
    strange = [name for name in classes if name not in origin["classes"]]
    if strange:
        raise UserError(
            f"{data_dir} has classes that the checkpoint does not know: {', '.join(strange[:5])}; "
            f"it knows {', '.join(origin['classes'])}"
        )
    index = np.array([origin["classes"].index(name) for name in classes])
    for sample in samples:
        sample.labels = index[sample.labels]
    preprocess = Preprocess(processor, origin["image_size"])
    with faults:
        dataset = DetectionData(*usable(config.split, samples, preprocess, faults, cache_limit("auto")))
    faults.report()
    loader = eval_loader(dataset, collate, config.batch_size or origin["batch_size"], config.num_workers, dataset.shapes)
    return loader, origin["classes"], data_dir or "demo"


def pictures_only(paths: list[Path], preprocess: Preprocess, faults: Faults):
    """The pictures as a data set without boxes; those that cannot be decoded are left out and named."""
    with faults:
        return DetectionData(*usable("input", [make_sample(p, None, []) for p in paths], preprocess, faults, cache_limit("auto")))


def data_sha256(train: list[Sample], val: list[Sample], classes: list[str]) -> str:
    """A hash of what was learnt from and scored on: names, sizes, boxes and labels, split by split."""
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, val):
        for s in split:
            digest.update(f"{s.path.name} {s.size}".encode())
            digest.update(np.ascontiguousarray(s.boxes.round(2)))
            digest.update(np.ascontiguousarray(s.labels))
        digest.update(b"|")
    return digest.hexdigest()
