"""The recordings of a folder: which files, whose voice, which split, which of them are one sound."""

from dataclasses import dataclass, replace
from pathlib import Path

from audio_files import AUDIO_ENDINGS, is_audio
from common.config import UserError
from common.exclude import Exclusions
from common.runtime import counted, say
from common.samples import Faults, data_folder, files_below, printable, short_names, split_of, visible_entries
from common.scan import Scan
from copies import exact_copies, near_copies, sound_reader

SPEAKERS = ("auto", "one", "folders")  # --speakers: numbered folders are voices, all is one voice, every folder is a voice


@dataclass(frozen=True)
class Recording:
    """A file with sound. name: unique in its data; speaker: a row of `speakers`; split: as its folder says, or None.

    group: recordings of one sound (in two formats, quieter, an mp3 of it) have the same, and belong on one side of a split.
    """

    path: Path
    name: str
    speaker: int
    split: str | None = None
    group: str = ""
    seconds: float = 0.0


def find_recordings(
    data_dir, faults: Faults, speakers: str = "auto", excluded: Exclusions | None = None
) -> tuple[list[Recording], list[str]]:
    """(recordings in order of their paths, names of the voices: Recording.speaker is a place in it) of a folder or of one file.

    Every file is decoded once, and what is known of it kept for the next start: what cannot be read, and copies of a file,
    are left out and named in faults. Folders named like a split (train, val ...) give the split. speakers: of SPEAKERS; with
    "auto" numbered folders are voices as in Applio, and what lies beside them is voice 0. excluded: files that are as
    good as not there, so that a copy of one is used. UserError where nothing is left.
    """
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise UserError(f"--data_dir: there is no folder or file {root}")
    if root.is_dir():
        root = data_folder(root, lambda folder: any(map(shows_layout, visible_entries(folder))))
        files, voice = sound_files(root, faults), root.name
    else:
        files, voice, root = [root], root.stem, root.parent
    if excluded:
        files = excluded.leave_out(files, faults, lambda path: path)
        excluded.note_strangers(faults)
    if not files:
        raise UserError(f"--data_dir {data_dir}: no recording in it (looked for {', '.join(AUDIO_ENDINGS)})")
    splits, owners = zip(*(place_of(path.relative_to(root).parts[:-1]) for path in files), strict=True)
    voices, rows = name_voices(owners, speakers, voice)
    every = [Recording(*facts) for facts in zip(files, short_names(files), rows, splits, strict=True)]
    found = one_of_each_sound(*read_all(every, faults), faults)
    if not found:
        raise UserError(f"--data_dir {data_dir}: of its {counted(len(every), 'recording')} none can be used{faults.reason()}")
    minutes = sum(recording.seconds for recording in found) / 60
    many = "one voice" if len(voices) == 1 else f"{len(voices)} voices: {', '.join(voices)}"
    say(f"recordings: {len(found)}, {minutes:.1f} minutes, of {many}")
    return found, voices


def read_all(recordings: list[Recording], faults: Faults) -> tuple[list[Recording], list]:
    """(those that can be decoded, what look_at_sound found in each)."""
    scan = Scan([recording.path for recording in recordings], sound_reader())
    try:
        scan.look("reading recordings")
    finally:
        scan.save()
    good, known = [], []
    for recording, (_, _, facts, fault, _) in zip(recordings, scan.entries, strict=True):
        if fault:
            faults.add_error(fault, recording.name)
        else:
            good.append(replace(recording, seconds=facts[0] / facts[1]))
            known.append(facts)
    return good, known


def one_of_each_sound(recordings: list[Recording], facts: list, faults: Faults) -> list[Recording]:
    """The recordings without copies of a file, and with a group for each sound; none is trained on and held out.

    Held-out ones come first: a copy of them is not trained on.
    """
    order = sorted(range(len(recordings)), key=lambda place: recordings[place].split in (None, "train"))
    recordings, facts = [recordings[place] for place in order], [facts[place] for place in order]
    kept = []
    for place, original in enumerate(exact_copies(facts)):
        if original == place:
            kept.append(place)
        else:
            faults.add_error(f"copy of another recording, {recordings[original].name}", recordings[place].name)
    recordings, facts = [recordings[place] for place in kept], [facts[place] for place in kept]
    found = []
    for recording, original in zip(recordings, near_copies([r.path for r in recordings], facts), strict=True):
        first = recordings[original]
        if first is not recording and first.split != recording.split:
            faults.add_error(f"same sound as a recording of another split, {first.name}", recording.name)
            continue
        if first is not recording:
            faults.note("same sound as another recording, on its side of the split", f"{recording.name} ({first.name})")
        found.append(replace(recording, group=first.name))
    return sorted(found, key=lambda recording: recording.path.parts)


def shows_layout(entry) -> bool:
    """Whether a folder that holds this entry is the one with the recordings, and no wrapping of an archive."""
    return entry.name.isdecimal() or split_of(entry.name) is not None or is_audio(entry.name)


def sound_files(root: Path, faults: Faults) -> list[Path]:
    """The files below a folder that should hold sound; faults is told of the others. What a run left there is no recording."""
    paths = [Path(path) for path in files_below(root, faults)]
    runs = {path.parent for path in paths if path.name == "config.yaml" and path.with_name("summary.json").is_file()}
    paths = [path for path in paths if runs.isdisjoint(path.parents)]
    for path in paths:
        if not is_audio(path):
            faults.add("file that is no recording", printable(str(path.relative_to(root))))
    return [path for path in paths if is_audio(path)]


def place_of(folders: tuple[str, ...]) -> tuple[str | None, str]:
    """(split, folder of the voice or "") that the folders above a file say."""
    split = next(filter(None, map(split_of, folders)), None)
    return split, next((folder for folder in folders if split_of(folder) is None), "")


def name_voices(owners: tuple[str, ...], speakers: str, single: str) -> tuple[list[str], list[int]]:
    """(names of the voices, the place in it of each recording's) by the recordings' folders, "" for those beside folders.

    single: what the voice is called where there is one, and that of the recordings beside folders.
    """
    numbers = sorted({owner for owner in owners if owner.isdecimal()}, key=lambda name: (int(name), name))
    if speakers == "folders":
        voices = [*sorted(set(owners) - {""}), *([""] if "" in owners else [])]
    elif speakers == "one" or len(numbers) < 2:
        voices = [""]
    else:
        beside = any(owner not in numbers for owner in owners) and int(numbers[0]) > 0
        voices = ["0", *numbers] if beside else numbers
    last = voices.index("") if "" in voices else 0
    rows = [voices.index(owner) if owner in voices else last for owner in owners]
    return [printable(voice or single) for voice in voices], rows
