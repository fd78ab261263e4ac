"""CLIP and SigLIP, tiny and random: bases, zero-shot heads, eight adapter methods, saving and loading do what they promise."""

import copy
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import CLIP, use_task

TASK = CLIP
use_task(TASK)

from common.bases import train_mode  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import count_parameters  # noqa: E402
from common.peft_adapters import add_adapter, train_whole  # noqa: E402
from common.saved_models import save_lora, save_model  # noqa: E402
from model import (  # noqa: E402
    SCALE,
    ClipClassifier,
    describe_trainable,
    label_words,
    layer_groups,
    load_base,
    load_checkpoint,
    lora_targets,
    origin,
    with_head,
    zero_shot_model,
    zero_shot_rows,
)
from peft_methods import adapter_config, quantized  # noqa: E402

KINDS = ("clip", "siglip")
METHODS = ("lora", "dora", "rslora", "pissa", "olora", "ia3", "loha", "lokr")
CLASSES = ["plain_disc", "n02088364-striped_bar", "dotted_cross", "red_diamond"]
PROMPT = "a photo of a {label}"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SETTINGS = SimpleNamespace(
    batch_size=4, data_dir="", seed=0, prompts=PROMPT, lora_r=4, lora_alpha=8, lora_dropout=0.1, quantize="none"
)  # fmt: skip
SHARED = 24  # what both towers of the CLIP are projected to: another width than either has


def save_base(folder, kind="clip", seed=0):
    """Writes a random base for 32 x 32 pictures with image processor and the demo's tokenizer, as a hub has it."""
    import transformers as hf

    token = json.loads((CLIP / "demo_base" / "config.json").read_text())["text_config"]
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**small, "image_size": 32, "patch_size": 16}
    text = {**small, "max_position_embeddings": 20}
    text |= {name: token[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    if kind == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED))
        size = {"height": 32, "width": 32}
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    else:
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
        processor = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)  # as of a trained net: pictures and texts that differ
        model.logit_scale.fill_(2.0)
        if kind == "siglip":
            model.logit_bias.fill_(-3.0)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(CLIP / "demo_base" / name, folder)
    if kind == "siglip":  # its own tokenizers give no mask: it reads the padding, too
        rewrite(folder / "tokenizer_config.json", model_input_names=["input_ids"])
    return folder


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_tokenizer(folder):
    for name in TOKENIZER:
        (folder / name).unlink()
    return folder


def change_weights(folder, edit):
    """Applies edit(tensors) to model.safetensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pixels_and_labels(count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % len(CLASSES)


@torch.no_grad()
def outputs(model):
    return model.eval()(pixel_values=pixels_and_labels()[0]).logits


def train(model, steps=2):
    pixels, labels = pixels_and_labels()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(steps):
        train_mode(model)
        torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def with_adapter(model, method, which="qv", rank=4):
    """As train_lora.py makes it."""
    config = SimpleNamespace(**{**vars(SETTINGS), "lora_r": rank})
    return add_adapter(model, adapter_config(method, config, lora_targets(model, which, r=rank)), ["classifier"])


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: folder} that tests read; those that tamper take a copy."""
    place = tmp_path_factory.mktemp("bases")
    return {kind: save_base(place / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def base(bases, kind):
    return bases[kind]


@pytest.fixture
def copied(base, tmp_path):
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture
def copied_clip(bases, tmp_path):
    return shutil.copytree(bases["clip"], tmp_path / "base")


def fresh(folder, head="zero_shot"):
    """(classifier, image processor, facts of the base) from a base's folder."""
    tower, processor, facts = load_base(str(folder))
    torch.manual_seed(5)
    return with_head(tower, CLASSES, str(folder), head, PROMPT), processor, facts


@pytest.fixture(scope="module")
def made(bases):
    """{kind: (zero-shot classifier, image processor, facts of the base)}; tests take a deep copy of the first."""
    return {kind: fresh(folder) for kind, folder in bases.items()}


# ---- what trains, and what is not even there -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_on_a_vit_b32_trains_as_many_parameters_as_it_says(capsys):
    """r 8 on q and v: 12 blocks x 2 layers x 8 (768 + 768); on the meta device, where weights take no memory."""
    from peft import get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=512))
        model = ClipClassifier(tower, [f"breed {i}" for i in range(120)], SCALE)
        config = SimpleNamespace(lora_r=8, lora_alpha=32, lora_dropout=0.1)
        model = get_peft_model(model, adapter_config("lora", config, lora_targets(model, "qv")))
    train_whole(model, ["classifier"])
    describe_trainable(model, "lora")
    assert "lora: 294,912 parameters train in the adapter, 61,560 in the head" in capsys.readouterr().out
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trains.values()) == 294_912 + 512 * 120 + 120
    assert all(re.search(r"\.(q|v)_proj\.lora_[AB]\.", name) for name in trains if "classifier" not in name)


