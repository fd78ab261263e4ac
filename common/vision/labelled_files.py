"""Pictures with one class each as users bring them: class folders, with splits or without, or CSV files. Opens no picture."""

import itertools
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from common.file_finder import FileFinder, name_parts
from common.runtime import say
from common.samples import (
    SPLIT_NAMES,
    Faults,
    folder_splits,
    is_hidden,
    note_alike,
    note_shared,
    readable,
    split_folders,
    split_of,
    split_off,
    visible_entries,
)
from common.tables import read_table
from common.vision.pictures import is_picture, picture_endings, pictures_below

LAYOUTS = "train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg, or a CSV file with the columns path and label"
TABLES = (".csv", ".tsv")
# What a CSV file may call its columns, small and without what is no letter: the first that is there counts.
COLUMNS = {
    "path": "path file filename image filepath imagepath imagename imagefile img imgpath imgname picture photo imageid id name",
    "label": "label class classname labels labelname category categoryname target breed species diagnosis dx choice "
    "classid labelid",
    "split": "split subset partition set",
}


@dataclass
class Sample:
    path: Path
    name: str  # the path inside the data folder: the same wherever the folder lies
    label: int


def read_dataset(source: Path, seed: int, faults: Faults, scored: bool = False):
    """(splits, classes, layout): splits maps train, val and perhaps test to lists of Sample; classes are sorted names.

    Without a val split about a fifth of every class becomes it: a hash of (seed, file name) decides for each picture alone.
    scored: the data is there to score a checkpoint, whose classes count; then no training split is needed, and `classes` are
    those of all splits. UserError where there is nothing to learn, or another split has a class that train has not.
    """
    if source.is_dir():
        root, (rows, layout) = source, read_folder(source, faults, scored)
    elif source.suffix.lower() in TABLES and source.is_file():
        root, layout = source.parent, "csv"
        rows = read_csv(source, root, faults, split_of(source.stem, alone=False) if scored else None)
    else:
        raise UserError(f"--data_dir: there is no folder (or CSV file) {source}")
    # One name may come in two forms of Unicode, from a Mac's disk and from a table: they are compared in one.
    names = {unicodedata.normalize("NFC", label): label for split, _, label in rows if scored or split == "train"}
    names = dict(sorted(names.items(), key=lambda item: item[1]))
    check_classes(source, list(names.values()), scored)
    note_alike(list(names.values()), faults)
    splits, start, number_of = {}, f"{root.as_posix()}/", {name: number for number, name in enumerate(names)}
    for split, path, label in rows:
        number = number_of.get(unicodedata.normalize("NFC", label))
        if number is None:
            raise UserError(f"{source}: the {split} split has the class {label!r}, which the training data has not")
        splits.setdefault(split, []).append(Sample(path, path.as_posix().removeprefix(start), number))
    classes = list(names.values())
    if not scored:
        note_shared(splits, faults)
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = split_classes(splits["train"], classes, seed, scored)
        many = f"{len(splits['val'])} of {len(splits['val']) + len(splits['train'])} pictures"
        say(f"no validation split in {source}: {many}, of every class a fifth by seed {seed}, become it")
    return splits, classes, layout


def check_classes(source: Path, names: list[str], scored: bool) -> None:
    """UserError where these are no classes to tell apart."""
    splits = [name for name in names if split_of(name)]
    if len({split_of(name) for name in splits}) > 1:
        raise UserError(f"{source}: {' and '.join(splits[:3])} look like splits, not like classes; expected {LAYOUTS}")
    if len(names) < (1 if scored else 2):
        found = f"only the class {names[0]}" if names else "no pictures" if scored else "no training pictures"
        raise UserError(f"{source} holds {found}; expected {LAYOUTS}")


def split_classes(samples: list[Sample], classes: list[str], seed: int, scored: bool = False):
    """(train, validation): of every class about a fifth is split off, at least one picture; of one picture only if scored."""
    train, val, members = [], [], [[] for _ in classes]
    for sample in samples:
        members[sample.label].append(sample)
    for name, mine in zip(classes, members, strict=True):
        single = len({s.name for s in mine}) < 2
        if single and not scored:
            raise UserError(f"the class {name!r} has one picture: too few to train and to validate on")
        chosen = [True] * len(mine) if single else split_off([s.name for s in mine], seed)
        for sample, held_out in zip(mine, chosen, strict=True):
            (val if held_out else train).append(sample)
    return train, val


