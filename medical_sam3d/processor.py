"""The cube around an organ, its active cells, and what the model is given in each: the same for training, eval and inference.

    processor = OrganProcessor(resolution=16)
    frame = processor.frame_of(observed, organ.affine)
    sample = processor.sample(organ, observed, frame)
    points = frame.to_world(vertices)               # from the cube [-.5, .5]^3 to RAS mm

The observed surface, the true one and the image are all looked up at the same points of the world, each through its whole
affine; so whatever grid an organ was scanned on, tilted, flipped or with thick slices, the model gets the same numbers.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch

from common.checkpoint import read_json, write_json
from common.config import Range, UserError, check_ranges, convert, field_kinds, shown
from observe import Observed, spacing_of

INPUT_CHANNELS = (("tsdf",), ("tsdf", "image"))
POINTS = 4  # samples along each edge of a cell: the decoder divides a cell as often
MOST_TURN = math.radians(15)  # of augmentation; and how far it scales and shifts, in edges of the cube
MOST_SCALE = 0.1
MOST_SHIFT = 0.05


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Frame:
    """Where a cube [-.5, .5]^3 lies in the world: centre (3,) RAS mm, edge mm, rotation (3, 3): its axes as columns."""

    centre: np.ndarray
    edge: float
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4): cube -> RAS mm."""
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.edge * self.rotation, self.centre
        return matrix

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) in the cube -> RAS mm."""
        return self.edge * points @ self.rotation.T + self.centre

    def to_cube(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) RAS mm -> in the cube, where |x| <= .5."""
        return (points - self.centre) @ self.rotation / self.edge

    def to_voxel(self, affine: np.ndarray) -> np.ndarray:
        """(3, 4): cube -> indices in a volume with that affine (voxel -> RAS mm)."""
        return (np.linalg.inv(affine) @ self.matrix)[:3]


class Sample(NamedTuple):
    """What the model gets of an organ, and where it is.

    coords (N, 3) int32: active cells, 0..resolution-1. inputs (N, C, 4, 4, 4) float32: at the centres of 4^3 parts of each cell
    the observed signed distance, in edges of a cell and cut off at 1, and the image less .5; or latents (N, 8). coverage: share
    of the cells with true surface that are active; None where the truth is not known.
    """

    coords: np.ndarray
    inputs: np.ndarray
    frame: Frame
    coverage: float | None


