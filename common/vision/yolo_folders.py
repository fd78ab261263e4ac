"""Where pictures and label files of a data set in YOLO's layout lie: as a data.yaml or obj.data says, or in the usual places."""

import os
import re
from collections import Counter
from pathlib import Path

from common.file_finder import FileFinder, name_parts
from common.samples import SPLIT_NAMES, Faults, read_text, split_of, visible_entries
from common.vision.pictures import picture_endings, pictures_below

# A folder of pictures -> that of their labels, which has the same place otherwise.
LABEL_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS", "JPEGImages": "labels"}


def yolo_splits(data_dir: Path, settings: dict, faults: Faults) -> dict[str, list[Path]]:
    """Split -> its pictures. settings: what data.yaml or obj.data says: perhaps path, and folders or lists by the splits' names.

    Pictures that are held out are not trained on, where the training folder has that of another split in it.
    """
    pictures = {split: yolo_pictures(data_dir, split, settings, faults) for split in SPLIT_NAMES}
    held_out = {path for split in ("val", "test") for path in pictures[split] or []}
    shared = [path for path in pictures["train"] or [] if path in held_out]
    if 0 < len(shared) < len(pictures["train"] or []):  # `train: images`, and val in a folder of it
        pictures["train"] = [path for path in pictures["train"] if path not in held_out]
        for path in shared:
            faults.note("picture of two splits, which is not trained on", path.name)
    return {split: paths for split, paths in pictures.items() if paths is not None}


def yolo_pictures(data_dir: Path, split: str, settings: dict, faults: Faults) -> list[Path] | None:
    """The pictures of a split, in the folders and lists that the settings name or in a usual folder; None where there is none."""
    entries = [value for key, value in settings.items() if isinstance(key, str) and key.lower() in SPLIT_NAMES[split]]
    entries = [e for value in entries for e in (value if isinstance(value, list) else [value]) if isinstance(e, str) and e]
    found = []
    for entry in entries:
        place = find_place(data_dir, str(settings.get("path") or ""), entry, split)
        if place:
            found += pictures_at(data_dir, place, split, faults)
        elif split != "test":  # many name one that did not come along
            faults.add(f"folder or list of the {split} split that is not there", entry)
    if not found:
        places = usual_places(data_dir, split)
        found = pictures_at(data_dir, places[0], split, faults) if places else None
        if found and places[0].is_dir():
            found = [path for path in found if not of_another_split(path.relative_to(places[0]), split)]
    for path, times in Counter(found or []).items():
        if times > 1:
            faults.note("picture that is listed twice, and taken once", path.name)
    return found and list(dict.fromkeys(found))


def of_another_split(path: Path, split: str) -> bool:
    return any(split_of(part) not in (None, split) for part in path.parts[:-1])


def find_place(data_dir: Path, root: str, entry: str, split: str) -> Path | None:
    """The folder or list in data_dir that an entry means; root: the data set's folder where it was made, perhaps elsewhere.

    Paths are often of another machine: the more of their last parts fit, the better. One that has lost the name of its split
    on the way (images, of ../train/images) is not believed.
    """
    whole = [part for part in name_parts(entry) if "*" not in part]
    named = any(split_of(part) == split for part in whole)
    tries = [name_parts(root) + whole, *(whole[start:] for start in range(len(whole)))]
    for parts in tries if whole else [[]]:
        place = descend(data_dir, parts)
        if place and (not named or any(split_of(part) == split for part in parts)):
            return place
    return None


def descend(folder: Path, parts: list[str]) -> Path | None:
    """What lies at these parts, as name_parts gives them, below the folder."""
    for part in parts:
        entries = [entry for entry in visible_entries(folder) if name_parts(entry.name) == [part]]
        if not entries:
            return None
        folder = folder / entries[0].name
    return folder


def usual_places(data_dir: Path, split: str) -> list[Path]:
    """The folders and lists of a split's pictures when nothing names the place, the likeliest first."""
    rooms = [data_dir / "images", data_dir / "Images", data_dir]
    named = [Path(e.path) for room in rooms for e in visible_entries(room) if e.is_dir() and split_of(e.name) == split]
    folders = [folder / "images" if (folder / "images").is_dir() else folder for folder in named]
    lists = [Path(e.path) for e in visible_entries(data_dir) if e.name.endswith(".txt") and split_of(e.name[:-4]) == split]
    return [p for p in [*folders, *lists, *(rooms if split == "train" else [])] if p.exists()]


def pictures_at(data_dir: Path, place: Path, split: str, faults: Faults) -> list[Path]:
    """The pictures below a folder, or those that a text file names, one a line."""
    if place.is_dir():
        return pictures_below(place)
    folders = [folder for folder in usual_places(data_dir, split) if folder.is_dir()]
    finder = FileFinder([data_dir, place.parent, *folders], picture_endings())
    lines = [line.strip() for line in read_text(place, faults).splitlines()]
    return [path for path in (finder.find(line, faults) for line in lines if line) if path]


class LabelFinder:
    """Finds the label files of pictures. Each folder is listed once."""

    def __init__(self, data_dir: Path, faults: Faults):
        self.data_dir, self.faults = data_dir, faults
        self.listings = {}  # folder -> {name, as it is and as it is compared: label file}
        self.owners = {}  # label file -> the picture that it was found for

    def find(self, picture: Path) -> Path | None:
        """A picture's label file, in the folder that belongs to its own or beside it; None where it has none, which is noted."""
        parts = Path(os.path.relpath(picture.parent, self.data_dir)).parts
        swapped = [(*parts[:n], LABEL_FOLDERS[part], *parts[n + 1 :]) for n, part in enumerate(parts) if part in LABEL_FOLDERS]
        name = f"{picture.stem}.txt"
        for folder in [*swapped[::-1], parts, ("labels", *parts)]:
            if folder not in self.listings:
                entries = visible_entries(self.data_dir.joinpath(*folder))
                files = {entry.name: Path(entry.path) for entry in entries if entry.name.lower().endswith(".txt")}
                self.listings[folder] = {**{name_parts(file)[-1]: path for file, path in files.items()}, **files}
            if file := self.listings[folder].get(name) or self.listings[folder].get(name_parts(name)[-1]):
                if (owner := self.owners.setdefault(file, picture)) != picture:
                    self.faults.note("label file of several pictures", f"{file.name} ({owner.name}, {picture.name})")
                return file
        self.faults.note("picture without a label file, which counts as one without objects", picture.name)
        return None

    def name_unused(self) -> None:
        """Names the label files, in the folders that were looked into, of which there is no picture."""
        files = {file for listing in self.listings.values() for file in listing.values()} - self.owners.keys()
        stems = {path.stem for path in pictures_below(self.data_dir)} if files else set()
        for file in sorted(files):
            if file.stem not in stems and re.match(r"\s*\d+(\s+[-+.\deE]+){4}", read_text(file, self.faults)):
                self.faults.add("label file without a picture", file.name)