# ---- folders ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, faults: Faults, scored: bool):
    """([(split, path, class name)], layout) of a folder: train/<class>/, <class>/, or CSV files in it."""
    folder = unwrap(folder)
    places = split_folders(folder)
    if any(folders_in(place) or tables_in(place) for place in places.values()):  # else they are classes: a train is a vehicle
        if "train" not in places and not scored:
            there = " and ".join(f"{place.name}/" for place in places.values())
            raise UserError(f"--data_dir {folder} holds {there}, but no train/")
        for other in (p for p in folders_in(folder) if p not in places.values() and pictures_below(p)):
            faults.add("folder of pictures beside the splits", other.name)
        found = [row for split, place in places.items() for row in read_split(place, split, faults)]
        return found, "folders"
    tables = [table for table in tables_in(folder) if not no_labels(table, faults)]
    if not tables:
        return [("train", *pair) for pair in class_folders(folder, faults)], "one folder"
    if len(tables) == 1:
        return read_csv(tables[0], folder, faults, split_of(tables[0].stem, alone=False) if scored else None), "csv"
    named = {split: [t for t in tables if split_of(t.stem, alone=False) == split] for split in SPLIT_NAMES}
    if max(map(len, named.values())) != 1 or not (named["train"] or scored):
        raise UserError(f"--data_dir {folder} holds {len(tables)} CSV files; name the one to read")
    for table in tables:
        if [table] not in named.values():
            faults.add("CSV file of no split", table.name)
    return [row for split, mine in named.items() for table in mine for row in read_csv(table, folder, faults, split)], "csv"


def no_labels(table: Path, faults: Faults) -> bool:
    """Whether a table is a competition's for answers, or of a test split without them: faults is told that it is not read."""
    unlabelled = "submission" in table.stem.lower()
    if not unlabelled and split_of(table.stem, alone=False) == "test":
        _, head = next(read_table(table, faults), (0, []))
        unlabelled = len(head) == 1
    if unlabelled:
        faults.add("CSV file without labels", table.name)
    return unlabelled


def read_split(place: Path, split: str, faults: Faults) -> list[tuple[str, Path, str]]:
    """The rows of a split's own folder: of class folders, or of a CSV file beside its pictures (metadata.csv, _classes.csv)."""
    place, tables = unwrap(place), tables_in(place)
    if len(tables) == 1 and not folders_in(place):
        return [(split, path, label) for _, path, label in read_csv(tables[0], place, faults)]
    return [(split, *pair) for pair in class_folders(place, faults)]


def unwrap(folder: Path) -> Path:
    """The folder that holds the data: archives often wrap it in folders that hold nothing else (chest_xray/chest_xray/train)."""
    inner = folders_in(folder)
    while len(inner) == 1 and not split_of(inner[0].name) and not tables_in(folder) and folders_in(inner[0]):
        if any(is_picture(entry.name) for entry in visible_entries(folder)):
            break
        folder, inner = inner[0], folders_in(inner[0])
    wrapped_again = len(inner) == 1 and inner[0].name == folder.name and folders_in(inner[0])  # seg_train/seg_train/<class>
    return inner[0] if wrapped_again else folder


def folders_in(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in visible_entries(folder) if entry.is_dir()]


def tables_in(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in visible_entries(folder) if entry.name.lower().endswith(TABLES) and entry.is_file()]


def class_folders(folder: Path, faults: Faults) -> list[tuple[Path, str]]:
    """(picture, class name) of every picture in folder/<class>/, at any depth. Hidden folders are no classes."""
    found = []
    for entry in visible_entries(folder):
        place = folder / entry.name
        if not entry.is_dir():
            fault = "picture outside the class folders" if is_picture(entry.name) else "file that is no picture"
            faults.add(fault, f"{folder.name}/{entry.name}")
            continue
        pictures = pictures_below(place, faults)
        if not pictures:
            faults.add("class folder without pictures", f"{folder.name}/{entry.name}")
        below = (os.fspath(path)[len(os.fspath(place)) + 1 :].partition(os.sep) for path in pictures)
        splits = sorted({name for name, deeper, _ in below if deeper and split_of(name)})
        if len({split_of(name) for name in splits}) > 1:
            raise UserError(f"{place} holds {' and '.join(splits)}; expected {LAYOUTS}, not <class>/{splits[0]}/")
        label = readable(entry.name)
        found += [(path, label) for path in pictures]
    return found


# ---- CSV files -------------------------------------------------------------------------------------------------------


