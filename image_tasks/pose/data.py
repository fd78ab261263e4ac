"""Pictures and keypoints for a pose model: checking, cut-outs around boxes, augmented, a cache in memory, batches."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.batches import EpochBatches, build_loader, eval_loader, seeded
from common.config import UserError
from common.exclude import exclude_for_eval, exclude_from
from common.folders import make_once
from common.runtime import counted, process_index, say
from common.sample_cache import CachedSamples, SampleCache, cache_limit, first_readable
from common.samples import Faults, chosen_split
from common.scan import check_files
from common.vision.pictures import decode, header_size, picture_reader
from common.vision.preprocess import mean_and_std
from crops import PADDING, box_fault, crop_matrix, cut_out, has_area, inverse, jitter, move, random_change, shrink, shrink_factor
from formats import read_dataset
from keypoints import KeypointSet, Sample

HERE = Path(__file__).resolve().parent
OUTSIDE = "keypoint outside its picture"


def demo_data() -> Path:
    """The folder of the synthetic target data, drawn at the first call (about three seconds)."""
    from synthetic import make_demo_data

    return make_once(HERE / "data" / "demo", make_demo_data)


class Preprocess:
    """How a base wants its pictures: size (height, width), mean and standard deviation, read from its image processor."""

    def __init__(self, processor, size: tuple[int, int]):
        self.size = tuple(size)
        self.mean, self.std = mean_and_std(processor)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Values from 0 to 1, (3, h, w) -> with the base's mean and standard deviation."""
        return (pixels - self.mean) / self.std


# ---- the data set ----------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A picture file and its figures. shrunk: the factor by which its pixels are made smaller when they are read."""

    path: Path
    size: tuple[int, int] | None  # (width, height): as claimed, and once its header is read the true one
    figures: list[Sample]
    shrunk: int = 1
    number: int = 0  # in the cache


def load_shrunk(picture: Picture) -> np.ndarray:
    """The picture as the cache keeps it, (h, w, 3) uint8."""
    return shrink(decode(picture.path, picture.size), picture.shrunk)


