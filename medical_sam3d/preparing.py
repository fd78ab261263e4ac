"""The organs of a case, made and written: read once, turned to RAS order, cropped, with distances and image; in processes."""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

# needs: safetensors
from cases import Case
from common.checkpoint import atomic_file, disk_fault
from common.config import UserError
from common.runtime import cores, counted, progress_bar, say
from common.sample_cache import free_memory
from common.samples import BadFile, attempt
from grids import check_pair, same_grid
from nifti_header import Geometry, in_bytes
from organs import MIN_VOXELS, BadOrgan, Organ, crop_organ
from volumes import doubt, guess_modality, look, normalise, read_image, read_mask, to_ras

PREPARED_FORMAT = 2  # counts up when the same files and settings give other organs
EMPTY = "mask that is empty"  # how crop_organ's word on a label without a voxel begins
BYTES_A_VOXEL = 106  # of a mask: 48 for each of its crop, two transforms with their indices, and a crop is 1.3^3 volumes at most
BYTES_AN_IMAGE_VOXEL = 16  # of a whole image: as it is read, as floats, while its percentiles are found
BYTES_A_WORKER = 2**29  # of the sum of all cases' memory, for which it is worth to start another process, which takes seconds
BYTES_KEPT = 4.125  # of a voxel on disk: distance and image in half precision, one bit of the mask
CROWDED = 3  # volumes' worth of voxels that the crops of all organs of a case come to at most: they overlap
LIBRARIES = 200 * 2**20  # bytes of a process before it has read anything


@dataclass(frozen=True)
class Preparation:
    """The settings that an organ depends on."""

    modality: str = "auto"  # ct, mr, or auto: as the case says, else by the values of the image
    min_voxels: int = MIN_VOXELS  # of an organ to train on


@dataclass(frozen=True)
class Job:
    folder: Path
    preparation: Preparation


# ---- what is known ---------------------------------------------------------------------------------------------------------


