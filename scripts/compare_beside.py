"""What other scripts found out about two runs, and left in compare/ beside them: read where it is of these weights, or made."""

from pathlib import Path

from common.checkpoint import read_json
from common.config import UserError
from compare_runs import check_numbers, read_beside, run_ids

TIMED = ("base", "full", "lora", "lora_merged")
LEFT = "Left out, as it is of weights that are there no more"  # begins a note on a stale file


def look_closer(record: dict) -> dict:
    """The record of a comparison with what needs the models: disagreements, rank curve, behaviour; made where missing or stale.

    Of the first seed that both have. What cannot be made is said among the notes.
    """
    from behaviour import behaviour
    from compare_text import lora_of
    from disagreements import disagreements
    from rank_curve import rank_curve

    folder, lora = Path(record["beside"]), lora_of(record)
    full = next(run for run in record["runs"] if run["label"] == record["compared_with"])
    if {"full", "lora"} != {full["method"], lora["method"]}:
        return record
    pairs = [(a, b) for a in full["runs"] for b in lora["runs"] if a["seed"] == b["seed"]] or [(full["runs"][0], lora["runs"][0])]
    runs, notes, ids = [Path(each["folder"]) for each in pairs[0]], [], ids_of(record["runs"])
    for name, make in {"disagreements": disagreements, "rank_curve": rank_curve, "behaviour": behaviour}.items():
        place = folder / f"{name}.json"
        state = state_of(place, ids)
        if state == "these":
            continue
        try:
            if state == "others":
                raise UserError(f"{place} is of other runs, or damaged; remove it, or compare these in a --runs_dir of their own")
            if state == "stale":
                print(f"{place} is of weights that are there no more: it is made anew")
            make(*runs, folder)
        except UserError as error:
            notes.append(f"Not made, {name.replace('_', ' ')}: {error}.")
    found, _ = read_closer(folder, record["runs"])
    return record | found | {"notes": [note for note in record["notes"] if not note.startswith(LEFT)] + notes}


def read_closer(folder: Path, rows: list[dict]) -> tuple[dict, list[str]]:
    """({name: what its file holds, None where there is none of these runs, of disagreements []}, notes on stale files)."""
    readers = {"disagreements": check_disagreements, "rank_curve": check_rank_curve, "behaviour": check_behaviour}
    found, stale, ids = {}, [], ids_of(rows)
    for name, check in readers.items():
        path = folder / f"{name}.json"
        state = state_of(path, ids)
        found[name] = read_beside(path, lambda content, check=check: check(content, folder)) if state == "these" else None
        stale += [path.name] if state == "stale" else []
    notes = [f"{LEFT}: {', '.join(stale)}; --look makes it anew."] if stale else []
    return found | {"disagreements": found["disagreements"] or []}, notes


def ids_of(rows: list[dict]) -> dict[str, str]:
    return run_ids(each["folder"] for row in rows for each in row["runs"])


def state_of(path: Path, ids: dict[str, str]) -> str:
    """Whose a file is: "absent", "these" (of the runs with these ids), "stale" (of weights that they had), "others".

    A runs_dir may hold several pairs of a task. A file without ids is one of before there were any: stale, where it names no
    other runs.
    """
    if not path.is_file():
        return "absent"
    try:
        content = read_json(path)
    except UserError:
        return "others"
    runs = content.get("runs", []) if isinstance(content, dict) else None
    if not isinstance(runs, list | dict) or not {str(name) for name in runs} <= ids.keys():
        return "others"
    return "these" if isinstance(runs, dict) and all(ids[name] == runs[name] for name in runs) else "stale"


# ---- what the files hold ---------------------------------------------------------------------------------------------


def check_rank_curve(found: dict, folder: Path) -> dict:
    """{"metric", "split", "ranks": [r], "full": [r], "lora": [r]} of rank_curve.json."""
    check_numbers(found["ranks"], found["full"], found["lora"])
    if not len(found["ranks"]) == len(found["full"]) == len(found["lora"]) > 0 or min(found["ranks"]) <= 0:
        raise ValueError("a rank is without its metric, or not above 0")
    return {key: found[key] for key in ("ranks", "full", "lora")} | {key: str(found[key])[:80] for key in ("metric", "split")}


def check_disagreements(found: dict, folder: Path) -> list[dict]:
    """[{"file", "what", "full", "lora", "picture" or "audio" or "mesh": a file}] of disagreements.json, whose files are there."""
    kinds = ("picture", "audio", "mesh")
    found = [{key: str(x)[:300] for key, x in one.items()} for one in found["samples"]]
    return [one for one in found if all(Path(one[k]).name == one[k] and (folder / one[k]).is_file() for k in kinds if k in one)]


def check_behaviour(found: dict, folder: Path) -> dict:
    """{"metric", "split", "corrupted", "milliseconds", "device", "threads", "drift"} of behaviour.json."""
    scores = {
        str(name)[:40]: {"full": each["full"], "lora": each["lora"], "difference": each["difference"]}
        for name, each in found["corrupted"].items()
    }
    times, moved = {key: found["milliseconds"][key] for key in TIMED}, {key: found["drift"][key] for key in ("full", "lora")}
    ends = [x["difference"] for x in scores.values() if x["difference"] is not None]
    check_numbers(times.values(), moved.values(), *([x["full"], x["lora"]] for x in scores.values()), *ends)
    if None in times.values() or any(len(each) != 2 or None in each for each in ends):
        raise ValueError("a time or an end of an interval is missing")
    said = {key: str(found[key])[:80] for key in ("metric", "split", "device", "threads")}
    return said | {"corrupted": scores, "milliseconds": times, "drift": moved}
