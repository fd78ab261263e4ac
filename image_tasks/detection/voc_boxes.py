"""Reads boxes in Pascal VOC's format: one XML per picture."""

import math
import os
import re
from collections import defaultdict
from pathlib import Path

from boxes import make_sample
from common.file_finder import FileFinder
from common.samples import SPLIT_NAMES, BadFile, Faults, files_below, read_text, split_of, visible_entries
from common.vision.pictures import picture_endings

PICTURE_FOLDERS = ("JPEGImages", "images", "Images", "img")  # beside the folder of annotations
LARGEST_XML = 2**24  # bytes; thousands of objects take one megabyte


def is_voc(data_dir: Path, anywhere: bool) -> bool:
    """Whether there are XML files: in a folder called annotations, or anywhere."""
    folders = [Path(entry.path) for entry in visible_entries(data_dir) if entry.is_dir() and entry.name.lower() == "annotations"]
    return any(p.lower().endswith(".xml") for place in ([data_dir] if anywhere else folders) for p in files_below(place))


def read_voc(data_dir: Path, faults: Faults):
    """Corner coordinates are taken as they stand (LabelImg's way). `difficult` boxes are treated as crowd: not scored."""
    finder, parsed = FileFinder([data_dir], picture_endings(), any_split=True), defaultdict(list)
    for file, split in voc_annotations(data_dir, faults).items():
        try:
            size, named, boxes = read_voc_file(file, faults)
        except (OSError, ValueError) as error:
            faults.add_error(str(error) if isinstance(error, BadFile) else "annotation that cannot be read", file.name)
            continue
        if picture := find_picture(finder, file.relative_to(data_dir), named, faults):
            parts = (*file.relative_to(data_dir).parts[:-1], *picture.relative_to(data_dir).parts[:-1])
            parsed[split or next(filter(None, map(split_of, parts)), "train")].append((picture, size, boxes))
    classes = sorted({box[4] for rows in parsed.values() for _, _, boxes in rows for box in boxes if box})
    numbers, splits = {name: number for number, name in enumerate(classes)}, {}
    for split in (split for split in SPLIT_NAMES if split in parsed):
        splits[split] = [
            make_sample(path, size, [b and (*b[:4], numbers[b[4]], b[5], math.nan) for b in boxes])
            for path, size, boxes in parsed[split]
        ]
    return splits, classes


# ---- which files -----------------------------------------------------------------------------------------------------


def voc_annotations(data_dir: Path, faults: Faults) -> dict[Path, str | None]:
    """Annotation -> split, as ImageSets/Main lists them; where there are no lists all, with None: their folders say the split."""
    paths = [Path(path) for path in files_below(data_dir)]
    files, lists = [path for path in paths if path.suffix.lower() == ".xml"], defaultdict(list)
    for path in paths:
        if path.parent.name.lower() in ("main", "imagesets") and path.suffix == ".txt":
            lists["trainval" if path.stem == "trainval" else split_of(path.stem)].append(path)
    if not any(lists[split] for split in (*SPLIT_NAMES, "trainval")):
        return dict.fromkeys(files)
    finder, listed = FileFinder(dict.fromkeys(file.parent for file in files), (".xml",)), {}
    for split in ("val", "test", "train", *(() if lists["train"] else ("trainval",))):  # what is listed twice is not trained on
        lines = [line.strip() for path in lists[split] for line in read_text(path, faults).splitlines()]
        for file in filter(None, (find_annotation(finder, line, faults) for line in lines if line)):
            listed.setdefault(file, split.removesuffix("val") or split)
    if not lists["train"] and not lists["trainval"]:
        listed.update({file: "train" for file in files if file not in listed})
    return listed


def find_annotation(finder: FileFinder, line: str, faults: Faults) -> Path | None:
    """The annotation that a line of a list names, with or without an ending; lists of one class have 1 or -1 behind the name."""
    names = [line, re.sub(r"\s+-?[01]$", "", line)]
    names = [os.path.splitext(n)[0] if n.lower().endswith((".xml", *picture_endings())) else n for n in names]
    return finder.find_as_it_stands(f"{names[0]}.xml") or finder.find(f"{names[1]}.xml", faults, "annotation")


def find_picture(finder: FileFinder, annotation: Path, named: str, faults: Faults) -> Path | None:
    """The picture of an annotation (a path in data_dir) whose <filename> is `named`.

    First by the annotation's own name, beside it or in the folder of pictures beside its folder, for <filename> is often of
    another day; where two pictures differ in their ending, <filename> chooses.
    """
    folders = [annotation.parent]
    for number, part in enumerate(annotation.parts[:-1]):
        if part.lower() in ("annotations", "annotation", "xmls", "labels"):
            folders += [Path(*annotation.parts[:number], name, *annotation.parts[number + 1 : -1]) for name in PICTURE_FOLDERS]
    file = Path(named.replace("\\", "/")).name
    names = [file, annotation.stem] if os.path.splitext(file)[0] == annotation.stem else [annotation.stem, file]
    for name in filter(None, names):
        for folder in folders:
            if picture := finder.find_as_it_stands(str(folder / name)):
                return picture
    own = str(annotation.with_suffix(""))
    return finder.find(own, None if named else faults) or (finder.find(named, faults) if named else None)


# ---- one file --------------------------------------------------------------------------------------------------------


def read_voc_file(file: Path, faults: Faults):
    """((width, height) or None, <filename>, [(x1, y1, x2, y2, name, difficult)]) of an annotation.

    None stands for a box that cannot be read. BadFile or ValueError where it is none, OSError where it cannot be opened.
    """
    root, boxes = parse_xml(file, faults), []
    if root.tag != "annotation":
        raise BadFile("XML that is no annotation in VOC's format")
    try:
        size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        size = (0, 0)  # the picture itself knows
    for number, thing in enumerate(root.iter("object")):
        corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            corners, name = [float(c) for c in corners], thing.findtext("name").strip()
            if not name:
                raise ValueError
            boxes.append((*corners, name, thing.findtext("difficult", "0").strip() == "1"))
        except (TypeError, ValueError, AttributeError):
            faults.add("box that cannot be read", f"{file.name} object {number + 1}")
            boxes.append(None)
    return size if min(size) > 0 else None, (root.findtext("filename") or root.findtext("path") or "").strip(), boxes


def parse_xml(file: Path, faults: Faults):
    """The root of an XML file in any encoding. BadFile for one with entities, whose text may be thousands of times its size."""
    import xml.etree.ElementTree as ElementTree

    if file.stat().st_size > LARGEST_XML:
        raise BadFile("annotation that is too large")
    content = file.read_bytes()
    head = re.match(rb"""\s*<\?xml[^>]*?encoding=["']([\w.-]+)""", content)
    try:
        text = content.decode(head[1].decode() if head else "utf-8")
    except (LookupError, ValueError):  # an encoding that nobody knows, or that the file does not keep to
        text = read_text(file, faults)
    if "<!ENTITY" in text:
        raise BadFile("annotation with XML entities")
    try:
        return ElementTree.fromstring(text.lstrip("\ufeff \r\n\t"))
    except (ElementTree.ParseError, ValueError) as error:
        raise BadFile(f"annotation that cannot be read, {error}") from None
