"""What the names of volume files and of the folders above them say: image or mask, of which case, in which split."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from common.samples import SPLIT_FILLERS, printable, readable, split_of
from volumes import volume_stem

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

    @property
    def named(self) -> str | None:
        """ct or mr, where its own name says so."""
        return next(filter(None, map(modality_word, words_of(self.stem))), None)


def name_as_text(name: str) -> str:
    """A name as one line that can be printed, written and compared: NFC, line feeds and bytes that are no text escaped."""
    return printable(unicodedata.normalize("NFC", readable(name)))


def path_below(path: Path, root: Path) -> str:
    """What to call a file where people read it: its path in the data folder."""
    return name_as_text(path.relative_to(root).as_posix())


def describe(path: Path, root: Path) -> VolumeFile:
    """What the names of a file and of the folders above it say."""
    *folders, stem = map(name_as_text, (*path.relative_to(root).parts[:-1], volume_stem(path.name)))
    roles = [role_of_folder(folder) for folder in folders]
    place = tuple(folder for folder, role in zip(folders, roles, strict=True) if not role)
    own = words_of(stem)
    named = "mask" if MASK_WORDS & set(own) else "image" if IMAGE_WORDS & set(own) else ""
    near = next((role for folder, role in zip(folders[::-1], roles[::-1], strict=True) if role or not split_of(folder)), "")
    role = near or named or next(filter(None, roles[::-1]), "")
    words = [word for folder, role in zip(folders, roles, strict=True) if role for word in words_of(folder)]
    split = next((SPLIT_ENDINGS[word] for word in words if word in SPLIT_ENDINGS), None)
    split = split or next(filter(None, map(split_of, folders)), None)
    above = [word for folder in folders[::-1] for word in words_of(folder)]
    modality = next(filter(None, map(modality_word, own + above)), None)
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
