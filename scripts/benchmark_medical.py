"""What the benchmark does otherwise for organs: a ball's surface in active cells, and sparse convolution against dense.

The imports of medical_sam3d's modules wait until scripts/benchmark.py has put the task's folder on the path.
"""

import time

REAL_RADIUS = 3.4  # cells: 300 of them are active then, a small crop for the official decoder
EDGE = 100.0  # mm, of the cube
OCCUPANCY = 0.05  # of the grid on which convolutions are compared


def build_organ(real: bool):
    """(encoder and decoder, what trains whole, one ball, the loss), as the other tasks' builders give them.

    At real size the official decoder with random weights in every layer, with gradient checkpointing.
    """
    import torch

    from decoder import DecoderConfig, SLatMeshDecoder
    from losses import mesh_losses
    from model import ENCODER, OrganMesher, load_base, new_encoder, whole_parts
    from processor import OrganProcessor

    if real:
        config = DecoderConfig()
        model = OrganMesher(new_encoder(OrganProcessor(), config), SLatMeshDecoder(config))
        model.new_layers, model.decoder.gradient_checkpointing = [ENCODER], True
        for parameter in model.decoder.parameters():  # the layers that start at zero would send nothing back
            torch.nn.init.normal_(parameter, std=0.02)
    else:
        model = load_base("demo")[0]

    def loss(model, batch):
        return sum(mesh_losses(decode(model, batch), {**batch, "truth": list(batch["truth"])}).values())

    cells = model.decoder.config.resolution
    return model, whole_parts(model), ball(cells, REAL_RADIUS if real else cells / 3, model.encoder.channels), loss


def ball(cells: int, radius: float, channels: int) -> dict:
    """A sample: active cells of a ball's surface, its distance at 4^3 points of each, and the truth on a grid of voxels."""
    import torch

    places = torch.cartesian_prod(*[torch.arange(cells)] * 3)
    coords = places[((places + 0.5 - cells / 2).norm(dim=1) - radius).abs() < 1]
    inside = (torch.cartesian_prod(*[torch.arange(4)] * 3) + 0.5) / 4  # points of a cell
    distance = (coords[:, None] + inside - cells / 2).norm(dim=-1) - radius  # (N, 64), in cells
    inputs = distance.clamp(-1, 1).view(-1, 1, 4, 4, 4).repeat(1, channels, 1, 1, 1)
    voxels = torch.cartesian_prod(*[torch.linspace(-0.5, 0.5, 32)] * 3).view(32, 32, 32, 3)
    truth = EDGE * (voxels.norm(dim=-1) - radius / cells)
    to_voxel = torch.cat([31 * torch.eye(3), torch.full((3, 1), 15.5)], dim=1)
    facts = {"truth": truth, "to_voxel": to_voxel, "edge": torch.tensor(EDGE), "index": torch.tensor(0)}
    return {"coords": coords.int(), "inputs": inputs, **facts}


def decode(model, batch):
    """The cubes of a batch in which each sample has as many cells: coords (B, N, 3), inputs (B, N, ...)."""
    import torch

    coords = batch["coords"]
    sample = torch.arange(len(coords), device=coords.device, dtype=coords.dtype)[:, None, None].expand(-1, coords.shape[1], 1)
    return model(torch.cat([sample, coords], dim=2).flatten(0, 1), batch["inputs"].flatten(0, 1))


def adapt_organ(model, config, _):
    from model import setup_for_finetuning

    return setup_for_finetuning(model, config)


def organ_loader(config):
    from data import build_loaders, find_organs
    from model import load_base

    return build_loaders(config, load_base("demo")[1], find_organs(config.data_dir, config.organs, config.seed))[0]


def compare_convolutions(side: int = 64, channels: int = 32, turns: int = 5) -> dict[str, float]:
    """{"sparse", "table", "dense"}: seconds of the processor, the fewest of some turns, for a 3^3 convolution of a grid.

    side^3 voxels of which OCCUPANCY is there, at random places; table: finding their neighbours, once for all convolutions.
    """
    import torch

    from sparse_ops import SparseConv3d, neighbours

    generator = torch.Generator().manual_seed(0)
    coords = (torch.rand(1, side, side, side, generator=generator) < OCCUPANCY).nonzero()
    table, feats = neighbours(coords), torch.randn(len(coords), channels, generator=generator)
    sparse, dense = SparseConv3d(channels, channels), torch.nn.Conv3d(channels, channels, 3, padding=1)
    grid = torch.zeros(1, channels, side, side, side)
    ways = {"sparse": lambda: sparse(feats, table), "table": lambda: neighbours(coords), "dense": lambda: dense(grid)}
    seconds = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for _ in range(turns):
            for name, way in ways.items():
                began = time.process_time()
                way()
                seconds[name] = min(seconds[name], time.process_time() - began)
    return seconds
