"""The SLAT mesh decoder: names and numbers of the official one, what is absent, adapters, files of strangers."""

import json
import os
import resource
import signal
import sys
import zipfile

import pytest
import torch
from conftest import MEDICAL, ROOT, Child, Payload, use_task
from torch.nn import functional as F

from common.checkpoint import write_json
from common.config import UserError
from common.lora import LoRAConfig, coverage, inject_lora, lora_parameters, merge_lora
from common.lora_files import load_adapter, save_adapter

TASK = MEDICAL
use_task(TASK)
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark_medical import compare_convolutions  # noqa: E402
from decoder import DecoderConfig, SLatMeshDecoder, config_of, file_dtype, memory_needed, read_decoder, write_decoder  # noqa: E402
from sparse_ops import SparseConv3d, children_neighbours, neighbours, sparse_conv, subdivide  # noqa: E402

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


def test_a_convolution_of_few_voxels_takes_a_fifth_of_a_dense_ones_time():
    seconds = compare_convolutions(side=48, turns=2)
    assert 5 * seconds["sparse"] < seconds["dense"]


def test_a_kernel_of_one_reads_its_weight_as_inputs_by_outputs():
    conv, feats = SparseConv3d(6, 4, 1), torch.randn(7, 6)
    expected = feats @ conv.conv.weight.view(6, 4) + conv.conv.bias
    assert torch.allclose(conv(feats), expected, atol=1e-6)
    assert not torch.allclose(conv(feats), feats @ conv.conv.weight.view(4, 6).t() + conv.conv.bias, atol=0.1)
    assert torch.equal(conv(feats, children=True), conv(feats).repeat_interleave(8, 0))


def test_neighbours_are_found_whatever_the_order_and_none_across_samples_or_edges():
    coords = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1023, 1023, 1023], [0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 1, 0]])
    table = neighbours(coords)
    pairs = {(row, j): int(table[row, j]) for row in range(6) for j in range(27) if table[row, j] < 6}
    beside = {(1, 14): 3, (3, 12): 1, (1, 16): 5, (5, 10): 1, (3, 15): 5, (5, 11): 3, (0, 17): 4, (4, 9): 0}
    assert pairs == {**{(row, 13): row for row in range(6)}, **beside}
    assert neighbours(coords[:0]).shape == (0, 27) and neighbours(coords[:1]).tolist() == [[1] * 13 + [0] + [1] * 13]


@pytest.mark.parametrize(
    "coords, what",
    [
        ([[0, 1, 2, 3], [0, 4, 4, 4], [0, 1, 2, 3]], r"voxel \[0, 1, 2, 3\] stands there twice"),
        ([[0, 1, 2, 8]], r"voxel \[0, 1, 2, 8\].* outside a grid of 8 cells"),
        ([[0, 1, -1, 3]], r"voxel \[0, 1, -1, 3\].* outside"),
        ([[-1, 1, 1, 3]], r"voxel \[-1, 1, 1, 3\].* outside"),
        ([[2**31, 1, 1, 3]], r"voxel \[2147483648, 1, 1, 3\].* outside"),
        ([[1, 2, 3]], r"must be \(N, 4\) whole numbers"),
        ([[0.0, 1.0, 2.0, 3.0]], r"must be \(N, 4\) whole numbers"),
    ],
)
def test_cells_that_cannot_be_are_refused(coords, what):
    with pytest.raises(ValueError, match=what):
        small_decoder()(torch.tensor(coords), torch.randn(len(coords), 8))
    with pytest.raises(ValueError, match=r"2 cells need latents of \(2, 8\), not \(3, 8\)"):
        small_decoder()(some_cells()[:2], torch.randn(3, 8))