class PoseData(CachedSamples):
    """Item (epoch, index) -> {"pixel_values" (3, h, w), "target" (K, 2), "visible" (K,), "back" (2, 3), "index"}.

    target: fractions of the input, 0 at the first pixel's centre and 1 at the last's; visible: keypoints that are labelled, in
    the picture and in the cut-out; back: the map from the input's pixels to the picture's. With augment, the item is a
    function of (seed, epoch, index): workers and resumed runs see the same pixels. Where a training picture turns out to be
    bad, another figure takes the place of each in it.
    """

    def __init__(
        self, samples: list[Sample], cache: SampleCache, preprocess: Preprocess, points: KeypointSet, augment=False, seed=0
    ):
        self.samples, self.cache, self.preprocess, self.augment, self.seed = samples, cache, preprocess, augment, seed
        self.pictures = {picture.path: picture for picture in cache.items}
        self.swap = list(range(len(points.names)))  # the keypoints' places in a mirrored picture
        for a, b in points.flip_pairs:
            self.swap[a], self.swap[b] = b, a
        self.mirrors = bool(points.flip_pairs)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"{self.samples[index].path} ({self.samples[index].where})"

    def box(self, index: int) -> tuple[np.ndarray, float]:
        """(box x, y, w, h, padding) of a sample: its own, or the whole picture."""
        sample = self.samples[index]
        if sample.box is not None:
            return sample.box, PADDING
        return np.array([0.0, 0.0, *self.pictures[sample.path].size]), 1.0

    def place(self, index: int) -> int:
        """Of the figure's picture in the cache."""
        return self.pictures[self.samples[index].path].number

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        chosen, pixels = first_readable(self, lambda figure: self.cache[self.place(figure)], index, self.seed, epoch)
        sample, size = self.samples[chosen], self.preprocess.size
        picture, (box, padding) = self.pictures[sample.path], self.box(chosen)
        points, labelled, change, colours = sample.points, sample.labelled, {}, None
        if self.augment:
            with seeded(self.seed, epoch, index):
                change, colours = random_change(self.mirrors), torch.rand(3).tolist()
        matrix = crop_matrix(box, size, padding, **change)
        further = max(1, shrink_factor(box, size, padding) // picture.shrunk)  # a large figure among small ones
        pixels = cut_out(shrink(pixels, further), matrix, size, picture.shrunk * further)
        pixels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        if colours:
            pixels = jitter(pixels, *colours)
        if change.get("mirror"):
            points, labelled = points[self.swap], labelled[self.swap]
        target = move(np.where(labelled[:, None], points, 0), matrix) / [size[1] - 1, size[0] - 1]
        visible = labelled & ((target >= 0) & (target <= 1)).all(axis=1)
        return {
            "pixel_values": self.preprocess.normalize(pixels),
            "target": torch.from_numpy(np.where(visible[:, None], target, 0)).float(),
            "visible": torch.from_numpy(visible),
            "back": torch.from_numpy(inverse(matrix)),
            "index": index,
        }


def check_samples(
    samples: list[Sample], preprocess: Preprocess, faults: Faults, cache_bytes: int, text: str, posed=True, whole=True
):
    """(samples that are usable, cache of their pictures): see check_files. cache.items are Pictures.

    Keypoints that are not finite or lie outside their picture count as unlabelled; with `posed`, samples without any that
    counts are left out. What is kept of a picture is shrunk to what the crops need.
    """
    pictures = {}
    for sample in samples:
        pictures.setdefault(sample.path, Picture(sample.path, sample.size, [])).figures.append(sample)

    def measure(picture: Picture, header):
        picture.size = width, height = header_size(header, picture.size)
        for figure in picture.figures:
            to_pixels(figure, picture.size)
            clean_points(figure, picture.size, faults)
            frame_figure(figure, len(picture.figures) == 1, faults)
        boxes = [figure.box for figure in picture.figures if box_fault(figure.box, picture.size) is None]
        frames = [(np.array([0, 0, width, height]), 1.0) if box is None else (box, PADDING) for box in boxes]
        picture.shrunk = min((shrink_factor(box, preprocess.size, padding) for box, padding in frames), default=1)
        return -(-height // picture.shrunk), -(-width // picture.shrunk), 3

    every, text = list(pictures.values()), f"{text} pictures"
    _, cache = check_files(every, picture_reader(), measure, load_shrunk, faults, cache_bytes, text, whole)
    for place, picture in enumerate(cache.items):
        picture.number = place
    pictures = {picture.path: picture for picture in cache.items}
    good = []
    for sample in samples:
        if sample.path not in pictures:
            continue
        if posed and not sample.labelled.any():
            faults.add("figure without a keypoint that counts", f"{sample.path.name} ({sample.where})")
        elif fault := box_fault(sample.box, pictures[sample.path].size):
            faults.add(fault, sample.where)
        else:
            good.append(sample)
    return good, cache


def to_pixels(sample: Sample, size: tuple[int, int]) -> None:
    """Turns fractions of a picture of this (width, height) into its pixels, in place."""
    if sample.relative:
        scale, sample.relative = np.array(size), False
        edge = np.minimum(sample.points * scale, scale - 0.5)  # 1 is its edge, half a pixel beyond the last pixel's centre
        sample.points = np.where(sample.points <= 1, edge, sample.points * scale)
        sample.box = sample.box if sample.box is None else sample.box * [*size, *size]


def frame_figure(sample: Sample, alone: bool, faults: Faults) -> None:
    """Puts the box of a figure whose box has no area around its labelled keypoints, in place.

    A side is at least a quarter of the other: for points in a line, of which it is not known how wide the figure is. All
    points in one place do not tell its size: it stays without a box, or has the whole picture, where it is `alone` in it.
    """
    if sample.box is None or has_area(sample.box) or not sample.labelled.any():
        return
    points = sample.points[sample.labelled]
    low, high = points.min(axis=0), points.max(axis=0)
    sides = np.maximum(high - low, (high - low).max() / 4)
    if sides.max() >= 1:
        sample.box = np.array([*((low + high - sides) / 2), *sides])
        faults.note("figure without a box of its own, cut out around its keypoints", sample.where)
    elif alone:
        sample.box = None
        faults.note("figure without a box and with one keypoint alone, seen in the whole picture", sample.where)


def clean_points(sample: Sample, size: tuple[int, int], faults: Faults) -> None:
    """Takes the label off keypoints that are no numbers or lie outside the picture of this (width, height), in place."""
    finite = np.isfinite(sample.points).all(axis=1)
    inside_it = ((sample.points >= -0.5) & (sample.points <= np.array(size) - 0.5)).all(axis=1)
    for i in np.flatnonzero(sample.labelled & ~finite):
        faults.add("keypoint that is no number", f"{sample.where} keypoint {i + 1}")
    for i in np.flatnonzero(sample.labelled & finite & ~inside_it):
        faults.add(OUTSIDE, f"{sample.path.name} ({sample.where}) keypoint {i + 1}")
    sample.labelled = sample.labelled & finite & inside_it
    sample.points = np.where(finite[:, None], sample.points, 0.0)


def read_tables(data_dir: str, data_format: str, seed: int, to_train: bool = True, exclude: str = ""):
    """(splits, KeypointSet, format, faults) of a folder, or of the demo data where data_dir is empty. Opens no picture.

    exclude: a list of pictures to leave out.
    """
    folder = Path(data_dir).expanduser() if data_dir else demo_data()
    with Faults() as faults:
        splits, points, data_format = read_dataset(folder, data_format, seed, faults, to_train)
        return exclude_from(splits, exclude, folder, faults), points, data_format, faults


def build_loaders(config, preprocess: Preprocess, tables):
    """(train loader, validation loader, KeypointSet, facts for the summary); tables: what read_tables gave.

    With --cache off no training picture is decoded before it is used. Validation pictures always are: what is scored stays.
    """
    rank, world = process_index()
    splits, points, data_format, faults = tables
    limit = cache_limit(config.cache)
    with faults:
        training = usable("train", splits["train"], preprocess, faults, limit, whole=config.cache != "off")
        train = PoseData(*training, preprocess, points, config.augment, config.seed)
        val = PoseData(*usable("val", splits["val"], preprocess, faults, limit - train.cache.bytes), preprocess, points)
    facts = {
        "name": config.data_dir or "demo",
        "format": data_format,
        "sha256": data_sha256(train.samples, val.samples, points.names),
        "train": len(train),
        "val": len(val),
        "left_out": faults.counts(),
    }
    if rank == 0:
        faults.report()
        kept, many = train.cache.kept + val.cache.kept, len(train.cache) + len(val.cache)
        for doubt in doubts(train, points.names):
            say(doubt)
        names = ", ".join(points.names[:6]) + (" ..." if len(points.names) > 6 else "")
        say(f"data: {facts['name']} ({data_format}), {len(train)} training and {counted(len(val), 'validation figure')}")
        say(f"{counted(len(points.names), 'keypoint')}: {names}; {kept} of {many} decoded pictures stay in memory")
    batches = EpochBatches(len(train), config.batch_size, config.seed, rank, world)
    train_loader = build_loader(train, batches, collate, config.num_workers)
    return train_loader, eval_loader(val, collate, config.batch_size, config.num_workers), points, facts


def doubts(data: PoseData, names: list[str]) -> list[str]:
    """What looks as if the data meant something else, of which no single figure tells."""
    found, labelled = [], np.array([sample.labelled for sample in data.samples])
    never = [name for name, there in zip(names, labelled.any(axis=0), strict=True) if not there]
    if never:
        found.append(f"no training figure has keypoint {', '.join(never[:5])}: it cannot be learnt")
    sizes = np.array([data.pictures[s.path].size for s in data.samples])
    corners = np.array([s.points[s.labelled].max(axis=0) for s in data.samples])
    if len(sizes) >= 8 and (corners / sizes).max() < 0.5:
        found.append("all keypoints lie in the upper left quarter of their pictures: are they of pictures of another size?")
    elif len(sizes) >= 8 and 80 < corners.max() <= 100 < 0.9 * sizes.min():
        found.append("no keypoint lies beyond 100, and every picture is larger: are the coordinates percent? Expected pixels")
    framed = [(s.box, size) for s, size in zip(data.samples, sizes, strict=True) if s.box is not None]
    beyond = sum((box[:2] + box[2:] > 1.1 * size).any() for box, size in framed)
    if beyond > max(2, len(framed) / 5):
        found.append(f"{beyond} of {len(framed)} boxes reach far beyond their pictures: are they x, y, width, height?")
    return found


def usable(split: str, samples: list[Sample], preprocess: Preprocess, faults: Faults, limit: int, posed=True, whole=True):
    """(samples, cache) for PoseData; UserError where no figure is left, or most keypoints lie beside their pictures."""
    known = faults.counts().get(OUTSIDE, 0)
    samples, cache = check_samples(samples, preprocess, faults, limit, split, posed, whole)
    outside, inside_it = faults.counts().get(OUTSIDE, 0) - known, sum(int(sample.labelled.sum()) for sample in samples)
    if outside > max(9, inside_it):
        raise UserError(
            f"{outside} of {outside + inside_it} {split} keypoints lie outside their pictures; "
            "expected pixels of just these pictures, or fractions from 0 to 1"
        )
    if not samples:
        where = "--input" if split == "input" else f"the {split} split"
        raise UserError(f"{where} has no figure that can be used{faults.reason()}")
    return samples, cache


def load_for_eval(config, preprocess: Preprocess, known: dict, origin: dict):
    """(loader, KeypointSet, name of the data) for eval: config.data_dir, or the data that the checkpoint was trained on.

    known: the checkpoint's keypoints.json. UserError where the data's keypoints are others.
    """
    chosen = {"data_dir": config.data_dir, "data_format": config.data_format} if config.data_dir else origin
    data_dir = chosen["data_dir"]
    exclude = exclude_for_eval(config, origin)
    splits, points, _, faults = read_tables(data_dir, chosen["data_format"], origin["seed"], to_train=False, exclude=exclude)
    samples = chosen_split(splits, config.split, data_dir or "the demo data")
    both_named = points.named and known["named"]
    if len(points.names) != len(known["names"]) or (both_named and points.names != known["names"]):
        theirs, ours = (f"{len(names)} ({', '.join(names[:5])} ...)" for names in (points.names, known["names"]))
        raise UserError(f"{data_dir or 'the demo data'} has other keypoints, {theirs}, than the checkpoint, {ours}")
    with faults:
        found = usable(config.split, samples, preprocess, faults, cache_limit("auto"))
    faults.report()
    dataset = PoseData(*found, preprocess, points)
    loader = eval_loader(dataset, collate, config.batch_size or origin["batch_size"], config.num_workers)
    return loader, points, data_dir or "demo"


def figures_only(framed, preprocess: Preprocess, points: KeypointSet, faults: Faults) -> PoseData:
    """[(picture, box x, y, w, h or None, score)] as a data set without keypoints; pictures that cannot be decoded are named."""
    none = np.zeros((len(points.names), 2)), np.zeros(len(points.names), dtype=bool)
    samples = [
        Sample(path, None, *none, None if box is None else np.array(box, dtype=np.float64), math.nan, path.name, score)
        for path, box, score in framed
    ]
    with faults:
        return PoseData(*usable("input", samples, preprocess, faults, cache_limit("auto"), posed=False), preprocess, points)


def collate(items: list[dict]) -> dict:
    """Items -> their tensors stacked; index (B,)."""
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


def data_sha256(train: list[Sample], val: list[Sample], names: list[str]) -> str:
    """A hash of what was learnt from and scored on: names, keypoints and boxes, split by split."""
    digest = hashlib.sha256(repr(names).encode())
    for split in (train, val):
        for s in split:
            digest.update(s.path.name.encode())
            digest.update(np.ascontiguousarray(s.points.round(2)))
            digest.update(np.ascontiguousarray(s.labelled))
            digest.update(b"" if s.box is None else np.ascontiguousarray(s.box.round(2)))
        digest.update(b"|")
    return digest.hexdigest()
