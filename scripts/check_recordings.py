"""Checks of recordings for a voice, without preparing them: what can be read, copies, level, noise, clipping, rates, length."""

from collections import defaultdict
from pathlib import Path

from common.config import UserError
from common.samples import attempt
from common.scan import Scan, in_parts
from findings import Findings, in_order

COPIES = ("copy of another recording", "same sound as")  # what the reader says of them; here they are told in pairs
VOICE_RATE = 40000  # Hz, of the base that train takes
# A measure of report.py -> what is said of recordings beyond it, and what to do.
ADVICE = {
    "clipped": ("warning", "clipped recording", "record at a lower level"),
    "noisy": ("warning", "noisy recording", "clean it, or leave it out"),
    "quiet": ("note", "quiet recording", "it is raised, with the noise in it"),
    "narrow": ("note", "recording without high tones", f"a voice of {VOICE_RATE // 1000} kHz will sound muffled"),
}


def check_recordings(folder: Path, seed: int) -> Findings:
    """UserError where training would refuse the folder."""
    from data import find_voice
    from experiments import slices_as_recordings

    found = find_voice(str(folder), "auto", seed)
    if found.kind == "prepared":
        raise UserError(f"{folder} is what preprocess.py leaves; check the folder of the recordings themselves")
    recordings, speakers, faults = found.recordings, found.speakers, found.faults
    if found.kind == "experiment":
        recordings, speakers = slices_as_recordings(found.folder, faults)
    findings = Findings(folder, "voice_rvc", found.kind)
    find_copies(findings, found, recordings)
    rows = measure(findings, recordings, speakers)
    findings.take(faults, COPIES)
    used = {recording.path for recording in recordings}
    kept = {group.kept for group in findings.copies} | {path for group in findings.copies for path, _, _ in group.others}
    for path in sound_paths(found, recordings):
        if path not in used and path not in kept:
            findings.unusable[path] = None
    for recording in recordings:
        split = recording.split or "not said"
        findings.splits[split] = findings.splits.get(split, 0) + 1
    if {recording.split for recording in recordings} <= {None, "train"} and len(recordings) == 1:
        findings.add("note", "one recording alone: its end is held out, so the metrics flatter", [recordings[0].path])
    judge(findings, rows, speakers)
    return findings


def sound_paths(found, recordings) -> list[Path]:
    """The files that should hold sound."""
    from audio_files import is_audio
    from common.samples import files_below

    if found.kind == "experiment":
        return [recording.path for recording in recordings]
    root = found.folder
    return [Path(path) for path in files_below(root) if is_audio(Path(path))] if root.is_dir() else [root]


def find_copies(findings: Findings, found, recordings) -> None:
    """Recordings that are one sound, by copies.py: the same file, or one take in another format, quieter, at another rate."""
    from copies import exact_copies, near_copies, sound_reader
    from recordings import place_of

    paths = sound_paths(found, recordings)
    scan = Scan(paths, sound_reader())
    try:
        scan.look("reading recordings")
    finally:
        scan.save()
    root = found.folder if found.folder.is_dir() else found.folder.parent
    entries = dict(zip(paths, scan.entries, strict=True))
    good = [(path, place_of(path.relative_to(root).parts[:-1])[0] or "train") for path in paths if not entries[path][3]]
    good = in_order(good)
    facts = [entries[path][2] for path, _ in good]
    same_file = exact_copies(facts)
    originals = [place for place, first in enumerate(same_file) if first == place]
    near = near_copies([good[place][0] for place in originals], [facts[place] for place in originals])
    first_of = {place: originals[first] for place, first in zip(originals, near, strict=True)}
    firsts = [(first_of[first], first != place) for place, first in enumerate(same_file)]
    findings.take_copies([(path, split, None) for path, split in good], firsts)


def measure(findings: Findings, recordings: list, speakers: list[str]) -> list[dict]:
    """A row for each recording that can be cut into clips, as of report.py; findings of the others."""
    from audio import open_audio
    from slices import cut_source, join_measures

    def row_of(recording):
        source = open_audio(recording.path)
        plan, pieces = cut_source(source)
        facts = join_measures([piece.facts for piece in pieces])
        row = {"path": recording.path, "voice": speakers[recording.speaker], "name": recording.name, "notes": source.notes}
        return row | {"rate": plan.rate, "seconds": plan.seconds, "kept": plan.kept, "copy_of": None, **facts}

    results = in_parts(recordings, lambda recording: attempt(row_of, recording), "measuring recordings")
    faults, notes, rows = defaultdict(list), defaultdict(list), []
    for recording, (row, fault, _) in zip(recordings, results, strict=True):
        if fault:
            what, _, detail = fault.partition(", ")
            faults[what].append(f"{findings.name(recording.path)} ({detail})" if detail else recording.path)
            findings.unusable[recording.path] = None
            continue
        rows.append(row)
        for note in row["notes"]:
            what, _, detail = note.partition(", ")
            notes[what].append(f"{findings.name(recording.path)} ({detail})" if detail else recording.path)
    for what, where in faults.items():
        findings.add("warning" if what.startswith("too short") else "error", what, where, "training leaves it out")
    for what, where in notes.items():
        findings.add("note", what, where)
    return rows


def judge(findings: Findings, rows: list[dict], speakers: list[str]) -> None:
    """What the report of preprocess.py would say of level, noise, bandwidth and amount, by its limits."""
    from report import CLIPPED, NARROW, NOISY, QUIET, about_amount

    beyond = {
        "clipped": [(row, f"{100 * row['clipped']:.1f} %") for row in rows if row["clipped"] > CLIPPED],
        "noisy": [(row, f"{row['snr']:.0f} dB above noise") for row in rows if row["snr"] < NOISY],
        "quiet": [(row, f"{row['level']:.0f} dB") for row in rows if row["level"] < QUIET],
        "narrow": [
            (row, f"nothing above {row['bandwidth'] / 1000:.1f} kHz") for row in rows if row["bandwidth"] < NARROW * VOICE_RATE
        ],
    }
    for kind, found in beyond.items():
        severity, what, advice = ADVICE[kind]
        findings.add(severity, what, [f"{findings.name(row['path'])} ({told})" for row, told in found], advice)
    rates = defaultdict(list)
    for row in rows:
        rates[row["rate"]].append(row)
    if len(rates) > 1:
        told = [f"{rate} Hz: {len(own)}" for rate, own in sorted(rates.items())]
        findings.add("note", "recordings of several rates, resampled to one", told)
    copies = {path for group in findings.copies for path, _, _ in group.others}
    voices = []
    for speaker in speakers:
        own = [row for row in rows if row["voice"] == speaker and row["path"] not in copies]
        voices.append({"name": speaker, "minutes": sum(row["kept"] for row in own) / 60})
    findings.classes = {"minutes": {voice["name"]: round(voice["minutes"], 2) for voice in voices}}
    amounts = about_amount(voices, rows)
    little = [line for line in amounts if "enough" not in line or "not enough" in line]
    findings.add("warning", "little speech", little)
    findings.add("note", "amount of speech", [line for line in amounts if line not in little])
