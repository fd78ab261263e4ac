"""A page to listen to: one HTML file with players, scores and pictures, that opens on a laptop and on a phone."""

import base64
import html
import io
from pathlib import Path

import numpy as np
import soundfile

from audio import write_wave
from common.checkpoint import write_text
from common.runtime import counted
from metrics import heard_clips, plain_name
from sound_plots import draw_f0, draw_scores, draw_spectrograms, score_text
from trials import FEWEST_DRAWN, LABELS, STEADY_SECONDS, UNTRAINED, Trial

PAGE_BYTES = 15_000_000  # of sound on a page: more would be slow to open on a phone
PAGE_SECONDS = 20  # of each sound, from its beginning

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: 0.4rem 0; } .note { opacity: 0.75; font-size: 0.9rem; }
.card { border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.8rem; margin: 0.8rem 0; background: var(--soft); }
.players { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: 0.6rem 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 0.9rem; } audio { width: 100%; height: 2.6rem; display: block; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; min-width: 6rem; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; } small { opacity: 0.7; display: block; }
img { max-width: 100%; height: auto; background: white; border-radius: 0.4rem; }
"""
# The page shows and plays what is in it, and nothing else: no script, nothing from elsewhere.
RULES = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


# ---- a page to listen to ---------------------------------------------------------------------------------------------


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def as_flac(wave: np.ndarray, rate: int) -> bytes:
    """The beginning of a wave, as every browser plays it without loss."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.nan_to_num(wave[: PAGE_SECONDS * rate]), -1, 1), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def card(title: str, note: str, sounds: dict[str, tuple[np.ndarray, int]]) -> str:
    """The players of one recording. sounds: name -> (wave (n,), rate)."""
    players = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><audio controls preload="metadata" '
        f'src="{data_url(as_flac(wave, rate), "audio/flac")}"></audio></figure>'
        for name, (wave, rate) in sounds.items()
    )
    head = f"<h3>{html.escape(title)}</h3>" + (f'<p class="note">{html.escape(note)}</p>' if note else "")
    return f'<div class="card">{head}<div class="players">{players}</div></div>'


def scored(systems: dict[str, dict], metrics) -> list[str]:
    """Those of the metrics that some system has a value of."""
    return [key for key in metrics if any((row.get(key) or {}).get("value") is not None for row in systems.values())]


def system_table(systems: dict[str, dict], metrics: dict[str, str]) -> str:
    """systems: name -> {metric: {"value", "interval"}, "n": how many}; metrics: key -> title, those that some system has."""
    shown = {key: metrics[key] for key in scored(systems, metrics)}
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["", *shown.values(), "n"])
    rows = ""
    for name, row in systems.items():
        cells = f"<td>{html.escape(name)}</td>"
        for key in shown:
            score = row.get(key) or {}
            value, ends = score.get("value"), score.get("interval")
            below = f"<small>{score_text(ends[0])} to {score_text(ends[1])}</small>" if ends else ""
            cells += "<td>-</td>" if value is None else f"<td>{score_text(value)}{below}</td>"
        rows += f"<tr>{cells}<td>{row['n']}</td></tr>"
    return f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>'


