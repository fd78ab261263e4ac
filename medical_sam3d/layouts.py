"""Which mask belongs to which image, by the names of files and folders alone.

Read are TotalSegmentator's folders (s0001/ct.nii.gz with segmentations/liver.nii.gz ...), Medical Decathlon's and nnU-Net's
(imagesTr, labelsTr, dataset.json; case_0000.nii.gz), folders of images and of masks under any usual names, one flat folder
(case-image, case-label), a folder for each case, and masks alone.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from common.checkpoint import read_json
from common.config import UserError
from common.file_finder import inside
from common.samples import Faults, files_below
from volume_names import CHANNEL, MASK_WORDS, VolumeFile, bare_name, describe, modality_word, path_below, words_of
from volumes import VOLUME_ENDINGS, volume_stem

PER_CASE = "a folder for each case"
LISTED = "pairs that dataset.json lists"
NNUNET = "nnU-Net"
BY_NAME = "images and masks of one name"
BY_WORDS = "images and masks told apart by a word of their names"
IMAGE_ALONE = "image without a mask"
MASK_ALONE = "mask without an image"
# Endings that hold volumes, too -> what makes a NIfTI of them.
OTHER_FORMATS = {
    ".nrrd": "3D Slicer or SimpleITK",
    ".nhdr": "3D Slicer or SimpleITK",
    ".mha": "3D Slicer or SimpleITK",
    ".mhd": "3D Slicer or SimpleITK",
    ".mgz": "mri_convert",
    ".mgh": "mri_convert",
    ".mnc": "mnc2nii",
    ".nii.bz2": "bunzip2",
    ".nii.xz": "unxz",
    ".nii.zst": "unzstd",
    ".nii.zip": "unzip",
}
DICOM = (".dcm", ".dicom", ".ima")


@dataclass(frozen=True)
class FoundCase:
    """A case as its files' names have it. masks: (organ, path); organ "": the file holds several, told apart by label.

    place: the folders above it; about: the dataset.json that speaks of it, {} where there is none.
    """

    name: str
    place: tuple[str, ...]
    image: Path | None
    masks: tuple[tuple[str, Path], ...]
    split: str | None
    modality: str | None
    about: dict


def find_layout(root: Path, faults: Faults) -> tuple[list[FoundCase], str]:
    """(cases in order of their places, what the layout is called) of a folder; faults is told of files that belong to no case."""
    volumes, tables = sort_files(root, faults)
    cases, volumes = take_listed(volumes, tables, faults)
    volumes = with_roles(volumes, faults, root)
    layouts, rest = Counter({LISTED: len(cases)}), []
    for group in by_place(volumes):
        found, left, layout = pair_group(group, speaks_of(group[0].path, tables), faults)
        layouts[layout] += len(found)
        cases += found
        rest += left
    for pair_rest in (pair_organs, pair_trees):
        found, rest, layout = pair_rest(rest, speaks_of(rest[0].path, tables), faults) if rest and not cases else ([], rest, "")
        layouts[layout] += len(found)
        cases += found
    alone = not cases and not any(volume.role == "image" for volume in rest)
    for group in by_place(rest):
        cases += left_over(group, speaks_of(group[0].path, tables), layouts[PER_CASE] > 0, alone, faults, root)
    return unique_names(cases, root), "masks without images" if alone else layouts.most_common(1)[0][0]


def by_place(volumes: list[VolumeFile]) -> list[list[VolumeFile]]:
    """Volumes in groups of one place and split, in which image and mask of a case are looked for."""
    groups = defaultdict(list)
    for volume in volumes:
        groups[volume.place, volume.split].append(volume)
    return list(groups.values())


# ---- files -----------------------------------------------------------------------------------------------------------------


def sort_files(root: Path, faults: Faults) -> tuple[list[VolumeFile], dict[Path, dict]]:
    """(volumes, folder -> its dataset.json); of files in other formats faults is told, all else is passed over in silence."""
    volumes, tables, seen, series = [], {}, set(), Counter()
    for path in map(Path, files_below(root, faults)):
        name, shown = path.name.lower(), path_below(path, root)
        if name == "dataset.json":
            tables[path.parent] = read_table_of_labels(path, faults)
        elif name.endswith(VOLUME_ENDINGS):
            place = path.parent / unicodedata.normalize("NFC", volume_stem(path.name))
            if place in seen:
                faults.add("second file of one name", shown)
            else:
                volumes.append(describe(path, root))
            seen.add(place)
        elif name.endswith(DICOM):
            series[path.parent] += 1
        elif other := next((end for end in OTHER_FORMATS if name.endswith(end)), ""):
            faults.add(f"format that is not read ({other}); {OTHER_FORMATS[other]} makes a NIfTI of it", shown)
        elif name.endswith((".img", ".img.gz")) and not path.with_name(re.sub(r"(?i)img(\.gz)?$", "hdr", path.name)).exists():
            faults.add("image data without its header file (.hdr)", shown)
    for folder, count in series.items():
        shown = f"{path_below(folder, root)} ({count} files)"
        faults.add("format that is not read (DICOM); dcm2niix makes a NIfTI of a series", shown)
    return volumes, tables


def read_table_of_labels(path: Path, faults: Faults) -> dict:
    try:
        about = read_json(path)
    except UserError as error:
        about, fault = None, str(error)
    else:
        fault = f"{path} does not hold a JSON object"
    if not isinstance(about, dict):
        faults.note("dataset.json that cannot be read, so that labels have no names", fault)
        return {}
    return about


def speaks_of(path: Path, tables: dict[Path, dict]) -> dict:
    """The nearest dataset.json above a file."""
    return next((tables[folder] for folder in path.parents if folder in tables), {})


def with_roles(volumes: list[VolumeFile], faults: Faults, root: Path) -> list[VolumeFile]:
    """The volumes, each an image or a mask: what does not say so is what is missing in its place, or everywhere; alone a mask."""
    everywhere = {volume.role for volume in volumes} - {""}
    settled = []
    for group in by_place(volumes):
        roles = ({volume.role for volume in group} - {""}) or everywhere
        for volume in group:
            if volume.role:
                settled.append(volume)
            elif len(roles) == 2:
                faults.add("volume that is neither image nor mask by its name", path_below(volume.path, root))
            else:
                settled.append(replace(volume, role="image" if roles == {"mask"} else "mask"))
    return settled


# ---- pairs -----------------------------------------------------------------------------------------------------------------


def take_listed(volumes: list[VolumeFile], tables: dict[Path, dict], faults: Faults) -> tuple[list[FoundCase], list[VolumeFile]]:
    """(cases that a dataset.json lists with image and label, the volumes that are left)."""
    there = {volume.path: volume for volume in volumes}
    cases, taken = [], set()
    for folder, about in tables.items():
        for kind, split in (("training", None), ("validation", "val"), ("test", "test")):
            for entry in about.get(kind, []) if isinstance(about.get(kind), list) else []:
                names = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else []
                names = [name[0] if isinstance(name, list) and name else name for name in names]
                if len(names) < 2 or not all(isinstance(name, str) for name in names):
                    continue
                image, mask = (there.get(inside(folder, name)) for name in names)
                if mask is None:
                    faults.add("mask that dataset.json lists and that is not there", names[1])
                elif image and not {image.path, mask.path} & taken:  # nnU-Net lists images without their channel
                    cases.append(a_case(mask.stem, image, [("", mask.path)], about, split or mask.split))
                    taken |= {image.path, mask.path}
    return cases, [volume for volume in volumes if volume.path not in taken]


def a_case(name: str, image: VolumeFile, masks: list, about: dict, split: str | None) -> FoundCase:
    return FoundCase(name or last_of(image), image.place, image.path, tuple(masks), split, modality_of(image, about), about)


def last_of(volume: VolumeFile) -> str:
    """The folder of a case whose files do not name it; "" for one that lies in the data folder itself."""
    return volume.place[-1] if volume.place else ""


def modality_of(image: VolumeFile, about: dict) -> str | None:
    """ct or mr, by the first channel that dataset.json names, or else by the names of the file and its folders."""
    channels = about.get("channel_names", about.get("modality"))
    channels = dict(enumerate(channels)) if isinstance(channels, list) else channels
    first = channels.get("0", channels.get(0)) if isinstance(channels, dict) else channels
    return next(filter(None, map(modality_word, words_of(str(first)))), image.modality)


def pair_group(group: list[VolumeFile], about: dict, faults: Faults) -> tuple[list[FoundCase], list[VolumeFile], str]:
    """(cases, volumes that are left over, layout) of the volumes of one place."""
    images = [volume for volume in group if volume.role == "image"]
    masks = [volume for volume in group if volume.role == "mask"]
    if of_one_scan(images, masks):
        name = bare_name(images[0].stem)
        note_channels(name or last_of(images[0]), images, faults)
        return [a_case(name, images[0], organs_of(masks), about, images[0].split)], [], PER_CASE
    ways = {
        BY_NAME: (attrgetter("stem"), attrgetter("stem")),
        NNUNET: (without_channel, attrgetter("stem")),
        BY_WORDS: (attrgetter("key"), attrgetter("key")),
    }
    # The way that fits most comes first: among nnU-Net's channels the image P_0000 is not that of the mask P_0000.
    ranked = sorted(ways, key=lambda way: -len(matches(images, masks, *ways[way])))
    cases = []
    for way in ranked:
        pairs = matches(images, masks, *ways[way])
        for found, mask in pairs:
            name = bare_name(mask.stem) or last_of(mask) or mask.stem if way == BY_WORDS else mask.stem
            cases.append(a_case(name, found[0], [("", mask.path)], about, mask.split))
            note_channels(name, found, faults)
        taken = {volume.path for found, mask in pairs for volume in (*found, mask)}
        images, masks = ([volume for volume in volumes if volume.path not in taken] for volumes in (images, masks))
    return cases, images + masks, ranked[0]


def note_channels(name: str, images: list[VolumeFile], faults: Faults) -> None:
    if len(images) > 1:
        faults.note("several images of a case, the first is taken", f"{name} ({images[0].path.name} of {len(images)})".strip())


def without_channel(image: VolumeFile) -> str | None:
    """case_1 of nnU-Net's case_1_0000; None of a name that has no channel."""
    return CHANNEL.sub("", image.stem) if CHANNEL.search(image.stem) else None


