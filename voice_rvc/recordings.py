"""The recordings of a folder: which files, whose voice, which split, which of them are one sound."""

from dataclasses import dataclass
from pathlib import Path

from audio_files import AUDIO_ENDINGS, check_file, is_audio
from common.config import UserError
from common.runtime import say
from common.samples import BadFile, Faults, data_folder, files_below, readable, short_names, split_of, visible_entries

SPEAKERS = ("auto", "one", "folders")  # --speakers: numbered folders are voices, all is one voice, every folder is a voice


@dataclass(frozen=True)
class Recording:
    """A file with sound. name: unique in its data; speaker: a row of `speakers`; split: as its folder says, or None.

    group: recordings of one sound (copies, quieter ones, an mp3 of it) have the same, and belong on one side of a split.
    """

    path: Path
    name: str
    speaker: int
    split: str | None = None
    group: str = ""


def find_recordings(data_dir, faults: Faults, speakers: str = "auto") -> tuple[list[Recording], list[str]]:
    """(recordings in order of their paths, names of the voices: Recording.speaker is a place in it) of a folder or of one file.

    Folders named like a split (train, val ...) give the split. speakers: of SPEAKERS; with "auto" numbered folders are voices
    as in Applio, and what lies beside them is voice 0. UserError where there is no recording.
    """
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise UserError(f"--data_dir: there is no folder or file {root}")
    if not root.is_dir():
        files, root = [root], root.parent
        voice = files[0].stem
    else:
        root = data_folder(root, lambda folder: any(map(shows_layout, visible_entries(folder))))
        files, voice = sound_files(root, faults), root.name
    if not files:
        raise UserError(f"--data_dir {data_dir}: no recording in it (looked for {', '.join(AUDIO_ENDINGS)})")
    splits, owners = zip(*(place_of(path.relative_to(root).parts[:-1]) for path in files), strict=True)
    voices = name_voices(list(owners), speakers, readable(voice))
    found = []
    for path, name, split, owner in zip(files, map(readable, short_names(files)), splits, owners, strict=True):
        try:
            check_file(path)
            speaker = voices.index(owner) if owner in voices else 0
            found.append(Recording(path, name, speaker, split, group=name))
        except (BadFile, OSError) as error:
            faults.add_error(str(error), name)
    if not found:
        raise UserError(f"--data_dir {data_dir}: none of its {len(files)} recordings can be used")
    say(f"{len(found)} recordings of {len(voices)} {'voice' if len(voices) == 1 else 'voices: ' + ', '.join(voices)}")
    return found, voices


def shows_layout(entry) -> bool:
    """Whether a folder that holds this entry is the one with the recordings, and no wrapping of an archive."""
    return entry.name.isdecimal() or split_of(entry.name) is not None or is_audio(entry.name)


def sound_files(root: Path, faults: Faults) -> list[Path]:
    """The files below a folder that should hold sound; faults is told of the others."""
    paths = files_below(root, faults)
    for path in paths:
        if not is_audio(path):
            faults.add("file that is no recording", readable(str(Path(path).relative_to(root))))
    return [Path(path) for path in paths if is_audio(path)]


def place_of(folders: tuple[str, ...]) -> tuple[str | None, str]:
    """(split, folder of the voice or "") that the folders above a file say."""
    split = next(filter(None, map(split_of, folders)), None)
    return split, next((folder for folder in folders if split_of(folder) is None), "")


def name_voices(owners: list[str], speakers: str, single: str) -> list[str]:
    """The voices' names, in order of their numbers or names; owners: each recording's folder, "" for those beside folders."""
    numbers = sorted({owner for owner in owners if owner.isdecimal()}, key=lambda name: (int(name), name))
    if speakers == "folders":
        return sorted(set(owners) - {""}) or [single]
    if speakers == "one" or len(numbers) < 2:
        return [single]
    beside = any(owner not in numbers for owner in owners)
    return ["0", *numbers] if beside and int(numbers[0]) > 0 else numbers
