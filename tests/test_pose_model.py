"""Three pose backbones, tiny and random: heads, loss, adapters, training, saving and loading do what they promise."""

import json
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import POSE, Payload, check_picture_inputs, use_task

TASK = POSE
use_task(TASK)

from common.checkpoint import fingerprint  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import is_within  # noqa: E402
from common.peft_adapters import add_adapter  # noqa: E402
from common.saved_models import save_lora, save_model  # noqa: E402
from keypoints import KeypointSet  # noqa: E402
from model import (  # noqa: E402
    HEAD,
    HEAD_FILE,
    LOSS_BETA,
    NEW_BETA,
    SCORE_RADIUS,
    SPOT_RADIUS,
    SPOT_WEIGHT,
    VITPOSE_BETA,
    feature_map,
    input_size,
    keypoint_errors,
    keypoint_loss,
    load_base,
    load_checkpoint,
    lora_targets,
    origin,
    soft_argmax,
    with_head,
)
from predictor import Predictor  # noqa: E402

NAMES = ["nose", "left_hand", "right_hand", "left_foot", "right_foot"]
POINTS = KeypointSet(NAMES, [(0, 1), (0, 2)], [(1, 2), (3, 4)], [0.05] * 5, True)
KINDS = ["vit", "dinov2", "vitpose"]
SIZES = {"vit": (32, 32), "dinov2": (32, 32), "vitpose": (32, 24)}  # (height, width) of what each takes
FACTS = SimpleNamespace(batch_size=4, data_dir="", data_format="auto", seed=0)


def keypoints(count):
    return KeypointSet([f"p{i}" for i in range(count)], [], [], [0.05] * count, False)