def pair_organs(volumes: list[VolumeFile], about: dict, faults: Faults) -> tuple[list[FoundCase], list[VolumeFile], str]:
    """Cases whose masks lie under one word more than the image: labels/001/liver or labels/liver/001 with images/001."""
    images = {(*volume.place, volume.stem): volume for volume in volumes if volume.role == "image"}
    organs = defaultdict(list)
    for mask in volumes:
        path = (*mask.place, mask.stem)
        shorter = {(*path[:place], *path[place + 1 :]): word for place, word in enumerate(path)}
        if mask.role == "mask" and (of := next((short for short in shorter if short in images), None)):
            organs[of].append((shorter[of], mask))
    if max(map(len, organs.values()), default=0) < 2:  # one mask each: the word is a site or a study, no organ
        return [], volumes, ""
    cases = []
    for of, found in organs.items():
        cases.append(a_case(of[-1], images[of], [(organ, mask.path) for organ, mask in found], about, images[of].split))
    taken = {path for case in cases for path in (case.image, *(mask for _, mask in case.masks))}
    return cases, [volume for volume in volumes if volume.path not in taken], PER_CASE


def pair_trees(volumes: list[VolumeFile], about: dict, faults: Faults) -> tuple[list[FoundCase], list[VolumeFile], str]:
    """Cases with images in one tree of folders and masks in another (BIDS' derivatives), under names that are nowhere twice."""
    counts = Counter((volume.role, volume.stem) for volume in volumes)
    alike = [volume for volume in volumes if counts[volume.role, volume.stem] > 1]
    alone = [volume for volume in volumes if counts[volume.role, volume.stem] == 1]
    cases, rest, layout = pair_group(alone, about, faults)
    return cases, rest + alike, layout