@torch.no_grad()
def test_voxels_in_another_order_give_the_same_in_that_order():
    model, coords = small_decoder(), some_cells()
    latents, order = torch.randn(len(coords), 8), torch.randperm(len(coords))
    cubes, other = model(coords, latents), model(coords[order], latents[order])
    rows = (order[:, None] * 64 + torch.arange(64)).flatten()
    assert torch.equal(other.coords, cubes.coords[rows])
    assert torch.allclose(other.features, cubes.features[rows], atol=1e-4) and cubes.features.std() > 0.1


@torch.no_grad()
def test_a_sample_knows_nothing_of_the_others_in_its_batch():
    model, coords = small_decoder(), some_cells(4)
    coords = coords[(coords[:, 0] != 1) & ~((coords[:, 0] == 2) & (coords[:, 1] > 0))]  # one without voxels
    coords = torch.cat([coords[coords[:, 0] != 2], coords[coords[:, 0] == 2][:1]])  # and one with a single voxel
    latents = torch.randn(len(coords), 8)
    together = model(coords, latents)
    for sample in (0, 1, 2, 3):
        mine = coords[:, 0] == sample
        alone = model(coords[mine], latents[mine])
        assert torch.equal(together.of(sample).coords, alone.coords) and len(alone.coords) == 64 * mine.sum()
        assert torch.allclose(together.of(sample).features, alone.features, atol=1e-4)
    assert model(coords[:0], latents[:0]).features.shape == (0, 101)