def save_base(folder, kind="vit", names=NAMES, seed=0, **changes):
    """Writes a random base of some 7,000 parameters with its image processor, as one would find it on a hub.

    "imagenet" is a ViT with classes, such as google/vit-base-patch16-224 is. Only "vitpose" has a keypoint head.
    """
    import transformers as hf

    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 32, "patch_size": 8, **changes}
    torch.manual_seed(seed)
    if kind == "vit":
        model, processor = hf.ViTModel(hf.ViTConfig(**vit)), hf.ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "imagenet":
        model = hf.ViTForImageClassification(hf.ViTConfig(**vit, num_labels=7))
        processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "dinov2":  # resizes to 36 and crops to 32
        model = hf.Dinov2Model(hf.Dinov2Config(**vit, mlp_ratio=2))
        processor = hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    else:
        backbone = hf.VitPoseBackboneConfig(
            image_size=[32, 24], patch_size=[8, 8], hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
        )
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        settings = {"backbone_config": backbone, "use_simple_decoder": True, "scale_factor": 4, **labels, **changes}
        model = hf.VitPoseForPoseEstimation(hf.VitPoseConfig(**settings))
        processor = hf.VitPoseImageProcessor(size={"height": 32, "width": 24})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))  # outputs that differ from picture to picture
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_batch(kind="vit", count=4, points=5):
    """Random pictures; targets all over the input, a fifth of them not visible."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, *SIZES[kind], generator=generator)
    target = torch.rand(count, points, 2, generator=generator)
    return pixels, target, torch.arange(count * points).view(count, points) % 5 != 3


def prepare(folder, head="heatmap", points=POINTS):
    """(model with a head for `points`, image processor, facts about the base)."""
    base, processor, facts = load_base(str(folder))
    return with_head(base, points, head, input_size(base, 0)), processor, facts


@torch.no_grad()
def coords(model, pixels):
    return model.eval()(pixels)[0]


def add_lora(model, which="all-linear"):
    from peft import LoraConfig

    model = add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model, which)), (HEAD,))
    return model


def train(model, batch, steps=5):
    """Losses of a few steps on one batch; without weight decay, so that only a gradient moves a tensor."""
    pixels, target, visible = batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        found, _, heatmaps = model.train()(pixels)
        loss = keypoint_loss(found, target, visible, heatmaps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base_folder(kind, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(kind) / "base", kind)


@pytest.fixture(scope="module")
def trained(base_folder, kind):
    """A LoRA run in miniature, all linear layers adapted, saved; everything the tests below look at."""
    model, processor, facts = prepare(base_folder)
    batch = make_batch(kind)
    plain, before = clones(model.state_dict().items()), coords(model, batch[0])
    model = add_lora(model)
    at_start = coords(model, batch[0])
    losses = train(model, batch)
    still = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    folder = base_folder.parent / "adapter"
    save_lora(folder, model, processor, origin("lora", model, facts, FACTS))
    return SimpleNamespace(
        model=model, plain=plain, before=before, at_start=at_start, still=still, losses=losses, folder=folder, batch=batch,
        after=coords(model, batch[0]),
    )  # fmt: skip


# ---- bases and heads -------------------------------------------------------------------------------------------------


def test_the_backbone_is_the_librarys_with_the_bases_weights(base_folder, kind):
    import transformers

    base, _, facts = load_base(str(base_folder))
    old = clones(base.backbone.named_parameters())
    model = with_head(base, keypoints(3), "heatmap", input_size(base, 0))
    assert all(torch.equal(old[name], p) for name, p in model.backbone.named_parameters())
    pixels = make_batch(kind)[0]
    if kind == "vitpose":
        theirs = transformers.VitPoseForPoseEstimation.from_pretrained(base_folder).backbone.eval()
        tokens = theirs(pixels).feature_maps[-1]
    else:
        theirs = transformers.AutoModel.from_pretrained(base_folder).eval()
        tokens = theirs(pixels).last_hidden_state[:, 1:]  # without the class token
    features = feature_map(model.backbone.eval(), pixels)
    rows, columns = SIZES[kind][0] // 8, SIZES[kind][1] // 8
    assert features.shape == (4, 16, rows, columns)
    for row in range(rows):
        for column in range(columns):
            torch.testing.assert_close(features[:, :, row, column], tokens[:, row * columns + column])
    assert sum(p.numel() for p in theirs.parameters()) >= sum(p.numel() for p in model.backbone.parameters())
    assert facts["sha256"] == load_base(str(base_folder))[2]["sha256"]
    found, scores, _ = model(pixels)
    assert found.shape == (4, 3, 2) and scores.shape == (4, 3) and 0 <= found.min() and found.max() <= 1


def test_vitposes_own_head_gives_vitposes_own_heatmaps(tmp_path, capsys):
    import transformers

    folder = save_base(tmp_path / "base", "vitpose")
    model, _, _ = prepare(folder)
    assert "new " not in capsys.readouterr().out and model.facts["beta"] == VITPOSE_BETA
    pixels = make_batch("vitpose")[0]
    with torch.no_grad():
        theirs = transformers.VitPoseForPoseEstimation.from_pretrained(folder).eval()(pixels).heatmaps
        ours = model.eval().keypoint_head(feature_map(model.backbone, pixels))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(coords(model, pixels), soft_argmax(theirs * VITPOSE_BETA)[0])


def test_a_base_head_of_another_number_kind_or_name(tmp_path, capsys):
    base, _, _ = load_base(str(save_base(tmp_path / "base", "vitpose")))
    head, size = base.keypoint_head, input_size(base, 0)
    capsys.readouterr()
    other = KeypointSet(["a", "b", "c", "d", "e"], [], [], [0.1] * 5, True)
    for points, kind, same, told in (
        (POINTS, "heatmap", True, ""),
        (keypoints(5), "heatmap", True, ""),  # numbers stand in for names
        (other, "heatmap", True, "note: the base's head is used.*it calls them nose, left_hand"),
        (keypoints(4), "heatmap", False, "head for 4 keypoints: a new heatmap head, since the base's is a heatmap head for 5"),
        (POINTS, "regression", False, "head for 5 keypoints: a new regression head, since the base's is a heatmap head for 5"),
    ):
        model = with_head(base, points, kind, size)
        text = capsys.readouterr().out
        assert (model.keypoint_head is head) == same and model.new_layers == ([] if same else ["keypoint_head"])
        assert re.search(told, text) if told else text == ""
        assert model.facts["beta"] == (VITPOSE_BETA if same else NEW_BETA)
        assert model.facts["names"] == points.names and model.facts["head"] == kind and model.facts["input_size"] == [32, 24]
        assert coords(model, make_batch("vitpose")[0]).shape == (4, len(points.names), 2)


def test_vitpose_with_deconvolutions_lends_its_backbone_alone(tmp_path, capsys):
    base, _, _ = load_base(str(save_base(tmp_path / "base", "vitpose", use_simple_decoder=False)))
    assert base.keypoint_head is None and "only its backbone is used" in capsys.readouterr().out
    assert coords(with_head(base, POINTS, "heatmap", input_size(base, 0)), make_batch("vitpose")[0]).shape == (4, 5, 2)


def test_an_imagenet_checkpoint_is_a_base(tmp_path):
    import transformers

    folder = save_base(tmp_path / "base", "imagenet")
    model, _, _ = prepare(folder)
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).vit
    pixels = make_batch()[0]
    with torch.no_grad():
        tokens = theirs.eval()(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(feature_map(model.backbone.eval(), pixels).flatten(2).transpose(1, 2), tokens)


# ---- answers and loss ------------------------------------------------------------------------------------------------


def test_soft_argmax_by_hand():
    h, w = 7, 11
    logits = torch.zeros(1, 4, h, w)
    logits[0, 0, 2, 9] = 60  # a sharp peak
    logits[0, 1, 6, 0] = 60  # in a corner
    logits[0, 2, 3, 2] = logits[0, 2, 3, 8] = 60  # two alike: half way, where there is nothing
    found, scores = soft_argmax(logits)  # the last is flat: the middle
    expected = torch.tensor([[9 / 10, 2 / 6], [0, 1], [0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    near = sum(abs(c / 10 - 0.5) <= SCORE_RADIUS for c in range(w)) * sum(abs(r / 6 - 0.5) <= SCORE_RADIUS for r in range(h))
    torch.testing.assert_close(scores[0], torch.tensor([1, 1, 0, near / (h * w)]), atol=1e-5, rtol=0)

    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 3, h, w)).requires_grad_()
    found, scores = soft_argmax(logits)
    share = torch.softmax(logits.flatten(2), 2).view(2, 3, h, w)
    by_hand = sum(share[1, 2, r, c] * torch.tensor([c / 10, r / 6]) for r in range(h) for c in range(w))
    torch.testing.assert_close(found[1, 2], by_hand)
    mirrored, same = soft_argmax(logits.flip(3))
    torch.testing.assert_close(mirrored, torch.stack([1 - found[..., 0], found[..., 1]], dim=2))
    torch.testing.assert_close(same, scores)
    found[0, 0, 0].backward()
    assert logits.grad[0, 0].abs().sum() > 0 and not logits.grad[0, 1:].any() and not scores.requires_grad


def test_the_loss_counts_visible_keypoints_only():
    torch.manual_seed(0)
    target, visible = torch.rand(3, 4, 2), torch.rand(3, 4) > 0.4
    assert 0 < visible.sum() < 12
    found = torch.rand(3, 4, 2, requires_grad=True)
    loss = keypoint_loss(found, target, visible)

    def smooth(d):
        return 0.5 * d * d / LOSS_BETA if abs(d) < LOSS_BETA else abs(d) - LOSS_BETA / 2

    by_hand = [[sum(smooth(float(d)) for d in row) for row in rows] for rows in (found - target).detach()]
    torch.testing.assert_close(keypoint_errors(found, target).detach(), torch.tensor(by_hand))
    assert float(loss.detach()) == pytest.approx(float(torch.tensor(by_hand)[visible].mean()), rel=1e-5)
    loss.backward()
    assert not found.grad[~visible].any() and (found.grad[visible] != 0).all()
    moved = torch.where(visible[..., None], target, target + 7)
    assert torch.equal(keypoint_loss(found, moved, visible), loss)


def test_the_loss_on_heatmaps_wants_a_spot_at_the_keypoint():
    torch.manual_seed(0)
    target, found, heatmaps = torch.tensor([[[0.25, 0.75]]]), torch.rand(1, 1, 2), torch.randn(1, 1, 5, 9)
    spot = [
        [math.exp(-((x / 8 - 0.25) ** 2 + (y / 4 - 0.75) ** 2) / (2 * SPOT_RADIUS**2)) for x in range(9)] for y in range(5)
    ]  # cells at i / (n - 1)
    total = sum(map(sum, spot))
    shares = heatmaps.flatten().softmax(dim=0).reshape(5, 9)
    entropy = -sum(spot[y][x] / total * math.log(shares[y, x]) for y in range(5) for x in range(9))
    by_hand = float(keypoint_errors(found, target)) + SPOT_WEIGHT * entropy
    assert float(keypoint_errors(found, target, heatmaps)) == pytest.approx(by_hand, rel=1e-4)
    # The same mean place, from one spot and from two: only coordinates would not tell them apart.
    one, two = torch.full((2, 1, 1, 5, 9), -9.0)
    one[..., 3, 2] = two[..., 3, 0] = two[..., 3, 4] = 9.0
    losses = [float(keypoint_errors(soft_argmax(maps)[0], target, maps)) for maps in (one, two)]
    assert losses[0] < losses[1] and not torch.equal(one, two)


def test_a_batch_without_a_visible_keypoint_teaches_nothing(tmp_path):
    model, _, _ = prepare(save_base(tmp_path / "base"))
    pixels, target, _ = make_batch()
    found, _, heatmaps = model(pixels)
    loss = keypoint_loss(found, target, torch.zeros(4, 5, dtype=torch.bool), heatmaps)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)  # NaN would be "any"


@pytest.mark.parametrize("head", ["heatmap", "regression"])
def test_every_tensor_of_a_full_model_gets_a_gradient_and_the_loss_falls(base_folder, kind, head):
    model, _, _ = prepare(base_folder, head)
    losses = train(model, make_batch(kind), steps=8)
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to all of a query's logits: its gradient is rounding, or nothing. No answer depends on a mask
    # token of pretraining, which a run freezes.
    assert [name for name in still if not name.endswith(("k_proj.bias", "key.bias", "mask_token"))] == []
    assert losses[-1] < 0.85 * losses[0] and all(map(math.isfinite, losses)), losses


def test_a_regression_head_says_that_it_does_not_know_how_sure_it_is(tmp_path):
    model, _, _ = prepare(save_base(tmp_path / "base"), "regression")
    with torch.no_grad():
        found, scores, heatmaps = model.eval()(make_batch()[0])
    assert heatmaps is None
    assert (scores == 1).all() and scores.shape == (4, 5) and found.min() > 0 and found.max() < 1


# ---- where adapters go -----------------------------------------------------------------------------------------------


def test_lora_targets_hit_layers_of_the_kind_asked_for_and_never_the_head(kind, base_folder, capsys):
    model, _, _ = prepare(base_folder, "regression")  # that head has linear layers
    linear = {
        name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and not is_within(name, (HEAD,))
    }
    assert len(linear) == 2 * 6
    hit = {which: set(lora_targets(model, which)) for which in ("qv", "all-linear", "layers?.1.*fc1", "projection")}
    # Names move: DINOv2 had VitPose's, query and value, until a recent version of transformers.
    ends = ("query", "value") if any(name.endswith("query") for name in linear) else ("q_proj", "v_proj")
    assert hit["qv"] == {name for name in linear if name.endswith(ends)} and len(hit["qv"]) == 4
    assert hit["all-linear"] == linear
    (only,) = hit["layers?.1.*fc1"]
    assert only in linear and ".1." in only and only.endswith("fc1")
    (patches,) = hit["projection"]  # a pattern takes convolutions, too
    assert isinstance(model.get_submodule(patches), torch.nn.Conv2d) and "patch_embeddings" in patches
    assert "LoRA on 12 layers" in capsys.readouterr().out
    for pattern in ("qkv", "keypoint_head.hidden", "keypoint_head.*"):
        with pytest.raises(UserError, match="no layer's name ends in .*; there are: .*mlp.fcN"):
            lora_targets(model, pattern)
    with pytest.raises(UserError, match="no valid regular expression"):
        lora_targets(model, "(q_proj")


# ---- what training an adapter does -----------------------------------------------------------------------------------


def test_at_step_zero_the_adapter_changes_nothing(trained):
    torch.testing.assert_close(trained.at_start, trained.before, atol=1e-6, rtol=0)


def test_every_adapter_gets_a_gradient_and_the_loss_falls(trained):
    assert trained.still == []
    assert trained.losses[-1] < 0.97 * trained.losses[0], trained.losses
    assert (trained.after - trained.before).abs().max() > 1e-2


def test_adapters_and_head_train_and_the_base_does_not_move(trained):
    state, moved = trained.model.state_dict(), set()
    for name, tensor in trained.plain.items():
        prefix, last = name.rsplit(".", 1)
        after = state.get(f"base_model.model.{name}", state.get(f"base_model.model.{prefix}.base_layer.{last}"))
        if not torch.equal(after, tensor):
            assert is_within(name, (HEAD,)), f"{name} moved"
            moved.add(name)
    assert moved == {name for name in trained.plain if is_within(name, (HEAD,))}
    for name, p in trained.model.named_parameters():
        assert p.requires_grad == ("lora_" in name or is_within(name, (HEAD,))), name


def test_rank_zero_moves_the_head_alone(tmp_path):
    from peft import LoraConfig

    model = prepare(save_base(tmp_path / "base"))[0]
    model = add_adapter(model, LoraConfig(r=0, target_modules=lora_targets(model, "all", r=0)), (HEAD,))
    old = clones(model.named_parameters())
    train(model, make_batch(), steps=2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved == {name for name in old if is_within(name, (HEAD,))} and len(moved) == 2


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge, tolerance", [(False, 1e-6), (True, 1e-4)])
def test_a_loaded_adapter_answers_as_the_trained_one(trained, merge, tolerance, kind):
    model, _, facts = load_checkpoint(trained.folder, merge=merge)
    torch.testing.assert_close(coords(model, trained.batch[0]), trained.after, atol=tolerance, rtol=0)
    assert facts["task"] == "pose" and facts["method"] == "lora"
    assert model.facts["names"] == NAMES and KeypointSet.from_json(model.facts) == POINTS
    assert any("lora_" in name for name, _ in model.named_parameters()) != merge
    assert not load_checkpoint(trained.folder, merge=merge)[0].training


def test_plain_peft_loads_the_same_adapter(trained, base_folder):
    from peft import PeftModel

    torch.manual_seed(5)  # another new head, which the file's replaces
    model = PeftModel.from_pretrained(prepare(base_folder)[0], trained.folder)
    torch.testing.assert_close(coords(model, trained.batch[0]), trained.after, atol=1e-5, rtol=0)  # other order of additions


@pytest.mark.parametrize("head", ["heatmap", "regression"])
def test_a_fully_trained_model_is_saved_and_loaded_as_it_is(base_folder, kind, head, tmp_path):
    import transformers

    model, processor, facts = prepare(base_folder, head)
    batch = make_batch(kind)
    before = coords(model, batch[0])
    train(model, batch, steps=2)
    after = coords(model, batch[0])
    assert (after - before).abs().max() > 1e-3
    save_model(tmp_path / "best", model, processor, origin("full", model, facts, FACTS))
    loaded, _, found = load_checkpoint(tmp_path / "best")
    assert torch.equal(coords(loaded, batch[0]), after) and found["method"] == "full" and loaded.facts == model.facts
    assert fingerprint(loaded.state_dict()) == fingerprint(model.state_dict())
    # The backbone is the library's own folder format.
    name = json.loads((tmp_path / "best" / "config.json").read_text())["architectures"][0]
    extra = {"add_pooling_layer": False} if kind == "vit" else {}
    plain, info = getattr(transformers, name).from_pretrained(tmp_path / "best", output_loading_info=True, **extra)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(feature_map(plain.eval(), batch[0]), feature_map(model.backbone.eval(), batch[0]))
    # It is a base, too, with a head of its own.
    again, _, _ = load_base(str(tmp_path / "best"))
    assert torch.equal(coords(with_head(again, POINTS, head, input_size(again, 0)), batch[0]), after)


def test_an_adapter_of_another_base_is_refused(trained, kind, tmp_path):
    other = save_base(tmp_path / "other", kind, seed=7)
    with pytest.raises(UserError, match="was trained on the base .* an adapter fits no other base"):
        load_checkpoint(trained.folder, base=str(other))


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter (untrained) without a manifest, so that its files can be tampered with."""
    model, processor, facts = prepare(save_base(tmp_path / "base"))
    save_lora(tmp_path / "adapter", add_lora(model, "qv"), processor, origin("lora", model, facts, FACTS))
    (tmp_path / "adapter" / "manifest.json").unlink()
    return tmp_path / "adapter"


