"""What the mesh decoder learns from: the true signed distance at every active corner, and the terms that keep cubes in order.

All in float32, and in the object's cube, whose edge is 1; distances from the surface are counted in bands of three cubes.
A number is the mean over a sample, then over samples, so that it says the same whatever a sample's batch holds.
"""

import zlib

import torch
from torch.nn import functional as F

from cube_tables import CUBE_CORNERS
from flexicubes import Lattice, corner_mean, full_precision, moved_corners, surface_of

BAND = 3  # cubes to either side of the surface within which its distance is told; farther away the side alone is
WEIGHTS_WEIGHT = 0.02  # keeps alpha and beta near 1, so that cubes do not drift where no crossing needs them
DEV_WEIGHT = 0.5  # as TRELLIS weighs it
SURFACE_POINTS = 2048  # drawn on a mesh, and on the true surface
TRUE_STEPS = 3  # of Newton's, from a voxel at the true surface onto it


class TrueDistance:
    """The true signed distance of one sample as a function of points in its cube, in edges of the cube; differentiable.

    truth (X, Y, Z) mm at the centres of voxels; to_voxel (3, 4): cube -> index of a voxel; edge: mm. Between voxels the value
    is trilinear, beyond the volume that of its border.
    """

    def __init__(self, truth, to_voxel, edge, like):
        self.volume = (truth.to(like) / edge.to(like))[None, None]
        self.to_voxel = to_voxel.to(like)
        self.last = torch.tensor(truth.shape, device=like.device) - 1  # index of the last voxel, along each axis

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (...)"""
        voxels = F.linear(points, self.to_voxel[:, :3], self.to_voxel[:, 3])
        places = (2 * voxels / self.last.clamp(min=1) - 1).flip(-1)  # grid_sample wants -1..1, the last axis first
        values = F.grid_sample(self.volume, places.view(1, 1, 1, -1, 3), padding_mode="border", align_corners=True)
        return values.view(points.shape[:-1])

    @torch.no_grad()
    def normals(self, points: torch.Tensor, step: float) -> torch.Tensor:
        """(n, 3) -> (n, 3) unit vectors away from the inside, by differences over `step` to either side; 0 where all is flat."""
        steps = step * torch.eye(3, dtype=points.dtype, device=points.device)
        return F.normalize(torch.stack([self(points + way) - self(points - way) for way in steps], -1), dim=-1)

    @torch.no_grad()
    def surface(self, count: int, step: float, rng) -> torch.Tensor:
        """(n <= count, 3): points on the true surface, of which each voxel at it has about as many as any other."""
        inside = self.volume[0, 0] < 0
        near = torch.zeros_like(inside)
        for axis in range(3):
            low, high = (inside.narrow(axis, first, inside.shape[axis] - 1) for first in (0, 1))
            near.narrow(axis, 0, low.shape[axis]).logical_or_(low != high)
        near = near.nonzero().to(self.volume)
        if not len(near):
            return near
        chosen = torch.randint(len(near), (count,), generator=rng).to(near.device)
        voxels = near[chosen] + torch.rand(count, 3, generator=rng).to(near)
        points = torch.linalg.solve(self.to_voxel[:, :3], (voxels - self.to_voxel[:, 3]).T).T
        for _ in range(TRUE_STEPS):
            points = points - self(points)[:, None] * self.normals(points, step)
        return points[self(points).abs() < step / 4]  # a step of Newton's may miss what is thin


def distance_loss(cubes, true) -> torch.Tensor:
    """Mean |distance - true distance| at the corners as they are moved, in bands, the true one cut off at one band.

    Each cube's own word on a corner is taught, not the mean of what cubes that share it say.
    """
    band = BAND / cubes.resolution
    corners = cubes.coords[:, None, 1:] + torch.tensor(CUBE_CORNERS, device=cubes.coords.device)
    points = moved_corners(corners, cubes.deform, cubes.resolution)
    return (cubes.sdf - true(points).clamp(-band, band)).abs().mean() / band


def consistency_loss(cubes) -> torch.Tensor:
    """Mean square of what a cube says of a corner less the mean of all cubes there, over distance, offset and colour.

    The mean is not taught: the sum of squares around it does not change with it, to first order.
    """
    lattice = Lattice(cubes.resolution, cubes.coords.device)
    names, corners = lattice.corners(lattice.keys(cubes.coords[:, 1:]))
    parts = [cubes.sdf[..., None], cubes.deform, *([] if cubes.color is None else [cubes.color])]
    squares = [(part - corner_mean(part.detach(), corners, len(names))[corners]).square().sum() for part in parts]
    return sum(squares) / sum(part.numel() for part in parts)


def on_surface(surface, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """SURFACE_POINTS points spread evenly over a mesh that has faces, and the normals of their faces; both differentiable."""
    triangles = surface.vertices[surface.faces]  # (F, 3, 3)
    normals = torch.linalg.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = torch.linalg.vector_norm(normals.detach().cpu().double(), dim=1).cumsum(0)  # on the CPU: not every device has doubles
    draws = torch.rand(SURFACE_POINTS, 3, generator=rng, dtype=torch.double)
    along = (torch.arange(SURFACE_POINTS) + draws[:, 0]) / SURFACE_POINTS * area[-1]
    chosen = torch.searchsorted(area, along).clamp(max=len(area) - 1).to(normals.device)
    # Even over a triangle: (1 - sqrt(u), sqrt(u) (1 - v), sqrt(u) v).
    root, v = draws[:, 1].sqrt(), draws[:, 2]
    shares = torch.stack([1 - root, root * (1 - v), root * v], 1).to(triangles.dtype).to(triangles.device)
    return (triangles[chosen] * shares[..., None]).sum(1), F.normalize(normals[chosen], dim=1, eps=1e-20)


def to_vertices(surface, points, normals, cube: float) -> torch.Tensor:
    """Mean distance from points (n, 3) of the true surface, with their normals, to the mesh.

    To the nearest vertex: along the normal, and aside as far as that is more than a cube, which is how far apart vertices are.
    """
    from scipy.spatial import cKDTree

    vertices = surface.vertices
    if not vertices.isfinite().all():  # which a step reports; a tree of them cannot be built
        return vertices.sum()
    _, nearest = cKDTree(vertices.detach().cpu().numpy()).query(points.cpu().numpy())
    way = vertices[torch.from_numpy(nearest).to(vertices.device)] - points
    along = (way * normals).sum(1)
    aside = torch.linalg.vector_norm(way - along[:, None] * normals, dim=1)
    return (along.abs() + (aside - cube).relu()).mean()


def lies_in(points, cubes) -> torch.Tensor:
    """(n, 3) -> (n,) bool: in an active cube."""
    places, lattice = ((points + 0.5) * cubes.resolution).floor(), Lattice(cubes.resolution, points.device)
    active = torch.isin(lattice.keys(places), lattice.keys(cubes.coords[:, 1:]))
    return active & ((places >= 0) & (places < cubes.resolution)).all(-1)  # beyond the grid keys stand for other cubes


def surface_losses(surface, cubes, true, rng) -> dict[str, torch.Tensor]:
    """Of one sample: Chamfer distance in bands, and 1 - cos of the angle between normals; both means over points.

    From the mesh to the true surface the true distance says how far it is; back, drawn points look for the nearest vertex.
    Where cells are not active there is no mesh, and none is missed. No mesh at all: a constant, half an edge of the cube.
    """
    cube, band = 1 / cubes.resolution, BAND / cubes.resolution
    points = true.surface(SURFACE_POINTS, cube, rng)
    points = points[lies_in(points, cubes)]
    nothing = cubes.features.sum() * 0
    if not len(surface.faces):
        return {"chamfer": nothing + (0.5 / band if len(points) else 0), "normals": nothing}
    drawn, normals = on_surface(surface, rng)
    there = true(drawn).abs().mean()
    back = to_vertices(surface, points, true.normals(points, cube), cube) if len(points) else nothing
    wanted = true.normals(drawn.detach(), cube)
    return {"chamfer": (there + back) / band, "normals": (1 - (normals * wanted).sum(1)).mean()}


def sample_losses(cubes, true, mesh_weight: float, rng) -> dict[str, torch.Tensor]:
    """The weighted parts for the cubes of one sample."""
    parts = {
        "sdf": distance_loss(cubes, true),
        "weights": WEIGHTS_WEIGHT * cubes.weights[:, :20].abs().mean(),
        "consistency": consistency_loss(cubes),
    }
    if mesh_weight:
        surface = surface_of(cubes, "open", training=True)
        parts["dev"] = DEV_WEIGHT * surface.l_dev
        parts |= {name: mesh_weight * value for name, value in surface_losses(surface, cubes, true, rng).items()}
    return parts


def mesh_losses(cubes, batch, mesh_weight: float = 0.0) -> dict[str, torch.Tensor]:
    """The weighted parts of the loss by name; their sum is the loss.

    cubes: a decoder's Cubes for the samples of `batch`, which has "truth": a list of (X, Y, Z) signed distances in mm,
    "to_voxel" (B, 3, 4): cube -> voxel of the truth, "edge" (B,) mm, "index" (B,). Of every sample "sdf" (the true distance),
    "weights" (FlexiCubes' weights, as they are) and "consistency" (between cubes); with a mesh_weight the mesh is made, too:
    "dev" (FlexiCubes' regulariser), "chamfer" and "normals". Points are drawn by the sample's index and place in the world.
    """
    cubes = cubes._replace(features=full_precision(cubes.features))
    parts = []
    with torch.autocast(cubes.features.device.type, enabled=False):
        for sample, (truth, to_voxel, edge, index) in enumerate(
            zip(batch["truth"], batch["to_voxel"], batch["edge"], batch["index"], strict=True)
        ):
            rng = torch.Generator().manual_seed(zlib.crc32(to_voxel.cpu().numpy().tobytes(), int(index) % 2**32))
            true = TrueDistance(truth, to_voxel, edge, like=cubes.features)
            parts.append(sample_losses(cubes.of(sample), true, mesh_weight, rng))
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
