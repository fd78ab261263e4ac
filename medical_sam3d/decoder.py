"""The SLAT mesh decoder of SAM 3D Objects (TRELLIS, arXiv:2412.01506): latents in active cells -> values on cubes, for a mesh.

N active cells of a grid of R^3, each with a latent, go through a transformer with attention in windows, and are subdivided
twice into 64 N cubes of a grid of (4 R)^3. Each cube gets signed distances and shifts at its 8 corners, and weights for
flexicubes.py. Plain PyTorch on any device; names and shapes of tensors are those of the official checkpoint.
"""

import json
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.checkpoint import atomic_file, disk_fault, read_json, write_json
from common.config import Range, UserError, convert, field_kinds, shown
from common.tensor_files import is_finite, misfit, shapes_of
from layers import Block, Upsample, Windows, positions
from sparse_ops import check_coords, children_neighbours, neighbours, subdivide

CORNERS = 8  # of a cube, x fastest: corner k is (k & 1, k >> 1 & 1, k >> 2 & 1)
VALUES = {"sdf": 8, "deform": 24, "weights": 21, "color": 48}  # in this order: 101, or 53 without color
# Without these a file is no such decoder.
KEY_TENSORS = ("input_layer.weight", "blocks.0.mlp.mlp.0.weight", "upsample.1.out_layers.3.conv.weight", "out_layer.weight")
NOT_IN_SHAPES = ("resolution", "num_heads", "window_size", "num_groups")


@dataclass(frozen=True)
class DecoderConfig:
    """An architecture; the defaults are the official one. UserError for numbers that no decoder can have.

    resolution: cells along an edge; window_size: of attention, in cells; num_groups: of each group normalisation.
    """

    resolution: Annotated[int, Range(2, 256)] = 64
    model_channels: Annotated[int, Range(8, 4096)] = 768
    latent_channels: Annotated[int, Range(1, 256)] = 8
    num_blocks: Annotated[int, Range(1, 64)] = 12
    num_heads: Annotated[int, Range(1, 64)] = 12
    mlp_ratio: Annotated[int, Range(1, 16)] = 4
    window_size: Annotated[int, Range(2, 64)] = 8
    num_groups: Annotated[int, Range(1, 512)] = 32
    use_color: bool = True

    def __post_init__(self):
        for name, kind in field_kinds(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(kind, value))
            except ValueError as error:
                raise UserError(f"decoder: {name} is {shown(value)}, but must be {error}") from None
        for part, what in ((8 * self.num_groups, "8 num_groups"), (self.num_heads, "num_heads")):
            if self.model_channels % part:
                raise UserError(f"decoder: model_channels is {self.model_channels}, but must be a multiple of {what}, {part}")

    @property
    def out_channels(self) -> int:
        """101 for each cube, or 53 without color."""
        return sum(VALUES.values()) - (0 if self.use_color else VALUES["color"])

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "DecoderConfig":
        """What to_json gave. UserError for keys that are not known or not there, and values that do not fit."""
        kinds = field_kinds(cls)
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            odd = sorted(map(str, set(data) ^ set(kinds))) if isinstance(data, dict) else [shown(data)]
            raise UserError(f"decoder: the configuration must have {', '.join(kinds)}; missing or unknown: {shown(odd)}")
        return cls(**data)


class Cubes(NamedTuple):
    """What the decoder says of M cubes: coords (M, 4) int32 [sample, x, y, z], features (M, 101 or 53), cubes along an edge."""

    coords: torch.Tensor
    features: torch.Tensor
    resolution: int

    @property
    def sdf(self) -> torch.Tensor:
        """(M, 8) signed distances at the corners in edges of the whole grid, negative inside: the network's less one cube."""
        return self.features[:, :8] - 1 / self.resolution

    @property
    def deform(self) -> torch.Tensor:
        """(M, 8, 3) how far each corner moves; tanh of it, in half cubes."""
        return self.features[:, 8:32].unflatten(1, (CORNERS, 3))

    @property
    def weights(self) -> torch.Tensor:
        """(M, 21) FlexiCubes' weights before their ranges: beta of 12 edges, alpha of 8 corners, gamma."""
        return self.features[:, 32:53]

    @property
    def color(self) -> torch.Tensor | None:
        """(M, 8, 6) color and normal at the corners, or None."""
        return self.features[:, 53:].unflatten(1, (CORNERS, 6)) if self.features.shape[1] > 53 else None

    def of(self, sample: int) -> "Cubes":
        """The cubes of one sample; no copy where that is all."""
        mine = self.coords[:, 0] == sample
        return self if mine.all() else Cubes(self.coords[mine], self.features[mine], self.resolution)


