"""Recordings of other voices, converted by several systems, and how close each comes to what the target voice said."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from audio import read_audio, resample
from common.batches import seed_everything
from common.config import UserError
from common.runtime import progress_bar, quiet
from common.samples import Faults, attempt
from convert import Conversion, choose_shift, convert_wave
from distances import LONGEST_ALIGNED, long_term_distance
from f0 import choose_f0, extract_f0
from metrics import added, sound_scores, sound_sums
from recordings import Recording, find_recordings
from spectrum import spectrogram

NO_CONVERSION = "no conversion"
UNTRAINED = "base as it is"
RESYNTHESIS = "analysis-resynthesis"
LABELS = {"full": "full", "lora": "LoRA", "head": "rows alone"}  # of what was trained, by its method
SAME_TIMING = 0.01  # seconds by which two recordings may differ in length and yet be compared frame by frame
DRAWS_OF_SCORES = 1000
FEWEST_DRAWN = 5  # recordings; of fewer, an interval says less than it seems to
STEADY_SECONDS = 10  # of speech, from which on a long-term spectrum tells of the speaker and not of the words


@dataclass
class Trial:
    """A recording to convert. speaker: whose it is; truth: the file in which the target says the same, or None.

    What the systems made of it: sounds and sums (metrics.sound_sums) by system, `seconds` that each took.
    """

    path: Path
    name: str
    speaker: str
    truth: Path | None = None
    sounds: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    length: float = 0.0  # seconds of the source
    shift: float = 0.0  # semitones
    asked: np.ndarray | None = None  # the F0 that was asked for, Hz, 100 a second
    aligned: bool = False  # whether source and truth differ in timing, so that time warping pairs their frames


# ---- what to convert -------------------------------------------------------------------------------------------------


def find_trials(source_dir: str, truths: list[Recording], split: str, most: int, faults: Faults) -> list[Trial]:
    """The recordings of a folder as trials, at most so many, of each voice in turn.

    Where folders are named like splits, those of `split`. truths: held-out recordings of the target; one whose name ends the
    name of a source is the same sentence. UserError where there is nothing to convert.
    """
    if not Path(source_dir).expanduser().exists():
        raise UserError(f"--source_dir: there is no folder {source_dir}")
    try:
        with quiet():
            found, voices = find_recordings(source_dir, faults)
    except UserError as error:
        raise UserError(str(error).replace("--data_dir", "--source_dir")) from None
    found = [recording for recording in found if recording.split in (None, split)]
    if not found:
        raise UserError(f"--source_dir {source_dir} has no recording in a folder named {split}")
    trials = [trial_of(recording, voices[recording.speaker], truths) for recording in found]
    turns, order = {}, []
    for trial in trials:
        turns[trial.speaker] = turns.get(trial.speaker, 0) + 1
        order.append(turns[trial.speaker])
    return [trials[place] for place in sorted(range(len(trials)), key=order.__getitem__)[:most]]


def trial_of(recording: Recording, voice: str, truths: list[Recording]) -> Trial:
    """The trial of a source; with the truth whose name is the end of its name, if there is one, the rest is the speaker's."""
    stem = recording.path.stem
    same = [truth for truth in truths if is_end_of(truth.path.stem, stem) and truth.path != recording.path]
    if not same:
        return Trial(recording.path, recording.name, voice)
    truth = max(same, key=lambda truth: len(truth.path.stem))
    return Trial(recording.path, recording.name, stem[: -len(truth.path.stem)].rstrip("_- .") or voice, truth.path)


def is_end_of(end: str, name: str) -> bool:
    """Whether a name ends another as a word of its own: 1 does not end 11."""
    return name.endswith(end) and (len(name) == len(end) or not name[-len(end) - 1].isalnum() or not end[0].isalnum())


# ---- converting ------------------------------------------------------------------------------------------------------


def run_trials(trials: list[Trial], systems: dict, voice, speaker: int, pitch, content, likeness, faults: Faults) -> list[Trial]:
    """The trials that could be read, converted by each of `systems` (name -> Synthesizer) and measured.

    The last system also says the truths through its posterior. pitch: semitones or "auto", for all systems the same. likeness:
    of sound_likeness, or None. What cannot be read is told to `faults`.
    """
    done = []
    for trial in progress_bar(trials, "converting"):
        sounds, fault, _ = attempt(load_sounds, trial, voice.config.sample_rate)
        if fault:
            faults.add_error(fault, trial.name)
            continue
        run_trial(trial, *sounds, systems, voice, speaker, pitch, content)
        if likeness is not None:
            for name, wave in trial.sounds.items():
                trial.sums[name]["likeness"] = likeness(wave, voice.config.sample_rate)
        done.append(trial)
    return done


