"""A tuned model as an object of your own program; several adapters on one base, which is loaded once.

import sys
sys.path.insert(0, "path/to/medical_sam3d")
from meshes import write_mesh
from predictor import Predictor

predictor = Predictor("outputs/medical_sam3d/lora/checkpoints/best")      # full or LoRA
meshes = predictor.predict("segmentation.nii.gz")                         # {"1": Mesh, "5": Mesh}: vertices in RAS mm, faces
meshes = predictor.predict((labels, affine), organs={"liver": 5})         # an array (X, Y, Z) and its voxel -> mm matrix
write_mesh("liver.ply", meshes["liver"])
predictor.add("outputs/medical_sam3d/lora_2/checkpoints/best", "bones")   # another adapter on the same base
meshes = predictor.predict("segmentation.nii.gz", model="bones")
"""

import sys
from pathlib import Path

import numpy as np

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from cases import Case  # noqa: E402
from common.adapters_on_base import AdaptersOnBase  # noqa: E402
from meshes import Mesh, bounding_box  # noqa: E402
from model import answer, load_base, load_checkpoint  # noqa: E402
from nifti_header import Geometry  # noqa: E402
from organs import BadOrgan, Organ, crop_organ  # noqa: E402
from preparing import Volume, read_labels, read_picture  # noqa: E402
from reconstruct import between_drawn, reconstruct, seen  # noqa: E402
from volumes import to_ras  # noqa: E402


class Predictor(AdaptersOnBase):
    """A checkpoint that makes meshes in RAS mm of masks. Threads may share it; they take turns."""

    model_functions = load_base, load_checkpoint, answer

    def details(self, model, processor, origin):
        """How images were scaled in a checkpoint's training: ct, mr, or auto, by what is known of each."""
        return origin.get("modality", "auto")

    def predict(self, source, organs=None, image=None, every: int | None = None, model: str = "") -> dict[str, Mesh]:
        """{organ: Mesh} of a mask's file, or of (labels (X, Y, Z) of whole numbers, affine (4, 4) from voxel to RAS mm).

        organs: {name: label}; None: all labels there are, named by their numbers. image: the scan's file, on the mask's voxels
        or not, for a model that takes one. every, model: see `mesh`. ValueError (BadVolume) for a file that cannot be read,
        and for an organ of which there is no voxel.
        """
        volume = read_volume(source, image, self.find(model).details)
        organs = {str(label): label for label in labels_of(volume.labels)} if organs is None else organs
        found = {name: organ_of(volume, label)[:2] for name, label in organs.items()}
        return {name: self.mesh(*organ, every, model, volume=volume.geometry)[0] for name, organ in found.items()}

    def mesh(self, organ: Organ, kept: tuple | None = None, every: int | None = None, model: str = "", latents=None, volume=None):
        """(Mesh, organ on the grid it was seen on, Observed) of one organ. kept, every: as of reconstruct.seen.

        model: a name given to `add`; "": the first. latents (latents.Latents): of the official pipeline, for a model that was
        trained on these. volume (nifti_header.Geometry): the voxels that were scanned, outside of which nothing is made.
        """
        processor = self.find(model).processor
        organ, observed = seen(organ, every, kept)
        sample = processor.sample(organ, observed, latents=latents)
        with self.using(model) as mesher:
            return reconstruct(mesher, processor, [sample], volume)[0], organ, observed


def labels_of(labels: np.ndarray) -> list[int]:
    """The labels of organs that are in a mask, in order."""
    return [int(label) for label in np.unique(labels) if label]


def read_volume(source, image=None, modality: str = "auto") -> Volume:
    """A mask, with its image where one is given, in RAS order: of a file, or of (labels, affine). ValueError where it is none."""
    if not isinstance(source, (tuple, list)):
        path = Path(source).expanduser()
        case = Case(path.name, path.name, image and Path(image).expanduser(), ((path.name, path, 1),), None, None)
        return read_labels(path, read_picture(case, modality), False)
    labels, affine = np.asarray(source[0]), np.asarray(source[1], np.float64)
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)))
    sound = affine.shape == (4, 4) and np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]) != 0
    if labels.ndim != 3 or not whole or not sound:
        what = f"{labels.dtype} of shape {labels.shape}, affine of {affine.shape}"
        raise ValueError(f"no mask, expected whole numbers (X, Y, Z) and an affine (4, 4) that can be inverted, got {what}")
    labels, affine = to_ras(labels.astype(np.int64) if labels.dtype.kind == "f" else labels, affine)
    return Volume(labels, Geometry(labels.shape, affine), None, {}, [], None)


def organ_of(volume: Volume, label: int) -> tuple[Organ, tuple | None, str]:
    """(organ, the slices in which it was drawn where not in all, remark) of a label. BadOrgan where it has no voxel.

    remark: what would keep it from being trained on, that it is cut by the border, small or flat; "" where nothing does.
    """
    labels, geometry, image = volume.labels, volume.geometry, volume.image
    box = volume.boxes.get(label) or box_around(labels == label)
    drawn, kept = between_drawn(labels[box] == label)
    if kept:
        labels, label = np.zeros(labels.shape, np.uint8), 1
        labels[box] = drawn
    try:
        organ, remark = crop_organ(labels, label, geometry, image, box=box), ""
    except BadOrgan as error:
        organ, remark = crop_organ(labels, label, geometry, image, training=False, box=box), str(error)
    if kept:
        axis, indices = kept
        first = np.rint(np.linalg.inv(geometry.affine) @ organ.affine[:, 3]).astype(int)[axis]  # of the crop, in the volume
        kept = axis, indices + box[axis].start - first
    return organ, kept, remark


def box_around(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask. BadOrgan for an empty one."""
    if not mask.any():
        raise BadOrgan("mask that is empty, no voxel of the organ")
    return tuple(slice(int(low), int(high)) for low, high in zip(*bounding_box(mask), strict=True))