class SLatMeshDecoder(nn.Module):
    """See above. gradient_checkpointing: blocks keep their input alone and run once more in the backward pass.

    Under autocast matrix products and convolutions are in its type; norms, sums along the torso and the output stay float32.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width = config.model_channels
        self.input_layer = nn.Linear(config.latent_channels, width)
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.num_blocks))
        widths = (width, width // 4, width // 8)
        self.upsample = nn.ModuleList(Upsample(*pair, config.num_groups) for pair in zip(widths, widths[1:], strict=False))
        self.out_layer = nn.Linear(widths[-1], config.out_channels)
        self.apply(start_linear)
        nn.init.zeros_(self.out_layer.weight)

    def forward(self, coords: torch.Tensor, latents: torch.Tensor) -> Cubes:
        """coords (N, 4) integer [sample, x, y, z] in 0 .. R-1, latents (N, C) -> values on 64 N cubes of the grid 4 R.

        Rows in any order: the cubes of row i are rows 64 i to 64 i + 63. ValueError for what no such cells can be.
        """
        check_coords(coords, self.config.resolution)
        wanted = (len(coords), self.config.latent_channels)
        if latents.shape != wanted:
            raise ValueError(f"{len(coords)} cells need latents of {wanted}, not {tuple(latents.shape)}")
        coords = coords.int()
        if bool((coords[1:, 0] >= coords[:-1, 0]).all()):
            return self.decode(coords, latents)
        by_sample = coords[:, 0].argsort(stable=True)
        cubes, back = self.decode(coords[by_sample], latents[by_sample]), by_sample.argsort()
        order = (back[:, None] * 64 + torch.arange(64, device=back.device)).flatten()
        return Cubes(cubes.coords[order], cubes.features[order], cubes.resolution)

    def decode(self, coords, latents) -> Cubes:
        """`forward` of cells whose samples lie one after another."""
        config = self.config
        table, sizes = neighbours(coords), coords[:, 0].unique_consecutive(return_counts=True)[1].tolist()
        windows = [Windows.of(coords, config.window_size, shift) for shift in (0, config.window_size // 2)]
        h = self.input_layer(latents.to(self.input_layer.weight.dtype)) + positions(coords, config.model_channels)
        for i, block in enumerate(self.blocks):
            h = self.run(block, h, windows[i % 2])
        for block in self.upsample:
            finer = children_neighbours(table)
            h = self.run(block, h, table, finer, sizes)
            coords, _ = subdivide(coords, h[:0])
            table, sizes = finer, [8 * size for size in sizes]
        with torch.autocast(h.device.type, enabled=False):
            features = self.out_layer(h.to(self.out_layer.weight.dtype))
        return Cubes(coords, features, 4 * config.resolution)

    def run(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def start_linear(module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ---- files ------------------------------------------------------------------------------------------------------------


def read_decoder(path: Path | str) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """(architecture, float32 tensors by their official names) of a .safetensors, .ckpt or .pt, also under "state_dict".

    Nothing in the file runs. Sizes come from the shapes; what these do not tell is the official value, unless the file's
    metadata or a JSON beside it (NAME.json, config.json) says otherwise. UserError, in one line, for anything that is no such
    decoder, and for tensors that are missing, left over, of another shape, or not finite.
    """
    path = Path(path)
    tensors, told = read_tensors(path)
    if missing := [name for name in KEY_TENSORS if name not in tensors]:
        some = f"{len(tensors)} tensors such as {shown(next(iter(tensors)))}" if tensors else "nothing"
        raise UserError(f"{path} is no SLAT mesh decoder: it has no {missing[0]}, but {some}")
    try:
        config = config_of(tensors, told if told is not None else told_beside(path))
    except (UserError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its architecture cannot be told: {error}") from None
    check_tensors(path, without_memory(config), tensors)
    return config, {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> tuple[dict, dict | None]:
    """(plain tensors by name, what safetensors' metadata says of the architecture) of any file. UserError where it has none."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        told, content = read_safetensors(path) if head[8:] == b"{" else (None, unpickle(path))
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no weights by their names")
    odd = [name for name, tensor in content.items() if not isinstance(name, str) or not is_plain(tensor)]
    if odd:
        raise UserError(f"{path} holds {shown(odd[0])} among its weights, which is no plain tensor of numbers")
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > size:
        raise UserError(f"{path} claims more numbers than it has bytes: refused")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in content.items()}, told


