"""Seven classifier architectures, tiny and random: heads, adapters, preprocessing, saving and loading do what they promise."""

import json
import re
import shutil
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSIFICATION, Payload, check_picture_inputs, use_task
from test_labelled import check_preprocess

TASK = CLASSIFICATION
use_task(TASK)

from common.bases import train_mode  # noqa: E402
from common.checkpoint import fingerprint  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import is_within  # noqa: E402
from common.peft_adapters import add_adapter  # noqa: E402
from common.saved_models import save_lora, save_model, take_head  # noqa: E402
from common.trial import freeze_unused  # noqa: E402
from common.vision.preprocess import ClassifierPreprocess  # noqa: E402
from model import answer, class_layers, load_base, load_checkpoint, lora_targets, origin, start_from, with_classes  # noqa: E402
from predictor import Predictor  # noqa: E402

CLASSES = ["cat", "dog", "fish"]
KINDS = ["vit", "deit", "swin", "dinov2", "convnext", "mobilevit", "timm"]
FACTS = SimpleNamespace(batch_size=4, data_dir="", seed=0)
NEW = ["cat", "Dog", "star", "dot"]  # one of the base's classes, and three that it has never seen (names are case-sensitive)
UNUSED = {"dinov2": {"dinov2.embeddings.mask_token"}}  # of pretraining: no answer depends on it
# How many layers attention's query and value projections are; ConvNeXt has none.
QV_LAYERS = {"vit": 4, "deit": 4, "swin": 4, "dinov2": 4, "convnext": 0, "mobilevit": 18, "timm": 2}


def save_base(folder, kind="vit", classes=CLASSES, seed=0):
    """Writes a random base of some 10,000 parameters for 32 x 32 pictures, with its image processor, as a hub has it."""
    import transformers as hf

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 32, "patch_size": 8, **names}
    size, crop = {"height": 32, "width": 32}, {"crop_size": {"height": 32, "width": 32}}
    torch.manual_seed(seed)
    if kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(**vit))
        processor = hf.ViTImageProcessor(size=size)
    elif kind == "deit":
        model = hf.DeiTForImageClassification(hf.DeiTConfig(**vit))
        processor = hf.DeiTImageProcessor(size={"height": 37, "width": 37}, **crop)
    elif kind == "swin":
        small = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        model = hf.SwinForImageClassification(hf.SwinConfig(**small, **names))
        processor = hf.ViTImageProcessor(size=size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    elif kind == "dinov2":
        model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**vit))
        processor = hf.BitImageProcessor(size={"shortest_edge": 36}, **crop)
    elif kind == "convnext":
        model = hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **names))
        processor = hf.ConvNextImageProcessor(size={"shortest_edge": 32})
    elif kind == "mobilevit":
        small = {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 8, 8, 12, 16, 16]}
        small |= {"num_attention_heads": 2, "last_layer_dropout": 0.0, "classifier_dropout_prob": 0.0}
        small |= {"output_stride": 8}  # maps of 4 x 4 up to the end: attention over a single patch would teach q and k nothing
        model = hf.MobileViTForImageClassification(hf.MobileViTConfig(**small, **names))
        processor = hf.MobileViTImageProcessor(size={"shortest_edge": 36}, **crop)
        for module in model.modules():  # statistics as a trained BatchNorm has them, not 0 and 1
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                torch.nn.init.ones_(module.weight)  # 0.02 at random, with which nothing reaches the last layer
    elif kind == "timm":
        facts = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
        facts |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "first_conv": "patch_embed.proj", "classifier": "head"}
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        config = hf.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", pretrained_cfg=facts, model_args=shape, do_pooling=True, **names
        )
        model = hf.TimmWrapperForImageClassification(config)
        processor = None
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                # As of a trained net: outputs that differ from picture to picture. (0.2 would die out in 30 convolutions.)
                p.normal_(0, 1.5 * p[0].numel() ** -0.5 if kind == "mobilevit" else 0.2)
    model.eval().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def make_batch(count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


@torch.no_grad()
def outputs(model, pixels):
    return model.eval()(pixel_values=pixels).logits


def add_lora(model, which="all"):
    from peft import LoraConfig

    head = class_layers(model)
    model = add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model, which)), head)
    return model


