"""What held-out clips sound like by a voice, through the inference path, and the numbers that say how close that comes."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from audio import write_wave
from common.batches import number_from, seed_everything, to_device
from common.record import write_samples
from common.runtime import gather_lists, process_index, progress_bar
from distances import frame_distortions, frames_that_count, long_term_distance, loudness_by_band, stft_distances
from f0_scores import f0_scores, f0_sums, heard_f0
from losses import MEL_WEIGHT
from spectrum import mel_spectrogram
from synthesizer import Excitation

SOUNDS_KEPT = 3  # held-out clips whose sound is kept


# ---- from waves to numbers -------------------------------------------------------------------------------------------


def sound_sums(truth: np.ndarray | None, given: np.ndarray, asked: np.ndarray, rate: int, align: bool = False) -> dict:
    """What a sound (n,) gives towards `sound_scores`, as sums, so that those of several sounds add up.

    truth: what it ought to be, at the same `rate`; None: unknown, and only the F0 and the long-term spectrum are measured.
    asked: the F0 that it was to have, in Hz at 100 a second, 0 where unvoiced. align: truth and sound differ in timing.
    """
    sums = {"given": loudness_by_band(given, rate), **f0_sums(asked, heard_f0(given, rate))}
    if truth is None:
        return sums
    counts = frames_that_count(heard_f0(truth, rate) if align else asked, truth, rate)
    distortions = frame_distortions(truth, given, rate, counts, align)
    sums |= {"mcd": np.array([len(distortions), distortions.sum()]), "truth": loudness_by_band(truth, rate)}
    return sums if align else sums | {"stft": np.array([1, *stft_distances(truth, given, rate)])}


def added(rows: list[dict]) -> dict:
    """The sums of several sounds; of what only some have, over those."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: np.sum([row[key] for row in rows if key in row], axis=0) for key in keys}


def sound_scores(sums: dict) -> dict[str, float | None]:
    """The metrics of `sound_sums`, added. None where there is nothing to say it of.

    mcd: mel-cepstral distortion in dB, the mean over voiced frames. f0_rmse_cents, f0_correlation, vuv_error: against the F0
    that was asked for. stft_distance, spectral_convergence: means over clips. ltas_distance: of all of them joined, in dB.
    speaker_similarity: the mean of what speaker_encoder.py gave, if it was asked.
    """
    scores = {}
    if "mcd" in sums:
        scores["mcd"] = mean_of(sums["mcd"], 1)
    scores |= f0_scores(sums["f0"], sums["vuv"])
    if "stft" in sums:
        scores |= {name: mean_of(sums["stft"], place) for place, name in enumerate(("stft_distance", "spectral_convergence"), 1)}
    if "truth" in sums:
        scores["ltas_distance"] = long_term_distance(sums["truth"], sums["given"])
    if "likeness" in sums:
        scores["speaker_similarity"] = mean_of(sums["likeness"], 1)
    return scores


def mean_of(sums: np.ndarray, place: int) -> float | None:
    """The sum at `place` divided by the count, which comes first; None where nothing was counted."""
    return float(sums[place] / sums[0]) if sums[0] else None


# ---- a model on held-out clips ---------------------------------------------------------------------------------------


def noise_of(index: int, frames: int, config, device) -> Excitation:
    """All that is random when a clip is spoken, as a function of its index: the same on any device, in any batch and epoch."""
    generator = torch.Generator().manual_seed(number_from("validation", index))
    shapes = (1, config.inter_channels, frames), (1, 1, frames * config.hop)
    latent, source = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return Excitation(latent, source, torch.zeros(1, device=device))


@torch.no_grad()
def speak(model, batch: dict, row: int) -> torch.Tensor:
    """The wave (frames * hop,) of one clip of a batch, from its content, F0 and speaker alone, as infer makes it.

    No clip sees another's padding, so no number depends on what is in a batch; two epochs differ by the weights alone.
    """
    frames = int(batch["lengths"][row])
    phone, lengths, sid = (batch[key][row : row + 1] for key in ("phone", "lengths", "sid"))
    pitch, f0 = (batch[key][row : row + 1, :frames] if model.config.f0 else None for key in ("pitch", "f0"))
    noise = noise_of(int(batch["index"][row]), frames, model.config, phone.device)
    return model.infer(phone[:, :frames], lengths, pitch, f0, sid, excitation=noise)[0, 0].float()


@torch.no_grad()
def resynthesize(model, batch: dict, row: int) -> torch.Tensor:
    """The wave (frames * hop,) of one clip through the posterior and back: the best that the decoder can do."""
    frames = int(batch["lengths"][row])
    lengths, sid = (batch[key][row : row + 1] for key in ("lengths", "sid"))
    f0 = batch["f0"][row : row + 1, :frames] if model.config.f0 else None
    seed_everything("resynthesis", int(batch["index"][row]))
    return model.resynthesize(batch["spec"][row : row + 1, :, :frames], lengths, f0, sid)[0, 0].float()


