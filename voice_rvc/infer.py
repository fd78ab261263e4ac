"""Converts recordings into a voice that was tuned: the same words, by another speaker.

    python infer.py --input speech.mp3                       # or a folder, or a glob in quotes: "talks/*.flac"
    python infer.py --input song.wav --pitch 12              # semitones up; auto brings speech to the pitch of the voice
    python infer.py --input speech.wav --checkpoint voice.pth --index added_voice.index          # a voice of RVC or Applio

Any length, in the same memory. Leaves a wav (or flac) of 16 bits for each recording, and predictions.json (what was made of
what, by how many semitones, how fast) in a new folder each time: outputs/voice_rvc/predictions/<method>/<number>/.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import CountOrZero, LoadConfig, Range, Share, UserError, cli, parse  # noqa: E402


@dataclass(kw_only=True)
class InferConfig(LoadConfig):
    checkpoint: str = ""  # folder of a trained voice, a .pth of RVC or Applio, or adapters of one base: a,b; empty: newest
    input: str  # a recording, a folder of recordings, or a glob in quotes
    pitch: Annotated[float, Range(-48, 48)] | Literal["auto"] = "auto"  # semitones up; auto: to the voice's median F0; songs: 0
    speaker_id: CountOrZero = 0  # whose voice, of a checkpoint with several: row of its speakers
    index: str = ""  # faiss index of the voice's content (RVC's added_*.index); empty: voice.index of the run, where it has one
    index_rate: Share | None = None  # share of the index's content, 0 to 1; empty: 0.5 with an index, 0 without
    protect: Annotated[float, Range(0, 0.5)] = 0.33  # of that share, what breath and consonants take; 0.5: all of it
    volume_envelope: Share = 1.0  # 1: loudness of the voice, 0: of the recording
    f0_method: Literal["", "auto", "harvest", "dio", "pyin", "swift", "crepe"] = ""  # pitch tracker; empty: as in training
    content: str = ""  # where the voice's content model is, if not under its name: hubert:<folder>
    format: Literal["wav", "flac"] = "wav"  # of the results
    output_dir: str = ""  # where the results go; empty: a new outputs/voice_rvc/predictions/<method>/<number>


def find_sounds(pattern: str, faults) -> list[Path]:
    """The audio files that a path names: a file, a folder (its recordings), or a glob in quotes. UserError for none."""
    import glob

    from audio_files import AUDIO_ENDINGS, is_audio
    from recordings import sound_files

    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sound_files(path, faults)
    else:
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if is_audio(p) and Path(p).is_file()]
    if not found:
        there = path.is_dir() or glob.has_magic(str(path))
        what = f"no recording there ({', '.join(AUDIO_ENDINGS)})" if there else "there is no such file or folder"
        raise UserError(f"--input {pattern}: {what}")
    return found


def load_voices(config, method: str):
    """(Predictor, names of its voices) of the checkpoints that --checkpoint names; several are adapters of one base."""
    from common.saved_models import choose_checkpoint
    from predictor import Predictor
    from voice_files import is_run_folder

    def choose(name: str) -> str:
        path = Path(name).expanduser()
        of_others = name and (path.is_file() or (path.is_dir() and is_run_folder(path)))
        return name if of_others else choose_checkpoint(name, "voice_rvc", method)[0]

    named = config.checkpoint
    folders = [choose(name) for name in ([named] if Path(named).expanduser().exists() else named.split(","))]
    predictor = Predictor(folders[0], config.model, config.device, config.merge, config.content)
    names = [""]
    for folder in folders[1:]:
        names.append(f"_{len(names) + 1}")
        predictor.add(folder, names[-1])
    return predictor, names


def note_what_does_nothing(config, predictor) -> None:
    """A line for each setting that was given and has no effect."""
    from common.runtime import say
    from voice_index import index_of

    tuned = predictor.known[""]
    voice = tuned.processor
    has_index = bool(config.index or index_of(tuned.folder))
    if config.index_rate and not has_index:
        say(f"--index_rate has no effect: there is no voice.index beside {tuned.folder}; name an index with --index")
    if config.protect != InferConfig.protect and (not has_index or config.index_rate == 0):
        say("--protect has no effect: it says how much of an index's content unvoiced sounds take, and none is used")
    if config.content and config.content != voice.content:
        say(f"note: --content {config.content} in place of {voice.content}, on which the voice was trained")


def convert_all(predictor, names: list[str], sounds: list[Path], root: Path, ending: str, settings: dict, faults) -> list[dict]:
    """Converts each recording into each voice, into files in `root`; the rows of predictions.json. Faults go to `faults`."""
    from common.runtime import progress_bar, say
    from common.samples import short_names

    rows = []
    jobs = [(number, *pair) for number, pair in enumerate(zip(sounds, short_names(sounds), strict=True), start=1)]
    for number, path, shown in progress_bar(jobs, "converting"):
        for name in names:
            to = root / f"{number:04d}_{path.stem[:60]}{name}.{ending}"
            began = time.perf_counter()
            try:
                made = predictor.convert(path, to, name, **settings)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:  # one file's fault costs the others nothing
                faults.add_error(str(error) or type(error).__name__, shown)
                break
            factor = (time.perf_counter() - began) / made.seconds
            speed = f"{made.seconds:.2f} s, {made.shift:+z.1f} semitones, real-time factor {factor:.2f}"
            say(f"{shown} -> {to.name}: {speed}")
            for note, _, detail in (note.partition(", ") for note in made.notes):
                faults.note(note, f"{shown} ({detail})" if detail else shown)
            facts = {"seconds": made.seconds, "rate": made.rate, "pitch_shift": made.shift, "scale": made.scale}
            facts |= {"loudness_db": made.loudness, "real_time_factor": factor, "checkpoint": str(predictor.known[name].folder)}
            rows.append({"file_name": str(path), "output": to.name, **facts, "settings": settings})
    return rows


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json
    from common.folders import predictions_folder
    from common.runtime import counted, start_accelerator
    from common.samples import Faults
    from convert import check_speaker

    faults = Faults()
    sounds = find_sounds(config.input, faults)
    accelerator = start_accelerator(config)
    config.device = accelerator.device
    predictor, names = load_voices(config, method)
    keys = ("pitch", "index", "index_rate", "protect", "volume_envelope", "f0_method")
    settings = {key: getattr(config, key) for key in keys} | {"speaker": config.speaker_id}
    for name in names:  # what does not fit is found before a file is read
        with predictor.speaking(name, settings) as (synthesizer, options, _):
            check_speaker(options.speaker, synthesizer, predictor.known[name].processor)
    note_what_does_nothing(config, predictor)
    root = predictions_folder(config, predictor.origin)

    with accelerator.autocast():
        rows = convert_all(predictor, names, sounds, root, config.format, settings, faults)
    faults.report()
    if not rows:
        if not config.output_dir:
            root.rmdir()
        raise UserError(f"--input {config.input}: nothing in it could be converted")
    write_json(root / "predictions.json", rows)
    seconds = sum(row["seconds"] for row in rows)
    speed = sum(row["seconds"] * row["real_time_factor"] for row in rows) / seconds
    count, rate = len({row["file_name"] for row in rows}), rows[0]["rate"]
    print(f"{counted(count, 'recording')} converted, {seconds:.1f} s at {rate} Hz, real-time factor {speed:.2f}")
    print(f"saved {counted(len(rows), f'{config.format} file')} and predictions.json in {root}")


if __name__ == "__main__":
    cli(main)