def train(model, steps=5):
    """Losses of a few steps on one batch; without weight decay, so that only a gradient moves a tensor."""
    pixels, labels = make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        train_mode(model)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
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
def small_base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="module")
def loaded(base_folder):
    """(model, image processor, facts) of the base; tests make models from it and leave it as it is."""
    return load_base(str(base_folder))


@pytest.fixture(scope="module")
def trained(base_folder, loaded):
    """A LoRA run in miniature on four classes, all layers adapted, saved; everything the tests below look at."""
    base, processor, facts = loaded
    pixels, _ = make_batch()
    model = with_classes(base, NEW)
    plain, head, before = clones(model.state_dict().items()), class_layers(model), outputs(model, pixels)
    model = add_lora(model)
    at_start, start = outputs(model, pixels), clones(model.named_parameters())
    losses = train(model)
    folder = base_folder.parent / "adapter"
    save_lora(folder, model, processor, origin("lora", model, facts, FACTS))
    return SimpleNamespace(
        model=model, head=head, plain=plain, start=start, before=before, at_start=at_start, losses=losses, folder=folder,
        after=outputs(model, pixels), pixels=pixels,
    )  # fmt: skip


# ---- the head for other classes --------------------------------------------------------------------------------------


def test_unknown_classes_get_a_new_head_and_every_other_weight_stays(kind, loaded):
    base, _, _ = loaded
    old, head = clones(base.state_dict().items()), class_layers(base)
    assert head == (["timm_model.head"] if kind == "timm" else ["classifier"])
    model = with_classes(base, NEW)
    freeze_unused(model, answer)
    assert [model.config.id2label[i] for i in range(4)] == NEW and model.config.num_labels == 4
    assert outputs(model, make_batch()[0]).shape == (4, 4)
    state = model.state_dict()
    assert set(state) == set(old)
    for name, tensor in state.items():
        if not is_within(name, head):
            assert torch.equal(tensor, old[name]), name
    weight = state[f"{head[0]}.weight"]
    assert weight.shape[0] == 4 and weight.std() > 0 and weight.dtype == torch.float32
    assert not torch.equal(weight[0], old[f"{head[0]}.weight"][0])  # not even the class that the base knows
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == UNUSED.get(kind, set())
    assert model.new_layers == head


@pytest.mark.parametrize("classes", [["fish", "cat", "dog"], ["fish", "dog"]])
def test_a_base_that_knows_the_classes_keeps_its_answers_for_them_by_name(loaded, classes, capsys):
    base, _, _ = loaded
    pixels, _ = make_batch()
    theirs = outputs(base, pixels)[:, [CLASSES.index(name) for name in classes]]
    assert theirs.std(dim=0).min() > 1e-3  # pictures tell apart
    model = with_classes(base, classes)
    torch.testing.assert_close(outputs(model, pixels), theirs, atol=1e-6, rtol=1e-5)
    assert model.new_layers == []
    assert "rows of the base, by name" in capsys.readouterr().out


def test_the_same_classes_leave_the_base_as_it_is(loaded):
    base, _, facts = loaded
    assert with_classes(base, CLASSES) is base and base.new_layers == []
    assert fingerprint(base.state_dict()) == facts["sha256"]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip", "timm"])