def measure(model, batches, by=speak):
    """Yields for each clip {"index", "sums", "wave" (n,) as the model says it}; one after the other, whatever the batches.

    by: `speak` or `resynthesize`.
    """
    model = extract_model_from_parallel(model).eval()
    device, config = next(model.parameters()).device, model.config
    for batch in batches:
        on_device = to_device(batch, device)
        for row, index in enumerate(batch["index"].tolist()):
            frames = int(batch["lengths"][row])
            wave = by(model, on_device, row)
            truth = on_device["wave"][row, : frames * config.hop]
            mels = [mel_spectrogram(each[None], config) for each in (wave, truth)]
            loss = (mels[0] - mels[1]).abs().mean().item()
            wave, truth, f0 = (each.cpu().numpy() for each in (wave, truth, on_device["f0"][row, :frames]))
            sums = sound_sums(truth, wave, f0, config.sample_rate) | {"mel": np.array([frames, frames * loss])}
            yield {"index": index, "sums": sums, "wave": wave}


def predict(model, loader, by=speak) -> list[dict]:
    """What `measure` gives of the clips of all processes, in order; the waves only of those that are heard."""
    heard, found = heard_clips(loader.dataset), []
    for item in measure(model, progress_bar(loader, "evaluating"), by):
        found.append(item if item["index"] in heard else item | {"wave": None})
    found = {item["index"]: item for item in gather_lists(found)}  # processes repeat a batch to have equally many
    return [found[index] for index in sorted(found)]


def evaluate(model, loader, folder: Path | None = None) -> dict:
    """The metrics of a voice on a loader's held-out clips: val_loss, `sound_scores`, and of several voices the mcd of each.

    val_loss: the mel part of the training loss, weighted as it is there, but of whole clips through the inference path.
    folder: where the sound of a few clips is put, as WAV. Used in training and by eval.py.
    """
    found = predict(model, loader)
    if folder and process_index()[0] == 0:
        save_sounds(model, loader.dataset, found, folder)
    return voice_metrics(loader.dataset, found)


def voice_metrics(dataset, found: list[dict]) -> dict:
    """The metrics of what `predict` gave. Two voices or more: per_speaker_mcd has the distortion of each by its name."""
    total = added([item["sums"] for item in found])
    frames, loss = total["mel"]
    metrics = {"val_loss": float(MEL_WEIGHT * loss / frames), **sound_scores(total)}
    names = dataset.voice.speakers
    if len(names) > 1:
        rows = {name: [] for name in names}
        for item in found:
            rows[names[dataset.clips[item["index"]].speaker]].append(item["sums"])
        metrics["per_speaker_mcd"] = {name: sound_scores(added(each))["mcd"] if each else None for name, each in rows.items()}
    return metrics


def heard_clips(dataset) -> list[int]:
    """The indices of the clips whose sound is kept: the first of each voice, then the second of each ..."""
    seen, turns = Counter(), []
    for index, clip in enumerate(dataset.clips):
        turns.append((seen[clip.speaker], index))
        seen[clip.speaker] += 1
    return [index for _, index in sorted(turns)[:SOUNDS_KEPT]]


def save_sounds(model, dataset, found: list[dict], folder: Path) -> None:
    """Writes the waves that `predict` kept as 1_<name>.wav, 2_<name>.wav ..., in the order of heard_clips.

    found: of all clips, or of a part, as where a validation is only timed.
    """
    waves = {item["index"]: item["wave"] for item in found}
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(heard_clips(dataset), start=1):
        if index in waves:
            path = folder / f"{number}_{plain_name(dataset.name(index))}.wav"
            write_wave(path, np.nan_to_num(waves[index]), model.config.sample_rate)


def plain_name(name: str) -> str:
    """What a file may be called after a recording, whatever that is called."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)[:60]


def save_samples(dataset, found: list[dict], path: Path) -> None:
    """samples.json: the distortion of each recording, and of how many frames it is (the weight that gives mcd).

    A recording is one sample however many clips it was cut into: they are alike.
    """
    rows = {}
    for item in found:
        rows.setdefault(dataset.clips[item["index"]].recording, []).append(item["sums"]["mcd"])
    rows = {name: np.sum(sums, axis=0) for name, sums in rows.items()}
    samples = [
        {"file": name, "value": float(total / frames), "weight": int(frames)} for name, (frames, total) in rows.items() if frames
    ]
    write_samples(path, "mcd", False, samples)
