"""Recordings as a voice trains on them, kept on disk: clips of a few seconds with their content features and F0.

    clips = prepare(recordings, voice, prepared_folder(data_dir), workers=0, faults=faults)
    wave, content, f0 = clips[0].load(voice.config.hop)

A recording's clips are in files named by the hash of its bytes and of all settings, written whole or not at all: so what is
there is never prepared twice and never taken for other settings, and a stopped run goes on where it was. prepared.json in the
folder, written last, makes it one that train takes as it is.
"""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# needs: safetensors
from common.card import is_hub_name
from common.checkpoint import read_json, write_json
from common.config import UserError
from common.folders import one_at_a_time
from common.runtime import choose_device, counted, say
from common.samples import BadFile, Faults, attempt
from common.scan import user_cache
from content import align, content_version
from f0 import F0_HIGH, F0_LOW, choose_f0
from preparing import PREPARED_FORMAT, Job, facts_of_all, known_facts
from recordings import Recording

PREPARED = "prepared.json"


@dataclass(frozen=True)
class Clip:
    """A piece of a recording, ready to train on. frames: of 10 ms; speaker: a row; split: as its folder says, or None.

    recording: clips of the same stay on one side of a split; copies of one sound share it. start, stop: seconds in it.
    path: of the file of clips that it is in.
    """

    name: str
    recording: str
    speaker: int
    frames: int
    split: str | None
    start: float
    stop: float
    path: Path
    number: int  # of its tensors in the file

    def load(self, hop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(wave (frames * hop,), content (frames, C), f0 (frames,) in Hz), float32. BadFile where the file is damaged."""
        wave, content, f0 = read_tensors_of(self.path, self.number)
        if len(wave) != self.frames * hop:
            raise BadFile(f"prepared for another rate, {len(wave) // self.frames} samples a frame where the voice has {hop}")
        return wave, *align(content, f0, self.frames)


def read_tensors_of(file: Path, number: int) -> list[np.ndarray]:
    """wave, content (at 50 Hz) and F0 of a clip."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return [tensors.get_tensor(f"{number}.{kind}") for kind in ("wave", "content", "f0")]
    except (OSError, SafetensorError) as error:
        raise BadFile(f"prepared file that is damaged or gone, {file.name}: delete it and prepare again") from error


# ---- folders ---------------------------------------------------------------------------------------------------------------


def prepared_folder(data_dir) -> Path:
    """Where the clips of a data folder are kept if nobody names a place: in the user's cache, the same for every script."""
    place = Path(data_dir).expanduser().resolve()
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    try:
        return user_cache() / "voice" / f"{place.name[:60]}-{digest}"
    except RuntimeError:
        raise UserError("there is no home folder to keep prepared clips in: name one by LORA_WORKSHOP_CACHE") from None


def is_prepared(folder: Path) -> bool:
    return (Path(folder) / PREPARED).is_file()


def open_prepared(folder: Path, voice=None) -> tuple[list[Clip], list[str]]:
    """(clips, names of the speakers) of a folder that preprocess.py wrote. UserError where it does not suit the voice."""
    folder = Path(folder)
    about = read_json(folder / PREPARED)
    if not (isinstance(about, dict) and about.get("finished") is True and about.get("format") == PREPARED_FORMAT):
        raise UserError(f"{folder} was not prepared to the end, or by another version: run preprocess.py on its recordings again")
    if voice is not None:
        check_suits(folder, about["settings"], voice)
    clips = []
    for entry in about["recordings"]:
        recording = Recording(folder / entry["name"], *(entry[key] for key in ("name", "speaker", "split", "group")))
        facts = known_facts(folder, entry["key"])
        if facts is None:
            raise UserError(f"{folder}: the files of {entry['name']} are damaged or gone; run preprocess.py again")
        clips += clips_of(recording, facts, folder)
    return clips, about["speakers"]


def check_suits(folder: Path, settings: dict, voice) -> None:
    """UserError where clips were prepared for another kind of voice."""
    source = voice.content.removeprefix("hubert:")
    # A hub name says which model it is: clips train where that model was never fetched, as on a machine without a network.
    named = settings["content"] == voice.content and is_hub_name(source) and not Path(source).is_dir()
    version = settings["content_version"] if named else content_version(voice.content)
    pairs = (
        ("rate", settings["rate"], voice.config.sample_rate, "Hz"),
        ("content", settings["content"], voice.content, ""),
        ("content", settings["content_version"], version, ""),
        ("content width", settings["width"], voice.config.content_width, ""),
    )
    for what, found, wanted, unit in pairs:
        if found != wanted and not (what == "content" and settings["content_version"] == version):
            raise UserError(
                f"{folder} was prepared with {what} {found} {unit}".rstrip()
                + f", and this base takes {wanted}: run preprocess.py for this --model, or train on the recordings"
            )
    if voice.f0_method not in ("auto", settings["f0_method"]):
        say(f"F0: by {settings['f0_method']}, as {folder.name} was prepared, not by {voice.f0_method}")


def clips_of(recording: Recording, facts: dict, folder: Path) -> list[Clip]:
    several = len(facts["clips"]) > 1
    return [
        Clip(
            f"{recording.name} ({clip['start']:.1f} s)" if several else recording.name,
            recording.group or recording.name,
            recording.speaker,
            clip["frames"],
            recording.split,
            clip["start"],
            clip["stop"],
            Path(folder) / Path(clip["file"]).name,
            clip["number"],
        )
        for clip in facts["clips"]
    ]


# ---- all recordings --------------------------------------------------------------------------------------------------------


def prepare(
    recordings: list[Recording],
    voice,
    folder: Path,
    workers: int,
    faults: Faults,
    f0_range: tuple[float, float] = (F0_LOW, F0_HIGH),
    speakers: list[str] | None = None,
    device: str = "auto",
) -> list[Clip]:
    """The clips of recordings, in their order; only those that the folder does not have are made, `workers` at a time (0: cores).

    voice (model.Voice): rate, kind of content and F0 method. faults is told what was left out, in order of the recordings.
    UserError where nothing is left; the folder is then none that train takes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    method, config = choose_f0(voice.f0_method), voice.config
    device = choose_device(device) if voice.content != "dsp" else "cpu"
    version = content_version(voice.content)
    job = Job(folder, config.sample_rate, voice.content, version, config.content_width, method, *map(float, f0_range), device)
    with one_at_a_time(folder / "clips"):
        write_json(folder / PREPARED, {"format": PREPARED_FORMAT, "finished": False})
        keys = [attempt(job.key, recording.path)[0] or "" for recording in recordings]  # "": it cannot be read
        found = facts_of_all(recordings, keys, job, workers)
        kept, left_out = [], []
        for recording, key, (facts, fault) in zip(recordings, keys, found, strict=True):
            if fault:
                left_out.append({"name": recording.name, "fault": fault, "seconds": facts and facts["seconds"]})
            else:
                note_recording(facts, recording.name, faults)
                kept.append((recording, key, facts))
        if not kept:
            (folder / PREPARED).unlink()
            why = Counter(entry["fault"].partition(", ")[0] for entry in left_out)
            why = "; ".join(f"{fault} ({count})" for fault, count in why.items())
            raise UserError(f"no voice found in {counted(len(recordings), 'recording')}: {why}")
        for entry in left_out:
            faults.add_error(entry["fault"], entry["name"])
        entries = [
            {"name": r.name, "speaker": r.speaker, "split": r.split, "group": r.group or r.name, "key": key} for r, key, _ in kept
        ]
        speakers = speakers or [str(row) for row in range(1 + max(recording.speaker for recording, _, _ in kept))]
        about = {"format": PREPARED_FORMAT, "finished": True, "settings": job.settings, "speakers": speakers}
        write_json(folder / PREPARED, about | {"recordings": entries, "left_out": left_out})
    return [clip for recording, _, facts in kept for clip in clips_of(recording, facts, folder)]


def note_recording(facts: dict, name: str, faults: Faults) -> None:
    """What is worth knowing of a recording that is used."""
    for note in facts["notes"]:
        what, _, detail = note.partition(", ")
        faults.note(what, f"{name} ({detail})" if detail else name)
    if not facts["f0"]:
        faults.note("recording without a voiced frame, which no F0 statistics count", name)
