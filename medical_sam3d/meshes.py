"""Masks and meshes in millimetres, one made of the other, and mesh files that say what space and unit they are in."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import atomic_file

MESH_ENDINGS = (".ply", ".stl", ".glb")
LPS = (-1.0, -1.0, 1.0)  # what turns RAS into LPS and back: left is right, back is front


class Mesh(NamedTuple):
    """A surface: vertices (V, 3) float64 in RAS mm, faces (F, 3) int64, counter-clockwise seen from outside."""

    vertices: np.ndarray
    faces: np.ndarray

    @property
    def volume(self) -> float:
        """What the closed surface encloses, in mm3: the sum of signed tetrahedra; negative for one turned inside out."""
        if not len(self.faces):
            return 0.0
        a, b, c = (self.vertices - self.vertices.mean(axis=0))[self.faces].swapaxes(0, 1)
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)

    @property
    def area(self) -> float:
        """Of all faces, in mm2."""
        a, b, c = self.vertices[self.faces].swapaxes(0, 1)
        return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def open_edges(mesh: Mesh) -> int:
    """How many edges have another number of faces than two: 0 for a closed manifold."""
    if not len(mesh.faces):
        return 0
    ends = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, counts = np.unique(ends[:, 0] * len(mesh.vertices) + ends[:, 1], return_counts=True)
    return int((counts != 2).sum())


# ---- mask to mesh ----------------------------------------------------------------------------------------------------


def mask_to_mesh(mask: np.ndarray, affine: np.ndarray) -> Mesh:
    """The surface of a mask (X, Y, Z) in mm through its affine (4, 4): closed, outward, two faces at every edge.

    The zero of the smoothed signed distance, which is kept from crossing any voxel's centre: what was inside stays inside,
    however thin, and a hole stays a hole. Voxels that touch at an edge alone come apart or get a neck. An organ that reaches the
    border of the array ends there, flat, at the faces of its voxels. The volume is that of the voxels to 2 %, of 200 or more.
    ValueError for an empty mask.
    """
    from distance import signed_distance

    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        raise ValueError("empty mask, it has no surface")
    low, high = bounding_box(mask)
    box, spacing = np.pad(mask[tuple(map(slice, low, high))], 2), np.linalg.norm(affine[:3, :3], axis=0)
    distance, voxel = signed_distance(box, spacing), spacing.prod()
    surface = zero_surface(distance, box, spacing)
    # Where it bends, a surface between voxels encloses less than they: 1 to 4 % at 6 voxels' radius. So it moves out by that.
    missing = (box.sum() * voxel - surface.volume) / surface.area
    surface = zero_surface(distance - np.clip(missing, -spacing.min() / 4, spacing.min() / 4), box, spacing)
    indices = surface.vertices / spacing + low - 2.0
    return Mesh(indices @ affine[:3, :3].T + affine[:3, 3], outward(surface.faces, affine))


def zero_surface(distance: np.ndarray, inside: np.ndarray, spacing: np.ndarray) -> Mesh:
    """Where a distance (X, Y, Z) in mm is 0, which is kept from having another sign than `inside` says; index 0 at 0 mm."""
    from skimage.measure import marching_cubes

    # Bounds of different size for the two sides: where all four voxels around an edge are held to one, no tie is left for
    # marching cubes to decide in one cell so and in its neighbour otherwise.
    least = spacing.min()
    distance = np.where(inside, np.minimum(distance, -0.1 * least), np.maximum(distance, 0.2 * least))
    vertices, faces, _, _ = marching_cubes(distance, 0.0, spacing=tuple(spacing), gradient_direction="descent")
    return Mesh(vertices.astype(np.float64), faces.astype(np.int64))


def bounding_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first index, last index + 1) of what is set in a mask that is not empty, each (3,)."""
    found = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([each[0] for each in found]), np.array([each[-1] + 1 for each in found])


