"""The SLAT mesh decoder: names and numbers of the official one, what is absent, adapters, files of strangers."""

import json

import pytest
import torch
from conftest import MEDICAL, ROOT, use_task
from torch.nn import functional as F

TASK = MEDICAL
use_task(TASK)

from decoder import DecoderConfig, SLatMeshDecoder  # noqa: E402
from sparse_ops import SparseConv3d, children_neighbours, neighbours, subdivide  # noqa: E402

GOLDEN = ROOT.parent / "shared" / "golden" / "slat_mesh_decoder_a.safetensors"
SMALL = DecoderConfig(resolution=8, model_channels=32, num_blocks=2, num_heads=4, num_groups=2, window_size=4)


def some_cells(samples=2, side=8, share=0.2, seed=0):
    """(N, 4) int32: a random share of the cells of a grid in each sample."""
    torch.manual_seed(seed)
    return (torch.rand(samples, side, side, side) < share).nonzero().int()


def to_dense(coords, feats, side):
    """(B, C, side, side, side), zero where nothing is."""
    dense = feats.new_zeros(int(coords[:, 0].max()) + 1, side, side, side, feats.shape[1])
    return dense.index_put(tuple(coords.long().t()), feats).movedim(-1, 1)


def at(dense, coords):
    """(N, C): the values of a dense grid at the voxels."""
    return dense.movedim(1, -1)[tuple(coords.long().t())]


def small_decoder(config=SMALL, seed=0):
    """A decoder none of whose layers is zero, as after training."""
    torch.manual_seed(seed)
    model = SLatMeshDecoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_names_and_numbers_of_parameters_are_the_official_ones():
    with torch.device("meta"):
        official = SLatMeshDecoder(DecoderConfig()).state_dict()
        without_color = SLatMeshDecoder(DecoderConfig(use_color=False)).state_dict()
    assert len(official) == 120 and sum(t.numel() for t in official.values()) == 90_926_693
    assert sum(t.numel() for t in without_color.values()) == 90_922_037
    assert official["upsample.0.out_layers.0.conv.weight"].shape == (192, 3, 3, 3, 768)
    assert official["upsample.1.skip_connection.conv.weight"].shape == (96, 1, 1, 1, 192)
    assert official["blocks.11.mlp.mlp.2.weight"].shape == (768, 3072) and official["out_layer.weight"].shape == (101, 96)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference output is not there")
def test_features_are_those_of_the_reference_implementation():
    from safetensors import safe_open

    with safe_open(GOLDEN, "pt") as file:
        told = json.loads(file.metadata()["config"])
        found = {name: file.get_tensor(name) for name in file.keys()}
    told["use_color"] = told.pop("representation_config")["use_color"]
    model, torso = SLatMeshDecoder(DecoderConfig(**told)), []
    model.load_state_dict({name[6:]: t.float() for name, t in found.items() if name.startswith("state.")}, strict=True)
    model.blocks[-1].register_forward_hook(lambda _, __, output: torso.append(output))
    with torch.no_grad():
        cubes = model(found["coords"], found["feats"])
    assert (torso[0] - found["torso"]).abs().max() < 1e-4
    assert torch.equal(cubes.coords, found["out_coords"]) and (cubes.features - found["out_feats"]).abs().max() < 1e-4


def test_convolution_and_its_gradients_are_those_of_a_dense_one():
    coords = some_cells(3)[torch.randperm(len(some_cells(3)))]
    conv, feats = SparseConv3d(5, 4).double(), torch.randn(len(coords), 5, dtype=torch.double, requires_grad=True)
    found = conv(feats, neighbours(coords))
    weight = conv.conv.weight.permute(0, 4, 1, 2, 3)
    expected = at(F.conv3d(to_dense(coords, feats, 8), weight, conv.conv.bias, padding=1), coords)
    assert (found - expected).abs().max() < 1e-12
    inputs, shares = (feats, conv.conv.weight, conv.conv.bias), torch.randn_like(found)
    gradients = [torch.autograd.grad((y * shares).sum(), inputs) for y in (found, expected)]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*gradients, strict=True))


def test_a_convolution_after_subdividing_is_that_of_the_children():
    coords = some_cells(2)
    table = neighbours(coords)
    conv, feats = SparseConv3d(5, 4).double(), torch.randn(len(coords), 5, dtype=torch.double, requires_grad=True)
    children, repeated = subdivide(coords, feats)
    assert torch.equal(children_neighbours(table), neighbours(children))
    found, expected = conv(feats, table, children=True), conv(repeated, neighbours(children))
    assert (found - expected).abs().max() < 1e-12
    inputs, shares = (feats, conv.conv.weight, conv.conv.bias), torch.randn_like(found)
    gradients = [torch.autograd.grad((y * shares).sum(), inputs) for y in (found, expected)]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*gradients, strict=True))
