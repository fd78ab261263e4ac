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
from common.samples import SPLIT_FILLERS, Faults, files_below, inside, readable, split_of
from volumes import VOLUME_ENDINGS, volume_stem

MASK_WORDS = frozenset(
    ("label", "labels", "lbl", "labelmap", "mask", "masks", "seg", "segs", "dseg", "segmentation", "segmentations")
    + ("annotation", "annotations", "gt", "groundtruth", "ground", "truth", "roi", "rois", "contour", "contours")
)
# What a scan was made with, which also tells the images of one case apart.
CT_WORDS = frozenset(("ct", "cta", "cbct"))
MR_WORDS = frozenset(
    ("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n", "t2", "t2w", "t2f", "flair", "dwi", "adc", "pd", "pdw", "bold")
)
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "imgs", "imaging", "scan", "scans", "volume", "volumes", "vol", "vols", *CT_WORDS, *MR_WORDS)
)
SPLIT_ENDINGS = {"tr": "train", "va": "val", "ts": "test"}  # imagesTr
CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net's, at the end of an image's name
PER_CASE = "a folder for each case"
LISTED = "pairs that dataset.json lists"
NNUNET = "nnU-Net"
BY_NAME = "images and masks of one name"
BY_WORDS = "images and masks told apart by a word of their names"
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


@dataclass(frozen=True)
class VolumeFile:
    path: Path
    stem: str  # its name without the ending, NFC
    role: str  # "image", "mask", or "" where nothing says it
    place: tuple[str, ...]  # the folders above it that do not say what it is
    split: str | None
    modality: str | None

    @property
    def key(self) -> tuple[str, ...]:
        """By which it is compared where image and mask are named differently: the words that do not say what it is."""
        return tuple(words_of(bare_name(self.stem)))


def find_layout(root: Path, faults: Faults) -> tuple[list[FoundCase], str]:
    """(cases in order of their places, what the layout is called) of a folder; faults is told of files that belong to no case."""
    volumes, tables = sort_files(root, faults)
    cases, volumes = take_listed(volumes, tables, faults)
    groups = defaultdict(list)
    for volume in volumes:
        groups[volume.place, volume.split].append(volume)
    layouts = Counter({LISTED: len(cases)})
    left = []
    for group in groups.values():
        found, rest, layout = pair_group(with_roles(group, faults, root), speaks_of(group[0].path, tables), faults)
        layouts[layout] += len(found)
        cases += found
        left.append(rest)
    alone = not cases and not any(volume.role == "image" for rest in left for volume in rest)
    for rest in left:
        about = speaks_of(rest[0].path, tables) if rest else {}
        cases += left_over(rest, about, layouts[PER_CASE] > 0, alone, faults, root)
    return unique_names(cases, root), "masks without images" if alone else layouts.most_common(1)[0][0]


# ---- files -----------------------------------------------------------------------------------------------------------------


def sort_files(root: Path, faults: Faults) -> tuple[list[VolumeFile], dict[Path, dict]]:
    """(volumes, folder -> its dataset.json); of files in other formats faults is told, all else is passed over in silence."""
    volumes, tables, seen, series = [], {}, set(), Counter()
    for path in map(Path, files_below(root, faults)):
        name, shown = path.name.lower(), readable(path.relative_to(root).as_posix())
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
        shown = readable(folder.relative_to(root).as_posix())
        faults.add("format that is not read (DICOM); dcm2niix makes a NIfTI of a series", f"{shown} ({count} files)")
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


def describe(path: Path, root: Path) -> VolumeFile:
    """What the names of a file and of the folders above it say."""
    stem = unicodedata.normalize("NFC", readable(volume_stem(path.name)))
    folders = [unicodedata.normalize("NFC", readable(folder)) for folder in path.relative_to(root).parts[:-1]]
    roles = [role_of_folder(folder) for folder in folders]
    place = tuple(folder for folder, role in zip(folders, roles, strict=True) if not role)
    own = words_of(stem)
    named = "mask" if MASK_WORDS & set(own) else "image" if IMAGE_WORDS & set(own) else ""
    near = next((role for folder, role in zip(folders[::-1], roles[::-1], strict=True) if role or not split_of(folder)), "")
    role = near or named or next(filter(None, roles[::-1]), "")
    words = [word for folder in folders for word in words_of(folder)]
    split = next((SPLIT_ENDINGS[word] for word in words if word in SPLIT_ENDINGS), None)
    split = split or next(filter(None, map(split_of, folders)), None)
    modality = next(filter(None, map(modality_word, (*own, *reversed(words)))), None)
    return VolumeFile(path, stem, role, place, split, modality)


