"""The clips of recordings, made and written: cut, levelled, at the voice's rate, with content features and F0; in processes."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

# needs: safetensors
from audio import open_audio, resample
from common.checkpoint import atomic_file, sha256_of, write_json
from common.config import UserError
from common.runtime import cores, counted, progress_bar, versions_of
from common.samples import BadFile, attempt
from content import align, load_content
from f0 import extract_f0, loud_f0
from recordings import Recording
from slices import cut_source, join_measures

PREPARED_FORMAT = 2  # counts up when the same recording and settings give other clips
LONGEST_FILE = 60_000  # frames of 10 ms in a file of clips, ten minutes: so much is in memory at once, whatever a recording has
BYTES_A_WORKER = 2**22  # of recordings, for which it is worth to start another process, which takes seconds
F0_POINTS = 21  # of a recording's F0 that are noted: 0, 5 ... 100 percent of its loud frames lie below
F0_DISTRIBUTIONS = {"swift": "swift-f0", "harvest": "pyworld", "dio": "pyworld", "pyin": "librosa", "crepe": "torchcrepe"}


@dataclass(frozen=True)
class Job:
    """How recordings are prepared; what of it changes a clip is in `settings`."""

    folder: Path
    rate: int
    content: str
    content_version: str
    width: int
    f0_method: str
    f0_min: float
    f0_max: float
    device: str = "cpu"

    @property
    def settings(self) -> dict:
        kept = {key: value for key, value in asdict(self).items() if key not in ("folder", "device")}
        return kept | {"format": PREPARED_FORMAT, **versions_of(F0_DISTRIBUTIONS[self.f0_method])}

    def key(self, path: Path) -> str:
        """The name of the files for a recording."""
        return hashlib.sha256(f"{sha256_of(path)} {json.dumps(self.settings, sort_keys=True)}".encode()).hexdigest()[:32]


def facts_of_all(recordings: list[Recording], keys: list[str], job: Job, workers: int) -> list[tuple[dict | None, str]]:
    """prepare_recording of each recording, or what is in the folder already."""
    facts = {key: known_facts(job.folder, key) for key in dict.fromkeys(keys) if key}
    tasks = {key or str(r.path): (r.path, key) for r, key in zip(recordings, keys, strict=True) if not facts.get(key)}
    if tasks:
        sizes = [path.stat().st_size if path.exists() else 0 for path, _ in tasks.values()]
        workers = min(workers or cores(), len(tasks), 1 + sum(sizes) // BYTES_A_WORKER)
        with progress_bar(None, f"preparing {counted(len(tasks), 'recording')} (MB)", total=round(sum(sizes) / 1e6, 1)) as bar:
            if workers > 1:
                made = in_processes(list(tasks.values()), sizes, job, workers, bar)
            else:
                made = [
                    prepare_recording(*task, job, lambda share, size=size: bar.update(round(share * size / 1e6, 3)))
                    for task, size in zip(tasks.values(), sizes, strict=True)
                ]
        made = dict(zip(tasks, made, strict=True))
    return [(facts[key], "") if facts.get(key) else made[key or str(r.path)] for r, key in zip(recordings, keys, strict=True)]


def known_facts(folder: Path, key: str) -> dict | None:
    """What is noted of a recording that was prepared before; None where a file of it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        facts = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        counts = Counter(clip["file"] for clip in facts["clips"])
        for name, count in counts.items():
            with safe_open(folder / Path(name).name, "np") as tensors:  # checks that the file has all its header promises
                if len(tensors.keys()) < 3 * count:
                    return None
        return facts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


# ---- one recording ---------------------------------------------------------------------------------------------------------


class Watched:
    """A Source for cut_source, which goes over its blocks twice; tell(share) is called with the share of the work that passed."""

    def __init__(self, source, tell):
        self.source, self.tell, self.rate = source, tell, source.rate

    def blocks(self, seconds):
        for sound in self.source.blocks(seconds):
            yield sound
            self.tell(len(sound.wave) / self.source.samples / 2)


def prepare_recording(path: Path, key: str, job: Job, tell) -> tuple[dict | None, str]:
    """(facts, "") of a recording whose clips are then in the folder; ({"seconds"} or None, what is wrong with it)."""
    try:
        source, fault, _ = attempt(open_audio, path)
        if not fault:
            facts, fault, _ = attempt(make_clips, source, key, job, tell)
    except MemoryError:
        return None, "recording for which the memory does not suffice"
    return (facts, "") if not fault else (source and {"seconds": source.seconds}, fault)


