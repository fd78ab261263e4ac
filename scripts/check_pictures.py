"""Checks of data for the tasks on pictures: classification, CLIP, detection, pose; one of them has been entered."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from alike_pictures import MODES, PLAIN, fingerprint_reader, first_of_each, mirror_images, thumbs_of
from common.config import UserError
from common.samples import BadFile, Faults
from common.scan import Scan
from common.vision.pictures import picture_reader
from findings import Findings, in_order

LONG = 5  # times as long as it is narrow, from where a resized picture shows little
SMALL = 32  # pixels of a side
SEEN = 640  # pixels of the longer side that a detector sees
TINY = 3  # of these, from which an object can be seen
USUAL = ("RGB", "L", "P", "RGBA", "1", "LA")


class AsItIs:
    """Stands for the preprocessing of whatever base will be trained: pictures stay as they are, and none is kept."""

    size = (224, 224)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    resized_shape = target_size

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels).permute(2, 0, 1)


def check_pictures(task: str, folder: Path, data_format: str, seed: int) -> Findings:
    """Reads a folder as the task's training does, and looks at each picture once. UserError where training would refuse it."""
    from data import read_tables

    kind = "classification" if task == "clip" else task
    arguments = () if kind == "classification" else (data_format,)
    splits, known, layout, faults = read_tables(str(folder), *arguments, seed)
    findings = Findings(folder, task, layout)
    every = {split: list(dict.fromkeys(sample.path for sample in samples)) for split, samples in splits.items()}
    claims = {sample.path: getattr(sample, "size", None) for samples in splits.values() for sample in samples}
    facts, headers = look_at_all(every)
    for split in every:
        share(every[split], facts)
    usable = {split: use(kind, samples, faults, split, findings) for split, samples in splits.items()}
    findings.splits = {split: len(samples) for split, samples in usable.items()}
    used = {sample.path for samples in usable.values() for sample in samples}
    findings.unusable = {path: None for paths in every.values() for path in paths if path not in used}
    emptied = [s.path for samples in usable.values() for s in samples if kind == "detection" and s.annotated and not len(s.boxes)]
    findings.add("error", "picture that loses all its boxes, so that training takes it for background", emptied, "mend them")
    findings.unusable |= dict.fromkeys(emptied)
    findings.take(faults)
    files = [(sample.path, split, label_of(kind, sample)) for split, samples in usable.items() for sample in samples]
    find_copies(findings, files, facts)
    look_for_odd(findings, facts, headers, claims if kind != "classification" else None)
    {"classification": check_classes_of, "detection": check_boxes, "pose": check_points}[kind](findings, usable, known)
    return findings


def look_at_all(every: dict[str, list[Path]]) -> tuple[dict, dict]:
    """(path -> the entry of its fingerprint's scan, path -> (width, height, orientation)) of all pictures."""
    paths = list(dict.fromkeys(path for paths in every.values() for path in paths))
    entries = []
    for reader, text in ((fingerprint_reader(), "looking at pictures"), (picture_reader(), "looking at headers")):
        scan = Scan(paths, reader)
        try:
            scan.look(text)
        finally:
            scan.save()
        entries.append(dict(zip(paths, scan.entries, strict=True)))
    return entries[0], {path: entry[2] for path, entry in entries[1].items() if entry[2]}


def share(paths: list[Path], entries: dict) -> None:
    """Tells the scan that training asks which pictures were decoded to their ends, and how that went: it need not again."""
    scan = Scan(paths, picture_reader())
    scan.look("looking at headers")

    def known(place):
        size, _, _, fault, _ = entries[paths[readable[place]]]
        if fault:
            raise BadFile(fault) if size >= 0 else OSError(fault)

    readable = [place for place, entry in enumerate(scan.entries) if not entry[3]]
    scan.prove(readable, known, "noting what is known")
    scan.save()


def use(kind: str, samples: list, faults: Faults, split: str, findings: Findings) -> list:
    """The samples that training can use, by its own checks, which tell faults of the others."""
    try:
        if kind == "classification":
            from common.vision.labelled import load_pictures

            return load_pictures(samples, AsItIs(), faults, 0, split)[0]
        from data import check_samples

        return check_samples(samples, AsItIs(), faults, 0, split)[0]
    except UserError as error:
        findings.add("error", "split that cannot be used", [str(error)])
        return []


def label_of(kind: str, sample):
    """What two copies of a picture must agree on; the boxes and points of two people never do to the pixel."""
    return sample.label if kind == "classification" else None


def find_copies(findings: Findings, files: list, facts: dict) -> None:
    """Pictures that are one, of those that can be used."""
    files = in_order([(path, split, label) for path, split, label in dict.fromkeys(files) if facts[path][2]])
    files = list({file[0]: file for file in reversed(files)}.values())[::-1]  # a file of two splits is the reader's to tell
    found = [facts[path][2] for path, _, _ in files]
    thumbs = thumbs_of(found)
    firsts = first_of_each(found, thumbs)
    findings.take_copies(files, firsts)
    places = [place for place, (first, _) in enumerate(firsts) if first == place]  # of copies one is enough
    findings.take_mirrored([(files[places[a]], files[places[b]]) for a, b in mirror_images(thumbs[places])])


