"""Pictures with one class each: reading folders and CSV files, checking, a cache in memory, augmentation, batches."""

import csv
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.batches import EpochBatches, EvalBatches, build_loader, seeded
from common.config import UserError
from common.runtime import process_index, say
from common.sample_cache import SampleCache, cache_limit, first_readable
from common.samples import SPLIT_NAMES, Faults, split_off
from common.scan import check_files
from common.vision.pictures import decode, header_size, is_picture, picture_reader, pictures_below
from common.vision.preprocess import ClassifierPreprocess

COLUMNS = {
    "path": ("path", "file", "file_name", "filename", "image"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
}


@dataclass
class Sample:
    path: Path
    name: str  # the path inside the data folder: the same wherever the folder lies
    label: int


# ---- what users bring: an ImageFolder tree, one tree of class folders, or a CSV ------------------------------------------


def read_dataset(source: Path, seed: int, faults: Faults):
    """(splits, classes, layout): splits maps train, val and perhaps test to lists of Sample; classes are sorted names.

    Without a val split about a fifth of every class becomes it: a hash of (seed, file name) decides for each picture alone.
    UserError where there is nothing to learn, or another split has a class that train has not.
    """
    root = source
    if source.suffix.lower() == ".csv" and source.is_file():
        root = source.parent
        rows, layout = read_csv(source, root, faults), "csv"
    elif not source.is_dir():
        raise UserError(f"--data_dir: there is no folder (or CSV file) {source}")
    else:
        rows, layout = read_folder(source, faults)
    names = sorted({label for name, (_, label) in rows if name == "train"})
    if len(names) < 2:
        found = f"only the class {names[0]}" if names else "no training pictures"
        raise UserError(
            f"{source} holds {found}; expected train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg, or a CSV file with "
            f"the columns path and label"
        )
    splits, start, number_of = {}, f"{root.as_posix()}/", {name: number for number, name in enumerate(names)}
    for split, (path, label) in rows:
        if label not in number_of:
            raise UserError(f"{source}: the {split} split has the class {label!r}, which the training data has not")
        name = path.as_posix().removeprefix(start)
        splits.setdefault(split, []).append(Sample(path, name, number_of[label]))
    if "val" not in splits:
        splits["train"], splits["val"] = split_classes(splits["train"], names, seed)
        many = len(splits["val"]), len(splits["val"]) + len(splits["train"])
        say(f"no validation split in {source}: {many[0]} of {many[1]} pictures, of every class a fifth by seed {seed}, become it")
    return splits, names, layout


def read_folder(folder: Path, faults: Faults):
    """([(split, (path, class name))], layout) of a folder: train/<class>/, <class>/, or a CSV file in it."""
    tree = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None) for split, names in SPLIT_NAMES.items()
    }
    if tree["train"]:
        found = [(split, pair) for split, place in tree.items() if place for pair in class_folders(place, faults)]
        return found, "folders"
    tables = {
        split: next((folder / f"{n}.csv" for n in names if (folder / f"{n}.csv").is_file()), None)
        for split, names in SPLIT_NAMES.items()
    }
    if tables["train"]:
        found = [(split, pair) for split, table in tables.items() if table for _, pair in read_csv(table, folder, faults)]
        return found, "csv"
    single = sorted(folder.glob("*.csv"))
    if len(single) == 1:
        return read_csv(single[0], folder, faults), "csv"
    if single:
        raise UserError(f"--data_dir {folder} holds {len(single)} CSV files; name the one to read")
    if tree["val"] or tree["test"]:  # else these would be taken for classes
        there = " and ".join(f"{place.name}/" for place in tree.values() if place)
        raise UserError(f"--data_dir {folder} holds {there}, but no train/")
    return [("train", pair) for pair in class_folders(folder, faults)], "one folder"


def class_folders(folder: Path, faults: Faults) -> list[tuple[Path, str]]:
    """(picture, class name) of every picture in folder/<class>/, at any depth. Hidden folders are no classes."""
    found = []
    for loose in sorted(p for p in folder.iterdir() if is_picture(p.name) and p.is_file()):
        faults.add("picture outside the class folders", f"{folder.name}/{loose.name}")
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        pictures = pictures_below(place, faults)
        if not pictures:
            faults.add("class folder without pictures", f"{folder.name}/{place.name}")
        found += [(path, place.name) for path in pictures]
    return found