def make_clips(source, key: str, job: Job, tell) -> dict:
    """Writes a recording's clips: <key>-0.safetensors ..., then <key>.json with its facts, which are returned."""
    plan, pieces = cut_source(Watched(source, tell))
    part, clips, measured, loud = [], [], [], []
    for piece in pieces:
        part.append(made := make_clip(piece, plan.rate, job))
        measured.append(piece.facts)
        loud.append(made["loud"])
        if sum(clip["frames"] for clip in part) >= LONGEST_FILE:
            clips += write_clips(part, key, len(clips), job)
            part = []
    clips += write_clips(part, key, len(clips), job)
    loud = np.concatenate(loud)
    facts = {
        "seconds": plan.seconds,
        "kept": plan.kept,
        "silence": plan.silence,
        "refused": plan.refused,
        "rate": plan.rate,
        "channels": source.channels,
        "notes": source.notes,
        "measures": join_measures(measured),
        "voiced": len(loud) / 100,
        "f0": f0_points(loud),
        "clips": clips,
    }
    write_json(job.folder / f"{key}.json", facts)
    return facts


def f0_points(f0: np.ndarray) -> list[float]:
    """The F0 that 0, 5 ... 100 % of the frames (n,) lie below, in Hz; [] where there is none."""
    return [round(float(value), 2) for value in np.percentile(f0, np.linspace(0, 100, F0_POINTS))] if len(f0) else []


def make_clip(piece, rate: int, job: Job) -> dict:
    """A piece of a recording at the voice's rate and at 16 kHz, both of T whole frames, and its F0 (T,)."""
    wave, heard = resample(piece.wave, rate, job.rate), resample(piece.wave, rate, 16000)
    frames = min(len(wave) * 100 // job.rate, len(heard) // 160)
    wave, heard = wave[: frames * job.rate // 100], heard[: frames * 160]
    wave /= max(1.0, float(np.abs(wave).max(initial=0)))  # a resampler's overshoot
    f0 = extract_f0(heard, job.f0_method, job.f0_min, job.f0_max)[:frames]
    return {"piece": piece, "frames": frames, "wave": wave, "heard": heard, "f0": f0, "loud": loud_f0(f0, heard)}


def write_clips(part: list[dict], key: str, first: int, job: Job) -> list[dict]:
    """Writes clips with their content features, as of one utterance; what is noted of each."""
    from safetensors.numpy import save_file

    if not part:
        return []
    content = content_of(job.content, job.device, job.width)
    statistics = content.statistics([content.describe(clip["heard"]) for clip in part])
    tensors, notes, name = {}, [], f"{key}-{first}.safetensors"
    for number, clip in enumerate(part, first):
        features = content(clip["heard"], statistics)
        align(features, clip["f0"], clip["frames"])
        for kind, array in (("wave", clip["wave"]), ("content", features), ("f0", clip["f0"])):
            if not np.isfinite(array).all():
                raise BadFile(f"{kind} that is not finite at {clip['piece'].start:.1f} s")
            tensors[f"{number}.{kind}"] = np.ascontiguousarray(array, np.float32)
        times = {"start": round(clip["piece"].start, 3), "stop": round(clip["piece"].stop, 3)}
        notes.append({**times, "frames": clip["frames"], "file": name, "number": number})
    with atomic_file(job.folder / name) as aside:
        save_file(tensors, aside)
    return notes


@cache
def content_of(name: str, device: str, width: int):
    """load_content, once in a process."""
    return load_content(name, device, width)


# ---- processes -------------------------------------------------------------------------------------------------------------

DONE = []  # in a worker: the bytes that all of them have gone through


def start_worker(done) -> None:
    """A worker has one thread, tells its progress, and does not outlive the process that started it."""
    import multiprocessing
    import threading

    import torch

    torch.set_num_threads(1)
    DONE[:] = [done]
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def prepare_in_worker(path: Path, key: str, size: int, job: Job) -> tuple[dict | None, str]:
    def tell(share):
        with DONE[0].get_lock():
            DONE[0].value += share * size

    return prepare_recording(path, key, job, tell)


def in_processes(tasks: list[tuple], sizes: list[int], job: Job, workers: int, bar) -> list[tuple[dict | None, str]]:
    """prepare_recording of all tasks, in their order. UserError where a worker dies."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
    done, threads = context.Value("d", 0.0), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: they share the cores
    pool = ProcessPoolExecutor(workers, context, start_worker, (done,))
    try:
        futures = [pool.submit(prepare_in_worker, *task, size, job) for task, size in zip(tasks, sizes, strict=True)]
        left = set(futures)
        while left:
            finished, left = wait(left, timeout=0.5)
            bar.update(round(done.value / 1e6 - bar.n, 3))
            for future in finished:
                future.result()  # a UserError of one ends all
        return [future.result() for future in futures]
    except BrokenProcessPool:
        names = [
            task[0].name for task, future in zip(tasks, futures, strict=True) if future not in finished or future.exception()
        ]
        raise UserError(
            f"a process that prepared {' or '.join(names[:workers])} died, perhaps for want of memory: what is done is kept; "
            "start again, with --num_workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