def load_sounds(trial: Trial, rate: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(source, truth or None) at `rate`: the first minute of each."""
    waves = [read_audio(path) if path else None for path in (trial.path, trial.truth)]
    return tuple(sound and resample(sound.wave[: LONGEST_ALIGNED * sound.rate], sound.rate, rate) for sound in waves)


def run_trial(trial: Trial, source: np.ndarray, truth, systems: dict, voice, speaker: int, pitch, content) -> None:
    """Fills in what the systems make of a source (n,), and how close that comes to the truth (m,), where there is one."""
    rate = voice.config.sample_rate
    tracker = choose_f0(voice.f0_method)
    f0 = extract_f0(resample(source, rate, 16000), tracker)
    trial.shift = choose_shift(pitch, f0, voice, speaker, []) if voice.config.f0 else 0.0
    trial.length = len(source) / rate
    trial.aligned = truth is not None and abs(len(truth) - len(source)) > SAME_TIMING * rate
    trial.asked = asked = f0 * 2 ** (trial.shift / 12)
    trial.sounds = {"source": source} | ({} if truth is None else {"target": truth})
    trial.sums[NO_CONVERSION] = measured(truth, source, asked, rate, trial.aligned)
    for name, model in systems.items():
        began = time.perf_counter()
        wave, _ = convert_wave(model, voice, source, rate, Conversion(pitch=trial.shift, speaker=speaker), content)
        trial.seconds[name] = time.perf_counter() - began
        trial.sounds[name] = wave
        trial.sums[name] = measured(truth, wave, asked, rate, trial.aligned)
    if truth is not None and model.enc_q is not None:
        f0 = extract_f0(resample(truth, rate, 16000), tracker)
        trial.sounds[RESYNTHESIS] = said_again(model, truth, f0, speaker)
        trial.sums[RESYNTHESIS] = measured(truth, trial.sounds[RESYNTHESIS], f0, rate, False)


def measured(truth, wave: np.ndarray, asked: np.ndarray, rate: int, aligned: bool) -> dict:
    """sound_sums of a wave that is made as loud as the truth: how loud a source was recorded is no fault of the voice."""
    if truth is not None:
        loud, own = (float(np.sqrt(np.mean(np.square(each, dtype=np.float64)))) for each in (truth, wave))
        wave = wave * np.float32(loud / max(own, 1e-6))
    return sound_sums(truth, wave, asked, rate, aligned)


@torch.no_grad()
def said_again(model, wave: np.ndarray, f0: np.ndarray, speaker: int) -> np.ndarray:
    """A wave (n,) through the posterior encoder and the decoder. f0: Hz, 100 a second."""
    config, device = model.config, model.emb_g.weight.device
    frames = len(wave) // config.hop
    f0 = np.pad(f0, (0, max(0, frames - len(f0))))[:frames].astype(np.float32)
    wave = torch.from_numpy(wave[: frames * config.hop])[None]
    f0, lengths, sid = torch.from_numpy(f0)[None], torch.tensor([frames]), torch.tensor([speaker])
    spec, lengths, f0, sid = (each.to(device) for each in (spectrogram(wave, config), lengths, f0, sid))
    seed_everything("said again")
    return model.resynthesize(spec, lengths, f0 if config.f0 else None, sid)[0, 0].float().cpu().numpy()


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores_of(rows: list[dict], groups: list[str]) -> dict:
    """{metric: {"value", "interval" (95 %, or None)}, "n"} of sums of sounds, drawn anew by their groups (Efron's bootstrap).

    groups: of each row, the sentence that it says: sounds of one sentence are alike, and are drawn together.
    """
    names = list(dict.fromkeys(groups))
    parts = [added([row for row, group in zip(rows, groups, strict=True) if group == name]) for name in names]
    total = added(parts)
    stacked = {key: np.stack([part.get(key, np.zeros_like(whole)) for part in parts]) for key, whole in total.items()}
    many, drawn = len(names), []
    if many >= FEWEST_DRAWN:
        draws = np.random.default_rng(0).multinomial(many, np.full(many, 1 / many), size=DRAWS_OF_SCORES)
        drawn = [sound_scores({key: times @ values for key, values in stacked.items()}) for times in draws]
    return {
        "n": len(rows),
        **{key: {"value": value, "interval": middle(key, drawn)} for key, value in sound_scores(total).items()},
    }


def middle(key: str, drawn: list[dict]) -> list[float] | None:
    """Where the middle 95 % of a metric lie; None where there were no draws, or some had no value."""
    values = [scores.get(key) for scores in drawn]
    return np.percentile(values, [2.5, 97.5]).tolist() if values and None not in values else None


def system_scores(trials: list[Trial], target: np.ndarray) -> dict[str, dict]:
    """System -> scores_of its sounds, and its real_time_factor (seconds of work for a second of sound, content and F0 included).

    target: loudness_by_band of the target's held-out sound, to which a sound is likened where nobody knows the truth.
    """
    found = {}
    for name in dict.fromkeys(name for trial in trials for name in trial.sums):
        own = [trial for trial in trials if name in trial.sums]
        rows = [{"truth": target} | trial.sums[name] for trial in own]
        found[name] = scores_of(rows, [(trial.truth or trial.path).stem for trial in own])
        if factors := [trial.seconds[name] / trial.length for trial in own if name in trial.seconds]:
            # The median: whoever comes first also waits for what a process loads once.
            found[name]["real_time_factor"] = {"value": float(np.median(factors)), "interval": None}
    return found


def nearest_voices(trials: list[Trial], system: str, target: np.ndarray) -> dict[str, dict]:
    """Source voice -> {"nearest", "seconds"}: whose long-term spectrum all that a system made of it comes nearest to.

    The source voices' own, or the target's: `target`, loudness_by_band of its held-out sound. seconds: of what was made.
    """
    speakers = list(dict.fromkeys(trial.speaker for trial in trials))

    def joined(speaker, name):
        return np.sum([trial.sums[name]["given"] for trial in trials if trial.speaker == speaker], axis=0)

    known = {"target": target} | {speaker: joined(speaker, NO_CONVERSION) for speaker in speakers}
    made = {speaker: joined(speaker, system) for speaker in speakers}
    found = {}
    for speaker, sound in made.items():
        distances = {name: long_term_distance(other, sound) for name, other in known.items()}
        found[speaker] = {"nearest": min(distances, key=distances.get), "seconds": float(sound[-1] / 100)}
    return found