def test_a_base_without_a_head_gets_one_and_is_the_same_base_each_time(kind, tmp_path):
    """As ViT on ImageNet-21k and DINOv2 lie on the hub: backbones, some with a pooler that a classifier has no use for."""
    import timm
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == "timm":
        args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
        timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **args), tmp_path)
        config, more = json.loads((tmp_path / "config.json").read_text()), {**args, "num_classes": 0}
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "pretrained_cfg": {**config["pretrained_cfg"], "input_size": [3, 32, 32]}, "model_args": more})
        )
    else:
        kinds = {"vit": "ViTConfig", "dinov2": "Dinov2Config", "clip": "CLIPConfig", "siglip": "SiglipConfig"}
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
        small |= {"intermediate_size": 32} if kind in ("clip", "siglip") else {}
        settings = {"vision_config": small, "text_config": text} if kind in ("clip", "siglip") else small
        config = getattr(transformers, kinds[kind])(**settings)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    base, _, facts = load_base(str(tmp_path))
    assert load_base(str(tmp_path))[2] == facts
    model = with_classes(base, ["a", "b", "c"])
    head = class_layers(model)
    found = outputs(model, torch.randn(2, 3, 32, 32))
    assert found.shape == (2, 3) and model.new_layers == head and len(head) == 1
    assert model.get_submodule(head[0]).weight.std() > 0
    assert answer(model).shape == (1, 3)  # for a picture in the size that the base is of


@pytest.mark.parametrize(("kind", "told"), [("ImageGPT", "takes no plain pictures"), ("ViTMAE", "none of type vit_mae")])
def test_a_base_that_is_no_classifier_of_pictures_is_refused_in_a_short_line(kind, told, tmp_path):
    import transformers

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    if kind == "ImageGPT":
        config = transformers.ImageGPTConfig(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=9)
        transformers.ImageGPTForImageClassification(config).save_pretrained(tmp_path)
    else:
        transformers.ViTMAEModel(transformers.ViTMAEConfig(**small, intermediate_size=8)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        load_base(str(tmp_path))
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("args", [{"checkpoint_path": "weights.pth"}, {"pretrained_cfg": {"file": "a.bin"}}], ids=str)
def test_settings_that_would_have_timm_load_another_file_are_refused(args, tmp_path):
    import timm

    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": args}))
    with pytest.raises(UserError, match=f"would have timm load {next(iter(args))}"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("config.json", {"num_hidden_layers": 10**6}, "far larger model"),
        ("config.json", {"hidden_size": 20_000}, "far larger model"),
        ("config.json", {"image_size": [10**12, 8]}, "image_size is 1000000000000"),
        ("config.json", {"id2label": {"0": {"a": [10**30]}}}, "a is 10000000000"),
        ("config.json", {"hidden_act": "no_such"}, "KeyError: 'no_such'"),
        ("config.json", {"num_attention_heads": "two"}, "cannot|TypeError|num_attention_heads"),
        ("preprocessor_config.json", {"size": {"height": 10**9, "width": 10**9}}, "(height|width) is 1000000000"),
    ],
    ids=str,
)
def test_settings_that_no_model_of_these_weights_has_end_soon_in_one_line(small_base, tmp_path, file, change, told):
    folder = shutil.copytree(small_base, tmp_path / "base")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    began = time.monotonic()
    with pytest.raises(UserError, match=told):
        load_base(str(folder))
    assert time.monotonic() - began < 20


def test_a_network_of_convolutions_takes_adapters_there_by_default(tmp_path, capsys):
    import timm

    timm.models.save_for_hf(timm.create_model("mobilenetv3_small_050", num_classes=3), tmp_path)
    model = load_base(str(tmp_path))[0]
    names = lora_targets(model, "all-linear")
    assert names == lora_targets(model, "all") and all("conv" in name or "downsample" in name for name in names)
    assert "so adapters go on convolutions, as with --lora_targets all" in capsys.readouterr().out


# ---- where adapters go -----------------------------------------------------------------------------------------------


