"""How far a mask or a mesh is from the true one, in millimetres: Dice, IoU, Hausdorff distances, ASSD, NSD, volume, Chamfer.

One definition of each, used in training, by eval and in every report:

- The surface of a mask is its boundary voxels: those with one of their six neighbours outside (beyond the array is outside).
  Distances run between the centres of the two masks' boundary voxels, in mm through the affine: surface to surface, never to
  the whole mask. A distance is of each boundary voxel to the nearest one of the other mask; both directions are taken.
- hd: the greatest of all distances. hd95: the greater of the two directed 95th percentiles (linear interpolation between
  ranks), not the percentile of both directions pooled. assd: the mean over all distances of both directions, so that the
  larger surface counts more. nsd: the share of all boundary voxels of both masks that are within a tolerance.
- chamfer_mm: between meshes, the mean of the two directed mean distances of points that are drawn evenly over one surface to
  the other surface. Not squared, not summed.
- Nothing is hidden: truth and prediction empty is no sample (None everywhere); a prediction that is empty where there is an
  organ is a miss, of Dice 0 and infinite distances; a prediction where there is no organ, a ghost, is scored so, too.
"""

from typing import NamedTuple

import numpy as np

from meshes import bounding_box

TOLERANCE = 2.0  # mm, of nsd
SAMPLED_POINTS = 5000  # of each surface, for chamfer_mm
NEAREST = 6  # triangles that are looked at for each point
MASK_SCORES = ("dice", "iou", "hd", "hd95", "assd", "nsd", "volume_error")
MISSED = {"dice": 0.0, "iou": 0.0, "hd": np.inf, "hd95": np.inf, "assd": np.inf, "nsd": 0.0}
SAME_GRID = 1e-3  # voxels by which the corners of two grids may differ and yet be one


# ---- masks -----------------------------------------------------------------------------------------------------------


def mask_scores(pred: np.ndarray, truth: np.ndarray, affine: np.ndarray, tolerance: float = TOLERANCE) -> dict[str, float | None]:
    """MASK_SCORES of a mask against the true one, both (X, Y, Z) on one grid, and their volumes pred_ml and truth_ml.

    affine: (4, 4) voxel -> mm. hd, hd95, assd in mm; dice, iou, nsd from 0 to 1; volume_error: (prediction - truth) / truth,
    with its sign. Where both are empty all scores are None, where one is, distances are infinite.
    """
    pred, truth = np.asarray(pred, bool), np.asarray(truth, bool)
    if pred.shape != truth.shape:
        raise ValueError(f"masks of shapes {pred.shape} and {truth.shape} are on no one grid; see one_grid")
    sizes, both = (int(pred.sum()), int(truth.sum())), int((pred & truth).sum())
    ml = float(abs(np.linalg.det(affine[:3, :3]))) / 1000
    volumes = {"pred_ml": sizes[0] * ml, "truth_ml": sizes[1] * ml}
    if not any(sizes):
        return dict.fromkeys(MASK_SCORES) | volumes
    error = {"volume_error": (sizes[0] - sizes[1]) / sizes[1] if sizes[1] else np.inf}
    if not all(sizes):
        return MISSED | error | volumes
    overlap = {"dice": 2 * both / sum(sizes), "iou": both / (sum(sizes) - both)}
    distances = directed_distances(boundary_points(pred, affine), boundary_points(truth, affine))
    return overlap | distance_scores(*distances, tolerance) | error | volumes


