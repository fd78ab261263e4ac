"""Prepares organs of CT and MR masks for training, and reports on them: how many, how large, whose, what was left out and why.

    python preprocess.py --data_dir ~/Totalsegmentator_dataset --organs liver,spleen
    python preprocess.py --data_dir ~/Task04_Hippocampus --output_dir ~/hippocampus --meshes

Reads the masks (NIfTI, in the layouts of TotalSegmentator, Medical Decathlon and nnU-Net, or images beside masks), crops each
organ and finds its signed distances in mm. train.py and train_lora.py do the same on the way where it was not done, and take
what is there: with the same --data_dir, or with the folder that this leaves. It holds the organs, prepared.json, report.md with
slices.png and volumes.png, and with --meshes the true surface of each organ in meshes/<case>/<organ>.ply, in mm.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Range, UserError, Workers, check_ranges, cli, parse  # noqa: E402


@dataclass
class Config:
    data_dir: str = ""  # folder with volumes and masks; empty: the synthetic demo data
    organs: str = ""  # names of the organs to prepare, with commas between them; empty: all that the masks hold
    group: str = ""  # regular expression that finds the patient in a case's name; empty: sub-01 of sub-01_ses-2, P7 of P7_visit2
    modality: Literal["auto", "ct", "mr"] = "auto"  # CT: a window of HU; MR: percentiles; auto: as the data says
    min_voxels: Annotated[int, Range(1, 10**6)] = 200  # organs with fewer are left out: they tell no shape
    meshes: bool = False  # also write each organ's surface as a PLY file
    output_dir: str = ""  # where organs and report go; empty: a folder of the user's cache, where train finds them
    num_workers: Workers = 0  # cases that are prepared at a time, each by a process; 0: as many as cores and memory allow

    def __post_init__(self):
        check_ranges(self)


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from cases import group_patients
    from common.runtime import counted, guard, say
    from data import find_organs
    from organs import MIN_VOXELS
    from prepared import prepare, prepared_folder, write_surfaces
    from preparing import Preparation, say_plan
    from report import report_on

    found = find_organs(config.data_dir, config.organs)
    if found.format == "prepared":
        raise UserError(f"{found.folder} is what this script leaves: train takes it as it is; name the volumes' own folder")
    own = [value for value, usual in ((config.group, ""), (config.min_voxels, MIN_VOXELS)) if value != usual]
    folder = Path(config.output_dir).expanduser() if config.output_dir else prepared_folder(found.folder, *own)
    if (folder.exists() and not folder.is_dir()) or folder.resolve() == found.folder.resolve():
        what = "the data's own folder" if folder.is_dir() else "no folder"
        raise UserError(f"--output_dir {folder} is {what}: name another, which may be new")
    with found.faults as faults:
        found.cases = group_patients(found.cases, config.group) if config.group else found.cases
        say_plan(found.cases, folder)
        preparation = Preparation(config.modality, config.min_voxels)
        items, about = prepare(found.cases, folder, config.num_workers, faults, preparation)
    faults.report()
    if config.meshes:
        write_surfaces(items, folder / "meshes", config.num_workers)
        say(f"{counted(len(items), 'mesh')} in RAS mm, in {folder / 'meshes'}")
    with guard("the report"):
        say(report_on(items, about, folder))
        say(f"report.md, slices.png and volumes.png are in {folder}")
    say(f"{counted(len(items), 'organ')} ready: python train_lora.py --data_dir {folder}")


if __name__ == "__main__":
    cli(main)