def test_lora_targets_hit_layers_of_the_kind_asked_for_and_never_the_head(kind, loaded, capsys, monkeypatch):
    model, _, _ = loaded
    head, layers = class_layers(model), dict(model.named_modules())
    monkeypatch.setattr("model.class_layers", lambda _: head)  # asked for once: it takes a while
    grouped = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
    linear = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)} - set(head)
    convolutions = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)} - grouped
    assert set(lora_targets(model, "all-linear")) == linear
    assert f"LoRA on {len(linear)} layers" in capsys.readouterr().out
    assert set(lora_targets(model, "all")) == linear | convolutions and convolutions
    assert bool(grouped) == (kind in ("convnext", "mobilevit"))
    first = sorted(linear)[0]
    assert lora_targets(model, re.escape(first)) == [first]
    chosen = lora_targets(model, "fc1|pwconv1|intermediate.dense")
    assert chosen and all(name.endswith(("fc1", "pwconv1", "intermediate.dense")) for name in chosen)
    for which in ("nonsense", re.escape(head[0]), "q_proj.*classifier"):
        with pytest.raises(UserError, match="no layer's name ends in .*; there are: .*N"):
            lora_targets(model, which)
    with pytest.raises(UserError, match="no valid regular expression"):
        lora_targets(model, "(q_proj")


def test_query_and_value_are_found_whatever_they_are_called(kind, loaded):
    model, _, _ = loaded
    if not QV_LAYERS[kind]:
        with pytest.raises(UserError, match="qv: no query and value layers.*all-linear"):
            lora_targets(model, "qv")
        return
    names = lora_targets(model, "qv")
    assert len(names) == QV_LAYERS[kind] and all(name.endswith(("q_proj", "v_proj", "query", "value", "qkv")) for name in names)
    assert {name.endswith("qkv") for name in names} == {kind == "timm"}


# ---- what training an adapter does -----------------------------------------------------------------------------------


def test_at_step_zero_the_adapter_changes_nothing(trained):
    torch.testing.assert_close(trained.at_start, trained.before, atol=1e-6, rtol=0)


def test_adapters_and_head_all_learn_and_nothing_else_moves(trained):
    assert trained.losses[-1] < 0.9 * trained.losses[0], trained.losses
    assert (trained.after - trained.before).abs().max() > 1e-2
    for name, p in trained.model.named_parameters():
        learns = "lora_" in name or is_within(name, trained.head)
        assert p.requires_grad == learns and (p.grad is not None) == learns, name
        assert torch.equal(p, trained.start[name]) != learns, name
    state = trained.model.state_dict()  # with the statistics of BatchNorm, which are no parameters
    for name, tensor in trained.plain.items():
        prefix, last = name.rsplit(".", 1)
        after = state.get(f"base_model.model.{name}", state.get(f"base_model.model.{prefix}.base_layer.{last}"))
        assert torch.equal(after, tensor) != is_within(name, trained.head), name