def role_of_folder(name: str) -> str:
    """ "mask" or "image" for a folder that is named for what it holds (labelsTr, train_images), else ""."""
    words = set(words_of(name))
    if words & MASK_WORDS and not any(word.isdecimal() for word in words):
        return "mask"
    fillers = {*SPLIT_FILLERS.split(), *SPLIT_ENDINGS, "nii", "nifti"}
    rest = {word for word in words - IMAGE_WORDS - fillers if split_of(word) is None}
    return "image" if words & IMAGE_WORDS and not rest else ""


def words_of(name: str) -> list[str]:
    """The words of a name in small letters: imagesTr, train-images, label0001 (label, 0001), t1w."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = []
    for word in filter(None, re.split(r"[\W_]+", apart.casefold())):
        numbered = re.fullmatch(r"([a-z]+)(\d+)", word)
        known = numbered and numbered[1] in MASK_WORDS | IMAGE_WORDS and not modality_word(word)
        words += numbered.groups() if known else [word]
    return words


def modality_word(word: str) -> str | None:
    return "ct" if word in CT_WORDS else "mr" if word in MR_WORDS else None


def bare_name(stem: str, dropped: frozenset = MASK_WORDS | IMAGE_WORDS) -> str:
    """A stem without the words that say what it is: case_01 of case_01_seg, 0001 of label0001, nothing of segmentation."""
    parts = re.split(r"([\W_]+)", stem)  # words at even places, what is between them at odd ones
    for place in range(0, len(parts), 2):
        words = words_of(parts[place])
        if dropped & set(words):
            parts[place] = "".join(word for word in words if word not in dropped)
            if not parts[place] and place:
                parts[place - 1] = ""
    return re.sub(r"^[_\-. ]+|[_\-. ]+$", "", "".join(parts))


def with_roles(group: list[VolumeFile], faults: Faults, root: Path) -> list[VolumeFile]:
    """The volumes of a place, each an image or a mask: what does not say so is what is missing there, alone a mask."""
    roles = {volume.role for volume in group} - {""}
    if len(roles) == 2:
        for volume in group:
            if not volume.role:
                faults.add("volume that is neither image nor mask by its name", readable(str(volume.path.relative_to(root))))
        return [volume for volume in group if volume.role]
    other = "image" if roles == {"mask"} else "mask"
    return [volume if volume.role else replace(volume, role=other) for volume in group]


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
    first = channels.get("0") if isinstance(channels, dict) else None
    return next(filter(None, map(modality_word, words_of(str(first)))), image.modality)


def pair_group(group: list[VolumeFile], about: dict, faults: Faults) -> tuple[list[FoundCase], list[VolumeFile], str]:
    """(cases, volumes that are left over, layout) of the volumes of one place."""
    images = [volume for volume in group if volume.role == "image"]
    masks = [volume for volume in group if volume.role == "mask"]
    if of_one_image(images, masks):
        return [a_case(bare_name(images[0].stem), images[0], organs_of(masks), about, images[0].split)], [], PER_CASE
    ways = {
        BY_NAME: (attrgetter("stem"), attrgetter("stem")),
        NNUNET: (without_channel, attrgetter("stem")),
        BY_WORDS: (attrgetter("key"), attrgetter("key")),
    }
    # The way that fits most comes first: among nnU-Net's channels the image P_0000 is not that of the mask P_0000.
    ranked = sorted(ways, key=lambda way: -len(matches(images, masks, *ways[way])))
    cases = []
    for way in ranked:
        for found, mask in matches(images, masks, *ways[way]):
            name = bare_name(mask.stem) or last_of(mask) or mask.stem if way == BY_WORDS else mask.stem
            cases.append(a_case(name, found[0], [("", mask.path)], about, mask.split))
            images = [image for image in images if image not in found]
            masks = [other for other in masks if other is not mask]
            if len(found) > 1:
                faults.note("several images of a case, the first is taken", f"{name} ({found[0].path.name} of {len(found)})")
    return cases, images + masks, ranked[0]


def without_channel(image: VolumeFile) -> str | None:
    """case_1 of nnU-Net's case_1_0000; None of a name that has no channel."""
    return CHANNEL.sub("", image.stem) if CHANNEL.search(image.stem) else None


