"""Checks a data folder before anything is trained on it: what is damaged, what is there twice, labels that cannot be.

    python scripts/check_data.py ~/boxes                              # the task is recognised where the layout says it
    python scripts/check_data.py ~/boxes --task detection --report ~/report.json --quarantine ~/bad.txt --pictures ~/copies.png
    cd image_tasks/detection && python train_lora.py --data_dir ~/boxes --exclude ~/bad.txt

Reads the folder as the task's training does and tells what that would tell, and more: pictures, recordings and scans that are
one, also across the splits; classes that a split lacks; pictures that viewers turn. Each file is read once, and what was found is
kept for the next start, of training, too.

Exit code: 0 no error was found (perhaps warnings and notes), 1 there are errors, 2 the folder cannot be checked.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Seed, UserError, check_ranges, cli, parse  # noqa: E402
from findings import Findings  # noqa: E402
from task_modules import enter_task  # noqa: E402

OF_PICTURES = ("classification", "clip", "detection", "pose")


@dataclass
class Config:
    data_dir: str = ""  # the folder to check (or CSV file); may stand alone, without the flag
    task: Literal["auto", "classification", "clip", "detection", "pose", "voice_rvc", "medical_sam3d"] = (
        "auto"  # whose data it is
    )
    data_format: Literal["auto", "coco", "voc", "yolo", "csv"] = "auto"  # layout of boxes or keypoints; auto looks what is there
    report: str = ""  # JSON file for all that was found, each place by its name; empty: none
    quarantine: str = (
        ""  # text file for train's --exclude: what is of no use, and all but one of samples that are one; empty: none
    )
    pictures: str = ""  # PNG file for pictures that are one, side by side, where there are any; empty: none
    seed: Seed = 0  # that of the training: where there is no validation split, it says what becomes one

    def __post_init__(self):
        check_ranges(self)
        if not self.data_dir:
            raise UserError("name the folder to check: python check_data.py FOLDER")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(text) for text in argv]
    if argv and not argv[0].startswith("-"):
        argv = ["--data_dir", *argv]
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json, write_text
    from common.runtime import counted, guard, say
    from recognise import recognise

    folder = Path(config.data_dir).expanduser()
    if not folder.exists():
        raise UserError(f"there is no folder (or CSV file) {folder}")
    for place in (config.report, config.quarantine, config.pictures):
        path = Path(place).expanduser().absolute()
        if place and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {place} into")
        if place and path.is_dir():
            raise UserError(f"{place} is a folder: name a file to write")
    task = recognise(folder) if config.task == "auto" else config.task
    enter_task(task)
    findings = check(task, folder, config)
    say(findings.text())
    if config.report:
        write_json(Path(config.report).expanduser(), findings.to_json())
    if config.quarantine:
        text, strange = findings.quarantine_text()
        write_text(Path(config.quarantine).expanduser(), text)
        many = len(findings.quarantine()) - len(strange)
        say(f"{config.quarantine}: {counted(many, 'file')} to leave out by --exclude {config.quarantine}")
        if strange:
            say(f"not in it, for no line can hold their names: {', '.join(strange[:5])}; rename them")
    if config.pictures and findings.copies and task in OF_PICTURES:
        from check_pictures import draw_copies

        with guard("the picture of copies"):
            more = draw_copies(findings, Path(config.pictures).expanduser())
            rest = f"; {more} pairs more are in the report" if more else ""
            say(f"{config.pictures}: pictures that are one, side by side{rest}")
    if findings.count("error"):
        raise SystemExit(1)


def check(task: str, folder: Path, config: Config) -> Findings:
    """The task's own checks; the task has been entered."""
    if task == "voice_rvc":
        from check_recordings import check_recordings

        return check_recordings(folder, config.seed)
    if task == "medical_sam3d":
        from check_organs import check_organs

        return check_organs(folder, config.seed)
    from check_pictures import check_pictures

    return check_pictures(task, folder, config.data_format, config.seed)


if __name__ == "__main__":
    cli(main)