def test_only_the_image_tower_is_taken(made, base, kind):
    model, _, facts = made[kind]
    tensors = model.state_dict()
    assert not [name for name in tensors if "text" in name or "logit" in name]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and facts["name"] == str(base)
    assert model.classifier.in_features == (SHARED if kind == "clip" else 32)


# ---- zero-shot heads -------------------------------------------------------------------------------------------------


def test_a_zero_shot_head_answers_as_the_library_does(made, base, kind):
    from transformers import AutoModel, AutoTokenizer

    library, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    texts = ["a photo of a plain disc", "a photo of a striped bar", "a photo of a dotted cross", "a photo of a red diamond"]
    padding = {"padding": "max_length", "max_length": 20} if kind == "siglip" else {"padding": True}
    with torch.no_grad():
        theirs = library(pixel_values=pixels_and_labels()[0], **tokenizer(texts, return_tensors="pt", **padding))
    expected = theirs.logits_per_image.softmax(dim=1)
    assert expected.std(dim=0).min() > 1e-3 and expected.std(dim=1).min() > 1e-3  # neither pictures nor texts are all alike
    torch.testing.assert_close(outputs(made[kind][0]).softmax(dim=1), expected, atol=1e-5, rtol=1e-5)


def test_several_prompts_are_the_mean_of_unit_vectors_unit_again(base):
    sentences = ["a photo of a {label}", "the {label}, a drawing", "{label}"]
    apart = [zero_shot_rows(str(base), CLASSES, text) for text in sentences]
    for rows, scale in apart:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
        assert rows.shape[0] == 4 and scale == pytest.approx(torch.e**2, rel=1e-6)
    mean = torch.stack([rows for rows, _ in apart]).mean(dim=0)
    assert mean.norm(dim=1).max() < 0.999
    rows, _ = zero_shot_rows(str(base), CLASSES, " | ".join(sentences))
    torch.testing.assert_close(rows, mean / mean.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_a_text_that_is_too_long_is_cut(bases):
    rows, _ = zero_shot_rows(str(bases["clip"]), ["plain disc", "plain disc " * 40], PROMPT)
    assert rows.isfinite().all() and not torch.equal(rows[0], rows[1])


def test_label_words():
    words = {
        "n02088364-German_shepherd": "German shepherd",
        "n02089078-black-and-tan_coonhound": "black-and-tan coonhound",
        "plain_borzel": "plain borzel",
        "n0208836-pug": "n0208836-pug",
        "Boston bull": "Boston bull",
    }
    assert {label: label_words(label) for label in words} == words


@pytest.mark.parametrize(
    "prompts", ["a photo of a dog", "", "a {label}|", "a {label}|a dog", "{label} of {breed}", "a {}", "{ label }"]
)
def test_bad_prompts_are_refused(bases, prompts):
    with pytest.raises(UserError, match="--prompts: every sentence needs {label}") as caught:
        zero_shot_rows(str(bases["clip"]), CLASSES, prompts)
    one_line(caught)


# ---- which head ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_zero_shot_head_where_the_base_can_read(base, capsys):
    model = fresh(base, "auto")[0]
    assert f"head for 4 classes: zero-shot, from '{PROMPT}' with plain disc" in capsys.readouterr().out
    rows, scale = zero_shot_rows(str(base), CLASSES, PROMPT)
    assert torch.equal(model.classifier.weight, rows) and not model.classifier.bias.any() and model.scale == scale
    assert model.new_layers == []


@pytest.fixture(params=["no tokenizer", "tower alone", "tower with tokenizer"])
def mute(request, base, tmp_path):
    """A base that cannot read texts."""
    if request.param == "no tokenizer":
        return without_tokenizer(shutil.copytree(base, tmp_path / "base"))
    tower, processor, _ = load_base(str(base))
    tower.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    if request.param == "tower with tokenizer":
        for name in TOKENIZER:
            shutil.copy(base / name, tmp_path / "base")
    return tmp_path / "base"


def test_auto_takes_a_random_head_where_the_base_cannot_read(mute, base, capsys):
    assert load_base(str(mute))[2]["sha256"] == load_base(str(base))[2]["sha256"]  # the tower itself is the same
    model = fresh(mute, "auto")[0]
    assert "head for 4 classes: random" in capsys.readouterr().out and model.scale == SCALE
    assert model.new_layers == ["classifier"]


def test_a_zero_shot_head_is_refused_where_the_base_cannot_read(mute):
    with pytest.raises(UserError) as caught:
        fresh(mute, "zero_shot")
    assert str(mute) in one_line(caught)


def test_at_first_a_random_head_finds_all_classes_about_as_likely(base, kind):
    """Of features of unit length, whatever the base."""
    shares = outputs(fresh(base, "random")[0]).softmax(dim=1) * len(CLASSES)
    assert 0.6 < shares.min() < 0.999 and 1.001 < shares.max() < 1.6
    other, again = load_base(str(base))[0], fresh(base, "random")[0]
    assert torch.equal(outputs(fresh(base, "random")[0]), outputs(again))  # a function of the seed
    assert not torch.equal(outputs(ClipClassifier(other, CLASSES, SCALE)), outputs(again))


# ---- bases -----------------------------------------------------------------------------------------------------------


def test_position_ids_in_an_old_file_are_no_fault(copied):
    before, rows = load_base(str(copied))[2], zero_shot_rows(str(copied), CLASSES, PROMPT)[0]

    def add(tensors):
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5).view(1, -1)
        tensors["text_model.embeddings.position_ids"] = torch.arange(20).view(1, -1)

    change_weights(copied, add)
    assert load_base(str(copied))[2] == before
    # Close, not equal: weights lie elsewhere in the longer file, and where they lie decides how a CPU's sums are ordered.
    torch.testing.assert_close(zero_shot_rows(str(copied), CLASSES, PROMPT)[0], rows, atol=1e-6, rtol=0)


