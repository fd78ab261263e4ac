"""Reads keypoint annotations - COCO JSON, CSV or Ultralytics' YOLO - into one form. Knows no model; opens no picture.

Files from outside are checked here: what is malformed is named, counted and left out; what makes the whole set unusable is a
UserError. Coordinates leave in pixels of the picture as a person sees it, whole numbers at pixel centres.
"""

from pathlib import Path

from coco_points import coco_files, read_coco
from common.config import UserError
from common.samples import Faults, choose_layout, data_folder, hold_out, note_shared, split_by_folders
from common.vision.foreign import foreign_hint
from csv_points import csv_files, read_csv
from keypoints import KEYPOINT_FILE, add_keypoint_file, describe_keypoints, mark_fractions
from yolo_points import read_yolo, yolo_file

LAYOUTS = (
    "COCO keypoints (annotations/*.json), CSV (a file with train in its name: picture, nose_x, nose_y ..., or DeepLabCut's) or "
    "YOLO (data.yaml with kpt_shape, images/, labels/)"
)


def read_dataset(data_dir: Path, data_format: str, seed: int, faults: Faults, to_train: bool = True):
    """(splits, KeypointSet, format): splits maps train, val and perhaps test to lists of Sample.

    data_format: "auto" recognises the layout by what is there. Without a val split about a fifth of the training pictures
    becomes it: a hash of (seed, file name) decides for each picture alone, so that adding pictures moves no other. to_train:
    there must be training pictures.
    """
    data_dir = data_folder(data_dir, lambda folder: coco_files(folder) or csv_files(folder) or yolo_file(folder))
    readers = {"coco": read_coco, "csv": read_csv, "yolo": read_yolo}
    there = {"coco": coco_files(data_dir), "csv": csv_files(data_dir), "yolo": yolo_file(data_dir)}
    data_format = choose_layout(data_dir, data_format, there, LAYOUTS, foreign_hint)
    splits, names, named, own = readers[data_format](data_dir, there[data_format], faults)
    if (data_dir / KEYPOINT_FILE).is_file():
        names, named, own = add_keypoint_file(data_dir / KEYPOINT_FILE, names, named, own)
    points = describe_keypoints(names, named, own, str(data_dir), to_train)
    if splits.keys() == {"train"}:
        splits = split_by_folders(splits["train"], data_dir, faults)
    for split, samples in splits.items():
        mark_fractions(f"{data_dir}, {split}", samples)
    if to_train and not splits.get("train"):
        raise UserError(f"{data_dir} ({data_format}) has no training pictures with keypoints")
    if to_train:
        note_shared(splits, faults)
    if splits.get("train") and not splits.get("val"):
        pictures = [s.path.name for s in splits["train"]]  # the figures of one picture stay together
        splits["train"], splits["val"] = hold_out(splits["train"], pictures, seed, data_dir, "pictures")
    return splits, points, data_format