def of_one_image(images: list[VolumeFile], masks: list[VolumeFile]) -> bool:
    """Whether masks are a case's organs: beside the only image, which has no name of its own, or in a folder below it."""
    if len(images) != 1 or not masks or any(mask.stem == images[0].stem for mask in masks):
        return False
    above = images[0].path.parent
    return not bare_name(images[0].stem) or all(above in mask.path.parents and above != mask.path.parent for mask in masks)


def organs_of(masks: list[VolumeFile]) -> list[tuple[str, Path]]:
    """(organ, path): liver of liver.nii.gz, and "" of segmentation.nii.gz, whose labels tell organs apart."""
    return [(bare_name(mask.stem, MASK_WORDS), mask.path) for mask in masks]


def matches(images: list[VolumeFile], masks: list[VolumeFile], of_image, of_mask) -> list[tuple[list[VolumeFile], VolumeFile]]:
    """(images of one key in order of their names, the mask of that key) for each key that both have."""
    keyed, taken = defaultdict(list), {None}
    for image in images:
        keyed[of_image(image)].append(image)
    pairs = []
    for mask in masks:
        if (key := of_mask(mask)) in keyed and key not in taken:
            pairs.append((keyed[key], mask))
            taken.add(key)
    return pairs


def left_over(rest: list[VolumeFile], about: dict, per_case: bool, alone: bool, faults: Faults, root: Path) -> list[FoundCase]:
    """Cases of masks alone, where a folder holds no image at all; else faults is told of what has no partner."""
    images = [volume for volume in rest if volume.role == "image"]
    masks = [volume for volume in rest if volume.role == "mask"]
    for image in images:
        if image.split != "test":  # images to try a model on have no masks
            faults.add("image without a mask", readable(image.path.relative_to(root).as_posix()))
    together = masks and (per_case or all(mask.path.parent.name.casefold() == "segmentations" for mask in masks))
    if alone and together:
        return [FoundCase(last_of(masks[0]), masks[0].place, None, tuple(organs_of(masks)), masks[0].split, None, about)]
    if alone:
        return [FoundCase(mask.stem, mask.place, None, (("", mask.path),), mask.split, None, about) for mask in masks]
    if together and masks[0].place:
        faults.add("case without an image (looked for ct.nii.gz, mri.nii.gz ...)", "/".join(masks[0].place))
        return []
    for mask in masks:
        faults.add("mask without an image", readable(mask.path.relative_to(root).as_posix()))
    return []


def unique_names(cases: list[FoundCase], root: Path) -> list[FoundCase]:
    """Cases under names that differ: with the folders above them where several have one (site_a/001)."""
    cases = [case if case.name else replace(case, name=root.resolve().name) for case in cases]
    counts = Counter(case.name for case in cases)
    named, taken = [], Counter()
    for case in sorted(cases, key=lambda case: (case.place, case.name, case.split or "")):
        name = case.name
        if counts[name] > 1:
            name = "/".join(case.place if case.place and case.place[-1] == name else (*case.place, name))
        taken[name] += 1
        if taken[name] > 1:  # imagesTr and imagesTs with the same names
            name = f"{case.split}/{name}" if case.split and f"{case.split}/{name}" not in taken else f"{name} ({taken[name]})"
            taken[name] += 1
        named.append(replace(case, name=name))
    return named
