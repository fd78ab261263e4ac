"""Meshes from values on cubes: FlexiCubes (arXiv:2308.05371) on the active cubes alone, as the SAM 3D mesh decoder ends.

A cube has a signed distance at each of its 8 corners (negative inside), an offset of each corner, and 21 weights that place
the surface within it. Corners that cubes share get the mean of what these say. A corner of no active cube is outside, at +1.

The decoder's active cubes are a shell around the surface. What the shell encloses is inactive, too, so that by this rule the
inside of an organ is outside and the mesh gets a second, inner skin: `interior="official"`. `interior="flood"`, for volumes
that are to be right, fills what the shell encloses, and closes the mesh where it meets the border of the grid.
"""

from typing import NamedTuple

import torch

from cube_tables import CUBE_CORNERS, cube_tables

CUBES_PER_CELL = 4  # cubes along a coarse cell, which the decoder divides into 4 x 4 x 4
SMALLEST = 1e-8  # difference of the values at the ends of an edge; divides, and may be 0 where float32 has no smaller number


class Surface(NamedTuple):
    """A triangle mesh in the object's cube [-0.5, 0.5]^3, axes as the cubes' coordinates. Nothing found: V = F = 0."""

    vertices: torch.Tensor  # (V, 3), differentiable
    faces: torch.Tensor  # (F, 3) int64, counter-clockwise from outside
    l_dev: torch.Tensor  # scalar: mean deviation of the distances between a dual vertex and its crossings; 0 without any
    color: torch.Tensor | None  # (V, 6) in 0..1: RGB and normal, where the decoder gives colours


