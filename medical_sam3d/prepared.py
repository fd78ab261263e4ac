"""Organs as a decoder trains on them, kept on disk: cropped, with signed distances and their image.

    items, about = prepare(cases, prepared_folder(data_dir), workers=0, faults=faults)
    organ = items[0].load()

An organ is in a file named by the hash of its mask's and image's bytes and of all settings, written whole or not at all: so what
is there is never prepared twice and never taken for other data, and a stopped run goes on where it was. prepared.json in the
folder, written last, makes it one that train takes as it is.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cases import Case
from common.checkpoint import read_json, sha256_of, write_json
from common.config import UserError
from common.folders import one_at_a_time
from common.runtime import cores, counted
from common.samples import Faults, attempt
from common.scan import user_cache
from organs import Organ
from preparing import (
    EMPTY,
    PREPARED_FORMAT,
    Job,
    Preparation,
    in_processes,
    known_facts,
    organ_file,
    organ_key,
    prepare_cases,
    read_organ,
)

MESHES_A_WORKER = 50  # for which it is worth to start another process
PREPARED = "prepared.json"
SOURCES = "sources.json"  # path -> [bytes and time of the last change, digest]: what is unchanged is not read again


@dataclass(frozen=True)
class Item:
    """An organ of a case, ready to train on."""

    name: str  # case/organ
    case: str
    organ: str
    label: int  # 0: the mask is of this organ alone
    patient: str  # whose organs stay on one side of a split; scans that are copies of each other are of one patient
    split: str | None  # train, val or test, as the data set says
    path: Path

    def load(self) -> Organ:
        """BadFile where the file is damaged or gone."""
        return read_organ(self.path)


# ---- folders ---------------------------------------------------------------------------------------------------------------


def prepared_folder(data_dir, *settings) -> Path:
    """Where the organs of a data folder are kept if nobody names a place: in the user's cache, the same for every script.

    settings: those by which patients or organs are others than training finds by itself; each has a folder of its own.
    """
    place = Path(data_dir).expanduser().resolve()
    digest = hashlib.sha256(os.fsencode("\n".join(map(str, (place, *settings))))).hexdigest()[:8]
    try:
        return user_cache() / "medical" / f"{place.name[:60]}-{digest}"
    except RuntimeError:
        raise UserError("there is no home folder to keep prepared organs in: name one by LORA_WORKSHOP_CACHE") from None


def is_prepared(folder) -> bool:
    return (Path(folder) / PREPARED).is_file()


def open_prepared(folder) -> tuple[list[Item], dict]:
    """(items, what prepared.json says beside them: settings, left_out, notes) of a folder that preprocess.py wrote."""
    folder = Path(folder)
    about = read_json(folder / PREPARED)
    if not (isinstance(about, dict) and about.get("finished") is True and about.get("format") == PREPARED_FORMAT):
        raise UserError(f"{folder} was not prepared to the end, or by another version: run preprocess.py on its volumes again")
    try:
        entries = [(entry, *(entry[key] for key in ("case", "organ", "label", "patient", "split"))) for entry in about["organs"]]
        items = [Item(f"{fields[0]}/{fields[1]}", *fields, organ_file(folder, Path(e["key"]).name)) for e, *fields in entries]
    except (KeyError, TypeError):
        raise UserError(f"{folder / PREPARED} is damaged: run preprocess.py again") from None
    if damaged := next((item.name for item in items if known_facts(folder, item.path.stem) is None), None):
        raise UserError(f"{folder}: the file of {damaged} is damaged or gone; run preprocess.py again")
    return items, about


# ---- all cases -------------------------------------------------------------------------------------------------------------


def prepare(
    cases: list[Case], folder, workers: int, faults: Faults, preparation: Preparation | None = None
) -> tuple[list[Item], dict]:
    """The organs of cases, in their order, and what open_prepared says beside them.

    Only those that the folder does not have are made, by `workers` processes (0: cores).

    faults is told what was left out and what is worth knowing. UserError where nothing is left; the folder is then none that
    train takes.
    """
    folder = Path(folder)
    job = Job(folder, preparation or Preparation())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --output_dir") from None
    with one_at_a_time(folder / "organs"):
        write_json(folder / PREPARED, {"format": PREPARED_FORMAT, "finished": False})
        digests = digests_of(cases, folder)
        keys = [keys_of(case, digests, job.preparation) for case in cases]
        found = facts_of_all(cases, keys, job, workers)
        left_out = [{"name": name, "organs": [], "fault": fault} for fault, names in faults.found.items() for name in names]
        for case, facts in zip(cases, found, strict=True):
            for entry in faults_of_case(case, facts):
                faults.add_error(entry["fault"], entry["name"])
                left_out.append(entry)
            note_case(case, facts, faults)
        note_in_no_case(found, faults)
        kept = [
            {"case": case.name, "organ": organ, "label": label, "patient": case.patient, "split": case.split}
            | {"key": keys[number][organ], "scan": found[number][organ]["scan"]}
            for number, case in enumerate(cases)
            for organ, _, label in case.masks
            if not found[number][organ]["fault"]
        ]
        if not kept:
            (folder / PREPARED).unlink()
            first = "; the first, {name}: {fault}".format(**left_out[0]) if left_out else ""
            raise UserError(f"no organ to train on in {counted(len(cases), 'case')}{first}")
        unite_copies(kept, faults)
        about = {"format": PREPARED_FORMAT, "finished": True, "settings": asdict(job.preparation), "organs": kept}
        write_json(folder / PREPARED, about | {"left_out": left_out, "notes": dict(faults.notes)})
        return open_prepared(folder)  # in here: another run, with other organs, writes its own prepared.json


def digests_of(cases: list[Case], folder: Path) -> dict[Path, str]:
    """A digest of each file of the cases, or its path where it cannot be read. Unchanged files are not read again."""
    paths = dict.fromkeys(path for case in cases for path in (case.image, *(mask for _, mask, _ in case.masks)) if path)
    try:
        known = read_json(folder / SOURCES)
    except UserError:  # there is none yet, or somebody else wrote it
        known = {}
    known = known if isinstance(known, dict) else {}

    def digest(path):
        stamps, fault, _ = attempt(stamps_of, path)
        if known.get(str(path)) and not fault and known[str(path)][:-1] == stamps:
            return known[str(path)]
        digests, _, _ = attempt(lambda: [sha256_of(part) for part in parts_of(path)])
        return [*stamps, "+".join(digests)] if digests and not fault else [str(path)]

    with ThreadPoolExecutor(cores()) as pool:
        entries = dict(zip(paths, pool.map(digest, paths), strict=True))
    write_json(folder / SOURCES, {str(path): entry for path, entry in entries.items() if len(entry) > 1})
    return {path: entry[-1] for path, entry in entries.items()}


def parts_of(path: Path) -> list[Path]:
    """The files of a volume: one, or header and voxels of a pair."""
    pair = {".hdr": ".img", ".img": ".hdr"}.get(path.suffix.lower())
    return [path, *(other for other in [path.with_suffix(pair)] if other.is_file())] if pair else [path]


def stamps_of(path: Path) -> list[int]:
    """Bytes and time of the last change, in ns, of each file of a volume."""
    return [number for part in parts_of(path) for number in (os.stat(part).st_size, os.stat(part).st_mtime_ns)]


def keys_of(case: Case, digests: dict[Path, str], preparation: Preparation) -> dict[str, str]:
    """Organ -> the name of its file."""
    image = digests.get(case.image, "")
    return {organ: organ_key(digests[mask], image, label, case.modality, preparation) for organ, mask, label in case.masks}


def facts_of_all(cases: list[Case], keys: list[dict[str, str]], job: Job, workers: int) -> list[dict[str, dict]]:
    """Organ -> facts, for each case: what the folder has, and prepare_cases of the rest; what is there twice is made once."""
    facts = {key: known_facts(job.folder, key) for of_case in keys for key in of_case.values()}
    tasks, left = [], {key for key, known in facts.items() if known is None}
    for case, of_case in zip(cases, keys, strict=True):
        if missing := {organ: key for organ, key in of_case.items() if key in left}:
            tasks.append((case, missing))
            left -= set(missing.values())
    if tasks:
        for (_, missing), made in zip(tasks, prepare_cases(tasks, job, workers), strict=True):
            facts |= {key: made[organ] for organ, key in missing.items()}
    return [{organ: facts[key] for organ, key in of_case.items()} for of_case in keys]


def faults_of_case(case: Case, facts: dict[str, dict]) -> list[dict]:
    """[{"name", "organs", "fault"}]: once for the case where all of its organs have one fault, else for each organ.

    An organ without a voxel is no fault where the case has others: most scans show some organs only.
    """
    found = {organ: noted["fault"] for organ, noted in facts.items()}
    if len(set(found.values())) == 1:
        return [{"name": case.name, "organs": list(found), "fault": fault} for fault in set(found.values()) if fault]
    found = {organ: fault for organ, fault in found.items() if fault and not fault.startswith(EMPTY)}
    return [{"name": f"{case.name}/{organ}", "organs": [organ], "fault": fault} for organ, fault in found.items()]


def note_case(case: Case, facts: dict[str, dict], faults: Faults) -> None:
    """What is worth knowing of the organs of a case that are used: of its files once, of each organ by its name."""
    used = {organ: noted for organ, noted in facts.items() if not noted["fault"]}
    if used and (absent := sum(noted["fault"].startswith(EMPTY) for noted in facts.values())):
        faults.note("organs of which the masks are empty", f"{case.name} ({absent})")
    for organ, noted in used.items():
        for text in noted["notes"]:
            note, _, detail = text.partition(", ")
            everywhere = all(text in other["notes"] for other in used.values())
            name = case.name if everywhere or len(facts) == 1 else f"{case.name}/{organ}"
            where = f"{name} ({detail})" if detail else name
            if where not in faults.notes[note]:
                faults.note(note, where)


def note_in_no_case(found: list[dict[str, dict]], faults: Faults) -> None:
    """Names the organs that masks are there for, and no case has."""
    there = {organ for facts in found for organ, noted in facts.items() if not noted["fault"].startswith(EMPTY)}
    for organ in dict.fromkeys(organ for facts in found for organ in facts if organ not in there):
        faults.note("organ that is in no case", organ)


def unite_copies(kept: list[dict], faults: Faults) -> None:
    """Scans that are there twice get one patient: else one would be trained on and its copy validated on.

    Copies have the same values in their image, or where there is none the same voxels in an organ, however they are stored.
    """
    first = {}  # scan -> (patient, case) that had it first
    for entry in kept:
        patient, case = first.setdefault(entry["scan"], (entry["patient"], entry["case"]))
        if case != entry["case"]:
            place = f"{entry['case']} is {case}"
            if place not in faults.notes["scan that is there twice, counted to one patient"]:
                faults.note("scan that is there twice, counted to one patient", place)
        if patient != entry["patient"]:
            old = entry["patient"]
            for other in kept:
                other["patient"] = patient if other["patient"] == old else other["patient"]


# ---- meshes ----------------------------------------------------------------------------------------------------------------


def write_surfaces(items: list[Item], folder: Path, workers: int) -> None:
    """The surface of each item's mask as folder/<case>/<organ>.ply, in RAS mm; one that is there already is not made again."""
    paths, taken = [], set()
    for item in items:
        parts = [re.sub(r"[^\w.+-]", "_", part).lstrip(".") or "_" for part in item.name.split("/")]
        path = folder.joinpath(*parts[:-1], f"{parts[-1]}.ply")
        path = path if str(path).casefold() not in taken else path.with_name(f"{parts[-1]}_{item.path.stem[:8]}.ply")
        taken.add(str(path).casefold())  # some file systems do not tell Liver from liver
        paths.append(path)
    tasks = [(item, path) for item, path in zip(items, paths, strict=True) if not is_surface_of(path, item)]
    workers = min(workers or cores(), 1 + len(tasks) // MESHES_A_WORKER)
    in_processes(write_surface, tasks, [item.name for item, _ in tasks], workers, f"making {counted(len(tasks), 'mesh')}")


def is_surface_of(path: Path, item: Item) -> bool:
    """Whether a mesh file is of this item as it is now: its comment names the prepared file."""
    try:
        with open(path, "rb") as file:
            return item.path.stem.encode() in file.read(1000)
    except OSError:
        return False


def write_surface(item: Item, path: Path) -> None:
    from meshes import mask_to_mesh, write_mesh

    organ = item.load()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mesh(path, mask_to_mesh(organ.mask, organ.affine), f"{item.name}, prepared as {item.path.stem}")
