"""The cases of a data folder: which mask belongs to which image, what its labels are called, whose scan it is, in which split.

    cases, facts = find_cases(data_dir, faults)

layouts.py says what the names of files and folders tell; here the files themselves are asked. Headers are looked at once, and
masks that hold several organs are read to their end once, for the labels that are in them; what was found is kept for the next
start.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.config import UserError
from common.exclude import Exclusions
from common.runtime import counted, say
from common.samples import Faults, split_of, visible_entries
from common.scan import FileReader, Scan
from common.tables import read_table
from grids import check_pair, pair_note
from layouts import MASK_ALONE, FoundCase, find_layout
from nifti_header import Geometry
from volume_names import path_below
from volumes import look, read_mask

READER = 1  # goes up when look_at_volume or look_at_mask finds something else in some file
GEOMETRY_FIELDS = ("x", "y", "z", *(f"affine{row}{column}" for row in range(3) for column in range(4)))
LAYOUTS = (
    "TotalSegmentator's folders (s0001/ct.nii.gz, s0001/segmentations/liver.nii.gz), imagesTr and labelsTr with dataset.json "
    "(Medical Decathlon, nnU-Net), or images and masks of one name (.nii, .nii.gz) in folders named for them"
)
ID_COLUMNS = ("image_id", "case_id", "case", "subject_id", "subject", "patient_id", "patient", "name", "id")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
# What may follow a patient in the name of a scan: P07_visit2, 012-baseline, patient001_frame12.
OF_A_SCAN = re.compile(
    r"(?i)[_\-. ]*(?<![a-z])(ses|session|visit|scan|frame|time(point)?|tp|run|study|exam|week|day|month|series|"
    r"baseline|follow-?up|fu|pre|post|preop|postop|ed|es)[_\-. ]?\d*$"
)


@dataclass(frozen=True)
class Case:
    """A scan and its masks. name: unique, "site_a/001" where names repeat; patient: whose scans stay on one side of a split.

    masks: (organ, file, label) each; label 0: all that is above 0 in the file is that organ. image: None where there is none.
    """

    name: str
    patient: str
    image: Path | None
    masks: tuple[tuple[str, Path, int], ...]
    split: str | None
    modality: str | None


def find_cases(folder, faults: Faults, organs: str = "", excluded: Exclusions | None = None) -> tuple[list[Case], dict]:
    """(cases in order of their places, facts: layout, where the splits come from, organ -> number of its masks) of a folder.

    organs: names or labels, "liver,2", that are wanted; empty: all. excluded: files and folders that are as good as not there.
    faults is told of what is left out and how the rest was understood. UserError where no case is left.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        why = ": it is a file; name the folder that holds the data" if root.exists() else ""
        raise UserError(f"--data_dir: there is no folder {root}{why}")
    found, layout = find_layout(root, faults)
    if excluded:
        found = leave_out_files(found, excluded, faults)
    if not found:
        raise UserError(f"--data_dir {folder}: no case in it; expected {LAYOUTS}")
    files = look_at_files(found)
    splits, source = read_splits(root, found, faults)
    cases = []
    for one in found:
        masks = masks_of(one, files, root, faults)
        if masks:
            split = splits.get(one.name, one.split)
            cases.append(Case(one.name, patient_of(one), one.image, tuple(masks), split, one.modality))
    note_missing_organs(found, cases, faults)
    cases = choose_organs(cases, organs)
    if not cases:
        unclear = f"; names do not say which mask is of which image: expected {LAYOUTS}"
        alike = unclear if MASK_ALONE in faults.found else faults.reason()
        raise UserError(f"--data_dir {folder}: of its {counted(len(found), 'case')} none can be used{alike}")
    patients = len({case.patient for case in cases})
    many = f"{counted(len(cases), 'case')} of {counted(patients, 'patient')}"
    say(f"{folder}: {many} ({layout}){f'; splits as in {source}' if source else ''}")
    counts = Counter(organ for case in cases for organ, _, _ in case.masks)
    return cases, {"layout": layout, "splits": source, "patients": patients, "organs": dict(sorted(counts.items()))}


def leave_out_files(found: list[FoundCase], excluded: Exclusions, faults: Faults) -> list[FoundCase]:
    """The cases without the masks that are excluded; none of a case whose image is, or all of whose masks are."""
    kept = []
    for case in found:
        masks = excluded.leave_out(case.masks, faults, lambda mask: mask[1])
        images = excluded.leave_out([case.image] if case.image else [], faults, lambda path: path)
        if masks and bool(images) == bool(case.image):
            kept.append(replace(case, masks=tuple(masks)))
    excluded.note_strangers(faults)
    return kept


