"""Which task a data folder is for, by whose own reader takes it.

    python recognise.py detection ~/boxes        # exit code 0: that task reads it

Tasks name their modules alike, so each reader is asked in a process of its own: this file, run with a task and a folder.
"""

import subprocess
import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402
from common.samples import Faults, files_below  # noqa: E402
from task_modules import FOLDERS, enter_task  # noqa: E402

ASKED = ("medical_sam3d", "voice_rvc", "classification", "detection", "pose")  # clip reads what classification does


def reads(task: str, folder: Path) -> bool:
    """Whether the task's reader finds samples in a folder; no sample is opened."""
    try:
        enter_task(task)
        if task == "medical_sam3d":
            from layouts import find_layout

            return bool(find_layout(folder, Faults())[0])
        if task == "voice_rvc":
            from audio_files import is_audio

            return any(is_audio(path) for path in map(Path, files_below(folder)))
        if task == "classification":
            from common.vision.labelled_files import read_dataset

            return bool(read_dataset(folder, 0, Faults())[0])
        from formats import read_dataset

        return bool(read_dataset(folder, "auto", 0, Faults())[0])
    except UserError:
        return False


def recognise(folder: Path) -> str:
    """The task that a folder is for. UserError where none reads it, or several do."""
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError(f"{folder} is empty")
    command = [sys.executable, str(Path(__file__).resolve())]
    asked = {
        task: subprocess.Popen([*command, task, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for task in ASKED
    }
    fitting = [task for task, process in asked.items() if process.wait() == 0]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UserError(
            f"{folder}: no task reads this as it is; say which it is for by --task ({', '.join(FOLDERS)}) to hear why"
        )
    raise UserError(f"{folder} can be read for {' and for '.join(fitting)}: say which by --task")


def main(arguments: list[str]) -> int:
    """The exit code: 0 where the task reads the folder, 1 where it does not, 2 where that was not asked."""
    if len(arguments) != 2 or arguments[0] not in ASKED:
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    return 0 if reads(arguments[0], Path(arguments[1])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
