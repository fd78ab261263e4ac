"""Pictures of sounds: mel spectrograms side by side, F0 asked for and got, and scores of several systems as bars."""

from pathlib import Path

import numpy as np
import torch

from common.plots import figure, plot_text, save_figure
from compiled import from_librosa
from f0_scores import heard_f0
from spectrum import mel_spectrogram

HERTZ = (250, 500, 1000, 2000, 4000, 8000, 16000)  # marked, where the bands reach so far
F0_TICKS = (50, 60, 70, 85, 100, 120, 140, 170, 200, 240, 280, 340, 400, 560, 800)  # Hz
SHOWN_SECONDS = 8  # of a longer sound: its beginning


def mel_picture(wave: np.ndarray, config) -> np.ndarray:
    """(mels, frames) natural logarithms of the mel bands of the beginning of a wave (n,) at config.sample_rate."""
    wave = torch.as_tensor(wave[: SHOWN_SECONDS * config.sample_rate], dtype=torch.float32)
    return mel_spectrogram(wave[None], config)[0].numpy()


def draw_spectrograms(sounds: list[dict[str, np.ndarray]], labels: list[str], config, title: str, path: Path) -> None:
    """A row for each of `sounds`, {column: wave (n,)}; a missing one leaves its place empty. One colour scale to a row.

    labels: what each row is called.
    """
    columns = list(dict.fromkeys(name for row in sounds for name in row))
    page, axes = figure(len(sounds), len(columns), max(2.6, 11 / len(columns)), 2.3)
    bands = from_librosa("mel_frequencies")(n_mels=config.mels + 2, fmax=config.sample_rate / 2)[1:-1]
    marked = [hertz for hertz in HERTZ if hertz < bands[-1]]
    for place, (row, label, line) in enumerate(zip(sounds, labels, axes, strict=True)):
        pictures = {name: mel_picture(wave, config) for name, wave in row.items()}
        top = max(picture.max() for picture in pictures.values())
        longest = max(picture.shape[1] for picture in pictures.values()) / 100
        for name, axis in zip(columns, line, strict=True):
            axis.grid(False)
            axis.set(xlim=(0, longest), ylim=(0, config.mels))
            axis.set_yticks(np.interp(marked, bands, range(len(bands))), [f"{hertz:g}" for hertz in marked], fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
            if name in pictures:
                extent = (0, pictures[name].shape[1] / 100, 0, config.mels)
                look = {"aspect": "auto", "origin": "lower", "cmap": "magma", "vmin": top - 9, "vmax": top}
                axis.imshow(pictures[name], extent=extent, **look)
            if place == 0:
                axis.set_title(plot_text(name), fontsize=10)
            if place == len(sounds) - 1:
                axis.set_xlabel("seconds", fontsize=8)
        line[0].set_ylabel(f"{plot_text(label, 28)}\nHz", fontsize=8)
    page.suptitle(plot_text(title, 120), fontsize=11)
    save_figure(page, path)


def draw_f0(sounds: list[dict[str, np.ndarray]], asked: list[np.ndarray], labels: list[str], rate: int, path: Path) -> None:
    """For each of `sounds`, {name: wave (n,)}, the F0 that was asked for (Hz, 100 a second) and what each wave has."""
    page, axes = figure(len(sounds), 1, 8, 2.4)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for row in sounds for name in row))}
    for row, wanted, label, (axis,) in zip(sounds, asked, labels, axes, strict=True):
        frames = min(len(wanted), SHOWN_SECONDS * 100)
        axis.plot(np.arange(frames) / 100, voiced_only(wanted[:frames]), color="0.75", lw=6, solid_capstyle="round")
        for name, wave in row.items():
            found = heard_f0(wave[: SHOWN_SECONDS * rate], rate)
            axis.plot(np.arange(len(found)) / 100, voiced_only(found), color=colors[name], lw=1.4)
        axis.set_yscale("log", base=2)
        low, high = f0_range([wanted, *(line.get_ydata() for line in axis.lines)])
        ticks = [hertz for hertz in F0_TICKS if low <= hertz <= high]
        axis.set_yticks(ticks, [str(hertz) for hertz in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set(ylabel="F0 (Hz)", ylim=(low, high), xlim=(0, frames / 100))
        axis.set_title(plot_text(label, 60), fontsize=9)
    axes[-1, 0].set_xlabel("seconds")
    for name, color in colors.items():
        axes[0, 0].plot([], [], color=color, label=plot_text(name))
    axes[0, 0].plot([], [], color="0.75", lw=6, label="asked for")
    page.legend(fontsize=9, loc="outside lower center", ncols=6, frameon=False)
    save_figure(page, path)


def voiced_only(f0: np.ndarray) -> np.ndarray:
    """F0 with gaps where it is unvoiced."""
    return np.where(f0 > 0, f0, np.nan)


def f0_range(values: list) -> tuple[float, float]:
    """Ends (Hz) of an axis that shows nearly all F0 of these arrays; 0 and NaN are none."""
    values = np.concatenate([np.asarray(each, dtype=float) for each in values])
    values = values[np.nan_to_num(values) > 0]
    low, high = np.percentile(values, [1, 99]) if len(values) else (70, 400)
    return max(45.0, low / 1.3), min(900.0, high * 1.3)


def score_text(value: float) -> str:
    """A score with the digits that say something: 0.991, 2.65, 612."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def draw_scores(systems: dict[str, dict], metrics: dict[str, str], title: str, own: str, path: Path) -> None:
    """A panel for each of metrics (key -> title), a bar for each system with its 95 % interval; no bar where it has no value.

    systems: name -> {metric: {"value", "interval" ([low, high] or None)}}; own: the one in colour.
    """
    shown = {key: text for key, text in metrics.items() if any((found.get(key) or {}).get("value") for found in systems.values())}
    page, (panels,) = figure(1, max(1, len(shown)), 3.4, max(2.2, 0.42 * len(systems) + 1.2))
    for panel, (key, text) in zip(panels, shown.items(), strict=False):
        for place, (name, found) in enumerate(systems.items()):
            score = found.get(key) or {}
            if score.get("value") is None:
                continue
            value, ends = score["value"], score.get("interval")
            panel.barh(place, value, color="C0" if name == own else "0.7", height=0.7)
            if ends:
                panel.plot(ends, [place, place], color="0.2", lw=1.5)
            panel.text(max([value, *(ends or [])]), place, f" {score_text(value)}", va="center", fontsize=8)
        names = [plot_text(name) for name in systems] if key == next(iter(shown)) else [""] * len(systems)
        panel.set_yticks(range(len(systems)), names, fontsize=8)
        panel.set_ylim(len(systems) - 0.4, -0.6)
        panel.set_title(text, fontsize=9)
        panel.margins(x=0.2)
    page.suptitle(plot_text(title, 110), fontsize=10)
    save_figure(page, path)