def read_csv(file: Path, folder: Path, faults: Faults) -> list[tuple[str, tuple[Path, str]]]:
    """[(split, (path, class name))] of a CSV file with a header line; split is train where there is no such column.

    Relative paths start at the CSV's folder.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            lines = list(csv.reader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no CSV file that can be read: {error}") from None
    head = [cell.strip().lower() for cell in lines[0]] if lines else []
    column = {key: next((head.index(name) for name in names if name in head), None) for key, names in COLUMNS.items()}
    if column["path"] is None or column["label"] is None:
        raise UserError(
            f"{file}: its first line must name the columns path and label (and perhaps split); it is {','.join(head)[:80]!r}"
        )
    found, split_of = [], {name: split for split, names in SPLIT_NAMES.items() for name in names}
    for number, cells in enumerate(lines[1:], 2):
        if not any(cells):
            continue
        values = {key: cells[i].strip() if i is not None and i < len(cells) else "" for key, i in column.items()}
        split = split_of.get(values["split"].lower()) if column["split"] is not None else "train"
        path = folder / values["path"]
        if not values["path"] or not values["label"]:
            faults.add("CSV line without a path or a label", f"{file.name} line {number}")
        elif split is None:
            faults.add("CSV line of a split that is none of train, val, test", f"{file.name} line {number}")
        elif not os.path.isfile(path):  # no exception, either, for a name that no file could have
            faults.add("picture that is not there", values["path"][:80])
        else:
            found.append((split, (path, values["label"])))
    return found


def split_classes(samples: list[Sample], classes: list[str], seed: int):
    """(train, validation): of every class about a fifth is split off, at least one picture."""
    train, val, members = [], [], [[] for _ in classes]
    for sample in samples:
        members[sample.label].append(sample)
    for name, mine in zip(classes, members, strict=True):
        if len({s.name for s in mine}) < 2:
            raise UserError(f"the class {name!r} has one picture: too few to train and to validate on")
        for sample, chosen in zip(mine, split_off([s.name for s in mine], seed), strict=True):
            (val if chosen else train).append(sample)
    return train, val


# ---- what a model gets -------------------------------------------------------------------------------------------------


class LabelledPictures(torch.utils.data.Dataset):
    """Item (epoch, index) -> {"pixels": (3, h, w) float, "target": (K,) share of each class, "index": index}.

    With an augmentation, the item is a function of (seed, epoch, index): workers, resumed runs and the other script of the
    pair see the same pixels. Where a training picture turns out to be bad, another one takes its place.
    """

    def __init__(self, samples, classes, preprocess, cache: SampleCache, augmentation=None, mixup=0.0, seed=0):
        self.samples, self.classes, self.preprocess, self.cache, self.seed = samples, classes, preprocess, cache, seed
        self.augmentation, self.mixup = augmentation, mixup

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return str(self.samples[index].path)

    def new_faults(self) -> list[tuple[str, str]]:
        return self.cache.new_faults()

    def resized(self, index: int, *key) -> tuple[torch.Tensor, int]:
        """(picture, class) of a sample, or of what takes its place; key: see first_readable."""
        chosen, pixels = first_readable(self, self.cache.__getitem__, index, *key)
        return torch.from_numpy(pixels), self.samples[chosen].label

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        """The items of a batch: a DataLoader asks for them at once, so that what is new can be decoded on all cores."""
        self.cache.fill(index for _, index in keys)
        return [self[key] for key in keys]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        target = torch.zeros(len(self.classes))
        pixels, label = self.resized(index, self.seed, epoch)
        if not self.augmentation:
            target[label] = 1
            return {"pixels": self.preprocess.normalize(self.preprocess.center(pixels)), "target": target, "index": index}
        with seeded(self.seed, epoch, index):
            pixels = self.preprocess.normalize(self.augmentation(pixels))
            share = 1.0
            if self.mixup > 0:  # the other picture is drawn from the whole data set, not from the batch: see the class' promise
                share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
                other, its_label = self.resized(int(torch.randint(len(self), ())), self.seed, epoch, index, "mixup")
                pixels = share * pixels + (1 - share) * self.preprocess.normalize(self.augmentation(other))
                target[its_label] += 1 - share
            target[label] += share
        return {"pixels": pixels, "target": target, "index": index}


def make_augmentation(config, preprocess: ClassifierPreprocess):
    """uint8 (3, H, W) -> uint8 in the shape that the model sees: random crop, flip, RandAugment, as the settings say."""
    from torchvision.transforms import v2

    steps = [preprocess.center]
    if config.crop < 1:
        steps = [v2.RandomResizedCrop(preprocess.shape, scale=(config.crop, 1.0), interpolation=preprocess.mode, antialias=True)]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=config.randaugment))
    return v2.Compose(steps)


def collate(items: list[dict]) -> dict:
    """Items -> pixel_values (B, 3, H, W), target (B, K), index (B,)."""
    return {
        "pixel_values": torch.stack([item["pixels"] for item in items]),
        "target": torch.stack([item["target"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
    }


def load_pictures(
    samples: list[Sample], preprocess: ClassifierPreprocess, faults: Faults, cache_bytes: int, text: str, whole=True
):
    """(usable samples, cache of their resized pictures): see check_files. UserError where no picture is left."""

    def measure(_, header):
        width, height = header_size(header, None)
        return (3, *preprocess.resized_shape(height, width))

    load = partial(load_resized, preprocess)
    good, cache = check_files(samples, picture_reader(), measure, load, faults, cache_bytes, f"{text} pictures", whole)
    if not good:
        raise UserError(f"the {text} data has no picture that can be used")
    return [samples[number] for number in good], cache


def load_resized(preprocess: ClassifierPreprocess, sample: Sample) -> np.ndarray:
    """The sample's picture as the cache keeps it, (3, h, w) uint8."""
    return preprocess.resize(decode(sample.path)).numpy()