def look_for_odd(findings: Findings, facts: dict, headers: dict, claims: dict | None) -> None:
    """Pictures that are good, but not as one expects them. claims: path -> (width, height) of its annotation, if it says."""
    turned = [path for path, (_, _, orientation) in headers.items() if orientation != 1]
    doubtful = []
    if claims is not None:
        doubtful = [path for path in turned if claims[path] is None or headers[path][2] < 5]
    advice = "its labels are taken to be of the turned picture: look at some"
    findings.add(
        "warning", "picture that viewers turn (EXIF), and no annotation says whether its labels are turned", doubtful, advice
    )
    findings.add("note", "picture that viewers turn (EXIF): used upright", [path for path in turned if path not in doubtful])
    sizes = {path: sorted(header[:2]) for path, header in headers.items()}
    findings.add(
        "warning", f"picture more than {LONG} times as long as it is narrow", [p for p, (a, b) in sizes.items() if b > LONG * a]
    )
    findings.add("warning", f"picture with a side below {SMALL} pixels", [p for p, (a, _) in sizes.items() if a < SMALL])
    good = [path for path, entry in facts.items() if entry[2]]
    thumbs = thumbs_of([facts[path][2] for path in good])
    plain = [
        path
        for path, thumb in zip(good, thumbs, strict=True)
        if max(thumb[:256].std(), thumb[256:320].std(), thumb[320:].std()) < PLAIN / 3
    ]
    findings.add("warning", "picture of one colour, in which there is nothing to see", plain)
    modes = {path: (*MODES, "unknown")[facts[path][2][1] - 1] for path in good}
    odd = [f"{findings.name(path)} ({mode})" for path, mode in modes.items() if mode not in USUAL]
    findings.add("note", "picture of an unusual kind, used as 8-bit RGB", odd)


# ---- labels ----------------------------------------------------------------------------------------------------------


def check_classes_of(findings: Findings, usable: dict, classes: list[str]) -> None:
    counts = {split: Counter(classes[sample.label] for sample in samples) for split, samples in usable.items()}
    findings.say_classes(counts, classes, "pictures", must=True)


def check_boxes(findings: Findings, usable: dict, classes: list[str]) -> None:
    counts = {
        split: Counter(classes[label] for sample in samples for label in sample.labels) for split, samples in usable.items()
    }
    findings.say_classes(counts, classes, "boxes", must=False)
    tiny, twice, empty = [], [], []
    for sample in (sample for samples in usable.values() for sample in samples):
        sides = (sample.boxes[:, 2:] - sample.boxes[:, :2]) * min(1, SEEN / max(sample.size))
        tiny += [f"{findings.name(sample.path)} box {number + 1}" for number in np.flatnonzero((sides < TINY).any(axis=1))]
        if len(np.unique(sample.boxes.round(), axis=0)) < len(sample.boxes):
            twice.append(sample.path)
        if not len(sample.boxes) and sample.path not in findings.unusable:
            empty.append(sample.path)
    findings.add("warning", f"box less than {TINY} pixels wide or high in a picture of {SEEN}: too small to be found", tiny)
    findings.add("warning", "picture with two boxes in one place", twice)
    findings.add("note", "picture without boxes: background", empty)


def check_points(findings: Findings, usable: dict, points) -> None:
    from data import PoseData, check_samples, doubts

    names, counts = points.names, {}
    for split, samples in usable.items():
        counts[split] = Counter(name for s in samples for name, there in zip(names, s.labelled, strict=True) if there)
    findings.say_classes(counts, names, "keypoints", must=False)
    beyond = [f"{findings.name(s.path)} ({s.where})" for samples in usable.values() for s in samples if leaves_its_box(s)]
    findings.add("warning", "figure with a keypoint far outside its own box", beyond)
    if train := usable.get("train"):
        preprocess = AsItIs()
        preprocess.mean = preprocess.std = 0
        samples, cache = check_samples(train, preprocess, Faults(), 0, "train")
        findings.add("warning", "doubtful keypoints", doubts(PoseData(samples, cache, preprocess, points), names))


def leaves_its_box(sample) -> bool:
    """Whether a labelled keypoint lies further outside the figure's box than a quarter of it."""
    if sample.box is None or not sample.labelled.any():
        return False
    low, size = sample.box[:2], sample.box[2:]
    where = (sample.points[sample.labelled] - low) / size
    return bool((np.abs(where - 0.5) > 0.75).any())


def draw_copies(findings: Findings, path: Path, most: int = 24) -> int:
    """A page of copies side by side, leaks first; how many pairs there are beyond it."""
    from common.vision.pairs import fitted, save_pairs
    from common.vision.pictures import decode

    groups = sorted(findings.copies, key=lambda group: ("two splits" not in group.what, "labels" not in group.what))
    pairs = [(group, other) for group in groups for other in group.others]

    def half(file: Path, split: str):
        return fitted(decode(file), 240)[0], f"{findings.name(file)}\n{split}"

    shown = [(half(group.kept, group.split), half(other[0], other[1])) for group, other in pairs[:most]]
    save_pairs(shown, f"{len(shown)} of {len(pairs)} pairs of pictures that are one: the left is kept", {}, path)
    return len(pairs) - len(shown)