# ---- what is in the files --------------------------------------------------------------------------------------------------


def look_at_volume(path: Path) -> tuple[int, ...]:
    return geometry_facts(look(path).geometry)


def look_at_mask(path: Path) -> tuple[int, ...]:
    """Facts of the geometry and the labels that are in the mask, which is read to its end."""
    labels, geometry, _ = read_mask(path)
    present = np.flatnonzero(np.bincount(labels.ravel(order="K")))
    return *geometry_facts(geometry), *(int(label) for label in present if label)


def geometry_facts(geometry: Geometry) -> tuple[int, ...]:
    """Shape and affine (rounded to float32) as whole numbers above 0, as a scan keeps them."""
    bits = geometry.affine[:3].astype(np.float32).ravel().view(np.uint32)
    return *geometry.shape, *(int(number) + 1 for number in bits)


def geometry_of(facts) -> Geometry:
    """The geometry that geometry_facts was given, to float32, without the file's header."""
    affine = np.eye(4)
    affine[:3] = (np.array(facts[3:15], np.int64) - 1).astype(np.uint32).view(np.float32).reshape(3, 4)
    return Geometry(tuple(facts[:3]), affine)


def look_at_files(found: list[FoundCase]) -> dict[Path, tuple[list[int], str]]:
    """File -> (facts, fault): of masks of several organs what look_at_mask finds, of all others what their headers say."""
    several = {path for case in found for organ, path in case.masks if not organ}
    others = {path for case in found for path in (case.image, *(mask for _, mask in case.masks)) if path} - several
    headers = FileReader(f"volumes, reader {READER}", GEOMETRY_FIELDS, look_at_volume)
    masks = FileReader(f"masks, reader {READER}", GEOMETRY_FIELDS, look_at_mask, more=True)
    files = {}
    for paths, reader, text in ((sorted(others), headers, "looking at headers"), (sorted(several), masks, "reading masks")):
        scan = Scan(paths, reader)
        try:
            scan.look(text)
        finally:
            scan.save()
        files |= {path: (entry[2], entry[3]) for path, entry in zip(paths, scan.entries, strict=True)}
    return files


def masks_of(case: FoundCase, files: dict, root: Path, faults: Faults) -> list[tuple[str, Path, int]]:
    """(organ, file, label) of each mask of a case that can be used; none where its image cannot."""
    image = None
    if case.image:
        facts, fault = files[case.image]
        if fault:
            faults.add_error(fault, path_below(case.image, root))
            return []
        image = geometry_of(facts)
    masks, names = [], names_of_labels(case.about)
    for organ, path in case.masks:
        facts, fault = files[path]
        if fault := fault or (image and check_pair(image, geometry_of(facts))):
            faults.add_error(fault, path_below(path, root))
            continue
        if note := image and pair_note(image, geometry_of(facts)):
            what, _, detail = note.partition(", ")
            faults.note(what, f"{path_below(path, root)} ({detail})")
        if organ:
            masks.append((plain_name(organ), path, 0))
        elif len(facts) == len(GEOMETRY_FIELDS):
            faults.add("mask that is empty", path_below(path, root))
        else:
            labels = facts[len(GEOMETRY_FIELDS) :]
            masks += [(names.get(label, str(label)), path, label) for label in labels if names.get(label) != "ignore"]
            if strange := [label for label in labels if names and label not in names]:
                faults.note(
                    "labels that dataset.json does not name", f"{path_below(path, root)} ({', '.join(map(str, strange))})"
                )
    return masks


# ---- organs ----------------------------------------------------------------------------------------------------------------


def names_of_labels(about: dict) -> dict[int, str]:
    """Label -> organ by a dataset.json, which says "1": "liver" (Medical Decathlon) or "liver": 1 (nnU-Net)."""
    labels = about.get("labels")
    labels = dict(enumerate(labels)) if isinstance(labels, list) else labels
    names = {}
    for one, other in labels.items() if isinstance(labels, dict) else ():
        number, name = (one, other) if str(one).isdecimal() else (other, one)
        if isinstance(name, str) and str(number).isdecimal() and int(number) > 0:  # a list is a region of nnU-Net's
            names[int(number)] = plain_name(name) or str(number)
    repeated = Counter(names.values())
    return {label: f"{name}_{label}" if repeated[name] > 1 else name for label, name in names.items()}


def plain_name(organ: str) -> str:
    """The name of an organ as one that files can have and --organs can list."""
    return re.sub(r"[\s/\\:*?\"<>|,]+", "_", "".join(c if c.isprintable() else " " for c in organ).strip())