def test_the_width_of_the_whole_models_config_counts(copied_clip, tmp_path):
    """CLIP's files may have 512 in the towers' own configs, the default, whatever the projection's true width is."""
    before = outputs(fresh(copied_clip)[0])
    config = json.loads((copied_clip / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["projection_dim"] = 512
    (copied_clip / "config.json").write_text(json.dumps(config))
    model, processor, facts = fresh(copied_clip)
    assert model.tower.visual_projection.out_features == SHARED and torch.equal(outputs(model), before)
    save_model(tmp_path / "best", model, processor, origin("full", model.classes, model, facts, SETTINGS))
    assert torch.equal(outputs(load_checkpoint(tmp_path / "best")[0]), before)


@pytest.mark.parametrize("damage", ["missing", "reshaped", "left over"])
def test_weights_of_the_image_tower_that_do_not_fit_are_refused_by_name(copied, kind, damage):
    name = "vision_model.post_layernorm.weight"

    def edit(tensors):
        if damage == "missing":
            del tensors[name]
        elif damage == "reshaped":
            tensors[name] = torch.zeros(7)
        else:
            tensors["vision_model.stray.weight"] = torch.zeros(7)
        tensors["text_model.stray.weight"] = torch.zeros(3)  # of the text side nothing is asked

    change_weights(copied, edit)
    with pytest.raises(UserError, match="weights and its config.json do not fit") as caught:
        load_base(str(copied))
    told = one_line(caught)
    assert ("stray.weight" if damage == "left over" else "post_layernorm.weight") in told
    assert "text_model" not in told and "(1 in all)" in told and str(copied) in told


def test_another_kind_of_base_is_refused(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a vit model; expected clip, .*siglip") as caught:
        load_base(str(tmp_path))
    assert str(tmp_path) in one_line(caught)


def test_a_base_with_weights_in_a_pytorch_file_is_the_same_base(copied):
    from safetensors.torch import load_file

    facts, before = load_base(str(copied))[2], outputs(fresh(copied)[0])
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert load_base(str(copied))[2] == facts  # the same weights; read into other places, so that sums may differ in order
    torch.testing.assert_close(outputs(fresh(copied)[0]), before, atol=1e-5, rtol=0)


def test_the_sha256_is_the_towers(copied):
    facts = load_base(str(copied))[2]
    change_weights(copied, lambda tensors: tensors["text_model.final_layer_norm.weight"].zero_())
    assert load_base(str(copied))[2] == facts
    change_weights(copied, lambda tensors: tensors["vision_model.post_layernorm.weight"].zero_())
    assert load_base(str(copied))[2] != facts


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, kind, which",
    [(method, *where) for method in METHODS for where in (("clip", "qv"), ("siglip", "all-linear"))]
    + [(method, "clip", "all-linear") for method in ("lora", "ia3", "lokr")],
)
def test_an_adapter_starts_at_zero_learns_and_comes_back(made, method, kind, which, tmp_path):
    from safetensors.torch import load_file

    plain, processor, facts = made[kind]
    model, before, head = copy.deepcopy(plain), outputs(plain), plain.classifier.weight
    model = with_adapter(model, method, which)
    torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=1e-5)

    adapters = {name for name, _ in model.named_parameters() if model.base_model.prefix in name}
    ends = "q_proj|v_proj" if which == "qv" else "[qkv]_proj|out_proj|fc1|fc2|visual_projection"
    assert adapters and all(re.search(rf"\.({ends})\.\w+\.default(\.weight)?$", name) for name in adapters)
    assert not [name for name in adapters if "head.attention" in name]  # PyTorch's own attention would pass an adapter by
    assert any(".mlp.fc1." in name for name in adapters) == (which == "all-linear")

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    after = outputs(model)
    assert (after - before).abs().max() > 1e-3
    idle = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in adapters or ".classifier." in name), name
        assert (name not in idle) == p.requires_grad, name

    save_lora(
        tmp_path / "adapter",
        model,
        processor,
        origin("lora", model.base_model.model.classes, model.base_model.model, facts, SETTINGS),
    )
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = model.base_model.model.classifier
    assert torch.equal(saved["base_model.model.classifier.weight"], trained.weight) and not torch.equal(trained.weight, head)
    assert torch.equal(saved["base_model.model.classifier.bias"], trained.bias)
    names = {}
    for merge in (True, False):
        again, _, found = load_checkpoint(tmp_path / "adapter", merge=merge)
        torch.testing.assert_close(outputs(again), after, atol=1e-5, rtol=1e-5)
        names[merge] = [name for name, _ in again.named_parameters()]
        assert found["classes"] == CLASSES and not again.training
    assert names[True] == [name for name, _ in plain.named_parameters()] and len(names[False]) > len(names[True])


