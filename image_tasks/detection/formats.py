"""Reads detection annotations - COCO, Pascal VOC or YOLO - into one form. Knows no model; opens no picture.

Files from outside are checked here: what is malformed is named, counted and left out; what makes the whole set
unusable is a UserError. Boxes leave as (x1, y1, x2, y2) in pixels of the picture as a person sees it.
"""

from pathlib import Path

from boxes import mark_fractions
from coco_boxes import coco_files, read_coco
from common.config import UserError
from common.samples import Faults, choose_layout, data_folder, hold_out, note_alike, note_shared, split_by_folders
from common.vision.foreign import foreign_hint
from voc_boxes import is_voc, read_voc
from yolo_boxes import read_yolo, yolo_file

LAYOUTS = (
    "COCO (annotations/*.json), VOC (Annotations/, JPEGImages/) or YOLO (data.yaml or classes.txt, images/, labels/), "
    "as their tools and CVAT, Roboflow, Label Studio and FiftyOne write them"
)


def read_dataset(data_dir: Path, data_format: str, seed: int, faults: Faults, to_train: bool = True):
    """(splits, classes, format): splits maps train, val and perhaps test to lists of Sample; classes are names in order.

    data_format: "auto" recognises the layout by what is there. Without a val split about a fifth of train becomes it: a
    hash of (seed, file name) decides for each picture alone, so that adding pictures moves no other. to_train: there must be
    training pictures.
    """
    data_dir = data_folder(data_dir, lambda folder: is_voc(folder, False) or yolo_file(folder) or coco_files(folder))
    readers = {"voc": read_voc, "yolo": read_yolo, "coco": read_coco}
    there = {"voc": is_voc(data_dir, anywhere=False), "yolo": yolo_file(data_dir, lists=False), "coco": coco_files(data_dir)}
    if data_format != "auto" or not any(there.values()):  # signs that in another layout would say nothing
        there.update({"voc": is_voc(data_dir, anywhere=True), "yolo": yolo_file(data_dir)})
    data_format = choose_layout(data_dir, data_format, there, LAYOUTS, foreign_hint)
    splits, classes = readers[data_format](data_dir, faults)
    note_alike(classes, faults)
    if splits.keys() == {"train"}:
        splits = split_by_folders(splits["train"], data_dir, faults)
    for split, samples in splits.items():
        mark_fractions(f"{data_dir}, {split}", samples)
    if to_train and not splits.get("train"):
        hint = "" if any(splits.values()) else foreign_hint(data_dir)
        raise UserError(f"{data_dir} ({data_format}) has no training pictures{hint}")
    if not classes:
        raise UserError(f"{data_dir} ({data_format}) names no classes")
    if to_train:
        note_shared(splits, faults)
    if splits.get("train") and not splits.get("val"):
        names = [s.path.name for s in splits["train"]]
        splits["train"], splits["val"] = hold_out(splits["train"], names, seed, data_dir, "pictures")
    return splits, classes, data_format