def note_missing_organs(found: list[FoundCase], cases: list[Case], faults: Faults) -> None:
    """Notes each organ that a dataset.json declares and no mask holds, and regions, which are none of one label."""
    tables = [labels for case in found if isinstance(labels := case.about.get("labels"), dict)]
    regions = [name for labels in tables for name, label in labels.items() if isinstance(label, list)]
    for name in dict.fromkeys(map(plain_name, regions)):
        faults.note("region of dataset.json that is passed over, its labels are organs of their own", name)
    declared = {name: label for case in found for label, name in names_of_labels(case.about).items() if name != "ignore"}
    there = {organ for case in cases for organ, _, _ in case.masks}
    for name, label in declared.items():
        if name not in there:
            faults.note("organ of dataset.json that is in no case", f"{name} (label {label})")


def choose_organs(cases: list[Case], organs: str) -> list[Case]:
    """Cases with those of their masks whose organ or label is wanted. UserError where one that is wanted is in no case."""
    wanted = [plain_name(name).casefold() for name in organs.split(",") if name.strip()]
    if not wanted:
        return cases
    there = dict.fromkeys((organ.casefold(), str(label)) for case in cases for organ, _, label in case.masks)
    for name in wanted:
        if not any(name in names for names in there):
            known = list(dict.fromkeys(organ for case in cases for organ, _, _ in case.masks))
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise UserError(f"--organs: there is no {name}; there are {', '.join(known[:20])}{more}")
    chosen = []
    for case in cases:
        masks = tuple(mask for mask in case.masks if {mask[0].casefold(), str(mask[2])} & set(wanted))
        if masks:
            chosen.append(replace(case, masks=masks))
    return chosen


# ---- patients and splits ---------------------------------------------------------------------------------------------------


def patient_of(case: FoundCase) -> str:
    """Whose scan it is, by its name: sub-01 of sub-01_ses-2 (BIDS), P07 of P07_visit2; with the folders where names repeat."""
    where, _, own = case.name.rpartition("/")
    folders = [folder for folder in (*case.place, own) if re.match(r"(?i)sub-[a-z0-9]+", folder)]
    if folders:
        own = re.match(r"(?i)sub-[a-z0-9]+", folders[0])[0]
        return own
    shorter = own
    while (cut := OF_A_SCAN.sub("", shorter)) not in ("", shorter):
        shorter = cut
    return f"{where}/{shorter}" if where else shorter


def group_patients(cases: list[Case], rule: str) -> list[Case]:
    """Cases with the patient that `rule`, a regular expression, finds in their names: its first group, or all that it matches.

    UserError where it is none, or finds nothing in a name.
    """
    try:
        found = [(case, re.search(rule, case.name)) for case in cases]
    except re.error as error:
        raise UserError(f"--group {rule!r} is no regular expression: {error}") from None
    if strange := [case.name for case, match in found if not (match and match[1 if match.re.groups else 0])]:
        raise UserError(f"--group {rule!r} finds no patient in {strange[0]} ({len(strange)} of {len(cases)} cases)")
    return [replace(case, patient=match[1 if match.re.groups else 0]) for case, match in found]


def read_splits(root: Path, found: list[FoundCase], faults: Faults) -> tuple[dict[str, str], str]:
    """(case -> split, the file that says so) by a meta.csv, as TotalSegmentator has it; ({}, "") where there is none."""
    folders = [root, *sorted({root / case.place[0] for case in found if len(case.place) > 1})]
    tables = [folder / entry.name for folder in folders for entry in visible_entries(folder) if entry.name.lower() == "meta.csv"]
    splits, unknown = {}, defaultdict(int)
    by_name = {name: case.name for case in found for name in (case.name.casefold(), *(p.casefold() for p in case.place[-1:]))}
    for table in tables:
        try:
            rows = [cells for _, cells in read_table(table, faults)]
        except UserError as error:
            faults.note("meta.csv that cannot be read, passed over", str(error))
            continue
        header = [cell.casefold() for cell in rows[0]] if rows else []
        names = next((header.index(column) for column in ID_COLUMNS if column in header), None)
        column = next((header.index(column) for column in SPLIT_COLUMNS if column in header), None)
        if names is None or column is None:
            faults.note("meta.csv that names no split, passed over", path_below(table, root))
            continue
        for cells in rows[1:]:
            case = by_name.get(cells[names].casefold()) if len(cells) > max(names, column) else None
            if case and (split := split_of(cells[column])):
                splits[case] = split
            elif case:
                unknown[cells[column]] += 1
    for word, count in unknown.items():
        faults.note("split of meta.csv that is none", f"{word!r} ({count} cases)")
    return splits, "meta.csv" if splits else ""