def test_all_linear_of_siglip_leaves_the_pooling_attention_alone(made):
    model, _, _ = made["siglip"]
    assert isinstance(model.tower.head.attention, torch.nn.MultiheadAttention)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    passed_by = linear - set(lora_targets(model, "all-linear"))
    assert passed_by == {"classifier", "tower.head.attention.out_proj"}


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_rank_zero_trains_the_head_alone(made, method):
    model = with_adapter(copy.deepcopy(made["clip"][0]), method, rank=0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_targets_by_a_regular_expression(made):
    model, _, _ = made["clip"]
    assert len(lora_targets(model, r"layers\.1\.mlp\.fc[12]")) == 2
    with pytest.raises(UserError, match="no layer's name ends in 'query'; there are: .*q_proj") as caught:
        lora_targets(model, "query")
    assert "classifier" not in one_line(caught)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    """Folders of an adapter and of a full checkpoint of the CLIP, without manifests: tests tamper with copies of them."""
    place = tmp_path_factory.mktemp("saved")
    for method in ("full", "lora"):
        plain, processor, facts = made["clip"]
        model = copy.deepcopy(plain)
        about = origin(method, model.classes, model, facts, SETTINGS)
        if method == "full":
            save_model(place / method, model, processor, about)
        else:
            save_lora(place / method, with_adapter(model, "lora"), processor, about)
        (place / method / "manifest.json").unlink()
    load_checkpoint(place / "full")  # they are fine before
    load_checkpoint(place / "lora")
    return place


@pytest.fixture(params=["full", "lora"])
def tampered(request, saved, tmp_path):
    """(folder, function that loads it)"""
    folder = shutil.copytree(saved / request.param, tmp_path / request.param)
    return folder, load_checkpoint


def test_a_fully_trained_model_is_saved_and_loaded_as_it_is(made, kind, tmp_path):
    plain, processor, facts = made[kind]
    model, before = copy.deepcopy(plain), outputs(plain)
    after = outputs(train(model))
    assert (after - before).abs().max() > 1e-2 and all(p.requires_grad for p in model.parameters())
    save_model(tmp_path / "best", model, processor, origin("full", model.classes, model, facts, SETTINGS))
    again, _, found = load_checkpoint(tmp_path / "best")
    assert torch.equal(outputs(again), after) and found["classes"] == CLASSES and not again.training
    assert found["scale"] == model.scale == again.scale and found["prompts"] == PROMPT and found["base"] == facts
    tower, _, _ = load_base(str(tmp_path / "best"))  # it can be the base of another run
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, model.tower.state_dict()[name]), name