class Lattice:
    """Corners and cubes of a grid of `resolution`^3 cubes as single int64 keys; a cube has the key of its lowest corner.

    One layer of cubes beyond the border has keys, too.
    """

    def __init__(self, resolution: int, device):
        self.resolution, self.side = resolution, resolution + 3
        self.strides = torch.tensor([self.side**2, self.side, 1], device=device)  # of keys, along x, y, z
        self.corner_steps = torch.tensor(CUBE_CORNERS, device=device) @ self.strides  # (8,), from a cube to its corners

    def keys(self, points: torch.Tensor) -> torch.Tensor:
        """(..., 3) whole numbers -1..resolution + 1 -> (...)"""
        return ((points.long() + 1) * self.strides).sum(-1)

    def points(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([keys // stride % self.side for stride in self.strides.tolist()], -1) - 1

    def corners(self, cubes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of cubes (M,) -> the keys of their corners (V,), each once and in order, and which are whose (M, 8)."""
        return torch.unique(cubes[:, None] + self.corner_steps, return_inverse=True)


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """At least float32: half a cube in 256 is the rounding error of bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def corner_mean(values: torch.Tensor, corners: torch.Tensor, count: int) -> torch.Tensor:
    """values (M, 8, C) at the corners of cubes, corners (M, 8) in 0..count - 1 -> their means (count, C), 0 where none is.

    One corner of the cubes after another: no two cubes share the same corner of theirs, so sums have one order on any device.
    """
    total = values.new_zeros(count, values.shape[-1])
    for k in range(8):
        total = total.index_add(0, corners[:, k], values[:, k])
    return total / torch.bincount(corners.flatten(), minlength=count).clamp(min=1)[:, None]


def cell_of(cubes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The coarse cell of cubes (..., 3), as an index into a grid with a layer of cells beyond the border."""
    return (cubes.long().div(CUBES_PER_CELL, rounding_mode="floor") + 1).unbind(-1)


def filled_cells(coords, beside, inside, resolution: int) -> torch.Tensor:
    """(n, n, n) bool: coarse cells inside the surface that hold none of the active cubes `coords` (M, 3).

    A region of cells, joined by faces, is inside where no path leads from it to the border and most of what active cubes say
    along it is inside: beside (K, 8, 3) are the cubes at corners that are inside or not (K,). So a hollow organ stays hollow.
    """
    from scipy import ndimage

    free = torch.ones((-(-resolution // CUBES_PER_CELL) + 2,) * 3, dtype=torch.bool)
    free[cell_of(coords.cpu())] = False
    regions, count = ndimage.label(free.numpy())
    regions = torch.from_numpy(regions).to(coords.device)
    votes = (inside[:, None] * 2.0 - 1).expand(beside.shape[:2])
    filled = torch.bincount(regions[cell_of(beside)].flatten(), votes.flatten(), count + 1) >= 0
    filled[0] = filled[regions[0, 0, 0]] = False  # cells with cubes, and what is around everything
    return filled[regions]


def find_cut_cubes(coords, sdf, corners, names, lattice, interior: str):
    """Cubes with corners inside and outside: keys (S,), which of the active ones the first A are (A,), what is filled (S,) bool.

    sdf (V,) of the corners `names` (V,), corners (M, 8) of the active cubes `coords` (M, 3). An inactive cube is cut where an
    active one gives it a corner on the other side of the surface than its own region is.
    """
    inside, keys = sdf < 0, lattice.keys(coords)
    signs = inside[corners]
    active = (signs.any(1) & ~signs.all(1)).nonzero()[:, 0]

    rim = (torch.bincount(corners.flatten()) < 8).nonzero()[:, 0]  # corners with inactive cubes around them
    beside = names[rim, None] - lattice.corner_steps  # (rim, 8) cubes
    points = lattice.points(beside)
    if interior == "flood":
        filled, there = filled_cells(coords, points, inside[rim], lattice.resolution)[cell_of(points)], True
    else:  # a surface that leaves the grid ends at its border
        within = (points >= 0) & (points < lattice.resolution) & (interior != "open")
        filled, there = torch.zeros_like(beside, dtype=torch.bool), within.all(-1)
    wanted = there & (inside[rim, None] != filled) & ~torch.isin(beside, keys)
    inactive, first = torch.unique(beside[wanted], return_inverse=True)
    filled = torch.zeros_like(inactive, dtype=torch.bool).index_put((first,), filled[wanted])
    return torch.cat([keys[active], inactive]), active, torch.cat([torch.zeros_like(active, dtype=torch.bool), filled])


class Corners(NamedTuple):
    """What the cubes that the surface cuts have at their corners, once for each, and which corners are whose."""

    points: torch.Tensor  # (P, 3) in the object's cube
    sdf: torch.Tensor  # (P,)
    color: torch.Tensor | None  # (P, 6) in 0..1
    of: torch.Tensor  # (S, 8)


def moved_corners(points, deform, resolution: int) -> torch.Tensor:
    """Corners (..., 3) in whole numbers, moved by up to half a cube -> their places in the object's cube."""
    return points / resolution - 0.5 + (1 - 1e-8) / (2 * resolution) * deform.tanh()


def gather_corners(cubes, lattice, interior: str) -> tuple[Corners, torch.Tensor, torch.Tensor]:
    """The corners of the S cut cubes, the keys (S,) of these and their weights (S, 21); an inactive cube's are 0."""
    coords, sdf = cubes.coords[:, 1:], cubes.sdf
    names, corners = lattice.corners(lattice.keys(coords))
    sdf = corner_mean(sdf[..., None], corners, len(names))[:, 0]
    cut, active, filled = find_cut_cubes(coords, sdf.detach(), corners, names, lattice, interior)
    used, of = lattice.corners(cut)

    place = torch.searchsorted(names, used).clamp(max=len(names) - 1)
    known = names[place] == used
    default = sdf.new_ones(len(used)).index_fill(0, of[filled].flatten(), -1.0)
    sdf = torch.where(known, sdf[place], default)

    # Offsets and colours are needed at the corners used alone; what other corners get goes into one row beyond them.
    local = torch.full_like(names, len(used)).index_put((place[known],), known.nonzero()[:, 0])[corners]
    near = (local < len(used)).any(1).nonzero()[:, 0]

    def mean(values):
        return corner_mean(values[near], local[near], len(used) + 1)[:-1]

    points = moved_corners(lattice.points(used), mean(cubes.deform), lattice.resolution)
    color = None if cubes.color is None else mean(cubes.color).sigmoid()
    weights = cubes.weights[active]
    weights = torch.cat([weights, weights.new_zeros(len(cut) - len(active), weights.shape[1])])
    return Corners(points, sdf, color, of), cut, weights


def crossing(a, b, sdf_a, sdf_b) -> torch.Tensor:
    """Where the straight line from sdf_a at a to sdf_b at b (n, C) is zero; one of the two (n,) is negative, the other is not."""
    difference = sdf_a - sdf_b
    safe = torch.where(difference < 0, difference.clamp(max=-SMALLEST), difference.clamp(min=SMALLEST))
    return torch.lerp(a, b, (sdf_a / safe)[:, None])


def cases_of_cubes(inside, cut, doubtful, lattice) -> torch.Tensor:
    """inside (S, 8) of the cubes with keys `cut` (S,) -> the case (S,) whose sheets they have."""
    case = (inside.long() << torch.arange(8, device=inside.device)).sum(1)
    face = doubtful[case]
    unsure = (face >= 0).nonzero()[:, 0]
    steps = torch.stack([-lattice.strides, lattice.strides], 1).flatten()  # across face 2 * axis + side
    both = unsure[torch.isin(cut[unsure] + steps[face[unsure]], cut[unsure])]
    return case.index_put((both,), 255 - case[both])


class Crossings(NamedTuple):
    """Where the surface crosses edges of the S cut cubes, (T,) each: cube by cube, an edge that four share four times."""

    cube: torch.Tensor
    edge: torch.Tensor  # 0..11
    dual: torch.Tensor  # which of the D dual vertices its sheet of the cube has
    ends: torch.Tensor  # (T, 2), 0..7: the edge's corners in the cube
    corners: torch.Tensor  # (T, 2): the same among all corners


def find_crossings(corners: Corners, cut, lattice) -> tuple[Crossings, torch.Tensor]:
    """And of which cube each dual vertex is, (D,)."""
    tables = cube_tables(cut.device)
    case = cases_of_cubes((corners.sdf < 0)[corners.of], cut, tables.doubtful, lattice)
    sheets = tables.groups[case]
    cube, edge = (tables.group[case] >= 0).nonzero().unbind(1)
    dual = (sheets.cumsum(0) - sheets)[cube] + tables.group[case[cube], edge]
    ends = tables.ends[edge]
    found = Crossings(cube, edge, dual, ends, corners.of[cube[:, None], ends])
    return found, torch.arange(len(cut), device=cut.device).repeat_interleave(sheets)


def dual_vertices(corners: Corners, found: Crossings, weights, count: int):
    """The vertices (D, 3), their colours (D, 6) or None, and the mean deviation of the distances to their crossings.

    weights (S, 21): beta of the 12 edges weighs a vertex' crossings, alpha of the 8 corners moves these along their edges.
    """
    beta, alpha = weights[:, :12].tanh() * 0.99 + 1, weights[:, 12:20].tanh() * 0.99 + 1
    a, b = found.corners.unbind(1)
    moved = (corners.sdf[found.corners] * alpha[found.cube[:, None], found.ends]).unbind(1)
    share = beta[found.cube, found.edge]
    share = share / share.new_zeros(count).index_add(0, found.dual, share)[found.dual]

    def mean(values):
        return values.new_zeros(count, values.shape[1]).index_add(0, found.dual, values * share[:, None])

    points, sdf, color = corners.points, corners.sdf, corners.color
    vertices = mean(crossing(points[a], points[b], *moved))
    color = None if color is None else mean(crossing(color[a], color[b], *moved))

    plain = crossing(points[a], points[b], sdf[a], sdf[b])
    distance = torch.linalg.vector_norm(plain - vertices[found.dual], dim=1)
    size = torch.bincount(found.dual, minlength=count)
    average = distance.new_zeros(count).index_add(0, found.dual, distance) / size
    l_dev = (distance - average[found.dual]).abs().sum() / max(len(distance), 1)
    return vertices, color, l_dev


def find_quads(corners: Corners, found: Crossings) -> torch.Tensor:
    """(Q, 4) dual vertices around each edge that the surface crosses between four cubes, counter-clockwise from outside."""
    tables = cube_tables(found.edge.device)
    name, edge = torch.unique(found.corners[:, 0] * 3 + tables.axis[found.edge], return_inverse=True)
    quads = torch.full((len(name), 4), -1, device=name.device).index_put((edge, tables.place[found.edge]), found.dual)
    inside = corners.sdf[name // 3, None] < 0  # where the edge begins; outside is then along it
    quads = torch.where(inside, quads[:, [1, 2, 3, 0]], quads[:, [0, 3, 2, 1]])
    return quads[(quads >= 0).all(1)]


def split_quads(quads, gamma) -> torch.Tensor:
    """(Q, 4) -> (2 Q, 3) triangles. The diagonal is the one whose ends have the greater product of gamma (D,)."""
    first, second = gamma[quads[:, ::2]].prod(1), gamma[quads[:, 1::2]].prod(1)
    triangles = torch.where((first > second)[:, None], quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]])
    return triangles.view(-1, 3)


def split_quads_smoothly(quads, gamma, values) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, 4) -> (4 Q, 3) triangles around a vertex in each quad; values (D, C) of the vertices, grown by those of the new ones.

    Both diagonals' middles by their product of gamma (D,), so that a step of training moves what `split_quads` decides.
    """
    first, second = gamma[quads[:, ::2]].prod(1)[:, None], gamma[quads[:, 1::2]].prod(1)[:, None]
    middles = values[quads[:, ::2]].mean(1), values[quads[:, 1::2]].mean(1)
    centre = (middles[0] * first + middles[1] * second) / (first + second)
    new = torch.arange(len(quads), device=quads.device)[:, None] + len(values)
    triangles = [torch.cat([quads[:, [i, (i + 1) % 4]], new], 1) for i in range(4)]
    return torch.stack(triangles, 1).view(-1, 3), torch.cat([values, centre])


def surface_of(cubes, interior: str, training: bool) -> Surface:
    """The mesh of one sample's cubes."""
    lattice = Lattice(cubes.resolution, cubes.coords.device)
    corners, cut, weights = gather_corners(cubes, lattice, interior)
    found, owner = find_crossings(corners, cut, lattice)
    vertices, color, l_dev = dual_vertices(corners, found, weights, len(owner))
    quads = find_quads(corners, found)
    gamma = (weights[:, 20].sigmoid() * 0.99 + 0.005)[owner]
    if not training:
        return Surface(vertices, split_quads(quads, gamma), l_dev, color)
    values = vertices if color is None else torch.cat([vertices, color], 1)
    faces, values = split_quads_smoothly(quads, gamma, values)
    return Surface(values[:, :3], faces, l_dev, None if color is None else values[:, 3:])


def extract(cubes, samples: int, interior: str = "flood", training: bool = False) -> list[Surface]:
    """The surface of each of `samples` samples, where values on `cubes` (a decoder's Cubes) change their sign.

    interior: "flood" fills what the active cells enclose and closes the mesh at the border of the grid; "official" takes all
    that is inactive for outside; "open" ends the mesh where active cells end. training: a vertex more in each quad, through
    which gradients reach all weights.
    """
    if interior not in ("flood", "official", "open"):
        raise ValueError(f"interior is flood, official or open, not {interior!r}")
    cubes = cubes._replace(features=full_precision(cubes.features))
    with torch.autocast(cubes.features.device.type, enabled=False):
        return [surface_of(cubes.of(sample), interior, training) for sample in range(samples)]