def of_one_scan(images: list[VolumeFile], masks: list[VolumeFile]) -> bool:
    """Whether masks are a case's organs: beside images without a name of their own (ct; t1, t2), or below the only image."""
    named = {bare_name(image.stem) for image in images}
    if len(named) != 1 or not masks or {mask.stem for mask in masks} & {image.stem for image in images}:
        return False
    above = images[0].path.parent
    below = all(above in mask.path.parents and above != mask.path.parent for mask in masks)
    return named == {""} or (len(images) == 1 and below)


def organs_of(masks: list[VolumeFile]) -> list[tuple[str, Path]]:
    """(organ, path): liver of liver.nii.gz, and "" of segmentation.nii.gz, whose labels tell organs apart."""
    return [(bare_name(mask.stem, MASK_WORDS), mask.path) for mask in masks]


def matches(images: list[VolumeFile], masks: list[VolumeFile], of_image, of_mask) -> list[tuple[list[VolumeFile], VolumeFile]]:
    """(images of one key in order of their names, the mask of that key) for each key that both have.

    A mask whose name says ct or mr is of an image that says so, too, or says neither: a_seg_mr is that of a_mr, not of a_ct.
    """
    keyed, taken, pairs = defaultdict(list), set(), []
    for image in images:
        keyed[of_image(image)].append(image)
    for mask in masks:
        key = of_mask(mask)
        free = [] if key is None else [image for image in keyed[key] if image.path not in taken]
        own = [image for image in free if mask.named in (None, image.named)]
        if found := own or [image for image in free if image.named is None]:
            pairs.append((found, mask))
            taken |= {image.path for image in found}
    return pairs