@pytest.mark.parametrize("damage", ["other classes", "bias missing", "not finite", "cut", "gone"])
def test_a_head_file_that_does_not_fit_is_named(saved, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved / "full", tmp_path / "full")
    file = folder / "classifier.safetensors"
    tensors = load_file(file)
    if damage == "other classes":
        save_file({name: tensor[:3].clone() for name, tensor in tensors.items()}, file)
    elif damage == "bias missing":
        save_file({"weight": tensors["weight"]}, file)
    elif damage == "not finite":
        save_file({**tensors, "bias": tensors["bias"] * torch.nan}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    told = "cannot be read" if damage in ("cut", "gone") else "does not fit the 4 classes of origin.json"
    with pytest.raises(UserError, match=told) as caught:
        load_checkpoint(folder)
    assert str(file) in one_line(caught)


NO_CLASSES = [{"classes": None}, {"classes": "abcd"}, {"classes": [1, 2]}, {"classes": []}]


@pytest.mark.parametrize("change", [*NO_CLASSES, {"scale": None}, {"scale": "100"}, {"scale": -1.0}], ids=str)
def test_an_origin_that_does_not_describe_a_classifier_is_named(tampered, change):
    folder, load = tampered
    facts = {**json.loads((folder / "origin.json").read_text()), **change}
    (folder / "origin.json").write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    told = f"origin.json is damaged: its {next(iter(change))} is "
    with pytest.raises(UserError, match=told) as caught:
        load(folder)
    assert str(folder / "origin.json") in one_line(caught)


def test_more_classes_than_the_weights_have_are_refused(tampered):
    folder, load = tampered
    rewrite(folder / "origin.json", classes=[*CLASSES, "one more"])
    with pytest.raises(UserError, match="does not fit") as caught:
        load(folder)
    assert str(folder) in one_line(caught) and "classifier" in one_line(caught)


def test_an_adapter_on_another_base_is_refused_with_both_hashes(saved, tmp_path):
    other = save_base(tmp_path / "other", seed=7)
    there, here = (
        facts["sha256"][:12] for facts in (json.loads((saved / "lora/origin.json").read_text())["base"], load_base(str(other))[2])
    )
    assert there != here
    with pytest.raises(UserError, match=f"sha256 {there}.* has sha256 {here}: an adapter fits no other base") as caught:
        load_checkpoint(saved / "lora", base=str(other))
    assert str(other) in one_line(caught)


def test_the_origin_says_of_which_kind_a_checkpoint_is(saved, tmp_path):
    both = shutil.copytree(saved / "lora", tmp_path / "both")
    shutil.copy(saved / "full" / "model.safetensors", both)
    assert torch.equal(outputs(load_checkpoint(both)[0]), outputs(load_checkpoint(saved / "lora")[0]))
    for method, missing in (("full", "adapter_model.safetensors"), ("lora", "model.safetensors")):
        folder = shutil.copytree(saved / method, tmp_path / method)
        rewrite(folder / "origin.json", method="lora" if method == "full" else "full")
        with pytest.raises(UserError, match=f"{method} holds no {missing}") as caught:
            load_checkpoint(folder)
        one_line(caught)


# ---- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_every_layer_learns_slower_than_the_one_above_it(made, kind, decay):
    model, _, _ = made[kind]
    groups = layer_groups(model, 0.1, decay)
    counted = Counter(id(p) for group in groups for p in group["params"])
    assert counted == Counter(id(p) for p in model.parameters())  # each once
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(group["lr"] == pytest.approx(0.1) for group in groups) == (decay == 1.0)
    found = {}
    for name, p in model.named_parameters():
        part = next(part for part in ("layers.0", "layers.1", "embedding", "pre_layrnorm", "") if part in name)
        found.setdefault({"pre_layrnorm": "embedding"}.get(part, part), set()).add(round(rate[id(p)], 9))
    expected = {"embedding": 0.1 * decay**3, "layers.0": 0.1 * decay**2, "layers.1": 0.1 * decay, "": 0.1}
    assert found == {part: {round(value, 9)} for part, value in expected.items()}
    assert rate[id(model.classifier.weight)] == rate[id(model.classifier.bias)] == 0.1
    assert any("post_layernorm" in name and rate[id(p)] == 0.1 for name, p in model.named_parameters())


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def test_four_bits_need_bitsandbytes_and_a_gpu(monkeypatch):
    model = torch.nn.Linear(2, 2)
    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    assert quantized(model, "none", "cpu") is model
    with pytest.raises(UserError, match="4bit needs bitsandbytes, which is not installed: pip install bitsandbytes") as caught:
        quantized(model, "4bit", "cpu")
    one_line(caught)
    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UserError, match="--quantize 4bit needs an NVIDIA GPU, and this run is on cpu") as caught:
        quantized(model, "4bit", torch.device("cpu"))
    one_line(caught)


