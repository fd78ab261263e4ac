"""Pictures with one class each, as data: checking, a cache in memory, augmentation, batches."""

import hashlib
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.batches import EpochBatches, build_loader, eval_loader, seeded
from common.config import UserError
from common.exclude import exclude_for_eval, exclude_from
from common.runtime import counted, process_index, say
from common.sample_cache import CachedSamples, SampleCache, cache_limit, first_readable
from common.samples import Faults, attempt, chosen_split
from common.scan import check_files, in_parts
from common.vision.labelled_files import Sample, read_dataset
from common.vision.pictures import decode, header_size, picture_reader
from common.vision.preprocess import ClassifierPreprocess

# ---- what a model gets -------------------------------------------------------------------------------------------------


class LabelledPictures(CachedSamples):
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

    def resized(self, index: int, *key) -> tuple[torch.Tensor, int]:
        """(picture, class) of a sample, or of what takes its place; key: see first_readable."""
        chosen, pixels = first_readable(self, self.cache.__getitem__, index, *key)
        return torch.from_numpy(pixels), self.samples[chosen].label

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
        raise UserError(f"the {text} data has no picture that can be used{faults.reason()}")
    return [samples[number] for number in good], cache


def load_resized(preprocess: ClassifierPreprocess, sample: Sample) -> np.ndarray:
    """The sample's picture as the cache keeps it, (3, h, w) uint8."""
    return preprocess.resize(decode(sample.path)).numpy()


def read_labelled(source: Path, seed: int, scored: bool = False, exclude: str = ""):
    """(splits, classes, layout, faults) of the pictures in `source`, a folder or CSV file: see read_dataset.

    exclude: a list of pictures to leave out.
    """
    with Faults() as faults:
        splits, classes, layout = read_dataset(source, seed, faults, scored)
        return exclude_from(splits, exclude, source, faults), classes, layout, faults


def labelled_loaders(config, processor, tables):
    """(train loader, validation loader, class names, facts for the summary); tables: what read_labelled gave.

    With --cache off one good training picture of each class is looked for; the others are decoded when they are used.
    Validation pictures always are: what is scored stays.
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
        for name in [] if whole else classes_without_pictures(train, classes, preprocess):
            faults.note("class of which no training picture can be decoded, so that it will not be learnt", name)
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
        say(f"data: {facts['name']} ({layout}), {len(train)} training and {counted(len(val), 'validation picture')}")
        say("training pictures of each class: " + ", ".join(f"{name} {counts[name]}" for name in classes))
        say(f"{train_cache.kept + val_cache.kept} of {len(train) + len(val)} decoded pictures stay in memory")
        if max(counts.values()) > 3 * min(counts.values()) and config.class_weights == "none":
            say("note: the classes are of very different size; --class_weights balanced makes each count the same")
    augmentation = make_augmentation(config, preprocess)
    train_data = LabelledPictures(train, classes, preprocess, train_cache, augmentation, config.mixup, config.seed)
    batches = EpochBatches(len(train), config.batch_size, config.seed, rank, world)
    train_loader = build_loader(train_data, batches, collate, config.num_workers)
    val_data = LabelledPictures(val, classes, preprocess, val_cache)
    return train_loader, eval_loader(val_data, collate, config.batch_size, config.num_workers), classes, facts


def classes_without_pictures(samples: list[Sample], classes: list[str], preprocess: ClassifierPreprocess) -> list[str]:
    """The classes of which no picture can be decoded. Of each class the first that can be is the last that is tried."""
    members = [[] for _ in classes]
    for sample in samples:
        members[sample.label].append(sample)

    def has_good(mine):
        return any(attempt(load_resized, preprocess, sample)[0] is not None for sample in mine)

    good = in_parts(members, has_good, "looking for a good picture of each class")
    return [name for name, found in zip(classes, good, strict=True) if not found]


def class_weights(kind: str, dataset: LabelledPictures, device):
    """(K,) weights of the loss: None, or the inverse of each class' share, such that their mean over samples is 1."""
    if kind == "none":
        return None
    counts = torch.bincount(torch.tensor([s.label for s in dataset.samples]), minlength=len(dataset.classes))
    return (len(dataset) / (len(dataset.classes) * counts)).to(device)


def labelled_for_eval(config, processor, origin: dict, source: Path):
    """(loader, classes, name of the data) for eval, of the pictures in `source`.

    The checkpoint's classes count. UserError where the data has others. It may lack some where it comes without a training
    split, or with config.subset.
    """
    data_dir = config.data_dir or origin["data_dir"]
    splits, found, _, faults = read_labelled(source, origin["seed"], scored=True, exclude=exclude_for_eval(config, origin))
    classes = origin["classes"]
    its_own = {unicodedata.normalize("NFC", name): name for name in classes}
    names = [its_own.get(unicodedata.normalize("NFC", name), name) for name in found]
    strange, missing = ([n for n in a if n not in b] for a, b in ((names, classes), (classes, names)))
    if strange or (missing and "train" in splits and not config.subset):
        only = " and ".join(
            f"{who} has {', '.join(some[:8])}{' ...' if len(some) > 8 else ''}"
            for who, some in (("only the data", strange), ("only the checkpoint", missing))
            if some
        )
        hint = "" if strange else "; --subset scores data that lacks some classes"
        raise UserError(f"{data_dir or 'the demo data'} has other classes than the checkpoint: {only}{hint}")
    samples = chosen_split(splits, config.split, data_dir or "the demo data")
    if missing:
        faults.note("class of which this data has no picture", ", ".join(missing))
    number_of = {name: number for number, name in enumerate(classes)}
    for sample in samples:
        sample.label = number_of[names[sample.label]]
    preprocess = ClassifierPreprocess(processor)
    with faults:
        samples, cache = load_pictures(samples, preprocess, faults, cache_limit("auto"), config.split)
    faults.report()
    dataset = LabelledPictures(samples, classes, preprocess, cache)
    loader = eval_loader(dataset, collate, config.batch_size or origin["batch_size"], config.num_workers)
    return loader, classes, data_dir or "demo"


def data_sha256(train: list[Sample], val: list[Sample], classes: list[str]) -> str:
    """A hash of what was learnt from and scored on: names, bytes on disk and labels, split by split."""
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, val):
        for s in split:
            digest.update(f"{s.name} {s.path.stat().st_size} {s.label}|".encode(errors="surrogateescape"))
        digest.update(b"||")
    return digest.hexdigest()