@dataclass
class OrganProcessor:
    """What an organ is to a model; saved beside its weights as processor.json.

    every, margin: as the model was trained to see organs. organs: names of those that it has learnt.
    """

    resolution: Annotated[int, Range(4, 128)] = 64  # cells along each edge of the cube
    channels: tuple[str, ...] = ("tsdf",)  # or ("tsdf", "image")
    latents: Literal["encoder", "precomputed"] = "encoder"
    every: Annotated[int, Range(1, 100)] = 5  # every n-th slice is seen
    margin: Annotated[float, Range(1, 4)] = 1.12  # edge of the cube, in greatest extents of the organ
    dilation: Annotated[int, Range(0, 8)] = 1  # cells around those with surface that are active, too
    interior: Literal["flood", "official"] = "flood"  # what the cells that are not active count as: see flexicubes.extract
    organs: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_ranges(self)

    def save_pretrained(self, folder: Path) -> None:
        write_json(Path(folder) / "processor.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "OrganProcessor":
        """Of a checkpoint folder. UserError where the file is not there, or holds what save_pretrained never writes."""
        file = Path(folder) / "processor.json"
        return cls.from_json(read_json(file), file)

    @classmethod
    def from_json(cls, data, where) -> "OrganProcessor":
        kinds = field_kinds(cls)
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise UserError(f"{where} must have {', '.join(kinds)}, but has {shown(data)}")
        channels, organs = data["channels"], data["organs"]
        if not isinstance(channels, list) or tuple(channels) not in INPUT_CHANNELS:
            raise UserError(f"{where}: channels is {shown(channels)}, but must be one of {shown(INPUT_CHANNELS)}")
        if not (isinstance(organs, list) and all(isinstance(name, str) for name in organs)):
            raise UserError(f"{where}: organs is {shown(organs)}, but must be a list of names")
        values = {"channels": tuple(channels), "organs": organs}
        for key in kinds.keys() - values.keys():
            try:
                values[key] = convert(kinds[key], data[key])
            except ValueError as error:
                raise UserError(f"{where}: {key} is {shown(data[key])}, but must be {error}") from None
        return cls(**values)

    def check_fits(self, model, where) -> None:
        """UserError where a model (model.OrganMesher) takes something else than this gives: the files are of different ones."""
        encoder, cells = model.encoder, model.decoder.config.resolution
        for what, here, there in (
            ("cells a side", self.resolution, cells),
            ("latents", self.latents, "precomputed" if encoder is None else "encoder"),
            ("channels", len(self.channels), len(self.channels) if encoder is None else encoder.channels),
        ):
            if here != there:
                raise UserError(
                    f"{where}: processor.json does not belong to the model, {what}: {here} where the model has {there}"
                )

    def frame_of(self, observed: Observed, affine: np.ndarray) -> Frame:
        """The cube around what is observed of an organ, with the axes of the world. ValueError where it has no surface."""
        points = surface_points(observed.sdf, affine)
        low, high = points.min(0), points.max(0)
        return Frame((low + high) / 2, self.margin * float((high - low).max()))

    def sample(self, organ, observed: Observed, frame: Frame | None = None, crop: int = 0, rng=None, latents=None) -> Sample:
        """What the model gets of an organ (organs.Organ), in the cube of frame_of or another one.

        crop: at most so many cells, those around one that rng (numpy's Generator) chooses, for training; 0: all. latents
        (latents.Latents): what is given instead of samples, with their cells and perhaps their frame. ValueError where an organ
        has no image and the model takes one, or no cell of the cube is active.
        """
        frame = frame or (latents.frame if latents is not None else None) or self.frame_of(observed, organ.affine)
        coords = self.active_cells(observed, organ.affine, frame) if latents is None else latents.coords
        coverage = None if organ.sdf is None else self.coverage(coords, organ, frame)
        chosen = crop_cells(coords, crop, rng) if crop else slice(None)
        coords = coords[chosen]
        inputs = self.inputs(coords, organ, observed, frame) if latents is None else latents.feats[chosen]
        return Sample(coords, inputs, frame, coverage)

    def active_cells(self, observed: Observed, affine: np.ndarray, frame: Frame) -> np.ndarray:
        """(N, 3) int32, x slowest: cells that the observed surface cuts, and `dilation` cells around them (by their faces)."""
        from scipy.ndimage import binary_dilation

        many = self.resolution
        corners = np.arange(many + 1) / many - 0.5
        inside = look_up(observed.sdf, grid_points(corners), affine, frame, away=True) < 0
        some, every = inside.copy(), inside.copy()  # of the corners of a cell
        for axis in range(3):
            low, high = (np.take(some, range(first, first + many), axis) for first in (0, 1))
            some = low | high
            low, high = (np.take(every, range(first, first + many), axis) for first in (0, 1))
            every = low & high
        active = some & ~every
        # What is thinner than a cell passes between its corners.
        active |= cells_with(surface_points(observed.sdf, affine), frame, many)[1:-1, 1:-1, 1:-1]
        if self.dilation:
            active = binary_dilation(active, iterations=self.dilation)
        if not active.any():
            raise ValueError("organ that the cube misses")
        return np.argwhere(active).astype(np.int32)

    def inputs(self, coords: np.ndarray, organ, observed: Observed, frame: Frame) -> np.ndarray:
        """(N, C, 4, 4, 4) float32 at the centres of the 4^3 parts of each cell: see Sample."""
        parts = grid_points((np.arange(POINTS) + 0.5) / POINTS)
        points = (coords[:, None, None, None] + parts) / self.resolution - 0.5
        distances = look_up(observed.sdf, points, organ.affine, frame, away=True)
        channels = [np.clip(distances * (self.resolution / frame.edge), -1, 1)]
        if "image" in self.channels:
            if organ.image is None:
                raise ValueError("organ without an image, which the model takes")
            channels.append(look_up(organ.image, points, organ.affine, frame) - 0.5)
        return np.stack(channels, 1, dtype=np.float32)

    def coverage(self, coords: np.ndarray, organ, frame: Frame) -> float:
        """Share of the cells that the true surface cuts that are among coords; those outside of the cube are not."""
        true = cells_with(surface_points(organ.sdf, organ.affine), frame, self.resolution)
        active = np.zeros_like(true)
        active[tuple(coords.T + 1)] = True
        return float((true & active).sum() / true.sum())


def grid_points(places: np.ndarray) -> np.ndarray:
    """(K, K, K, 3) of K places along each axis."""
    return np.stack(np.meshgrid(places, places, places, indexing="ij"), -1)


def look_up(volume: np.ndarray, points: np.ndarray, affine: np.ndarray, frame: Frame, away: bool = False) -> np.ndarray:
    """A volume (X, Y, Z) float32, trilinearly, at points (..., 3) of the cube: (...,) float32.

    Outside of the volume its border counts; with `away`, for signed distances, this much and the way to it in mm.
    """
    matrix, last = frame.to_voxel(affine), np.array(volume.shape, np.float32) - 1
    places = points.reshape(-1, 3) @ matrix[:, :3].T + matrix[:, 3]
    places = places.astype(np.float32)
    grid = torch.from_numpy((places * (2 / np.maximum(last, 1)) - 1)[:, ::-1].copy())  # as torch counts: z, y, x in -1..1
    values = torch.nn.functional.grid_sample(
        torch.from_numpy(volume)[None, None], grid[None, None, None], padding_mode="border", align_corners=True
    ).numpy()[0, 0, 0, 0]
    beyond = places - places.clip(0, last)
    if away and beyond.any():
        values += np.linalg.norm(beyond * spacing_of(affine), axis=1).astype(np.float32)
    return values.reshape(points.shape[:-1])


def surface_points(sdf: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(P, 3) RAS mm: where the signed distance is zero on the lines between neighbouring voxels. ValueError where nowhere."""
    inside, found = sdf < 0, []
    for axis in range(3):
        low, high = (tuple(part if a == axis else slice(None) for a in range(3)) for part in (slice(-1), slice(1, None)))
        crossed = np.flatnonzero(inside[low] != inside[high])
        before, after = sdf[low].ravel()[crossed], sdf[high].ravel()[crossed]
        places = np.stack(np.unravel_index(crossed, inside[low].shape), 1).astype(float)
        places[:, axis] += before / (before - after)
        found.append(places)
    points = np.concatenate(found)
    if not len(points):
        raise ValueError("organ without a surface, which is too thin for its voxels or fills them all")
    return points @ affine[:3, :3].T + affine[:3, 3]


def cells_with(points: np.ndarray, frame: Frame, resolution: int) -> np.ndarray:
    """(resolution + 2)^3 bool: the cells of the cube in which points (P, 3) RAS mm lie, with a layer for those around it."""
    cells = np.floor((frame.to_cube(points) + 0.5) * resolution).clip(-1, resolution).astype(np.int64)
    found = np.zeros((resolution + 2,) * 3, bool)
    found[tuple(cells.T + 1)] = True
    return found


def crop_cells(coords: np.ndarray, most: int, rng) -> np.ndarray:
    """Indices of the cells (N, 3) in the largest box, around one that rng chooses, that holds at most so many of them."""
    if len(coords) <= most:
        return np.arange(len(coords))
    far = np.abs(coords - coords[rng.integers(len(coords))]).max(1)
    sizes = np.cumsum(np.bincount(far))
    return np.flatnonzero(far < np.searchsorted(sizes, most, "right"))


def augmented(frame: Frame, rng) -> Frame:
    """A cube turned by up to 15 degrees about any axis, scaled by up to a tenth and shifted by up to a twentieth of its edge.

    The cube moves and not the organ, so that what is observed, the truth and the image stay together.
    """
    from scipy.spatial.transform import Rotation

    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * rng.uniform(-MOST_TURN, MOST_TURN)).as_matrix()
    centre = frame.centre + frame.edge * rng.uniform(-MOST_SHIFT, MOST_SHIFT, 3)
    return replace(
        frame, centre=centre, edge=frame.edge * rng.uniform(1 - MOST_SCALE, 1 + MOST_SCALE), rotation=frame.rotation @ turn
    )
