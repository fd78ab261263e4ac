"""What a model makes of an organ: a mesh in mm. And how a mask that somebody has drawn is shown to it.

organ, observed = seen(organ)                           # organs.Organ, as its slices show it
mesh, = reconstruct(model, processor, [processor.sample(organ, observed)])
"""

import numpy as np
import torch

from cube_tables import CUBE_CORNERS
from decoder import Cubes
from flexicubes import extract, moved_corners
from meshes import Mesh
from nifti_header import Geometry
from observe import Observed, kept_slices, observe, repeat_nearest
from organs import Organ
from processor import OrganProcessor, Sample

THICK = 1.51  # round() of which is 2: slices so many times as thick as their pixels are wide have something between them to find


def between_drawn(mask: np.ndarray) -> tuple[np.ndarray, tuple | None]:
    """(mask, None) where all slices count; else the mask with the nearest drawn slices in its empty ones, (axis, the drawn ones).

    So an organ of which somebody has drawn every n-th slice is one part and not as many as there are slices.
    """
    axis, kept = kept_slices(mask)
    if len(kept) == mask.shape[axis]:
        return mask, None
    return repeat_nearest(mask, axis, kept), (axis, kept)


def seen(organ: Organ, every: int | None = None, kept: tuple | None = None) -> tuple[Organ, Observed]:
    """(the organ on the grid that it is observed on, what is observed): no truth is in either.

    every: only each n-th slice is looked at; 1: the mask as it is. kept: (axis, indices) of the slices that were drawn, the
    only ones to look at. Neither: as the voxels are. Where slices are thick, on a grid of finer ones: the shape between their
    middles is interpolated, as it is between the kept slices of training. Else the mask as it is.
    """
    plain = organ._replace(sdf=None)
    if every or kept:
        return plain, observe(organ, every or 1, kept=None if every else kept)
    axis = organ.thick_axis
    times = organ.spacing[axis] / np.delete(organ.spacing, axis).max()
    if times < THICK:
        return plain, observe(organ)
    fine = with_slices_between(organ, axis, round(times))
    return fine, observe(fine, kept=(axis, np.arange(0, fine.mask.shape[axis], round(times))))


def with_slices_between(organ: Organ, axis: int, factor: int) -> Organ:
    """The organ with factor - 1 slices between any two, of which the first's mask and the image between both are taken."""
    from scipy.ndimage import zoom

    count = (organ.mask.shape[axis] - 1) * factor + 1
    mask = np.take(np.repeat(organ.mask, factor, axis), range(count), axis)
    image = organ.image
    if image is not None:
        image = zoom(image, np.divide(mask.shape, image.shape), order=1)  # the first and the last slice keep their places
    affine = organ.affine.copy()
    affine[:3, axis] /= factor
    return Organ(mask, None, image, affine, organ.thick_axis, organ.notes)


@torch.no_grad()
def reconstruct(model, processor: OrganProcessor, samples: list[Sample], volume: Geometry | None = None) -> list[Mesh]:
    """The mesh of each sample in RAS mm, through the sample's own frame; of no vertex where the model finds no surface.

    All parts of a surface are kept: what the model makes is shown as it is, but for what lies outside of `volume`, the voxels
    that were scanned: an organ which their border cuts ends there, flat. One sample after the other, so that no organ's mesh
    depends on another's, and memory is that of one.
    """
    device = next(model.parameters()).device
    meshes = []
    for sample in samples:
        coords = torch.from_numpy(np.insert(sample.coords, 0, 0, axis=1)).to(device)
        cubes = model(coords, torch.from_numpy(sample.inputs).to(device))
        if volume:
            cubes = cut_off(cubes, sample.frame.to_voxel(volume.affine), volume, sample.frame.edge)
        meshes.append(mesh_of(cubes, sample.frame.matrix, processor.interior))
    return meshes


def mesh_of(cubes: Cubes, matrix: np.ndarray, interior: str) -> Mesh:
    """The mesh in RAS mm of the values on one sample's cubes. matrix (4, 4): cube -> mm."""
    surface = extract(cubes, 1, interior)[0]
    vertices = surface.vertices.double().cpu().numpy() @ matrix[:3, :3].T + matrix[:3, 3]
    return Mesh(vertices, surface.faces.cpu().numpy())


def cut_off(cubes: Cubes, to_voxel: np.ndarray, volume: Geometry, edge: float) -> Cubes:
    """Cubes of one sample whose inside ends at the faces of the volume's outer voxels, by the greater of the two distances.

    to_voxel (3, 4): cube -> index of a voxel; edge: of the cube, in mm.
    """
    corners = cubes.coords[:, None, 1:] + torch.tensor(CUBE_CORNERS, device=cubes.coords.device)
    points = moved_corners(corners, cubes.deform, cubes.resolution).double()
    matrix, shape, spacing = (points.new_tensor(np.asarray(each)) for each in (to_voxel, volume.shape, volume.spacing / edge))
    index = points @ matrix[:, :3].T + matrix[:, 3]
    outside = (((index - (shape - 1) / 2).abs() - shape / 2) * spacing).amax(-1)  # (M, 8), in edges of the cube
    sdf = torch.maximum(cubes.sdf, outside.to(cubes.sdf.dtype))
    features = torch.cat([sdf + 1 / cubes.resolution, cubes.features[:, 8:]], 1)  # with the bias that Cubes.sdf takes off
    return cubes._replace(features=features)