def test_rank_zero_trains_the_head_alone_and_saves_it_alone(small_base, tmp_path, capsys):
    from peft import LoraConfig
    from safetensors.torch import load_file

    base, processor, facts = load_base(str(small_base))
    model = with_classes(base, NEW)
    capsys.readouterr()
    settings = LoraConfig(r=0, target_modules=lora_targets(model, "all-linear", r=0))
    model = add_adapter(model, settings, class_layers(model))
    start, pixels = clones(model.named_parameters()), make_batch()[0]
    train(model, steps=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    save_lora(tmp_path / "head", model, processor, origin("head", model, facts, FACTS))
    assert load_file(tmp_path / "head" / "head.safetensors").keys() == moved and "LoRA" not in capsys.readouterr().out
    assert not list((tmp_path / "head").glob("adapter*"))
    again, _, about = load_checkpoint(tmp_path / "head")
    assert torch.equal(outputs(again, pixels), outputs(model, pixels)) and about["method"] == "head"
    for classes, same in ((NEW, True), (["x", "y"], False)):  # a run that starts from it, on the same classes and on others
        begun = with_classes(load_base(str(small_base))[0], classes)
        begun = add_adapter(begun, LoraConfig(r=0, target_modules=[]), class_layers(begun))
        fresh = begun.classifier.weight.clone()
        start_from(str(tmp_path / "head"), begun)
        assert torch.equal(begun.classifier.weight, model.classifier.weight if same else fresh)
        assert begun.new_layers == ([] if same else ["classifier"])
    whole = with_classes(load_base(str(small_base))[0], NEW)  # what learns more starts with this head, too
    start_from(str(tmp_path / "head"), whole)
    adapted = with_classes(load_base(str(small_base))[0], NEW)
    adapter = LoraConfig(r=2, target_modules=lora_targets(adapted, "qv"))
    adapted = add_adapter(adapted, adapter, class_layers(adapted))
    start_from(str(tmp_path / "head"), adapted)
    for begun in (whole, adapted):
        assert torch.equal(outputs(begun, pixels), outputs(model, pixels))
    with pytest.raises(UserError, match=r"its classifier\.\w+ is \(.*\), and here it is missing"):
        take_head(torch.nn.Linear(2, 2), model, str(tmp_path / "head"), ())
    (tmp_path / "head" / "manifest.json").unlink()
    (tmp_path / "head" / "head.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "head")


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_a_loaded_adapter_answers_as_the_trained_one_merged_or_not(trained, capsys):
    model, processor, facts = load_checkpoint(trained.folder, merge=False)
    torch.testing.assert_close(outputs(model, trained.pixels), trained.after, atol=1e-5, rtol=1e-5)
    assert not model.training and facts["classes"] == NEW and ClassifierPreprocess(processor).shape == (32, 32)
    merged, _, _ = load_checkpoint(trained.folder)
    torch.testing.assert_close(outputs(merged, trained.pixels), trained.after, atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    assert "translated" not in capsys.readouterr().out


def test_plain_peft_loads_the_same_adapter(trained, loaded):
    from peft import PeftModel

    model = PeftModel.from_pretrained(with_classes(loaded[0], NEW), trained.folder)
    torch.testing.assert_close(outputs(model, trained.pixels), trained.after, atol=1e-5, rtol=1e-5)


def test_a_fully_trained_model_is_saved_and_loaded_as_it_is(loaded, kind, tmp_path):
    base, processor, facts = loaded
    model, (pixels, _) = with_classes(base, NEW), make_batch()
    before = outputs(model, pixels)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    old = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    train(model, steps=2)
    assert model.training and bool(norms) == (kind == "mobilevit") and not any(m.training for m in norms)
    for module, (mean, var) in zip(norms, old, strict=True):  # small batches would spoil the base's statistics
        assert torch.equal(module.running_mean, mean) and torch.equal(module.running_var, var)
    after = outputs(model, pixels)
    assert (after - before).abs().max() > 1e-2
    save_model(tmp_path / "best", model, processor, origin("full", model, facts, FACTS))
    again, _, found = load_checkpoint(tmp_path / "best")
    assert torch.equal(outputs(again, pixels), after) and found["classes"] == NEW and not again.training
    assert [again.config.id2label[i] for i in range(4)] == NEW  # so it can be the base of another run


@pytest.fixture(scope="module")
def untouched(small_base):
    """A saved ViT adapter on q and v (untrained), without a manifest."""
    base, processor, facts = load_base(str(small_base))
    model, folder = add_lora(with_classes(base, ["star", "dot"]), "qv"), small_base.parent / "adapter"
    save_lora(folder, model, processor, origin("lora", model, facts, FACTS))
    (folder / "manifest.json").unlink()
    load_checkpoint(folder)  # it is fine before a test tampers with it
    return folder


@pytest.fixture
def adapter(untouched, tmp_path):
    """A copy whose files can be tampered with."""
    return shutil.copytree(untouched, tmp_path / "adapter")


def change(folder, edit, **config):
    """Applies edit(tensors) to the adapter file of a folder, and sets keys of its adapter_config.json."""
    from safetensors.torch import load_file, save_file

    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    tensors = edit(tensors) or tensors
    save_file(tensors, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


HEAD = "base_model.model.classifier.bias"
MATRIX = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name, how, told",
    [
        (HEAD, "rename", "elsewhere.*no such tensor|classifier.bias is missing"),
        (HEAD, "remove", "classifier.bias is missing, expected \\(2,\\)"),
        (HEAD, "reshape", "classifier.bias"),
        (HEAD, "add", "stray.weight is .*, expected no such tensor"),
        (MATRIX, "rename", "elsewhere|q_proj.lora_A.weight"),
        (MATRIX, "remove", "q_proj.lora_A.weight is missing, expected \\(4, 16\\)"),
        (MATRIX, "reshape", "q_proj.lora_A"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(adapter, name, how, told):
    def edit(tensors):
        tensor = tensors[name]
        if how == "reshape":
            tensors[name] = torch.cat([tensor, tensor])
        elif how == "add":
            tensors["base_model.model.stray.weight"] = torch.zeros(3)
        else:
            del tensors[name]
            if how == "rename":
                tensors[name.replace("model.", "model.elsewhere.", 1)] = tensor

    change(adapter, edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line for the user to read
        with pytest.raises(UserError, match=told) as caught:
            load_checkpoint(adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_in_8_bit_floats_is_loaded(adapter):
    change(adapter, lambda tensors: {**tensors, MATRIX: tensors[MATRIX].to(torch.float8_e4m3fn)})
    load_checkpoint(adapter)


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    other = save_base(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="was trained on the base .* an adapter fits no other base"):
        load_checkpoint(adapter, base=str(other))


def test_an_adapter_that_does_not_say_where_it_comes_from_is_refused(adapter):
    (adapter / "origin.json").unlink()
    with pytest.raises(UserError, match="holds no origin.json: only checkpoints that these scripts saved say what"):
        load_checkpoint(adapter)


def test_pickles_are_refused(adapter, small_base, tmp_path):
    torch.save({HEAD: torch.zeros(2)}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which could run code"):
        load_checkpoint(adapter)
    full = shutil.copytree(small_base, tmp_path / "full")
    torch.save({}, full / "pytorch_model.bin")
    (full / "model.safetensors").unlink()
    shutil.copy(adapter / "origin.json", full)
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle, which could run code"):
        load_checkpoint(full)


def test_an_adapter_file_that_was_cut_short_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        load_checkpoint(adapter)


def test_an_adapter_of_numbers_that_are_not_finite_is_refused(adapter):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"not finite in {re.escape(name)}"):
        load_checkpoint(adapter)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target_modules": "(a+)+b"}, "target_modules must be a list of names"),
        ({"target_modules": ["(a+)+b"]}, "target_modules must be a list of names"),
        ({"exclude_modules": ".*"}, "exclude_modules must be a list"),
        ({"rank_pattern": {"(a+)+b": 4}}, "as a pattern: only names"),
        ({"alpha_pattern": {".*": 4}}, "as a pattern: only names"),
        ({"r": 3_000_000}, "the rank r is 3000000"),
        ({"r": 3}, "the rank r is 3, and no tensor"),
        ({"rank_pattern": {"vit.q_proj": 10**9}}, "the rank vit.q_proj is 1000000000"),
        ({"layer_replication": [[0, 10**9]]}, "asks for layer_replication"),
        ({"init_lora_weights": "pissa_niter_99999999"}, "init_lora_weights is 'pissa_niter_99999999'"),
        ({"lora_alpha": float("nan")}, "the alpha lora_alpha is nan"),
        ({"alpha_pattern": {"q_proj": 1e308}}, "the alpha q_proj is 1e\\+308"),
    ],
    ids=str,
)
def test_adapter_settings_that_could_hang_or_eat_the_memory_are_refused(adapter, change, told):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (adapter / "manifest.json").unlink(missing_ok=True)
    began = time.monotonic()
    with pytest.raises(UserError, match=told):
        load_checkpoint(adapter)
    assert time.monotonic() - began < 10


def test_nothing_is_fetched_for_a_base_that_only_a_checkpoint_names(adapter, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    file = adapter / "origin.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "base": {**about["base"], "name": "someone/who-is-not-there"}}))
    (adapter / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="not in the local cache, and it is fetched only where --model names it"):
        load_checkpoint(adapter)


def test_saving_twice_writes_the_same_bytes(adapter):
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names) and len(names) == 4, "a set's order differs from process to process"


# ---- adapters with the layer names of transformers 4 -----------------------------------------------------------------

SELF = [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]
OLD = {
    "vit": [(f".attention.{new}", f".attention.attention.{old}") for new, old in SELF]
    + [(".attention.o_proj", ".attention.output.dense"), (".mlp.fc1", ".intermediate.dense"), (".mlp.fc2", ".output.dense")]
    + [("vit.layers.", "vit.encoder.layer.")],
    "dinov2": [(f".attention.{new}", f".attention.attention.{old}") for new, old in SELF]
    + [(".attention.o_proj", ".attention.output.dense")],
}
OLD["deit"] = [(new.replace("vit.", "deit."), old.replace("vit.", "deit.")) for new, old in OLD["vit"]]
OLD["swin"] = [(f".attention.{new}", f".attention.self.{old}") for new, old in SELF]
OLD["swin"] += OLD["vit"][3:6]


def as_of_old(kind, name):
    """A layer's or tensor's name as transformers 4 had it. (Some kept it into the 5s: then there is nothing to change.)"""
    for new, old in OLD[kind]:
        name = name.replace(new, old)
    return name


def make_old(folder, kind, edit=None, **config):
    def rename(tensors):
        old = {as_of_old(kind, name): tensor for name, tensor in tensors.items()}
        assert any(f".{'self' if kind == 'swin' else 'attention'}.query.lora_A" in name for name in old)
        return (edit and edit(old)) or old

    settings = json.loads((folder / "adapter_config.json").read_text())
    targets = [as_of_old(kind, name) for name in settings["target_modules"]]
    change(folder, rename, **{"target_modules": targets, **config})


def test_an_adapter_with_the_names_of_transformers_4_is_translated(trained, kind, tmp_path, capsys):
    if kind not in OLD:  # its layers go by the names that they have always had: nothing may be translated
        load_checkpoint(trained.folder)
        assert "translated" not in capsys.readouterr().out
        return
    folder = shutil.copytree(trained.folder, tmp_path / "old")
    (folder / "manifest.json").unlink()
    make_old(folder, kind)
    model, _, _ = load_checkpoint(folder)
    torch.testing.assert_close(outputs(model, trained.pixels), trained.after, atol=1e-4, rtol=1e-4)
    names = [name for name, _ in trained.model.named_modules()]
    differs = any(as_of_old(kind, name) != name for name in names)  # not DINOv2's, in the early 5s
    assert ("of an older transformers; they are translated" in capsys.readouterr().out) == differs
    assert differs or kind == "dinov2"
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="adapter_config.json holds no settings"):
        load_checkpoint(folder)


@pytest.mark.parametrize("old", [True, False])
def test_an_adapter_that_peft_itself_saved_is_loaded_under_either_names(adapter, small_base, old, capsys):
    """target_modules of the last part of the names alone, and the head in modules_to_save, as PEFT's own examples have it."""
    from peft import LoraConfig, get_peft_model

    model = with_classes(load_base(str(small_base))[0], NEW)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    train(model)
    model.save_pretrained(adapter)
    facts = json.loads((adapter / "origin.json").read_text())
    (adapter / "origin.json").write_text(json.dumps({**facts, "classes": NEW}))
    if old:
        make_old(adapter, "vit", target_modules=["query", "value"])
    again, _, _ = load_checkpoint(adapter)
    torch.testing.assert_close(outputs(again, make_batch()[0]), outputs(model, make_batch()[0]), atol=1e-4, rtol=1e-4)
    assert ("they are translated" in capsys.readouterr().out) == old


def old_name(part):
    return f"base_model.model.vit.encoder.layer.1.attention.attention.{part}"


FAULTS = ("unknown", "matrix missing", "layer missing", "kind missing", "head missing", "twice", "alpha of its own")


@pytest.mark.parametrize(
    "fault, targets", [(fault, names) for fault in FAULTS for names in ("full", "short")] + [("", "pattern")]
)
def test_an_old_adapter_is_translated_as_a_whole_or_refused(adapter, fault, targets):
    def edit(tensors):
        if fault == "unknown":
            tensors[old_name("inquiry.lora_A.weight")] = tensors.pop(old_name("query.lora_A.weight"))
        elif fault == "matrix missing":
            del tensors[old_name("value.lora_B.weight")]
        elif fault == "layer missing":
            del tensors[old_name("value.lora_A.weight")], tensors[old_name("value.lora_B.weight")]
        elif fault == "kind missing":
            for name in [name for name in tensors if ".value." in name]:
                del tensors[name]
        elif fault == "head missing":
            del tensors["base_model.model.classifier.weight"]
        elif fault == "twice":
            tensors[MATRIX] = torch.zeros(4, 16)

    settings = {"short": {"target_modules": ["query", "value"]}, "pattern": {"target_modules": ".*\\.(query|value)"}}
    settings = settings.get(targets, {})
    if fault == "alpha of its own":
        settings["alpha_pattern"] = {"query": 64}
    make_old(adapter, "vit", edit, **settings)
    with pytest.raises(UserError, match="does not fit this base|must be a list of names") as caught:
        load_checkpoint(adapter)
    assert "\n" not in str(caught.value)


# ---- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "missing", "reshaped", "other", "pickle", "no processor", "no classifier"])
def test_a_base_that_cannot_be_loaded_is_named_in_one_line(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = save_base(tmp_path / "base")
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        tensors.pop("classifier.bias")
    elif damage == "reshaped":
        tensors["classifier.bias"] = torch.zeros(9)
    elif damage == "other":
        tensors["stray.weight"] = torch.zeros(1)
    elif damage == "pickle":
        file.unlink()
        torch.save(Payload(tmp_path / "made"), folder / "pytorch_model.bin")
    elif damage == "no processor":
        (folder / "preprocessor_config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    if damage in ("missing", "reshaped", "other"):
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_base(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    if damage in ("missing", "reshaped", "other"):
        assert ("stray.weight" if damage == "other" else "classifier.bias") in str(caught.value)


def test_a_base_with_weights_in_a_pytorch_file_is_the_same_base(tmp_path):
    from safetensors.torch import load_file

    folder = save_base(tmp_path / "base")
    facts = load_base(str(folder))[2]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_base(str(folder))[2] == facts


def test_a_base_in_half_precision_trains_in_single_precision(tmp_path):
    model, _, _ = load_base(str(save_base(tmp_path / "base")))
    model.half().save_pretrained(tmp_path / "base")
    base, _, _ = load_base(str(tmp_path / "base"))
    for classes in (CLASSES, NEW):
        assert {p.dtype for p in with_classes(base, classes).parameters()} == {torch.float32}


# ---- pictures as the base's own image processor prepares them --------------------------------------------------------


def test_pictures_are_prepared_as_by_the_bases_own_image_processor(loaded):
    check_preprocess(loaded[1])


# ---- the Predictor ---------------------------------------------------------------------------------------------------


def test_the_predictor_gives_the_models_probabilities_of_either_kind_of_checkpoint(adapter, small_base, tmp_path):
    base, processor, facts = load_base(str(small_base))
    model = with_classes(base, ["star", "dot"])
    save_model(tmp_path / "full", model, processor, origin("full", model, facts, FACTS))
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    for folder in (adapter, tmp_path / "full"):
        predictor = Predictor(folder, device="cpu")
        with torch.no_grad():
            own = processor(pixels, return_tensors="pt")["pixel_values"]
            expected = load_checkpoint(folder)[0](pixel_values=own).logits.softmax(dim=1)[0]
        answer = predictor.predict(pixels)
        assert [value for _, value in answer] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-4)
        assert answer[0][0] == ["star", "dot"][int(expected.argmax())]
        assert predictor.predict_batch([pixels, pixels[:, ::-1]], top_k=1, batch_size=1)[0] == answer[:1]
    check_picture_inputs(predictor.predict, tmp_path)