def is_plain(value) -> bool:
    """Whether it is a tensor of floating-point numbers that lie in memory."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.is_floating_point()


def read_safetensors(path: Path) -> tuple[dict | None, dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("config")
            return about and json.loads(about), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download it again") from None


def unpickle(path: Path):
    """What a file of torch holds, tensors and plain values alone. UserError for code in it, and for damage.

    torch answers odd files with errors of many kinds, some with the advice to run what is in the file.
    """
    packed = zipfile.is_zipfile(path)
    try:
        if packed:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise UserError(f"{path} would unpack to more bytes than it has: refused")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except (UserError, OSError):
        raise
    except Exception as error:
        if code := re.search(r"(?:GLOBAL|class) ([\w.]+\.\w+)", str(error)):
            raise UserError(f"{path} holds {code[1]}, which would run code as it is loaded: refused") from None
        raise UserError(f"{path} is no file of weights, or damaged: copy or download it again") from None


def told_beside(path: Path) -> dict | None:
    """What NAME.json or config.json beside a file says of its architecture."""
    files = [file for file in (path.with_suffix(".json"), path.parent / "config.json") if file.is_file()]
    return read_json(files[0]) if files else None


def config_of(tensors: dict, told: dict | None) -> DecoderConfig:
    """The architecture that shapes and `told` give: DecoderConfig.to_json, alone or as "decoder", or TRELLIS's {"args"}."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, latent = shapes["input_layer.weight"]
    told = told if isinstance(told, dict) else {}
    told = next((told[key] for key in ("decoder", "args") if isinstance(told.get(key), dict)), told)
    return DecoderConfig(
        model_channels=width,
        latent_channels=latent,
        num_blocks=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        mlp_ratio=shapes["blocks.0.mlp.mlp.0.weight"][0] // width,
        use_color=shapes["out_layer.weight"][0] > sum(VALUES.values()) - VALUES["color"],
        **{"num_heads": max(1, width // 64)} | {key: told[key] for key in NOT_IN_SHAPES if key in told},
    )


def without_memory(config: DecoderConfig) -> SLatMeshDecoder:
    with torch.device("meta"):
        return SLatMeshDecoder(config)


def check_tensors(where, model: nn.Module, tensors: dict) -> None:
    """UserError for the first tensor that is missing, left over, of another shape than the model's, or not finite.

    model: on the meta device, so that nothing is taken for the sizes that a stranger's file claims.
    """
    if wrong := misfit(shapes_of(model.state_dict()), tensors):
        raise UserError(f"{where} does not fit the decoder that it seems to be: {wrong}")


def write_decoder(path: Path | str, config: DecoderConfig, tensors: dict) -> None:
    """Writes a decoder as the official files are: blocks and convolutions in float16, all else in float32; NAME.json beside.

    .safetensors, or .ckpt and .pt of torch: a plain dict of tensors. UserError for tensors that are not this decoder's, and for
    numbers that half precision cannot hold, and where the disk does not take them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    check_tensors(path, without_memory(config), tensors)
    content = {name: t.detach().to("cpu", file_dtype(name), copy=True).contiguous() for name, t in tensors.items()}
    if large := [name for name, tensor in content.items() if not is_finite(tensor)]:
        raise UserError(f"{large[0]} has numbers above 65,504, which half precision cannot hold")
    about = {"name": "SLatMeshDecoder", "args": official_arguments(config)}
    try:
        with atomic_file(path) as aside:
            if path.suffix == ".safetensors":
                save_file(content, aside, metadata={"format": "pt", "config": json.dumps(config.to_json())})
            else:
                torch.save(content, aside)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own for a full disk is a RuntimeError
        raise UserError(f"could not write {path}: {disk_fault(error) or 'the disk took only a part of it'}") from error
    write_json(path.with_suffix(".json"), about)


def file_dtype(name: str) -> torch.dtype:
    """What a tensor is kept in: 181,891,796 bytes in all at official size."""
    return torch.float16 if name.startswith("blocks.") or ".conv." in name else torch.float32


def official_arguments(config: DecoderConfig) -> dict:
    """The architecture as the JSON beside a decoder of TRELLIS says it."""
    args = {key: value for key, value in config.to_json().items() if key not in ("use_color", "num_groups")}
    args |= {"attn_mode": "swin", "use_fp16": True, "representation_config": {"use_color": config.use_color}}
    return args if config.num_groups == 32 else {**args, "num_groups": config.num_groups}


# ---- memory -----------------------------------------------------------------------------------------------------------


def memory_needed(config: DecoderConfig, cells: int, training: bool, checkpointing: bool = False) -> int:
    """Bytes that a pass over so many cells takes in float32, beside weights, their gradients and the optimizer's state.

    training: with a loss that makes two tensors of the features' size. Within 15 % of 20 peaks measured on a CPU: 600 to
    2,500 cells, 64 to 768 channels, full and by LoRA.
    """
    unit = 4 * cells * config.model_channels  # bytes of a tensor on the cells; one on the finest voxels has 8 of them
    tables = 8 * 27 * (1 + 8 + 64) * cells
    features = 4 * 64 * cells * config.out_channels
    block = 1 if checkpointing else 10 + 2 * config.mlp_ratio  # units that a block of the torso keeps
    upsampling = 110 if checkpointing else 75  # what is computed again stands beside what is there
    if training:
        return tables + 5 * features + (upsampling + config.num_blocks * block) * unit
    return tables + features + 36 * unit