def boundary_points(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(N, 3) centres, in mm, of the voxels of a mask (X, Y, Z) that have one of their six neighbours outside."""
    low, high = bounding_box(mask)
    part = np.pad(mask[tuple(map(slice, low, high))], 1)
    inner = part.copy()
    for axis in range(3):
        inner &= np.roll(part, 1, axis) & np.roll(part, -1, axis)  # what wraps around is padding
    voxels = np.argwhere(part & ~inner) - 1 + low
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def directed_distances(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(of each point of pred (P, 3) to the nearest of truth (T, 3); the other way round), in the points' unit."""
    from scipy.spatial import cKDTree

    # Points on a grid share coordinates: a tree split at the middle of its boxes is built faster than one of equal halves.
    return tuple(cKDTree(to, balanced_tree=False).query(of)[0] for of, to in ((pred, truth), (truth, pred)))


def distance_scores(to_truth: np.ndarray, to_pred: np.ndarray, tolerance: float = TOLERANCE) -> dict[str, float]:
    """hd, hd95, assd, nsd of the two directed distances, in mm."""
    everything = np.concatenate([to_truth, to_pred])
    return {
        "hd": float(everything.max()),
        "hd95": float(max(np.percentile(each, 95) for each in (to_truth, to_pred))),
        "assd": float(everything.mean()),
        "nsd": float((everything <= tolerance + 1e-4).mean()),  # a float32 affine makes 2.0000001 mm of a voxel of 2 mm
    }


def looked_up(mask: np.ndarray, affine: np.ndarray, shape: tuple, to_affine: np.ndarray) -> np.ndarray:
    """What a mask (X, Y, Z) with its voxel -> mm affine is on another grid: at each voxel's centre, the nearest voxel's value.

    Exact where the grids differ by flips, axes and cropping alone; False outside of the mask's own grid.
    """
    from scipy.ndimage import affine_transform

    back = np.linalg.inv(affine) @ to_affine  # voxel of the other grid -> voxel of the mask
    return affine_transform(mask.astype(np.uint8), back[:3, :3], back[:3, 3], shape, order=0, mode="grid-constant") > 0


def one_grid(pred: np.ndarray, affine: np.ndarray, truth: np.ndarray, truth_affine: np.ndarray):
    """(pred, truth, affine) of two masks in the same world on the truth's grid, made larger where pred reaches beyond it."""
    if pred.shape == truth.shape and np.allclose(np.linalg.inv(truth_affine) @ affine, np.eye(4), atol=SAME_GRID):
        return pred, truth, truth_affine
    low, high = np.zeros(3, int), np.array(truth.shape)
    if pred.any():
        first, last = bounding_box(pred)
        corners = np.stack(np.meshgrid(*zip(first - 0.5, last - 0.5, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
        to_truth = np.linalg.inv(truth_affine) @ affine
        corners = corners @ to_truth[:3, :3].T + to_truth[:3, 3]
        low = np.minimum(low, np.floor(corners.min(axis=0) + 0.5).astype(int))
        high = np.maximum(high, np.ceil(corners.max(axis=0) + 0.5).astype(int))
    grid = truth_affine.copy()
    grid[:3, 3] += truth_affine[:3, :3] @ low
    truth = np.pad(truth, list(zip(-low, high - truth.shape, strict=True)))
    return looked_up(pred, affine, truth.shape, grid), truth, grid


def file_scores(pred, truth, tolerance: float = TOLERANCE) -> dict[int, dict[str, float | None]]:
    """Label -> mask_scores of a mask file against the true one, in world space: their axes, origins and grids may differ.

    Labels: those of either file. volumes.BadVolume where a file cannot be read.
    """
    from volumes import read_mask

    (pred, pred_geometry, _), (truth, truth_geometry, _) = (read_mask(path) for path in (pred, truth))
    labels = sorted((set(np.unique(pred).tolist()) | set(np.unique(truth).tolist())) - {0})
    found = {}
    for label in labels:
        *masks, affine = one_grid(pred == label, pred_geometry.affine, truth == label, truth_geometry.affine)
        found[int(label)] = mask_scores(*masks, affine, tolerance)
    return found


# ---- meshes ----------------------------------------------------------------------------------------------------------


class SampledSurface(NamedTuple):
    """Points (N, 3), in mm, drawn evenly over the area of a mesh, and its triangles (F, 3, 3)."""

    points: np.ndarray
    triangles: np.ndarray


def sampled_surface(mesh, count: int = SAMPLED_POINTS) -> SampledSurface | None:
    """A mesh's surface with points on it, the same at each call; None of a mesh without area."""
    from trimesh import Trimesh
    from trimesh.sample import sample_surface

    faces = Trimesh(mesh.vertices, mesh.faces, process=False)
    if not len(mesh.faces) or not faces.area > 0:
        return None
    return SampledSurface(np.asarray(sample_surface(faces, count, seed=0)[0]), np.asarray(faces.triangles))


def distances_to(points: np.ndarray, surface: SampledSurface) -> np.ndarray:
    """(P,) distance in mm of each point (P, 3) to a surface: to the nearest point of those triangles whose middles are nearest.

    Triangles of an extracted surface are small and alike, so the nearest one is among the NEAREST middles.
    """
    from scipy.spatial import cKDTree
    from trimesh.triangles import closest_point

    many = min(NEAREST, len(surface.triangles))
    _, near = cKDTree(surface.triangles.mean(axis=1)).query(points, k=many)
    near = np.reshape(near, (len(points), many))
    on_them = closest_point(surface.triangles[near.ravel()], np.repeat(points, many, axis=0))
    return np.linalg.norm(on_them.reshape(len(points), many, 3) - points[:, None], axis=2).min(axis=1)


def signed_distances(points: np.ndarray, organ) -> np.ndarray:
    """(P,) how far points (P, 3) in mm lie outside of the true surface of an organ (organs.Organ) in mm; inside is negative."""
    from scipy.ndimage import map_coordinates

    back = np.linalg.inv(organ.affine)
    return map_coordinates(organ.sdf, (points @ back[:3, :3].T + back[:3, 3]).T, order=1, mode="nearest")


def chamfer(pred: SampledSurface | None, truth: SampledSurface | None) -> float | None:
    """The mean of the two directed mean distances, in mm; None where there is neither surface, infinite where one is missing."""
    if pred is None or truth is None:
        return None if pred is truth else np.inf
    return float(distances_to(pred.points, truth).mean() + distances_to(truth.points, pred).mean()) / 2


def mesh_scores(pred, truth) -> dict[str, float | None]:
    """chamfer_mm of a mesh against the true one, both in mm."""
    return {"chamfer_mm": chamfer(sampled_surface(pred), sampled_surface(truth))}


# ---- many scores -----------------------------------------------------------------------------------------------------


def summary_of(values: list[float | None]) -> dict[str, float | int | None]:
    """{"n", "mean", "median", "infinite", "mean_finite"} of a score over samples; those that are None are no samples.

    A miss is infinite and stays so: the mean of a metric with a miss is infinite. mean_finite: of the others, never to be
    read without `infinite`, how many it leaves out. The median holds misses as the worst there are. Infinite numbers become
    None, which is what JSON has for them; n > 0 tells them from no sample.
    """
    known = np.array([value for value in values if value is not None], dtype=float)
    finite = known[np.isfinite(known)]

    def number(numbers, of):
        value = float(of(numbers)) if len(numbers) else np.nan
        return value if np.isfinite(value) else None

    with np.errstate(invalid="ignore"):  # the median of two infinite numbers
        return {
            "n": len(known),
            "mean": number(known, np.mean),
            "median": number(known, np.median),
            "infinite": len(known) - len(finite),
            "mean_finite": number(finite, np.mean),
        }