def outward(faces: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Faces that point outward in voxel indices, so that they do in mm: an affine that mirrors turns them round."""
    return faces[:, ::-1] if np.linalg.det(affine[:3, :3]) < 0 else faces


# ---- mesh to mask ----------------------------------------------------------------------------------------------------


def mesh_to_mask(mesh: Mesh, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: the voxels whose centres, at whole indices, lie inside a closed mesh in mm (winding number > 0).

    One line of voxels along x for each (y, z): each face that it crosses adds 1 from there on where it enters and takes 1
    where it leaves. Faces are cut by the planes y = j and the cuts by the lines z = k, both half-open and by the same numbers
    for all faces at an edge: so a line through a vertex or along a face still leaves as often as it enters.
    """
    mask = np.zeros(shape, dtype=bool)
    if not len(mesh.faces):
        return mask
    inverse = np.linalg.inv(affine)
    points = mesh.vertices @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.clip(np.floor(points.min(axis=0)), 0, shape).astype(int)
    high = np.clip(np.ceil(points.max(axis=0)) + 1, low, shape).astype(int)  # no voxel beyond is inside
    size = tuple(int(n) for n in high - low)
    if not all(size):
        return mask
    starts, ends, row = cut_by_planes(points - low, outward(mesh.faces, affine), size[1])
    x, column, sign, of = cut_by_lines(starts, ends, size[2])
    first = np.ceil(x).clip(0, size[0]).astype(np.int64)  # the first voxel behind the face
    there = first < size[0]
    flat = np.ravel_multi_index((first[there], row[of[there]], column[there]), size)
    steps = np.bincount(flat, sign[there], minlength=np.prod(size)).reshape(size)
    mask[tuple(map(slice, low, high))] = steps.cumsum(axis=0) > 0.5
    return mask


def whole_numbers(low: np.ndarray, high: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(which, j) for each whole number low[which] < j <= high[which] within 0..count - 1."""
    first = np.floor(low).clip(-1, count - 1).astype(np.int64) + 1
    many = np.floor(high).clip(-1, count - 1).astype(np.int64) + 1 - first
    which = np.repeat(np.arange(len(low)), many)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(many) - many, many) + first[which]


def cut_by_planes(points: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts (S, 2), ends (S, 2), j (S,)): the cuts of faces by planes y = j as (x, z), directed, inside to the one side."""
    y = points[:, 1]
    of, j = whole_numbers(y[faces].min(axis=1), y[faces].max(axis=1), count)
    below = y[faces[of]] < j[:, None]  # (S, 3): one corner or two
    alone = np.where(below.sum(axis=1) == 1, below.argmax(axis=1), (~below).argmax(axis=1))
    corner = faces[of[:, None], (alone[:, None] + np.arange(3)) % 3]  # the lone one, then the other two in their order
    first, second = (cut_edge(points, corner[:, 0], corner[:, other], j) for other in (1, 2))
    up = below[np.arange(len(of)), alone][:, None]  # the lone corner is below
    return np.where(up, first, second), np.where(up, second, first), j


def cut_edge(points: np.ndarray, one: np.ndarray, other: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(S, 2): x and z where edges between vertices of these numbers (S,) have y = j; to the bit the same in both directions."""
    a, b = points[np.minimum(one, other)], points[np.maximum(one, other)]
    share = (j - a[:, 1]) / (b[:, 1] - a[:, 1])
    return (a + share[:, None] * (b - a))[:, [0, 2]]


def cut_by_lines(starts: np.ndarray, ends: np.ndarray, count: int) -> tuple:
    """(x, k, +1 where it enters the inside in the direction of x or -1, which segment): directed (x, z) cut by lines z = k."""
    z0, z1 = starts[:, 1], ends[:, 1]
    of, k = whole_numbers(np.minimum(z0, z1), np.maximum(z0, z1), count)
    a, b = starts[of], ends[of]
    x = a[:, 0] + (k - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    return x, k, np.where(a[:, 1] > b[:, 1], 1, -1), of


# ---- files -----------------------------------------------------------------------------------------------------------


def write_mesh(path: Path, mesh: Mesh, comment: str = "", space: str = "RAS") -> None:
    """Writes a mesh in mm as .ply, .stl (both binary) or .glb, whole or not at all. ValueError for one without a face.

    None of the formats has a field for space and unit, so they stand where a reader may look: "SPACE=RAS" and "UNIT=mm" in
    PLY's comments and STL's header (80 bytes, so that a comment may be cut there), "space" and "unit" in GLB's asset.extras.
    GLB, too, has plain mm along the axes of the scanner: numbers equal those of the other files, and a viewer that takes its
    unit for metres shows it large and lying. space: RAS, or LPS as programs built on ITK or DICOM expect.
    """
    import trimesh

    path = Path(path)
    if not len(mesh.faces):
        raise ValueError("empty mesh, there is nothing to write")
    turned = mesh if space == "RAS" else Mesh(mesh.vertices * LPS, mesh.faces)  # a half turn: faces stay outward
    solid = trimesh.Trimesh(*turned, process=False)
    facts = [f"SPACE={space}", "UNIT=mm", *filter(None, [" ".join(comment.split())])]
    if path.suffix == ".ply":
        kind, line, rest = solid.export(file_type="ply").split(b"\n", 2)
        content = b"\n".join((kind, line, *(f"comment {fact}".encode("ascii", "replace") for fact in facts), rest))
    elif path.suffix == ".stl":  # the header may not begin with "solid", as text files do
        content = " ".join(facts).encode("ascii", "replace")[:80].ljust(80) + solid.export(file_type="stl")[80:]
    elif path.suffix == ".glb":
        extras = {"space": space, "unit": "mm", "comment": comment}
        content = trimesh.Scene(solid).export(
            file_type="glb", tree_postprocessor=lambda tree: tree["asset"].update(extras=extras)
        )
    else:
        raise ValueError(f"{path.name} is of no format that is written ({', '.join(MESH_ENDINGS)})")
    with atomic_file(path) as aside:
        aside.write_bytes(content)


def read_mesh(path: Path) -> Mesh:
    """A mesh file in RAS mm; one that says SPACE=LPS is turned. ValueError where it is none, OSError where it is not there."""
    import trimesh

    path = Path(path)
    try:
        solid = trimesh.load(path, force="mesh", process=path.suffix.lower() == ".stl")  # STL repeats a vertex for each face
        mesh = Mesh(np.asarray(solid.vertices, dtype=np.float64), np.asarray(solid.faces, dtype=np.int64))
    except OSError:
        raise
    except Exception as error:  # whatever a parser trips over in a stranger's file
        raise ValueError(f"no mesh that can be read, {type(error).__name__}: {error}") from error
    if not len(mesh.faces):
        raise ValueError("no mesh that can be read, it has no face")
    return Mesh(mesh.vertices * LPS, mesh.faces) if space_of(path) == "LPS" else mesh


def space_of(path: Path) -> str:
    """RAS or LPS, as the file says; RAS where it says nothing."""
    with open(path, "rb") as file:
        head = file.read(2000)
    if head[:4] == b"glTF":  # 12 bytes, then length and type of the JSON, then the JSON itself
        with open(path, "rb") as file:
            file.seek(20)
            extras = json.loads(file.read(int.from_bytes(head[12:16], "little")))["asset"].get("extras") or {}
        return str(extras.get("space", "RAS"))
    return "LPS" if b"SPACE=LPS" in head.partition(b"end_header")[0] else "RAS"
