"""Checks of organ masks: they are prepared as training does, once for both, and what that finds is told with their files."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.samples import Faults
from findings import Findings, in_order

FLAT = 5  # times as long as wide, from where a voxel's thickness hides the shape
UNLIKE = 3  # times as large as the smallest that the largest voxel of a data set may be
TWICE = "scan that is there twice"  # what preparing says of copies; here they are told in pairs


def check_organs(folder: Path, seed: int) -> Findings:
    """UserError where training would refuse the folder."""
    from data import find_organs, read_items, split_items
    from prepared import PREPARED, prepared_folder
    from report import advice

    found = find_organs(str(folder), "", seed)
    if found.format == "prepared":
        raise UserError(f"{folder} is what preprocess.py leaves; check the folder of the volumes themselves")
    findings = Findings(folder, "medical_sam3d", found.format)
    items = read_items(found)
    about = read_json(prepared_folder(found.folder) / PREPARED)
    try:
        splits = split_items(items, seed, found.folder, found.faults)
    except UserError as error:
        splits = {"train": items}
        findings.add("error", "data that nobody can be held out of", [str(error)])
    findings.splits = {split: len(own) for split, own in splits.items()}
    find_copies(findings, found.cases, about, splits)
    findings.unusable = dict.fromkeys([*unread_masks(found), *files_of_no_use(found.cases, items, about)])
    findings.take(found.faults, (TWICE,))
    organs = sorted({item.organ for item in items})
    findings.say_classes(
        {split: Counter(item.organ for item in own) for split, own in splits.items()}, organs, "masks", must=False
    )
    look_at_voxels(findings, items)
    findings.add("note", "splits", [line for line in advice(items) if not line.startswith("WARNING")])  # leaks are told above
    return findings


def files_of_case(case) -> list[Path]:
    """What to leave out for a case to be gone: its image, or all its masks."""
    return [case.image] if case.image else list(dict.fromkeys(mask for _, mask, _ in case.masks))


def find_copies(findings: Findings, cases: list, about: dict, splits: dict) -> None:
    """Scans that are there twice: the same values in the image, or the same voxels in an organ, however they are stored."""
    named = {case.name: case for case in cases}
    split_of_case = {item.case: split for split, items in splits.items() for item in items}
    scans = {entry["case"]: entry["scan"] for entry in about["organs"]}
    files = in_order([(files_of_case(named[case])[0], split_of_case[case], None, scan) for case, scan in scans.items()])
    first = {}
    firsts = [(first.setdefault(scan, place), False) for place, (*_, scan) in enumerate(files)]
    findings.take_copies([file[:3] for file in files], firsts)


def unread_masks(found) -> list[Path]:
    """Masks that belong to a case by their names, and of which the headers alone say that they cannot be used."""
    from layouts import find_layout

    named = [mask for case in find_layout(found.folder, Faults())[0] for _, mask in case.masks]
    used = {mask for case in found.cases for _, mask, _ in case.masks}
    return [mask for mask in dict.fromkeys(named) if mask not in used]


def files_of_no_use(cases: list, items: list, about: dict) -> list[Path]:
    """Masks of which no organ is trained on because of a fault; an empty one where the case has others is none."""
    used = {(item.case, item.organ) for item in items}
    lost = {(entry["name"].removesuffix(f"/{organ}"), organ) for entry in about["left_out"] for organ in entry["organs"]}
    found = defaultdict(list)
    for case in cases:
        for organ, mask, _ in case.masks:
            found[mask].append((case.name, organ))
    return [mask for mask, organs in found.items() if not used & set(organs) and lost & set(organs)]


def look_at_voxels(findings: Findings, items: list) -> None:
    """Voxels that are far from cubes, and cases of very different resolution."""
    from preparing import known_facts

    sizes = {item.name: np.array(known_facts(item.path.parent, item.path.stem)["spacing"]) for item in items}
    flat = [
        f"{name} ({' x '.join(f'{s:.3g}' for s in size)} mm)" for name, size in sizes.items() if size.max() > FLAT * size.min()
    ]
    findings.add("note", f"voxels more than {FLAT} times as thick as they are wide", flat)
    volumes = {name: float(size.prod()) for name, size in sizes.items()}
    low, high = min(volumes, key=volumes.get), max(volumes, key=volumes.get)
    if volumes[high] > UNLIKE**3 * volumes[low]:
        told = [f"{name} ({' x '.join(f'{s:.3g}' for s in sizes[name])} mm)" for name in (low, high)]
        findings.add("note", "voxels of very different size, the smallest and the largest", told)