def write_page(path: Path, title: str, notes: list[str], tables: list[str], cards, pictures: dict[str, Path]) -> tuple[int, int]:
    """One HTML file with everything in it: players, tables, pictures. Returns (cards that it holds, how many there were).

    cards: functions of no argument, each making one; those that PAGE_BYTES has no room for are left out, and that is said.
    """
    made, size = [], 0
    for make in cards:
        made.append(make())
        size += len(made[-1])
        if size > PAGE_BYTES and len(made) > 1:
            made.pop()
            break
    many = counted(len(made), "recording") if len(made) == len(cards) else f"the first {len(made)} of {len(cards)} recordings"
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes), *tables]
    parts += [f"<h2>To listen to: {many}</h2>" if made else "", *made]
    for name, picture in pictures.items():
        shown = data_url(picture.read_bytes(), "image/png")
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="{shown}">')
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{RULES}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>"""
    write_text(path, f"{head}<body>{''.join(parts)}</body></html>\n")
    return len(made), len(cards)


# ---- what an evaluation leaves ---------------------------------------------------------------------------------------

PICTURED = 3  # recordings in the pictures
SAVED_SOUNDS = 8  # whose sound is kept as WAV
TITLES = {
    "mcd": "MCD (dB, lower is better)",
    "f0_rmse_cents": "F0 RMSE (cents)",
    "f0_correlation": "F0 correlation",
    "vuv_error": "voicing errors (share)",
    "stft_distance": "STFT distance",
    "spectral_convergence": "spectral convergence",
    "ltas_distance": "long-term spectrum (dB)",
    "speaker_similarity": "speaker similarity (cosine)",
    "real_time_factor": "real-time factor",
}
DRAWN = ("mcd", "ltas_distance", "f0_rmse_cents", "speaker_similarity")


def leave_page(folder: Path, config, about: dict, dataset, held_out, trials: list[Trial], conversion: dict | None) -> None:
    """page.html, sounds/ and pictures of an evaluation. held_out: systems.HeldOut; conversion: see systems.score_conversions."""
    rate, voice = dataset.voice.config.sample_rate, dataset.voice
    own = [held_sounds(dataset, held_out, index) for index in heard_clips(dataset)]
    names = [dataset.name(index) for index in heard_clips(dataset)]
    for number, trial in enumerate(trials[:SAVED_SOUNDS], start=1):
        save_row(folder / "sounds" / f"{number}_{plain_name(trial.name)}", trial.sounds, rate)
    for number, (name, sounds) in enumerate(zip(names, own, strict=True), start=1):
        save_row(folder / "sounds" / f"held_out_{number}_{plain_name(name)}", sounds, rate)
    shown = trials[:PICTURED]
    rows, labels = ([t.sounds for t in shown], [t.name for t in shown]) if trials else (own, names)
    asked = [t.asked for t in shown] if trials else [dataset[0, index]["f0"].numpy() for index in heard_clips(dataset)]
    scores, what = (conversion["systems"], about_conversion(conversion)) if trials else (held_out.scores, about_held_out(about))
    draw_spectrograms(rows, labels, voice.config, "Mel spectrograms", folder / "spectrograms.png")
    own_name = next(name for name in held_out.scores if name in LABELS.values())
    said = [{name: row[name] for name in (UNTRAINED, own_name) if name in row} for row in rows]
    draw_f0(said, asked, labels, rate, folder / "f0.png")
    draw_scores(scores, {key: TITLES[key] for key in DRAWN}, what, own_name, folder / "scores.png")

    tables = [f"<h2>{html.escape(about_held_out(about))}</h2>", system_table(held_out.scores, TITLES)]
    if trials:
        named = f"<h2>{html.escape(about_conversion(conversion))}</h2>"
        nearest = "".join(f"<p>{html.escape(line)}</p>" for line in nearest_lines(conversion))
        tables = [named, system_table(conversion["systems"], TITLES), nearest, *tables]
    cards = [lambda t=t: card(t.name, about_trial(t), {k: (w, rate) for k, w in t.sounds.items()}) for t in trials]
    cards += [
        lambda n=n, row=row: card(f"{n} (held out)", "", {k: (w, rate) for k, w in row.items()})
        for n, row in zip(names, own, strict=True)
    ]
    notes = [
        f"Data: {about['data']}, {about['split']} split. Base: {about['base']['name']}. Checkpoint: {config.checkpoint}.",
        f"n: sounds that were scored. Below a score of {FEWEST_DRAWN} sentences or more: its 95 % interval (bootstrap).",
    ]
    pictures = {"Scores": "scores.png", "Spectrograms": "spectrograms.png", "F0, asked for and got": "f0.png"}
    pictures = {title: folder / name for title, name in pictures.items()}
    write_page(folder / "page.html", f"What {' and '.join(voice.speakers[:3])} sounds like", notes, tables, cards, pictures)


def held_sounds(dataset, held_out, index: int) -> dict[str, np.ndarray]:
    """System -> wave of a held-out clip, the recording first."""
    recorded = dataset[0, index]["wave"].flatten().numpy()
    return {"recorded": recorded} | {name: sounds[index] for name, sounds in held_out.sounds.items()}


def save_row(folder: Path, sounds: dict[str, np.ndarray], rate: int) -> None:
    """Writes <system>.wav for each sound of a recording."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wave in sounds.items():
        write_wave(folder / f"{plain_name(name)}.wav", np.nan_to_num(wave), rate)


def about_held_out(about: dict) -> str:
    return f"The voice's own words: {about['clips']} held-out clips, from their own content and F0"


def about_conversion(conversion: dict) -> str:
    voices = counted(len(conversion["voices"]), "other voice")
    return f"Conversion of {counted(conversion['recordings'], 'recording')} of {voices}"


def about_trial(trial: Trial) -> str:
    """What is known of a trial, in a line."""
    how = "nobody knows how the target would say it" if trial.truth is None else "compared with the target frame by frame"
    how = "compared with the target after time warping" if trial.aligned else how
    return f"from {trial.speaker}, {trial.length:.1f} s, pitch {trial.shift:+z.1f} semitones; {how}"


def nearest_lines(conversion: dict) -> list[str]:
    """How the conversions were compared, and whom they sound like, in words."""
    counts = {"frame by frame": conversion["frame_by_frame"], "after time warping": conversion["time_warped"]}
    compared = ", ".join(f"{many} {how}" for how, many in counts.items() if many)
    alone = conversion["without_truth"]
    lines = [f"MCD: of {compared}." if compared else "MCD: absent, for no source says what a held-out recording says."]
    if compared and alone:
        lines.append(f"{alone} without a counterpart count in F0 and likeness alone.")
    for speaker, found in conversion["nearest"].items():
        few = ", too few to be sure" if found["seconds"] < STEADY_SECONDS else ""
        how = f"by the long-term spectrum of {found['seconds']:.1f} s{few}"
        lines.append(f"{speaker}, converted, is nearest to {found['nearest']} {how}.")
    return lines


def say_scores(held_out: dict[str, dict], conversion: dict | None) -> None:
    """Prints both tables of scores: a line for each metric, a column for each system."""
    tables = {"held-out clips, from their own content and F0": held_out}
    if conversion:
        tables[about_conversion(conversion)] = conversion["systems"]
    for title, systems in tables.items():
        print(title)
        print(" " * 24 + "".join(f"{name:>22}" for name in systems))
        for key in scored(systems, TITLES):
            values = [(row.get(key) or {}).get("value") for row in systems.values()]
            print(f"  {key:22}" + "".join(f"{'-' if value is None else score_text(value):>22}" for value in values))
    for line in nearest_lines(conversion) if conversion else ():
        print(line)