def left_over(rest: list[VolumeFile], about: dict, per_case: bool, alone: bool, faults: Faults, root: Path) -> list[FoundCase]:
    """Cases of masks alone, where a folder holds no image at all; else faults is told of what has no partner."""
    images = [volume for volume in rest if volume.role == "image"]
    masks = sorted((volume for volume in rest if volume.role == "mask"), key=attrgetter("stem"))
    for image in images:
        if image.split != "test":  # images to try a model on have no masks
            faults.add(IMAGE_ALONE, path_below(image.path, root))
    together = masks and (per_case or all(mask.path.parent.name.casefold() == "segmentations" for mask in masks))
    if alone and together:
        return [FoundCase(last_of(masks[0]), masks[0].place, None, tuple(organs_of(masks)), masks[0].split, None, about)]
    if alone:
        return [FoundCase(mask.stem, mask.place, None, (("", mask.path),), mask.split, None, about) for mask in masks]
    if together and masks[0].place:
        faults.add("case without an image (looked for ct.nii.gz, mri.nii.gz ...)", "/".join(masks[0].place))
        return []
    for mask in masks:
        faults.add(MASK_ALONE, path_below(mask.path, root))
    return []


def unique_names(cases: list[FoundCase], root: Path) -> list[FoundCase]:
    """Cases under names that differ, in order of their places: 001, or site_a/001, or train/site_a/001, or with a number."""
    cases = [case if case.name else replace(case, name=root.resolve().name) for case in cases]
    cases.sort(key=lambda case: (case.place, case.name, case.split or ""))
    names = [possible_names(case) for case in cases]
    counts, numbers = Counter(name for own in names for name in dict.fromkeys(own)), Counter()
    named = []
    for case, own in zip(cases, names, strict=True):
        name = next((name for name in own if counts[name] == 1), own[-1])
        numbers[name] += 1
        named.append(replace(case, name=name if numbers[name] == 1 else f"{name} ({numbers[name]})"))
    return named


def possible_names(case: FoundCase) -> list[str]:
    """What a case may be called, the shortest first."""
    place = case.place if case.place and case.place[-1] == case.name else (*case.place, case.name)
    return [case.name, "/".join(place), "/".join(filter(None, (case.split, *place)))]
