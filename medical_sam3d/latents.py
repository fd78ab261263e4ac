"""Latents of the active cells, which the decoder makes a surface of: where they come from.

    latents = LatentEncoder(channels=1)(coords, inputs)      # from what is observed of an organ; trained with the decoder
    latents = read_latents(file)                             # made elsewhere, by the official pipeline; the decoder alone trains
    latents, loss = optimise_latents(decoder, batch)         # the best there are for this organ: a diagnosis, no prediction

Those of the encoder are its own. They have eight channels as the official ones, and with `official` their statistics at first,
but the official encoder has never seen them: what they mean is what the decoder and the encoder have learnt together.
"""

import threading
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.config import UserError, shown
from common.samples import BadFile
from processor import POINTS, Frame, OrganProcessor
from sparse_ops import SparseConv3d, neighbours

# Mean and standard deviation of the official latents in their eight channels, by which the pipeline normalises them.
OFFICIAL_MEAN = (-2.16875, -0.00435, -0.13352, -0.08418, -0.52712, 0.72387, -1.14145, 1.20394)
OFFICIAL_STD = (2.37765, 2.38638, 2.12442, 2.17486, 2.66394, 2.37119, 2.62174, 2.68452)
LARGEST_LATENTS = 2**28  # bytes when unpacked; 64^3 cells in doubles take a tenth
# numpy parses the header of an array by ast, which Python 3.11 cannot do in two threads at once.
READING = threading.Lock()
LATENT_KEYS = ("coords", "feats", "centre", "edge", "rotation")
ENCODER_RANGES = {"channels": range(1, 9), "width": range(1, 1025), "latent_channels": range(1, 1025)}