def read_labelled(source: Path, seed: int):
    """(splits, classes, layout, faults) of the pictures in `source`, a folder or CSV file. Opens no picture."""
    with Faults() as faults:
        return *read_dataset(source, seed, faults), faults


def labelled_loaders(config, processor, tables):
    """(train loader, validation loader, class names, facts for the summary); tables: what read_labelled gave.

    With --cache off no training picture is decoded before it is used. Validation pictures always are: what is scored stays.
    """
    rank, world = process_index()
    splits, classes, layout, faults = tables
    preprocess, limit = ClassifierPreprocess(processor), cache_limit(config.cache)
    with faults:
        whole = config.cache != "off"
        train, train_cache = load_pictures(splits["train"], preprocess, faults, limit, "training", whole)
        val, val_cache = load_pictures(splits["val"], preprocess, faults, limit - train_cache.bytes, "validation")
        counts = Counter(classes[s.label] for s in train)
        if missing := [name for name in classes if not counts[name]]:
            raise UserError(f"no training picture of the class {missing[0]!r} can be used")
    facts = {
        "name": config.data_dir or "demo",
        "format": layout,
        "sha256": data_sha256(train, val, classes),
        "train": len(train),
        "val": len(val),
        "left_out": faults.counts(),
    }
    if rank == 0:
        faults.report()
        say(f"data: {facts['name']} ({layout}), {len(train)} training and {len(val)} validation pictures")
        say("training pictures of each class: " + ", ".join(f"{name} {counts[name]}" for name in classes))
        if max(counts.values()) > 3 * min(counts.values()) and config.class_weights == "none":
            say("note: the classes are of very different size; --class_weights balanced makes each count the same")
    augmentation = make_augmentation(config, preprocess)
    train_data = LabelledPictures(train, classes, preprocess, train_cache, augmentation, config.mixup, config.seed)
    batches = EpochBatches(len(train), config.batch_size, config.seed, rank, world)
    train_loader = build_loader(train_data, batches, collate, config.num_workers)
    val_data = LabelledPictures(val, classes, preprocess, val_cache)
    return train_loader, eval_loader(val_data, config.batch_size, config.num_workers), classes, facts


def class_weights(kind: str, dataset: LabelledPictures, device):
    """(K,) weights of the loss: None, or the inverse of each class' share, such that their mean over samples is 1."""
    if kind == "none":
        return None
    counts = torch.bincount(torch.tensor([s.label for s in dataset.samples]), minlength=len(dataset.classes))
    return (len(dataset) / (len(dataset.classes) * counts)).to(device)


def labelled_for_eval(config, processor, origin: dict, source: Path):
    """(loader, classes, name of the data) for eval, of the pictures in `source`.

    The checkpoint's classes count. UserError where the data's are others; with config.subset the data may lack some.
    """
    data_dir = config.data_dir or origin["data_dir"]
    splits, names, _, faults = read_labelled(source, origin["seed"])
    classes = origin["classes"]
    strange, missing = ([n for n in a if n not in b] for a, b in ((names, classes), (classes, names)))
    if strange or (missing and not config.subset):
        only = " and ".join(
            f"{who} has {', '.join(some[:8])}{' ...' if len(some) > 8 else ''}"
            for who, some in (("only the data", strange), ("only the checkpoint", missing))
            if some
        )
        hint = "" if strange else "; --subset scores data that lacks some classes"
        raise UserError(f"{data_dir or 'the demo data'} has other classes than the checkpoint: {only}{hint}")
    if config.split not in splits:
        raise UserError(f"{data_dir or 'the demo data'} has no {config.split} split; it has {', '.join(splits)}")
    for sample in splits[config.split]:
        sample.label = classes.index(names[sample.label])
    preprocess = ClassifierPreprocess(processor)
    with faults:
        samples, cache = load_pictures(splits[config.split], preprocess, faults, cache_limit("auto"), config.split)
    faults.report()
    dataset = LabelledPictures(samples, classes, preprocess, cache)
    return eval_loader(dataset, config.batch_size or origin["batch_size"], config.num_workers), classes, data_dir or "demo"


def eval_loader(dataset: LabelledPictures, batch_size: int, num_workers: int = 0):
    return build_loader(dataset, EvalBatches([0] * len(dataset), batch_size, *process_index()), collate, num_workers)


def data_sha256(train: list[Sample], val: list[Sample], classes: list[str]) -> str:
    """A hash of what was learnt from and scored on: names, bytes on disk and labels, split by split."""
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, val):
        for s in split:
            digest.update(f"{s.name} {s.path.stat().st_size} {s.label}|".encode())
        digest.update(b"||")
    return digest.hexdigest()