def organ_key(mask: str, image: str, label: int, modality: str | None, preparation: Preparation) -> str:
    """The name of an organ's file: a hash of all that it depends on. mask, image: digests of the files' bytes."""
    facts = [PREPARED_FORMAT, mask, image, label, modality, asdict(preparation)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def organ_file(folder: Path, key: str) -> Path:
    return Path(folder) / f"{key}.safetensors"


def known_facts(folder: Path, key: str) -> dict | None:
    """What is noted of an organ that was prepared before, or found to be bad; None where its file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(organ_file(folder, key), "np") as tensors:  # checks that the file has all that its header promises
            facts = json.loads(tensors.metadata()["facts"])
            whole = facts["fault"] or {"mask", "sdf"} <= set(tensors.keys())
            return facts if whole and isinstance(facts["notes"], list) and isinstance(facts["fault"], str) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def read_organ(path: Path) -> Organ:
    """The organ in a prepared file. BadFile where that is damaged or gone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as tensors:
            facts = json.loads(tensors.metadata()["facts"])
            shape, affine = tuple(facts["shape"]), np.array(facts["affine"], np.float64).reshape(4, 4)
            sdf = tensors.get_tensor("sdf").astype(np.float32).reshape(shape)
            image = tensors.get_tensor("image").astype(np.float32).reshape(shape) if "image" in tensors.keys() else None
            mask = np.unpackbits(tensors.get_tensor("mask"), count=sdf.size).astype(bool).reshape(shape)
        return Organ(mask, sdf, image, affine, int(facts["thick_axis"]), list(facts["notes"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadFile(f"prepared file that is damaged or gone, {path.name}: prepare again") from error


def write_organ(organ: Organ | None, facts: dict, path: Path) -> None:
    """An organ with what is noted of it, whole or not at all; None where there is nothing but a fault to note.

    UserError where the disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors = {}
    if organ:
        # Half precision is 0.03 mm off at 50 mm and far less near the surface, where distances count.
        tensors = {"mask": np.packbits(organ.mask), "sdf": np.ascontiguousarray(organ.sdf, np.float16)}
        if organ.image is not None:
            tensors["image"] = np.ascontiguousarray(organ.image, np.float16)
    try:
        with atomic_file(path) as aside:
            save_file(tensors, aside, {"facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write to {path.parent}: {disk_fault(error)}; what is done is kept") from error


# ---- one case --------------------------------------------------------------------------------------------------------------


def prepare_case(case: Case, keys: dict[str, str], job: Job) -> dict[str, dict]:
    """Organ -> facts of those organs of a case that `keys` names; their files are then in the folder.

    facts["fault"] is "" or says in one line why an organ is of no use; a fault that lies in the files is noted for the next
    start, too, one of the disk or the memory is not.
    """
    made = {}
    picture, unread, stays = try_reading(read_picture, case, job.preparation.modality)
    for path in dict.fromkeys(mask for _, mask, _ in case.masks):
        organs = [(organ, label) for organ, mask, label in case.masks if mask == path and organ in keys]
        if not organs:
            continue
        volume, fault, lasting = None, unread, stays
        if not fault:
            volume, fault, lasting = try_reading(read_labels, path, picture, organs[0][1] == 0)
        for organ, label in organs:
            bad = {"fault": fault, "notes": [], "lasting": lasting}
            made[organ] = bad if fault else make_organ(volume, label, keys[organ], job)
    for organ, facts in made.items():
        if facts.pop("lasting", False):
            write_organ(None, facts, organ_file(job.folder, keys[organ]))
    return made


def try_reading(read, *arguments):
    """(result, "", False), or (None, what is wrong with it, whether that lies in the file) of read(*arguments)."""
    try:
        return attempt(read, *arguments)
    except MemoryError:
        return None, "volume for which the memory does not suffice", False


@dataclass
class Picture:
    """The image of a case; in RAS order, 0 to 1."""

    values: np.ndarray
    geometry: Geometry
    modality: str
    notes: list[str]
    digest: str  # of the values; "" where they are all alike, which tells nothing


@dataclass
class Volume:
    """A mask file, and the image on its voxels; in RAS order."""

    labels: np.ndarray  # (X, Y, Z), whole numbers
    geometry: Geometry
    image: np.ndarray | None  # (X, Y, Z) float32, 0 to 1
    boxes: dict[int, tuple]  # label -> slices that hold all of its voxels
    notes: list[str]
    picture: Picture | None  # the whole image as it was read


def read_picture(case: Case, modality: str) -> Picture | None:
    """The image of a case, by HU (ct) or percentiles (mr); None where it has none."""
    if case.image is None:
        return None
    image, geometry, notes = read_image(case.image)
    kind = modality if modality != "auto" else case.modality or guess_modality(image)
    notes += [doubt(image, kind)] if doubt(image, kind) else []
    values, affine = to_ras(normalise(image, kind), geometry.affine)
    digest = digest_of(values) if values.min() < values.max() else ""
    return Picture(values, replace(geometry, affine=affine, shape=values.shape), kind, notes, digest)


def digest_of(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:32]


def read_labels(path: Path, picture: Picture | None, alone: bool = False) -> Volume:
    """A mask file with the image on its voxels; alone: it is of one organ, which gets label 1.

    BadFile where it is damaged, or of another place than the image.
    """
    from scipy.ndimage import find_objects

    labels, geometry, notes = read_mask(path, alone)
    labels, affine = to_ras(labels, geometry.affine)
    geometry = replace(geometry, affine=affine, shape=labels.shape)
    if picture and (difference := check_pair(picture.geometry, geometry)):
        raise BadFile(difference)
    image = resampled(picture, geometry) if picture else None
    boxes = {value + 1: box for value, box in enumerate(find_objects(labels)) if box}
    return Volume(labels, geometry, image, boxes, notes + (picture.notes if picture else []), picture)


def resampled(picture: Picture, geometry: Geometry) -> np.ndarray:
    """The image (X, Y, Z) at the voxels of another geometry in the same space, linearly between its own; 0 outside of it."""
    from scipy.ndimage import affine_transform

    if same_grid(picture.geometry, geometry):
        return picture.values
    way = np.linalg.inv(picture.geometry.affine) @ geometry.affine  # index of the mask's voxel -> index in the image
    return affine_transform(picture.values, way[:3, :3], way[:3, 3], geometry.shape, order=1)


def make_organ(volume: Volume, label: int, key: str, job: Job) -> dict:
    """Writes one organ; the facts of it."""
    facts, value, picture = {"fault": "", "notes": list(volume.notes), "label": label}, label or 1, volume.picture
    try:
        if value not in volume.boxes:
            raise BadOrgan(f"{EMPTY}, no voxel of the organ")
        organ = crop_organ(
            *(volume.labels, value, volume.geometry, volume.image),
            min_voxels=job.preparation.min_voxels,
            box=volume.boxes[value],
        )
    except (ValueError, MemoryError) as error:
        fault = str(error) if isinstance(error, ValueError) else "organ for which the memory does not suffice"
        return facts | {"fault": fault, "lasting": isinstance(error, BadOrgan)}
    voxels = int(np.count_nonzero(organ.mask))
    facts |= {
        "notes": facts["notes"] + organ.notes,
        "shape": list(organ.mask.shape),
        "affine": organ.affine.ravel().tolist(),
        "thick_axis": organ.thick_axis,
        "spacing": [round(float(size), 4) for size in organ.spacing],
        "voxels": voxels,
        "ml": round(voxels * float(np.prod(organ.spacing)) / 1000, 4),
        "modality": picture and picture.modality,
        "scan": (picture and picture.digest) or digest_of(organ.mask, np.round(organ.affine, 2)),  # the same for copies
    }
    write_organ(organ, facts, organ_file(job.folder, key))
    return facts


# ---- memory and processes --------------------------------------------------------------------------------------------------


def voxels_of(case: Case) -> int:
    """Voxels of a case's largest volume, by the headers of its image and its first mask; 0 where these are damaged."""
    found = [attempt(look, path)[0] for path in (case.image, case.masks[0][1]) if path]
    return max((stored.voxels for stored in found if stored), default=0)


def bytes_needed(case: Case) -> int:
    """What a process takes at most to prepare a case."""
    return voxels_of(case) * (BYTES_A_VOXEL + (BYTES_AN_IMAGE_VOXEL if case.image else 0))


def say_plan(cases: list[Case], folder: Path) -> None:
    """Says before anything is taken what there is to prepare, and what memory and disk it will take."""
    from shutil import disk_usage

    organs = list(dict.fromkeys(organ for case in cases for organ, _, _ in case.masks))
    named = ", ".join(organs[:8]) + (f" and {len(organs) - 8} more" if len(organs) > 8 else "")
    memory = max(map(bytes_needed, cases), default=0)
    disk = sum(voxels_of(case) * min(len(case.masks), CROWDED) * BYTES_KEPT for case in cases)
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    needed, free = in_bytes(memory + LIBRARIES), in_bytes(free_memory())
    room = f"{in_bytes(disk)} in {folder} ({in_bytes(disk_usage(place).free)} free)"
    say(f"{len(organs)} organ{'s' * (len(organs) != 1)}: {named}")
    say(f"preparing takes up to {needed} of memory a process ({free} free) and up to {room}")


def prepare_cases(tasks: list[tuple[Case, dict]], job: Job, workers: int) -> list[dict[str, dict]]:
    """prepare_case of all tasks (case, keys), in their order, in as many processes as cores, memory and `workers` allow."""
    sizes = [bytes_needed(case) for case, _ in tasks]
    wanted = min(workers or cores(), len(tasks), 1 + sum(sizes) // BYTES_A_WORKER)
    room = int(free_memory() * 0.8) // (max(sizes, default=0) + LIBRARIES)
    workers = max(1, min(wanted, room))
    if workers < wanted:
        say(f"{workers} processes instead of {wanted}: the largest case takes up to {max(sizes) / 1e9:.1f} GB of memory")
    named, text = [case.name for case, _ in tasks], f"preparing {counted(len(tasks), 'case')}"
    return in_processes(prepare_case, [(*task, job) for task in tasks], named, workers, text)


@contextmanager
def one_thread_each():
    """Processes that are started inside have one thread: they share the cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def end_with_parent() -> None:
    """A worker does not outlive the process that started it."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_processes(work, tasks: list[tuple], named: list[str], workers: int, text: str) -> list:
    """[work(*task)] of all tasks, with a progress bar called `text`; by more processes than this one where workers > 1.

    named: the tasks, for the UserError where a process dies, which says what was in work.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    if workers < 2:
        return [work(*task) for task in progress_bar(tasks, text)]
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    with one_thread_each():
        pool = ProcessPoolExecutor(workers, context, end_with_parent)
        futures = {pool.submit(work, *task): name for task, name in zip(tasks, named, strict=True)}
        try:
            for future in progress_bar(as_completed(futures), text, total=len(futures)):
                future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            left = [name for future, name in futures.items() if not future.done() or future.exception()]
            raise UserError(
                f"a process that worked on {' or '.join(left[:workers])} died, perhaps for want of memory: what is done is kept; "
                "start again, with --num_workers 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