class LatentEncoder(nn.Module):
    """Samples of each active cell -> its latent: a linear layer over the cell, two sparse convolutions over its neighbours.

    channels: of the samples. width 32 makes about 60,000 weights. official: the first latents have the mean and the standard
    deviation of the official ones, for a decoder that was trained on these.
    """

    def __init__(self, channels: int, width: int = 32, latent_channels: int = 8, official: bool = False):
        super().__init__()
        self.channels, self.width, self.latent_channels = channels, width, latent_channels
        self.cell = nn.Linear(channels * POINTS**3, width)
        self.around = nn.ModuleList(SparseConv3d(width, width, 3) for _ in range(2))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # so that the scale of the latents is known from the start
        self.out = nn.Linear(width, latent_channels)
        if official:
            self.start_official()

    @torch.no_grad()
    def start_official(self) -> None:
        """Weights of the output layer by which latents begin with the statistics of the official ones. ValueError unless 8."""
        if self.latent_channels != len(OFFICIAL_STD):
            raise ValueError(f"official latents have {len(OFFICIAL_STD)} channels, not {self.latent_channels}")
        nn.init.normal_(self.out.weight, std=self.width**-0.5)
        self.out.weight *= torch.tensor(OFFICIAL_STD)[:, None]
        self.out.bias.copy_(torch.tensor(OFFICIAL_MEAN))

    def forward(self, coords: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """coords (N, 4) int: sample, x, y, z. inputs (N, channels, 4, 4, 4) -> (N, latent_channels)."""
        table = neighbours(coords)
        hidden = nn.functional.silu(self.cell(inputs.flatten(1)))
        for layer in self.around:
            hidden = hidden + nn.functional.silu(layer(hidden, table))
        return self.out(self.norm(hidden))

    def to_json(self) -> dict:
        return {key: getattr(self, key) for key in ENCODER_RANGES}

    @classmethod
    def from_json(cls, data) -> "LatentEncoder":
        """An encoder with new weights. UserError for what to_json never gives."""
        fits = isinstance(data, dict) and data.keys() == ENCODER_RANGES.keys()
        if not fits or not all(type(data[key]) is int and data[key] in values for key, values in ENCODER_RANGES.items()):
            raise UserError(f"the configuration of an encoder is {shown(data)}, but must have {', '.join(ENCODER_RANGES)}")
        return cls(**data)


# ---- latents of others -----------------------------------------------------------------------------------------------


class Latents(NamedTuple):
    """coords (N, 3) int32 and feats (N, 8) float32, as the decoder takes them (not normalised); frame: their cube, if said."""

    coords: np.ndarray
    feats: np.ndarray
    frame: Frame | None


def latents_folder(named: str, processor: OrganProcessor) -> Path | None:
    """The folder of latents that a processor takes, by --latents_dir; None where it takes none. UserError where none is."""
    if processor.latents == "encoder":
        return None
    folder = Path(named).expanduser()
    if not named or not folder.is_dir():
        why = f"there is no folder {named}" if named else "the model takes latents of others: name the folder of their .npz files"
        raise UserError(f"--latents_dir: {why}")
    return folder


def find_latents(folder: Path, name: str) -> Path:
    """The file of an organ "case/organ" in a folder of latents: case/organ.npz or case_organ.npz. BadFile where neither is."""
    places = [Path(folder) / f"{name}.npz", Path(folder) / f"{name.replace('/', '_')}.npz"]
    for place in places:
        if place.is_file():
            return place
    raise BadFile(f"organ without latents, neither {places[0].relative_to(folder)} nor {places[1].name} is in --latents_dir")


def read_latents(file: Path, resolution: int = 64, channels: int = 8) -> Latents:
    """Of a .npz file: coords (N, 3) int, each cell once, in 0..resolution-1; feats (N, channels) float; and the cube that they
    are in, if said: centre (3,) and edge () in RAS mm, rotation (3, 3), its axes as columns. BadFile where it holds else.

    coords of four columns, as the official pipeline has them, begin with the sample, which is the same for all.
    """
    arrays = read_arrays(file)
    if missing := [key for key in ("coords", "feats") if key not in arrays]:
        raise BadFile(f"latents without {missing[0]}")
    coords, feats = arrays["coords"], arrays["feats"]
    if coords.ndim == 2 and coords.shape[1] == 4 and len(np.unique(coords[:, 0])) == 1:
        coords = coords[:, 1:]
    if coords.dtype.kind not in "iu" or coords.ndim != 2 or coords.shape[1] != 3 or not len(coords):
        raise BadFile(f"latents whose coords are no cells, {coords.dtype} {coords.shape} where (N, 3) whole numbers belong")
    if coords.min() < 0 or coords.max() >= resolution:
        raise BadFile(f"latents outside of the cube, cells {coords.min()} to {coords.max()} of 0 to {resolution - 1}")
    if len(np.unique(coords, axis=0)) < len(coords):
        raise BadFile("latents that name a cell twice")
    if feats.dtype.kind != "f" or feats.shape != (len(coords), channels):
        raise BadFile(f"latents whose feats do not fit, {feats.dtype} {feats.shape} for {len(coords)} cells of {channels}")
    with np.errstate(over="ignore"):
        feats = feats.astype(np.float32)
    if not np.isfinite(feats).all():
        raise BadFile(f"latents that are not finite, {np.count_nonzero(~np.isfinite(feats))} of {feats.size}")
    return Latents(coords.astype(np.int32), feats, frame_in(arrays))


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file that latents may have. BadFile where it is none, or claims more than memory is to take."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_LATENTS:
            raise BadFile(f"latents that are too large, {size / 1e6:.0f} MB when unpacked")
        with READING, np.load(file, allow_pickle=False) as arrays:  # pickles would run code
            return {key: arrays[key] for key in LATENT_KEYS if key in arrays}
    except BadFile:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise BadFile(f"latents that cannot be read, {type(error).__name__}: {error}") from error


def frame_in(arrays: dict[str, np.ndarray]) -> Frame | None:
    """The cube that a file of latents names; None where it names none. BadFile for one that cannot be."""
    if "centre" not in arrays and "edge" not in arrays:
        return None
    centre, edge, rotation = arrays.get("centre"), arrays.get("edge"), arrays.get("rotation", np.eye(3))
    shapes = [None if part is None else part.shape for part in (centre, edge, rotation)]
    if shapes != [(3,), (), (3, 3)] or not all(part.dtype.kind in "iuf" for part in (centre, edge, rotation)):
        raise BadFile(f"latents whose cube is not known, centre {shapes[0]}, edge {shapes[1]}, rotation {shapes[2]}")
    turned = np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0
    if not (np.isfinite(centre).all() and 0 < edge < 1e5 and turned):
        raise BadFile(f"latents in a cube that cannot be, edge {edge:g} mm at {centre}")
    return Frame(centre.astype(np.float64), float(edge), rotation.astype(np.float64))


# ---- latents that know the truth -------------------------------------------------------------------------------------


@torch.enable_grad()
def optimise_latents(decoder: nn.Module, batch: dict, steps: int = 200, lr: float = 0.1) -> tuple[torch.Tensor, float]:
    """(latents (N, C), their loss): the best that a frozen decoder can do with the cells of a batch (data.collate).

    They are fitted to the truth itself. So what the decoder makes of them bounds what any encoder could get from it, and is
    never a prediction.
    """
    from losses import mesh_losses

    decoder = decoder.eval()
    learns = [weight for weight in decoder.parameters() if weight.requires_grad]
    for weight in learns:
        weight.requires_grad_(False)
    device = next(decoder.parameters()).device
    latents = torch.zeros(len(batch["coords"]), decoder.config.latent_channels, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([latents], lr)
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = sum(mesh_losses(decoder(batch["coords"], latents), batch).values())
            loss.backward()
            optimizer.step()
    finally:
        for weight in learns:
            weight.requires_grad_(True)
    return latents.detach(), float(loss.detach())