def read_csv(file: Path, folder: Path, faults: Faults, split: str | None = None) -> list[tuple[str, Path, str]]:
    """[(split, path, class name)] of a CSV file with a header line; without a column of splits all is `split`, or training data.

    The classes stand in one column, or are columns of which one holds a 1. UserError where most of the pictures are not there.
    """
    lines = read_table(file, faults)
    (_, head), first = next(lines, (0, [])), next(lines, None)
    column, one_hot = find_columns(file, head, first[1] if first else [])
    pictures, missing, seen = ListedPictures(file, folder, faults), [], {}
    for number, cells in itertools.chain([first] if first else [], lines):
        name, label, its_split = (cells[i] if i is not None and i < len(cells) else "" for i in column.values())
        if one_hot:
            ones = [head[i] for i in one_hot if i < len(cells) and cells[i] in ("1", "1.0")]
            label = ones[0] if len(ones) == 1 else ""
            if len(ones) > 1:
                faults.add("CSV line of several classes", f"{file.name} line {number}")
                continue
        label = re.sub(r"^(-?\d+)\.0+$", r"\1", label)  # whole numbers become 1.0 where a program found a cell empty
        row_split, where = split or "train" if column["split"] is None else split_of(its_split), f"{file.name} line {number}"
        if not name or not label:
            faults.add("CSV line without a path or a label", where)
        elif row_split is None:
            faults.add("CSV line of a split that is none of train, val, test", where)
        elif (path := pictures.find(name, label)) is None:
            faults.add("picture that is not there", name[:80])
            missing.append(name)
        elif pictures.is_hidden(path):
            faults.add("hidden copy of a picture", name[:80])
        elif seen.setdefault((row_split, path), label) != label:
            faults.add("picture that is listed with two classes", f"{where}: {name[:80]}")
    if column["split"] is None and not split:  # metadata.csv over train/a.jpg and val/b.jpg
        splits = folder_splits([path for _, path in seen], folder, faults)
        seen = {(its_split, path): label for its_split, ((_, path), label) in zip(splits, seen.items(), strict=True)}
    if len(missing) > len(seen):
        told = f"{len(missing)} of {len(missing) + len(seen)} pictures are not there, the first {missing[0][:80]!r}"
        raise UserError(f"{file}: {told}; paths start at {folder}{pictures.hint(missing[0])}")
    return [(row_split, path, label) for (row_split, path), label in seen.items()]


def find_columns(file: Path, head: list[str], first: list[str]) -> tuple[dict[str, int | None], list[int]]:
    """(column of path, label and split, if there is one; the columns of the classes where each has one) of a CSV file.

    head, first: the cells of the first two lines. UserError where they do not say what is what.
    """
    spelled = [re.sub(r"[\W_]", "", cell.lower()) for cell in head]
    column = {
        key: next((spelled.index(name) for name in names.split() if name in spelled), None) for key, names in COLUMNS.items()
    }
    known = [number for number in column.values() if number is not None]
    others = [number for number in range(len(head)) if number not in known]
    one_hot = []
    if column["path"] is not None and column["label"] is None:
        flags = [first[number] for number in others if number < len(first)]
        if len(others) > 1 and len(flags) == len(others) and set(flags) <= {"0", "1", "0.0", "1.0"}:
            one_hot = others
    if column["path"] is None or (column["label"] is None and not one_hot):
        more = ", a picture and not the names of columns" if any(map(is_picture, head)) else ""
        raise UserError(
            f"{file}: its first line must name the columns path and label (and perhaps split); "
            f"it is {','.join(head[:20])[:80]!r}{more}"
        )
    return column, one_hot


class ListedPictures:
    """The pictures that a CSV file lists: at the path it gives, in the usual folders beside it, or by the path's last parts.

    The last is for paths of other machines and with other slashes, and for names without an ending. It holds where the path
    names the folder that the picture lies in, or that is the usual or its class': else 1.jpg would be anybody's.
    """

    def __init__(self, file: Path, folder: Path, faults: Faults):
        usual = [folder, folder.parent, folder / "images", folder.parent / "images", folder / file.stem]
        self.folder, self.faults = folder, faults
        self.usual = list(dict.fromkeys([*usual, *split_folders(folder).values()]))
        self.finder = FileFinder([folder, folder.parent / "images", *self.usual[2:]], picture_endings())

    def find(self, name: str, label: str) -> Path | None:
        """The picture of a row; None where there is none, or several would do."""
        places = (os.path.join(place, name) for place in self.usual)
        if direct := next(filter(os.path.isfile, places), ""):
            return Path(direct)
        found = self.finder.find_by_last_parts(name)
        own = {*name_parts(name)[-2:-1], *name_parts(label)}
        if len(found) != 1 or not (self.holds_pictures(found[0].parent) or own & set(name_parts(found[0].parent)[-1:])):
            return None
        self.faults.note("picture not found as named, but by the last parts of its path", f"{name[:80]} ({found[0]})")
        return found[0]

    def holds_pictures(self, place: Path) -> bool:
        """Whether a folder is one of the usual, or called after what is in it: HAM10000_images_part_1."""
        return place in self.usual or re.search("image|picture|photo", place.name.lower()) is not None

    def is_hidden(self, path: Path) -> bool:
        """Whether a part of the path below the CSV file's folder, or elsewhere its name, is hidden."""
        start, text = os.path.join(self.folder, ""), os.fspath(path)
        parts = text[len(start) :].split(os.sep) if text.startswith(start) else [path.name]
        return any(map(is_hidden, parts))

    def hint(self, name: str) -> str:
        found = self.finder.find_by_last_parts(name)
        return f"; there is a {found[0]}" if found else ""