@pytest.mark.parametrize("method", ["pissa", "olora", "ia3", "loha", "lokr"])
def test_four_bits_are_refused_with_methods_that_cannot(method):
    with pytest.raises(UserError, match=f"lora, dora and rslora, not with {method}"):
        quantized(torch.nn.Linear(2, 2), "4bit", "cpu", method)


def test_a_packed_weight_counts_as_the_numbers_in_it():
    class Params4bit(torch.nn.Parameter):
        """As in bitsandbytes: two numbers a byte."""

    model = torch.nn.Linear(8, 4)
    model.weight = Params4bit(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert count_parameters(model) == {"total": 8 * 4 + 4, "trainable": 4}


def test_adapters_that_hold_a_part_of_the_base_do_not_drop_it():
    config = SimpleNamespace(lora_r=4, lora_alpha=8, lora_dropout=0.3)
    dropout = {
        name: adapter_config(name, config, ["q_proj"]).lora_dropout for name in ("lora", "dora", "rslora", "pissa", "olora")
    }
    assert dropout == {"lora": 0.3, "dora": 0.3, "rslora": 0.3, "pissa": 0.0, "olora": 0.0}


# ---- the zero-shot baseline of eval ----------------------------------------------------------------------------------


def test_the_baseline_is_the_base_as_it_is(made, base, kind):
    model = zero_shot_model(str(base), load_base(str(base))[2]["sha256"], CLASSES, PROMPT)
    assert not model.training
    assert torch.equal(outputs(model), outputs(made[kind][0]))


def test_a_baseline_of_another_base_is_refused(base):
    with pytest.raises(UserError, match="is not the base of the training: its sha256 is .{12}, not 0123456789ab") as caught:
        zero_shot_model(str(base), "0123456789abcdef", CLASSES, PROMPT)
    one_line(caught)


def test_the_baseline_is_never_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: asked.append("model_info"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot := SnapshotDownload(huggingface_hub.snapshot_download))
    monkeypatch.delenv("HF_HUB_OFFLINE")  # nothing but the code itself keeps it from the network
    began = time.monotonic()
    with pytest.raises(UserError, match="nobody/of-this-name is not in the local cache") as caught:
        zero_shot_model("nobody/of-this-name", "", CLASSES, PROMPT)
    one_line(caught)
    assert time.monotonic() - began < 5 and asked == [] and snapshot.calls == [{"local_files_only": True}]
    assert "HF_HUB_OFFLINE" not in os.environ


class SnapshotDownload:
    """Notes how it is called; goes on only where that stays on this machine."""

    def __init__(self, real):
        self.real, self.calls = real, []

    def __call__(self, name, **options):
        self.calls.append(options)
        assert options.get("local_files_only"), "a download"
        return self.real(name, **options)