BIAS = "base_model.model.keypoint_head.conv.bias"
MATRIX = "base_model.model.backbone.layers.0.attention.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name, change, told",
    [
        (BIAS, "rename", "elsewhere.*no such tensor|keypoint_head.conv.bias is missing"),
        (BIAS, "remove", "keypoint_head.conv.bias is missing, expected \\(5,\\)"),
        (BIAS, "reshape", "keypoint_head.conv.bias"),
        (MATRIX, "rename", "elsewhere|q_proj.lora_A.weight"),
        (MATRIX, "remove", "q_proj.lora_A.weight is missing, expected \\(4, 16\\)"),
        (MATRIX, "reshape", "q_proj.lora_A"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(adapter, name, change, told):
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    assert name in tensors, sorted(tensors)
    if change == "reshape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    else:
        tensor = tensors.pop(name)
        if change == "rename":
            tensors[name.replace("model.", "model.elsewhere.", 1)] = tensor
    save_file(tensors, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line for the user to read
        refused(lambda: load_checkpoint(adapter), told)


def refused(call, told):
    with pytest.raises(UserError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_pickle_in_place_of_the_adapter_is_refused(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({BIAS: torch.zeros(5)}, adapter / "adapter_model.bin")
    refused(lambda: load_checkpoint(adapter), "adapter_model.bin is a pickle")


def test_a_changed_file_of_a_sealed_checkpoint_is_refused(trained):
    file = trained.folder / "keypoints.json"
    whole = file.read_text()
    try:
        file.write_text(whole.replace("left_hand", "left_hard"))
        refused(lambda: load_checkpoint(trained.folder), "keypoints.json")
    finally:
        file.write_text(whole)


JUNK = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "5",
    "nothing": "{}",
    **{f"no {key}": {key: ...} for key in ("names", "head", "input_size", "beta", "skeleton", "flip_pairs", "sigmas", "named")},
    "another kind": {"head": "transformer"},
    "no width": {"input_size": [32]},
    "a word for a width": {"input_size": [32, "wide"]},
    "no size at all": {"input_size": [0, 32]},
    "a pair of one": {"flip_pairs": [[1]]},
    "a pair with a stranger": {"skeleton": [[1, 9]]},
    "sigmas of words": {"sigmas": ["a"] * 5},
    "no number of sigmas": {"sigmas": [0.1]},
    "sigmas of nothing": {"sigmas": [float("nan")] * 5},
    "names that are none": {"names": ["a", ["b"], "c", "d", "e"]},
    "names in one": {"names": "abcde"},
    "a size of truth": {"input_size": [True, 32]},
    "a size beyond measure": {"input_size": [32, 10**12]},
    "a size of no whole patches": {"input_size": [32, 33]},
    "beta beyond measure": {"beta": float("inf")},
    "beta of zero": {"beta": 0},
    "beta of nothing": {"beta": None},
    "other names": {"names": ["a", "b"], "skeleton": [], "flip_pairs": [], "sigmas": [0.1, 0.1]},
}


@pytest.mark.parametrize("what", JUNK)
def test_a_keypoints_json_that_does_not_describe_keypoints_is_refused(adapter, what):
    file, change = adapter / "keypoints.json", JUNK[what]
    if isinstance(change, dict):
        facts = {**json.loads(file.read_text()), **change}
        change = json.dumps({key: value for key, value in facts.items() if value is not ...})
    file.write_text(change)
    told = "keypoint_head.conv" if what == "other names" else "keypoints.json"
    refused(lambda: load_checkpoint(adapter), told)


def test_saving_twice_writes_the_same_bytes(adapter):
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names), "a set's order differs from process to process"


@pytest.mark.parametrize("damage", ["cut", "missing", "reshaped", "other", "pickle", "no processor", "no config"])
def test_a_base_that_cannot_be_loaded_is_named_in_one_line(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = save_base(tmp_path / "base")
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    name = sorted(key for key in tensors if key.endswith("bias") and "pooler" not in key)[0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        tensors.pop(name)
    elif damage == "reshaped":
        tensors[name] = torch.zeros(9)
    elif damage == "other":
        tensors["stray.weight"] = torch.zeros(1)
    elif damage == "pickle":
        file.unlink()
        torch.save(Payload(tmp_path / "made"), folder / "pytorch_model.bin")
    else:
        (folder / {"no processor": "preprocessor_config.json", "no config": "config.json"}[damage]).unlink()
    if damage in ("missing", "reshaped", "other"):
        save_file(tensors, file, metadata={"format": "pt"})
    told = {"missing": "do not fit: .*bias", "reshaped": "do not fit: .*bias", "other": "do not fit: stray.weight"}
    refused(lambda: load_base(str(folder)), f"{folder}.*{told.get(damage, '')}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "reshaped", "not finite", "other", "pickle"])
def test_a_head_file_that_does_not_fit_is_named_in_one_line(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    model, processor, facts = prepare(save_base(tmp_path / "base"))
    folder = tmp_path / "best"
    save_model(folder, model, processor, origin("full", model, facts, FACTS))
    (folder / "manifest.json").unlink()
    file, tensors = folder / HEAD_FILE, load_file(folder / HEAD_FILE)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "pickle":
        file.unlink()  # the tensors are a view of it
        torch.save(tensors, file)
    else:
        if damage == "missing":
            tensors.pop("conv.bias")
        elif damage == "reshaped":
            tensors["conv.bias"] = torch.zeros(6)
        elif damage == "not finite":
            tensors["conv.bias"] = torch.full((5,), torch.inf)
        else:
            tensors["stray"] = torch.zeros(1)
        save_file(tensors, file)
    told = {"missing": "conv.bias is missing, expected \\(5,\\)", "reshaped": "conv.bias is \\(6,\\), expected \\(5,\\)"}
    told |= {"not finite": "conv.bias is not finite, expected \\(5,\\)", "other": "stray is \\(1,\\), expected no such tensor"}
    told = f"{HEAD_FILE} {told.get(damage) and 'does not fit keypoints.json: ' + told[damage] or 'cannot be read'}"
    refused(lambda: load_checkpoint(folder), told)
    file.unlink()
    refused(lambda: load_checkpoint(folder), f"holds no {HEAD_FILE}")


def test_a_model_that_is_no_vit_is_refused_with_what_there_is(tmp_path):
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "swin", "architectures": ["SwinModel"]}))
    refused(lambda: load_base(str(folder)), "a swin model; keypoints need one of vit, dinov2, .*vitpose")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_name(name):
    refused(lambda: load_base(name), "there is no folder .*hub name .* or demo")


# ---- what the model sees ---------------------------------------------------------------------------------------------


def test_input_sizes(tmp_path):
    bases = {kind: load_base(str(save_base(tmp_path / kind, kind)))[0] for kind in KINDS}
    assert {kind: input_size(base, 0) for kind, base in bases.items()} == SIZES  # DINOv2's crop, not what it resizes to
    for kind in ("vit", "dinov2"):
        assert input_size(bases[kind], 48) == (48, 48)
        model = with_head(bases[kind], POINTS, "heatmap", (48, 48))
        assert coords(model, torch.randn(2, 3, 48, 48)).shape == (2, 5, 2)  # position embeddings are interpolated
        refused(lambda base=bases[kind]: input_size(base, 30), "--image_size 30 must be a multiple of 8")
        refused(lambda base=bases[kind]: input_size(base, -32), "--image_size -32")
    refused(lambda: input_size(bases["vitpose"], 48), "--image_size 48: ViTPose takes pictures of 32 x 24 only")


# ---- the Predictor ---------------------------------------------------------------------------------------------------


def test_the_predictor_finds_what_infer_finds_in_boxes_and_in_whole_pictures(adapter, tmp_path):
    from PIL import Image

    from common.batches import eval_loader
    from common.samples import Faults
    from data import Preprocess, collate, figures_only
    from metrics import detect

    framed = []
    for i, box in enumerate([None, (10.0, 5.0, 40.0, 60.0), (0.0, 0.0, 90.0, 70.0)]):
        noise = np.random.default_rng(i).integers(0, 255, (80 + i, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        framed.append((tmp_path / f"{i}.png", box, 1.0))
    predictor = Predictor(adapter, device="cpu", merge=False)
    processor = load_checkpoint(adapter)[1]
    dataset = figures_only(framed, Preprocess(processor, predictor.model.facts["input_size"]), POINTS, Faults())
    expected = [item for items in detect(predictor.model, eval_loader(dataset, collate, 1)) for item in items]
    images = [framed[0][0], Image.open(framed[1][0]), np.array(Image.open(framed[2][0]))]
    together = predictor.predict_batch(images, [box for _, box, _ in framed], batch_size=2)
    for found, answer in zip(expected, together, strict=True):
        assert list(answer) == NAMES
        np.testing.assert_allclose([value[:2] for value in answer.values()], found["points"], atol=1e-2)
        np.testing.assert_allclose([value[2] for value in answer.values()], found["scores"], atol=1e-4)
    assert predictor.predict(images[0]) == {name: pytest.approx(value, abs=1e-2) for name, value in together[0].items()}
    assert predictor.predict_batch([]) == []
    refused(lambda: predictor.predict(images[0], box=(200, 200, 5, 5)), "does not fit a picture of 100 x 80 pixels")
    refused(lambda: predictor.predict_batch(images, [None]), "3 pictures need as many boxes")
    check_picture_inputs(predictor.predict, tmp_path)
