"""A faiss index of what a voice said in training: conversion draws the content of another speaker towards it.

The files are those of RVC and Applio (added_*.index), either way.
"""

import math
import struct
from pathlib import Path

import numpy as np

from common.checkpoint import atomic_file, disk_fault
from common.config import UserError
from common.runtime import say
from common.samples import attempt

INDEX_FILE = "voice.index"
NEIGHBOURS = 8
MOST_ROWS = 200_000  # 67 minutes of content; more is reduced to the centres of clusters
CENTRES = 10_000
ROWS_A_LIST = 39  # faiss wants as many training vectors for each list of an inverted file
KINDS = {b"IxF2": "flat", b"IwFl": "inverted lists"}  # what a file starts with; both hold whole vectors, compared by L2
HEADER = "<4siqqq?i"  # kind, width, vectors, two words without meaning, trained, metric (1: L2)
HEADER_BYTES = 37
ROOM_FOR_LISTS = 1 << 28  # bytes that centres of lists and ids of vectors may take beside the vectors


def build_index(content):
    """A faiss index of content (N, C) float32, as RVC builds it: min(16 sqrt(N), N / 39) inverted lists, one of them searched.

    Below 39 vectors it is flat. Above 200,000 it holds 10,000 centres of theirs. UserError where there is no vector.
    """
    import faiss  # needs: faiss-cpu

    content = np.ascontiguousarray(content, dtype=np.float32)
    if content.ndim != 2 or not content.size:
        raise UserError(f"an index needs content of some frames, not an array of shape {content.shape}")
    if len(content) > MOST_ROWS:
        content = cluster_centres(content)
    rows, width = content.shape
    lists = max(1, min(int(16 * math.sqrt(rows)), rows // ROWS_A_LIST))
    index = faiss.index_factory(width, f"IVF{lists},Flat" if rows >= ROWS_A_LIST else "Flat")
    index.train(content)
    index.add(content)
    return index  # nprobe is 1, faiss's default


def cluster_centres(content: np.ndarray) -> np.ndarray:
    """(CENTRES, C): k-means in small batches, the same for the same content."""
    from sklearn.cluster import MiniBatchKMeans

    say(f"index: {len(content):,} frames are reduced to {CENTRES:,} (k-means; takes some minutes)")
    means = MiniBatchKMeans(CENTRES, init="random", n_init=1, batch_size=1024, compute_labels=False, random_state=0)
    return means.fit(content).cluster_centers_.astype(np.float32)


def write_index(path: Path | str, index) -> None:
    """Writes the file whole or not at all. The bytes go through Python: faiss itself opens no path beyond ASCII on Windows."""
    import faiss

    path = Path(path)
    try:
        with atomic_file(path) as aside:
            aside.write_bytes(faiss.serialize_index(index).data)
    except OSError as error:
        raise UserError(f"could not write {path}: {disk_fault(error)}") from None


def read_index(path: Path | str, width: int):
    """The faiss index in a file, to be searched by content of this width. UserError, in one line, where it cannot serve."""
    import faiss

    path = Path(path).expanduser()
    try:
        # Mapped, not read: a file may be of any length, and is looked at first.
        content = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the index {path}: {getattr(error, 'strerror', None) or error}") from None
    check_index_header(path, content, width)
    try:
        index = faiss.deserialize_index(content)
    except Exception as error:  # faiss's own words are a C++ assertion
        raise UserError(f"the index {path} is damaged or cut ({len(content):,} bytes): build or copy it again") from error
    if hasattr(index, "nprobe"):
        index.nprobe = 1
    return index


def check_index_header(path: Path, content: np.ndarray, width: int) -> None:
    """UserError unless the header is that of a trained index with vectors of this width, and the file has room for them."""
    if not len(content):
        raise UserError(f"the index {path} is empty (0 bytes): copy it again")
    kind, its_width, rows, _, _, trained, metric = struct.unpack(
        HEADER, content[:HEADER_BYTES].tobytes().ljust(HEADER_BYTES, b"\0")
    )
    if kind not in KINDS:
        known = kind[:2] in (b"Ix", b"Iw", b"IH", b"IB") or kind[:1] == b"I"
        what = f"a faiss index of another kind ({kind.decode('ascii', 'replace')})" if known else "no faiss index"
        raise UserError(f"{path} is {what}; expected a flat one or one with inverted lists, as RVC's added_*.index")
    if its_width != width:
        raise UserError(f"the index {path} is of another content: its vectors are {its_width} wide, not {width} as the voice's")
    if rows == 0 or not trained:
        added = sorted(path.parent.glob("added_*.index"))
        more = f"take {added[0].name} beside it" if added else "RVC's trained_*.index is such a file: take added_*.index"
        raise UserError(f"the index {path} has no vectors in it{'' if trained else ' and is not trained'}: {more}")
    if rows < 0 or rows * width * 4 > len(content):
        raise UserError(f"the index {path} is cut: {len(content):,} bytes, but {rows:,} vectors of {width} numbers need more")
    if len(content) > 3 * rows * width * 4 + ROOM_FOR_LISTS:
        raise UserError(f"the index {path} is damaged: {len(content):,} bytes for {rows:,} vectors of {width} numbers")
    if metric != 1:
        raise UserError(f"the index {path} compares by another measure than distance (faiss's metric {metric}, not L2)")


def retrieve(index, content: np.ndarray, rate: float) -> np.ndarray:
    """content (n, C) with a share `rate` of it, 0 to 1, replaced by its nearest vectors: float32 (n, C).

    The eight nearest, or all where there are fewer, weigh by 1 / d^2 of faiss's d, the squared distance (RVC). Where none is
    found, the list that is searched being empty, a frame stays as it is.
    """
    content = np.ascontiguousarray(content, dtype=np.float32)
    distances, ids, vectors = index.search_and_reconstruct(content, min(NEIGHBOURS, index.ntotal))
    there = (ids >= 0) & np.isfinite(vectors).all(axis=2)
    # The least distance keeps a frame that equals a vector from dividing by zero: it becomes that vector.
    weights = np.where(there, 1 / np.square(np.maximum(distances.astype(np.float64), 1e-9)), 0)
    total = weights.sum(axis=1, keepdims=True)
    weights = (weights / np.where(total > 0, total, 1)).astype(np.float32)
    near = np.einsum("nk,nkc->nc", weights, np.where(there[..., None], vectors, 0))
    return np.where(total > 0, (1 - rate) * content + rate * near, content).astype(np.float32)


def save_index(path: Path | str, data) -> None:
    """voice.index of a run. data: .clips with load(hop) -> (wave, content (frames, C) at 100 Hz, f0), and .voice, whose they are.

    Content has each frame twice at 100 Hz; clips that cannot be read any more are left out.
    """
    loaded = (attempt(clip.load, data.voice.config.hop)[0] for clip in data.clips)
    index = build_index(np.concatenate([clip[1][::2] for clip in loaded if clip]))
    write_index(path, index)
    say(f"index: {index.ntotal:,} frames of content in {path}")


def index_of(checkpoint: Path | str) -> Path | None:
    """Where a checkpoint has its index: beside its weights, or in the folder of its run; None where it has none."""
    folder = Path(checkpoint).expanduser().resolve()
    if folder.is_file():  # a voice of others, whose index may have any name
        return None
    places = [folder, folder.parents[1]] if folder.parent.name == "checkpoints" else [folder, folder / "checkpoints" / "best"]
    return next((place / INDEX_FILE for place in places if (place / INDEX_FILE).is_file()), None)
