"""What recordings are like before anybody trains on them: how much speech, how loud, how clean, whose; is that enough?"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.checkpoint import read_json, write_json, write_text
from common.plots import figure, plot_text, save_figure
from common.runtime import counted
from common.samples import BadFile, Faults
from f0 import F0_HIGH, F0_LOW
from prepared import PREPARED
from preparing import f0_points, known_facts
from slices import join_measures, measures

ENOUGH = 10  # minutes that RVC's makers advise at least; 5 where they are clean; below 1 no voice comes of it
NOISY = 20  # dB of signal above noise, below which a recording is heard to be noisy
QUIET = -40  # dB of full scale
CLIPPED = 0.001  # share of samples at the limit, above which it is heard
NARROW = 0.4  # of the voice's rate: what has nothing above it makes a voice sound muffled
SHOWN = 25  # recordings that the printed table has at most; report.txt has all
MEASURES = ("level", "rms", "peak", "dc", "clipped", "noise", "snr", "bandwidth")


def report_of_folder(folder: Path, faults: Faults) -> dict:
    """The report on what prepared.prepare left in a folder: settings, totals, voices, recordings, left_out, advice.

    Seconds add up: those of each recording are kept + silence + refused (pieces too short to use). Levels in dB of full scale.
    """
    about = read_json(folder / PREPARED)
    rows, names = [], {entry["name"] for entry in about["recordings"]}
    for entry in about["recordings"]:
        facts = known_facts(folder, entry["key"])
        row = {"name": entry["name"], "voice": about["speakers"][entry["speaker"]]}
        row["copy_of"] = entry["group"] if entry["group"] in names - {entry["name"]} else None
        row |= {key: facts[key] for key in ("seconds", "kept", "silence", "refused", "rate", "channels", "voiced", "f0", "notes")}
        rows.append(row | {"clips": len(facts["clips"])} | {key: facts["measures"][key] for key in MEASURES})
    return add_up(rows, left_out_of(about, faults), about["speakers"], about["settings"], as_it_is=False)


def report_of_clips(clips: list, speakers: list[str], voice, faults: Faults) -> dict:
    """The same of clips that others cut and measured (experiments.ExperimentClip), a row for each recording."""
    rate, parts = voice.config.sample_rate, defaultdict(list)
    for clip in clips:
        try:
            wave, _, f0 = clip.load(voice.config.hop)
            parts[clip.recording, clip.speaker].append((measures(wave, rate), f0[f0 > 0]))
        except BadFile as error:
            faults.add_error(str(error), clip.name)
    rows = []
    for (name, speaker), found in parts.items():
        joined, f0 = join_measures([facts for facts, _ in found]), np.concatenate([voiced for _, voiced in found])
        row = {
            "name": name,
            "voice": speakers[speaker],
            "copy_of": None,
            "silence": 0.0,
            "refused": 0.0,
            "channels": 1,
            "notes": [],
        }
        row |= {"seconds": joined["seconds"], "kept": joined["seconds"], "rate": rate, "voiced": len(f0) / 100}
        rows.append(row | {"f0": f0_points(f0), "clips": len(found)} | {key: joined[key] for key in MEASURES})
    settings = {"rate": rate, "content": voice.content, "f0_min": F0_LOW, "f0_max": F0_HIGH}
    return add_up(rows, left_out_of({"left_out": []}, faults), speakers, settings, as_it_is=True)


def add_up(rows: list[dict], left_out: list[dict], speakers: list[str], settings: dict, as_it_is: bool) -> dict:
    totals = {key: sum(row[key] for row in rows) for key in ("seconds", "kept", "silence", "refused", "clips")}
    totals |= {"recordings": len(rows), "copies": sum(row["kept"] for row in rows if row["copy_of"])}
    totals |= {"left_out": len(left_out), "left_out_seconds": sum(entry["seconds"] or 0 for entry in left_out)}
    voices = voices_of(rows, speakers)
    advice = [*about_amount(voices, rows), *about_sound(rows, settings["rate"]), *about_pitch(rows, settings)]
    return {
        "as_it_is": as_it_is,
        "settings": settings,
        "totals": totals,
        "voices": voices,
        "recordings": rows,
        "left_out": left_out,
        "advice": advice,
    }


def left_out_of(about: dict, faults: Faults) -> list[dict]:
    """[{"name", "fault", "seconds" or None}] of what was not used, for whatever reason."""
    known = about["left_out"]
    names = {entry["name"] for entry in known}
    rest = [(fault, where) for fault, places in faults.found.items() for where in places]
    strangers = [(fault, where) for fault, where in rest if where not in names and where.rpartition(" (")[0] not in names]
    return [*known, *({"name": where, "fault": fault, "seconds": None} for fault, where in strangers)]


def voices_of(rows: list[dict], speakers: list[str]) -> list[dict]:
    """Each voice: minutes kept without copies, and the F0 (Hz) that 5, 50 and 95 % of its loud frames lie below."""
    found = []
    for speaker in speakers:
        own = [row for row in rows if row["voice"] == speaker]
        points = np.array([row["f0"] for row in own if row["f0"]])
        seconds = np.array([row["voiced"] for row in own if row["f0"]])
        voice = {"name": speaker, "recordings": len(own), "minutes": sum(r["kept"] for r in own if not r["copy_of"]) / 60}
        found.append(voice | {"f0_low": None, "f0_median": None, "f0_high": None})
        if len(points):
            low, median, high = weighted_percentiles(points.ravel(), np.repeat(seconds, points.shape[1]), (0.05, 0.5, 0.95))
            found[-1] |= {"f0_low": low, "f0_median": median, "f0_high": high}
    return found


def weighted_percentiles(values: np.ndarray, weights: np.ndarray, shares) -> list[float]:
    """The values that these shares of the weight lie below."""
    order = np.argsort(values)
    ranks = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return [round(float(np.interp(share, ranks, values[order])), 1) for share in shares]


# ---- advice ----------------------------------------------------------------------------------------------------------------


def about_amount(voices: list[dict], rows: list[dict]) -> list[str]:
    """Whether it is enough, for each voice."""
    lines = []
    for voice in voices:
        minutes, snr = voice["minutes"], [row["snr"] for row in rows if row["voice"] == voice["name"]]
        whose = f"{voice['name']}: " if len(voices) > 1 else ""
        if not snr:
            lines.append(f"{whose}nothing of this voice can be used")
        elif minutes < 1:
            lines.append(f"{whose}{60 * minutes:.1f} s of speech are not enough for a good voice: 10 to 50 minutes are advised")
        elif minutes < 5:
            lines.append(f"{whose}{minutes:.1f} minutes of speech are little: 10 to 50 are advised, 5 if they are clean")
        elif minutes < ENOUGH:
            clean = np.median(snr) >= NOISY + 10
            what = "enough, since they are clean" if clean else "enough only if they are clean, and these are not quite"
            lines.append(f"{whose}{minutes:.1f} minutes of speech are {what}")
        else:
            lines.append(f"{whose}{minutes:.0f} minutes of speech are enough")
    copies = sum(row["kept"] for row in rows if row["copy_of"])
    if copies:
        lines.append(f"{copies / 60:.1f} minutes more are copies of other recordings, which add nothing: leave them out")
    return lines


def about_sound(rows: list[dict], rate: int) -> list[str]:
    """What is wrong with the sound of recordings, and what to do."""
    kinds = (
        ("clipped", lambda r: r["clipped"] > CLIPPED, lambda r: f"{100 * r['clipped']:.0f} %", "record at a lower level"),
        ("noisy", lambda r: r["snr"] < NOISY, lambda r: f"{r['snr']:.0f} dB above noise", "clean them, or leave them out"),
        ("quiet", lambda r: r["level"] < QUIET, lambda r: f"{r['level']:.0f} dB", "raised, with the noise in them"),
        (
            "narrow",
            lambda r: r["bandwidth"] < NARROW * rate,
            lambda r: f"nothing above {r['bandwidth'] / 1000:.1f} kHz",
            f"the voice of {rate / 1000:g} kHz will sound muffled",
        ),
    )
    lines = []
    for kind, is_so, measure, remedy in kinds:
        found = [f"{row['name']} ({measure(row)})" for row in rows if is_so(row)]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            lines.append(f"{kind} ({len(found)}), {remedy}: {', '.join(found[:5])}{more}")
    return lines


def about_pitch(rows: list[dict], settings: dict) -> list[str]:
    """Recordings whose F0 is at the edge of where it was looked for, or of which there is none."""
    low, high = settings["f0_min"], settings["f0_max"]
    edge = [row for row in rows if row["f0"] and not low * 1.05 < row["f0"][10] < high * 0.95]
    none = [row["name"] for row in rows if not row["f0"]]
    lines = []
    if edge:
        told = ", ".join(f"{row['name']} ({row['f0'][10]:.0f} Hz)" for row in edge[:5])
        lines.append(f"F0 at the edge of {low:g} to {high:g} Hz: {told}; --f0_min and --f0_max widen the range")
    if none:
        lines.append(f"no voiced frame between {low:g} and {high:g} Hz: {', '.join(none[:5])}")
    return lines


# ---- to read ---------------------------------------------------------------------------------------------------------------


def report_text(report: dict, most: int | None = None) -> str:
    """The report for people; most: rows of the table."""
    totals, rows = report["totals"], report["recordings"]
    names = [row["name"] if len(row["name"]) <= 40 else row["name"][:39] + "…" for row in rows]
    width = max(9, *map(len, names))
    lines = [f"{'recording':{width}}      s   kept silence refused clips  level  noise   SNR clipped   kHz  F0 Hz (5, 50, 95 %)"]
    for name, row in list(zip(names, rows, strict=True))[:most]:
        pitch = " ".join(f"{row['f0'][place]:.0f}" for place in (1, 10, 19)) if row["f0"] else "none"
        times = f"{row['seconds']:6.1f} {row['kept']:6.1f} {row['silence']:7.1f} {row['refused']:7.1f} {row['clips']:5}"
        levels = f"{row['level']:6.1f} {row['noise']:6.1f} {row['snr']:5.1f} {100 * row['clipped']:6.1f}%"
        lines.append(f"{name:{width}} {times} {levels} {row['bandwidth'] / 1000:5.1f}  {pitch}")
    if most and len(rows) > most:
        lines.append(f"... and {len(rows) - most} more, in report.txt")
    words = {"recordings": "recording", "clips": "clip", "left_out": "file"}
    many = {key: counted(totals[key], word) for key, word in words.items()}
    lines.append(
        f"{many['recordings']}, {in_minutes(totals['seconds'])} = {in_minutes(totals['kept'])} kept in {many['clips']} + "
        f"{in_minutes(totals['silence'])} cut as silence + {in_minutes(totals['refused'])} in pieces too short; "
        f"{many['left_out']} left out ({in_minutes(totals['left_out_seconds'])})"
    )
    for voice in report["voices"]:
        low, median, high = (voice[key] for key in ("f0_low", "f0_median", "f0_high"))
        pitch = f"F0 {low:.0f} to {high:.0f} Hz, median {median:.0f}" if median else "no F0"
        size = f"{counted(voice['recordings'], 'recording')}, {voice['minutes']:.1f} minutes"
        lines.append(f"voice {voice['name']}: {size}, {pitch}")
    for entry in report["left_out"] if most is None else ():
        lines.append(f"left out: {entry['name']}: {entry['fault']}")
    return "\n".join([*lines, *report["advice"]])


def in_minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def write_report(report: dict, folder: Path) -> None:
    """report.json and report.txt."""
    write_json(folder / "report.json", json.loads(json.dumps(report)))
    write_text(folder / "report.txt", report_text(report) + "\n")


def draw_report(report: dict, path: Path) -> None:
    """A picture of the recordings, one beside the other: how much is kept of each, its level and noise, its F0."""
    from matplotlib.ticker import LogFormatter

    rows = report["recordings"]
    places = np.arange(len(rows))
    drawing, axes = figure(3, 1, width=max(6.0, min(16.0, 0.35 * len(rows))), height=2.6)
    below = np.zeros(len(rows))
    for key, colour in (("kept", "#3b7dd8"), ("silence", "#cfd4da"), ("refused", "#d1495b")):
        values = np.array([row[key] for row in rows])
        axes[0, 0].bar(places, values, bottom=below, color=colour, label=key, width=0.8)
        below += values
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].plot(places, [row["level"] for row in rows], "o", color="#3b7dd8", ms=4, label="level of the loud parts")
    axes[1, 0].plot(places, [max(row["noise"], -100) for row in rows], "v", color="#d1495b", ms=4, label="noise")
    axes[1, 0].set_ylabel("dB of full scale")
    by_voice = defaultdict(list)
    for place, row in enumerate(rows):
        if row["f0"]:
            by_voice[row["voice"]].append((place, row["f0"][1], row["f0"][10], row["f0"][19]))
    for voice, points in by_voice.items():
        x, low, median, high = np.array(points).T
        axes[2, 0].errorbar(x, median, [median - low, high - median], fmt="o", ms=4, lw=1, label=plot_text(voice))
    axes[2, 0].set_ylabel("F0 in Hz (5, 50, 95 %)")
    axes[2, 0].set_yscale("log")
    axes[2, 0].yaxis.set_major_formatter(LogFormatter())  # 200, not 2 x 10^2
    axes[2, 0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis in axes[:, 0]:
        axis.set_xlim(-0.7, len(rows) - 0.3)
        axis.set_xticks([])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if len(rows) <= 30:
        axes[2, 0].set_xticks(places, [plot_text(row["name"], 24) for row in rows], rotation=60, ha="right", fontsize=7)
    save_figure(drawing, path)