@torch.no_grad()
def test_attention_is_within_windows_of_the_grid_which_every_other_block_shifts():
    config = DecoderConfig(**{**SMALL.to_json(), "num_blocks": 1})
    for shift, model in ((0, small_decoder(config)), (2, small_decoder())):
        coords, torso = some_cells(2), []
        latents = torch.randn(len(coords), 8)
        block = model.blocks[-1]
        block.register_forward_hook(lambda _, inputs, output, torso=torso: torso.append((inputs[0], output)))
        model(coords, latents)
        (x, found), window = torso[0], torch.cat([coords[:, :1], (coords[:, 1:] + shift) // 4], dim=1)
        q, k, v = block.attn.to_qkv(F.layer_norm(x, (32,), eps=1e-6)).view(-1, 3, 4, 8).permute(1, 2, 0, 3)
        same = (window[:, None] == window[None]).all(-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(0, 1).flatten(1)
        expected = x + block.attn.to_out(y)
        expected = expected + block.mlp(F.layer_norm(expected, (32,), eps=1e-6))
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_values_of_cubes_have_their_places():
    model, coords = small_decoder(), some_cells(1)
    cubes = model(coords, torch.randn(len(coords), 8))
    before = cubes.features.clone()
    assert cubes.resolution == 32 and torch.equal(cubes.sdf, cubes.features[:, :8] - 1 / 32)
    assert torch.equal(cubes.sdf, cubes.sdf) and torch.equal(cubes.features, before)  # asked twice, moved once
    assert torch.equal(cubes.deform[:, 1], cubes.features[:, 11:14]) and torch.equal(cubes.weights, cubes.features[:, 32:53])
    assert torch.equal(cubes.color[:, 7], cubes.features[:, 95:]) and cubes.color.shape[1:] == (8, 6)
    plain = SLatMeshDecoder(DecoderConfig(**{**SMALL.to_json(), "use_color": False}))(coords, torch.randn(len(coords), 8))
    assert plain.features.shape[1] == 53 and plain.color is None


def test_checkpointing_changes_no_output_and_no_gradient():
    model, coords = small_decoder(), some_cells()
    latents = torch.randn(len(coords), 8, requires_grad=True)
    found = []
    for model.gradient_checkpointing in (False, True):
        features = model(coords, latents).features
        found.append([features, *torch.autograd.grad(features.square().mean(), [latents, *model.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gradients_of_the_whole_decoder_are_those_of_finite_differences():
    torch.manual_seed(0)
    model, coords = small_decoder().double(), some_cells(1, share=0.05)
    latents, other = torch.randn(2, len(coords), 8, dtype=torch.double)
    weights = dict(model.named_parameters())
    steps = {name: torch.randn_like(p) for name, p in weights.items()}
    shares = torch.randn(64 * len(coords), 101, dtype=torch.double)

    def value(step):
        moved = {name: p + step * steps[name] for name, p in weights.items()}
        return (torch.func.functional_call(model, moved, (coords, latents + step * other)).features * shares).sum()

    step = torch.zeros((), dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(value(step), step)
    with torch.no_grad():
        expected = (value(1e-6) - value(-1e-6)) / 2e-6
    assert abs(slope - expected) < 1e-5 * abs(expected)


def test_autocast_rounds_products_and_leaves_norms_and_output_in_full():
    model, coords = small_decoder(), some_cells()
    latents = torch.randn(len(coords), 8)
    exact = model(coords, latents).features
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(coords, latents).features
    rounded.square().mean().backward()
    assert rounded.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    assert 0 < (rounded - exact).abs().mean() < 0.03 * exact.abs().mean()


# ---- adapters ---------------------------------------------------------------------------------------------------------

CONVS = r"upsample\.\d\.(out_layers\.[03]|skip_connection)\.conv"


def with_adapters(seed=0):
    """(a decoder with adapters on its convolutions that change what it says, its base)."""
    model, base = small_decoder(), small_decoder()
    inject_lora(model, LoRAConfig(r=3, lora_alpha=6, target_modules=CONVS))
    return model, base


def test_an_adapter_on_convolutions_starts_as_the_base_and_merges_into_it(tmp_path):
    model, base = with_adapters()
    coords = some_cells()
    latents = torch.randn(len(coords), 8)
    assert torch.equal(model(coords, latents).features, base(coords, latents).features)
    assert {row["shape"][1]: row["parameters"] for row in coverage(model)} == {3: 3 * (27 * 4 + 4), 1: 3 * (8 + 4)}
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = model(coords, latents).features
    assert (adapted - base(coords, latents).features).abs().mean() > 0.05
    merged = merge_lora(model, inplace=False)
    assert merged.state_dict().keys() == base.state_dict().keys()
    scale = adapted.abs().max()
    assert (merged(coords, latents).features - adapted).abs().max() < 1e-5 * scale
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(coords, latents).features, adapted)


@pytest.mark.parametrize("kernel, children", [(3, False), (3, True), (1, False), (1, True)])
def test_the_gradients_of_an_adapter_are_those_of_its_product(kernel, children):
    holder = torch.nn.ModuleDict({"layer": SparseConv3d(6, 5, kernel)}).double()
    inject_lora(holder, LoRAConfig(r=2, target_modules=["conv"]))
    layer, coords = holder["layer"].conv, some_cells(2)
    feats, table = torch.randn(len(coords), 6, dtype=torch.double, requires_grad=True), neighbours(coords)
    for parameter in layer.adapter().values():
        torch.nn.init.normal_(parameter)
    found = layer(feats, table, children)
    expected = sparse_conv(feats, layer.weight, layer.bias, table, children)
    assert (found - expected).abs().max() < 1e-10
    inputs, shares = [feats, *layer.adapter().values()], torch.randn_like(found)
    gradients = [torch.autograd.grad((y * shares).sum(), inputs) for y in (found, expected)]
    assert all((a - b).abs().max() < 1e-8 for a, b in zip(*gradients, strict=True))


def test_the_estimate_of_memory_grows_with_what_it_depends_on():
    official = DecoderConfig()
    plain, training, less = (memory_needed(official, 1000, *how) for how in ((False,), (True,), (True, True)))
    assert plain < less < training and memory_needed(official, 2000, True) == 2 * training
    assert 0.8e9 < training < 1.2e9 and memory_needed(SMALL, 1000, True) < training / 3


# ---- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
@pytest.mark.parametrize("use_color", [True, False])
def test_a_decoder_is_read_as_it_was_written_halved_where_the_official_one_is(tmp_path, ending, use_color):
    model, path = small_decoder(DecoderConfig(**{**SMALL.to_json(), "use_color": use_color})), tmp_path / f"slat.{ending}"
    write_decoder(path, model.config, model.state_dict())
    config, tensors = read_decoder(path)
    assert config == model.config and tensors.keys() == model.state_dict().keys()
    kinds = {"blocks.0.attn.to_qkv.bias": 1, "upsample.1.skip_connection.conv.weight": 1, "upsample.0.out_layers.1.weight": 0}
    for name, half in {**kinds, "input_layer.weight": 0, "out_layer.bias": 0}.items():
        expected = model.state_dict()[name].half().float() if half else model.state_dict()[name]
        assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["slat.json", path.name])


def test_a_file_of_the_official_size_has_the_official_bytes():
    with torch.device("meta"):
        state = SLatMeshDecoder(DecoderConfig()).state_dict()
    assert sum(t.numel() * file_dtype(name).itemsize for name, t in state.items()) == 181_891_796
    assert config_of(state, None) == DecoderConfig()


def test_a_state_dict_under_its_key_and_the_names_that_training_puts_before_are_read(tmp_path):
    state = small_decoder().state_dict()
    torch.save({"state_dict": {f"module.{name}": t.double() for name, t in state.items()}, "epoch": 3}, tmp_path / "last.ckpt")
    write_json(tmp_path / "config.json", SMALL.to_json())
    config, tensors = read_decoder(tmp_path / "last.ckpt")
    assert config == SMALL and all(torch.equal(tensors[name], t) for name, t in state.items())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="its architecture cannot be told: decoder: model_channels is 32, .* 8 num_groups, 256"):
        read_decoder(tmp_path / "last.ckpt")
    write_json(tmp_path / "last.json", {"name": "SLatMeshDecoder", "args": {"num_groups": 2, "num_heads": 4, "use_fp16": True}})
    official = {"resolution": 64, "window_size": 8}
    assert read_decoder(tmp_path / "last.ckpt")[0] == DecoderConfig(**{**SMALL.to_json(), **official})


def bad_states():
    """What is done to the tensors of a decoder -> what the error says."""
    nan = torch.full((32, 8), torch.nan)
    return {
        "missing": ({"blocks.1.attn.to_out.bias": None}, r"blocks.1.attn.to_out.bias is missing, expected \(32,\)$"),
        "left over": ({"norm.weight": torch.ones(3)}, r"norm.weight is \(3,\), expected no such tensor$"),
        "misshapen": (
            {"upsample.0.out_layers.1.bias": torch.ones(9)},
            r"upsample.0.out_layers.1.bias is \(9,\), expected \(8,\)$",
        ),
        "not finite": ({"input_layer.weight": nan}, r"input_layer.weight is not finite, expected \(32, 8\)$"),
        "many": ({f"x{i}": torch.ones(2) for i in range(9)}, r"x0 is \(2,\), expected no such tensor \(9 in all\)$"),
        "other model": ({"upsample.1.out_layers.3.conv.weight": None}, "is no SLAT mesh decoder: it has no upsample.1"),
        "nothing": ("", "holds no weights by their names"),
        "whole numbers": (
            {"out_layer.bias": torch.ones(101).int()},
            "'out_layer.bias' among its weights, which is no plain tensor",
        ),
        "text": ({"note": "hello"}, "'note' among its weights, which is no plain tensor"),
        "one number in many places": ({"out_layer.bias": torch.ones(1).expand(10**9)}, "claims more numbers than it has bytes"),
        "no blocks": (
            {"blocks.0.mlp.mlp.0.weight": torch.ones(3, 32)},
            "its architecture cannot be told: decoder: mlp_ratio is 0",
        ),
        "empty width": ({"input_layer.weight": torch.ones(0, 8)}, "its architecture cannot be told"),
    }


@pytest.mark.parametrize("name", bad_states())
def test_a_file_that_is_no_whole_decoder_says_what_is_wrong_in_a_line(tmp_path, name):
    changes, what = bad_states()[name]
    state = {**small_decoder().state_dict(), **(changes or {})} if isinstance(changes, dict) else {}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "bad.pt")
    write_json(tmp_path / "bad.json", SMALL.to_json())
    with pytest.raises(UserError, match=what) as caught:
        read_decoder(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value) and "bad.pt" in str(caught.value)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_files_that_are_cut_off_or_foreign_are_refused_in_a_line(tmp_path, ending):
    path = tmp_path / f"decoder.{ending}"
    write_decoder(path, SMALL, small_decoder().state_dict())
    whole = path.read_bytes()
    junk = [
        b"",
        b"\0" * 100,
        b"<!DOCTYPE html>",
        whole[:50],
        whole[: len(whole) // 2],
        whole[:-9],
        b"\x80\x02}q\x00.",
        b"PK\x03\x04x",
    ]
    for content in junk:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_decoder(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for place in (tmp_path, tmp_path / "nothing.pt"):
        with pytest.raises(UserError, match="cannot read"):
            read_decoder(place)


def test_code_in_a_file_does_not_run_and_a_packed_one_does_not_unpack(tmp_path):
    for legacy in (True, False):
        content = {**small_decoder().state_dict(), "extra": Payload(tmp_path / "made")}
        torch.save(content, tmp_path / "code.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"holds \w+\.mkdir, which would run code as it is loaded: refused"):
            read_decoder(tmp_path / "code.pt")
    assert not (tmp_path / "made").exists()
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(UserError, match="would unpack to more bytes than it has"):
        read_decoder(tmp_path / "bomb.pt")


def test_nothing_is_written_that_half_precision_cannot_hold_or_that_is_of_another_decoder(tmp_path):
    state = small_decoder().state_dict()
    state["blocks.0.attn.to_out.bias"] = torch.full((32,), 1e5)
    with pytest.raises(UserError, match="blocks.0.attn.to_out.bias has numbers above 65,504"):
        write_decoder(tmp_path / "a.safetensors", SMALL, state)
    with pytest.raises(UserError, match="does not fit the decoder"):
        write_decoder(tmp_path / "a.safetensors", DecoderConfig(), state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("limit", [0, 30_000])
def test_a_disk_that_fills_up_ends_in_a_line_and_leaves_nothing(tmp_path, name, limit):
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writes beyond the limit fail, as on a full disk
        try:
            write_decoder(tmp_path / "out" / name, SMALL, small_decoder().state_dict())
        except UserError as error:
            os._exit(10 if str(error).startswith(f"could not write {tmp_path / 'out' / name}: ") else 11)

    (tmp_path / "out").mkdir()
    assert Child(write, log=tmp_path / "log.txt").wait() == 10
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"num_groups": 3}, "model_channels is 32, but must be a multiple of 8 num_groups, 24"),
        ({"num_heads": 5}, "model_channels is 32, but must be a multiple of num_heads, 5"),
        ({"resolution": 10**9}, "resolution is 1000000000, but must be 2 to 256"),
        ({"num_blocks": "many"}, "num_blocks is 'many', but must be a whole number"),
        ({"model_channels": None}, "model_channels is None, but must be a whole number"),
        ({"use_color": "yes"}, "use_color is 'yes', but must be true or false"),
        ({"window_size": float("nan")}, "window_size is nan, but must be a whole number"),
        ({"extra": 1}, "missing or unknown: .*extra"),
    ],
)
def test_numbers_that_no_decoder_has_are_refused(changes, what):
    assert DecoderConfig.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    with pytest.raises(UserError, match=what):
        DecoderConfig.from_json({**SMALL.to_json(), **changes})
    with pytest.raises(UserError, match="missing or unknown"):
        DecoderConfig.from_json({"resolution": 8})
