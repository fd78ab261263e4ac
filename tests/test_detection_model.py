"""Six detector architectures, tiny and random: class heads, adapters, training, saving and loading do what they promise."""

import json
import math
import os
import shutil
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DETECTION, Payload, check_picture_inputs, in_child, use_task

TASK = DETECTION
use_task(TASK)

from common.bases import train_mode  # noqa: E402
from common.checkpoint import fingerprint  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import is_within  # noqa: E402
from common.peft_adapters import add_adapter  # noqa: E402
from common.saved_models import save_lora, save_model  # noqa: E402
from model import (  # noqa: E402
    HEADS,
    check_size,
    load_base,
    load_checkpoint,
    lora_targets,
    origin,
    with_classes,
)
from predictor import Predictor  # noqa: E402

CLASSES = ["circle", "square", "triangle"]
KINDS = ["detr", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
FACTS = SimpleNamespace(image_size=0, batch_size=4, data_dir="", data_format="auto", seed=0)
# Layers in which each architecture has a query and a value projection (some attention has neither).
QV_LAYERS = {"detr": 10, "conditional_detr": 6, "deformable_detr": 4, "rt_detr": 6, "rt_detr_v2": 6, "d_fine": 6}


def save_base(folder, kind="detr", classes=CLASSES, seed=0, size=None):
    """Writes a random base of about 0.1 M parameters, with its image processor, as one would find it on a hub."""
    import transformers

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    small = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48}
    small |= {"decoder_ffn_dim": 48, "decoder_layers": 2, "num_queries": 8, "encoder_layers": 1, "dropout": 0.0}
    if kind.endswith(("conditional_detr", "deformable_detr")) or kind == "detr":
        stages = ["stage1", "stage2"] if kind == "deformable_detr" else ["stage2"]
        small |= {"num_feature_levels": 2} if kind == "deformable_detr" else {}
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=stages
        )
        small |= {"use_timm_backbone": False, "auxiliary_loss": True}
    else:
        stages = ["stage2", "stage3", "stage4"]
        backbone = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
        )
        if kind == "d_fine":
            backbone = transformers.HGNetV2Config(
                stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24, 32], stage_mid_channels=[8, 8, 8, 8],
                stage_out_channels=[16, 24, 32, 32], hidden_sizes=[16, 24, 32, 32], depths=[1, 1, 1, 1],
                stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], stage_kernel_size=[3, 3, 3, 3],
                stage_downsample=[False, True, True, True], stage_light_block=[False, False, True, True], out_features=stages,
            )  # fmt: skip
            small |= {"decoder_n_points": [2, 2, 2]}
            backbone.hidden_sizes = [16, 24, 32, 32]
        small |= {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32]}
        small |= {"num_denoising": 8}
        if kind == "d_fine":
            small["encoder_in_channels"] = [24, 32, 32]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, backbone_config=backbone, **small, **names)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    with torch.no_grad():  # random detectors say "half sure" everywhere; this spreads their answers
        for name, tensor in model.named_parameters():
            if is_within(name, HEADS):
                tensor.add_(torch.randn_like(tensor) * 0.3)
        for name, tensor in model.named_buffers():  # statistics as a trained BatchNorm has them, not 0 and 1
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    model.save_pretrained(folder)
    kinds = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}
    processor = getattr(transformers, f"{kinds.get(kind, 'RTDetr')}ImageProcessor")
    processor(size=size or {"height": 64, "width": 64}, do_pad=False).save_pretrained(folder)
    return folder


def make_batch(classes=4):
    torch.manual_seed(1)
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2]])
    labels = [{"class_labels": torch.tensor([i % classes, classes - 1]), "boxes": boxes - 0.02 * i} for i in range(2)]
    return {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long),
        "labels": labels,
    }


@torch.no_grad()
def outputs(model, batch):
    model.eval()
    found = model(**{key: batch[key] for key in ("pixel_values", "pixel_mask")})
    return torch.cat([found.logits, found.pred_boxes], dim=2)


def add_lora(model, which="all"):
    from peft import LoraConfig

    model = add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model, which)), HEADS)
    return model


def train(model, batch, steps=6):
    """Losses of a few steps on one batch, the same noise in each (RT-DETR and D-FINE draw noise for their queries)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        train_mode(model)
        torch.manual_seed(0)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base_folder(kind, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(kind) / "base", kind)


@pytest.fixture(scope="module")
def trained(base_folder):
    """A LoRA run in miniature on four classes, saved; everything the tests below look at."""
    base, processor, facts = load_base(str(base_folder))
    batch, classes = make_batch(), ["square", "Circle", "triangle", "star"]
    model = with_classes(base, classes)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs(model, batch)
    model = add_lora(model)
    at_start = outputs(model, batch)
    train_mode(model)
    torch.manual_seed(0)
    model(**batch).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    losses = train(model, batch)
    folder = base_folder.parent / "adapter"
    save_lora(folder, model, processor, origin("lora", model, facts, FACTS))
    return SimpleNamespace(
        model=model, plain=plain, before=before, at_start=at_start, without=without, losses=losses, folder=folder, batch=batch,
        classes=classes, after=outputs(model, batch), base=facts,
    )  # fmt: skip


# ---- the head for other classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["square", "Circle", "triangle", "star"], ["triangle", "star"], ["dot", "square", "circle"]])
def test_class_rows_follow_their_names_and_all_else_stays(base_folder, classes):
    base, _, _ = load_base(str(base_folder))
    old = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_classes(base, classes)
    assert [model.config.id2label[i] for i in range(len(classes))] == classes
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.endswith((".up", ".reg_scale")) for name in frozen)  # D-FINE's two constants; all else trains
    heads, layers = 0, set()
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[-2]
        is_class = "class" in name or "enc_score_head" in name
        if not is_class:
            assert torch.equal(tensor, old[name]), name
            continue
        heads += layer != "denoising_class_embed"
        layers.add(name.rpartition(".")[0])
        for row, label in enumerate(classes):
            known = label.lower() in CLASSES
            expected = old[name][CLASSES.index(label.lower())] if known else old[name][:3].mean(dim=0)
            torch.testing.assert_close(tensor[row], expected)
        assert torch.equal(tensor[len(classes) :], old[name][3:]), "no object, or the denoising queries' empty class"
    assert heads >= 2  # a weight and a bias
    assert set(model.new_layers) == layers  # of each list some class is new


def test_the_same_classes_leave_the_base_as_it_is(base_folder):
    base, _, facts = load_base(str(base_folder))
    assert with_classes(base, CLASSES) is base and base.new_layers == []
    assert fingerprint(base.state_dict()) == facts["sha256"]


# ---- where adapters go -----------------------------------------------------------------------------------------------


def test_lora_targets_hit_layers_of_the_kind_asked_for_and_never_a_head(kind, base_folder, capsys):
    model, _, _ = load_base(str(base_folder))
    layers = dict(model.named_modules())
    grouped = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
    linear = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear) and not is_within(name, HEADS)}
    convolutions = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)} - grouped
    pattern = "decoder.*fc1|decoder.*layers.0.mlp.*0"
    hit = {which: set(lora_targets(model, which)) for which in ("qv", "all-linear", "all", pattern)}
    assert hit["qv"] == {name for name in linear if name.endswith(("q_proj", "v_proj"))} and len(hit["qv"]) == QV_LAYERS[kind]
    assert hit["all-linear"] == linear and hit["all"] == linear | convolutions
    chosen = hit[pattern]
    assert chosen and all(".decoder.layers." in name and ".mlp." in name for name in chosen)
    for names in hit.values():
        assert not [name for name in names if is_within(name, HEADS) or "bbox" in name or "class" in name]
    assert f"LoRA on {len(linear)} layers" in capsys.readouterr().out
    with pytest.raises(UserError, match="'qkv'; there are: .*q_proj"):
        lora_targets(model, "qkv")
    with pytest.raises(UserError, match="no valid regular expression"):
        lora_targets(model, "(q_proj")


# ---- what training an adapter does -----------------------------------------------------------------------------------


def test_at_step_zero_the_adapter_changes_nothing(trained):
    torch.testing.assert_close(trained.at_start, trained.before, atol=1e-6, rtol=0)


def test_every_trainable_tensor_gets_a_gradient_and_the_loss_falls(trained):
    assert trained.without == []
    assert trained.losses[-1] < 0.97 * trained.losses[0], trained.losses
    assert (trained.after - trained.before).abs().max() > 1e-2


def test_adapters_and_heads_train_and_the_base_does_not_move(trained):
    state, moved = trained.model.state_dict(), set()
    for name, tensor in trained.plain.items():
        prefix, last = name.rsplit(".", 1)
        after = state.get(f"base_model.model.{name}", state.get(f"base_model.model.{prefix}.base_layer.{last}"))
        if torch.equal(after, tensor):
            continue
        assert is_within(name, HEADS), f"{name} moved"
        moved.add(name)
    assert moved
    for name, p in trained.model.named_parameters():
        assert p.requires_grad == ("lora_" in name or is_within(name, HEADS)), name


def test_batch_norm_keeps_the_statistics_of_the_base(kind, base_folder):
    model, _, _ = load_base(str(base_folder))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms or "rt_detr" not in kind and kind != "d_fine"
    old = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    train(model, make_batch(3), steps=2)
    assert model.training and not any(m.training for m in norms)
    for module, (mean, var) in zip(norms, old, strict=True):
        assert torch.equal(module.running_mean, mean) and torch.equal(module.running_var, var)


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge, tolerance", [(False, 1e-5), (True, 1e-4)])
def test_a_loaded_adapter_answers_as_the_trained_one(trained, merge, tolerance):
    model, processor, facts = load_checkpoint(trained.folder, merge=merge)
    torch.testing.assert_close(outputs(model, trained.batch), trained.after, atol=tolerance, rtol=0)
    assert not model.training and facts["classes"] == trained.classes and processor.size["height"] == 64
    assert any("lora_" in name for name, _ in model.named_parameters()) != merge


def test_plain_peft_loads_the_same_adapter(trained, base_folder):
    from peft import PeftModel

    base = with_classes(load_base(str(base_folder))[0], trained.classes)
    model = PeftModel.from_pretrained(base, trained.folder)
    torch.testing.assert_close(outputs(model, trained.batch), trained.after, atol=1e-5, rtol=0)


def test_a_fully_trained_model_is_saved_and_loaded_as_it_is(base_folder, tmp_path, kind):
    base, processor, facts = load_base(str(base_folder))
    model, batch = with_classes(base, [*CLASSES, "star"]), make_batch()
    before = outputs(model, batch)
    train(model, batch, steps=2)
    assert (outputs(model, batch) - before).abs().max() > 1e-2
    save_model(tmp_path / "best", model, processor, origin("full", model, facts, FACTS))
    loaded, _, found = load_checkpoint(tmp_path / "best")
    assert torch.equal(outputs(loaded, batch), outputs(model, batch)) and found["classes"] == [*CLASSES, "star"]
    assert fingerprint(loaded.state_dict()) == fingerprint(model.state_dict())


def test_an_adapter_of_another_base_is_refused(trained, kind, tmp_path):
    other = save_base(tmp_path / "other", kind, seed=7)
    with pytest.raises(UserError, match="was trained on the base .* an adapter fits no other base"):
        load_checkpoint(trained.folder, base=str(other))


@pytest.fixture
def detr_adapter(tmp_path):
    """A saved adapter (untrained) without a manifest, so that its files can be tampered with."""
    base, processor, facts = load_base(str(save_base(tmp_path / "base")))
    model = add_lora(with_classes(base, ["star", "dot"]), "qv")
    save_lora(tmp_path / "adapter", model, processor, origin("lora", model, facts, FACTS))
    (tmp_path / "adapter" / "manifest.json").unlink()
    return tmp_path / "adapter"


HEAD = "base_model.model.class_labels_classifier.bias"
MATRIX = "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name, change, told",
    [
        (HEAD, "rename", "elsewhere.*no such tensor|class_labels_classifier.bias is missing"),
        (HEAD, "remove", "class_labels_classifier.bias is missing, expected \\(3,\\)"),
        (HEAD, "reshape", "class_labels_classifier.bias"),
        (MATRIX, "rename", "elsewhere|q_proj.lora_A.weight"),
        (MATRIX, "remove", "q_proj.lora_A.weight is missing, expected \\(4, 32\\)"),
        (MATRIX, "reshape", "q_proj.lora_A"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(detr_adapter, name, change, told):
    from safetensors.torch import load_file, save_file

    file = detr_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    assert name in tensors
    if change == "reshape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    else:
        tensor = tensors.pop(name)
        if change == "rename":
            tensors[name.replace("model.", "model.elsewhere.", 1)] = tensor
    save_file(tensors, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line for the user to read
        with pytest.raises(UserError, match=told) as caught:
            load_checkpoint(detr_adapter)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_place_of_the_adapter_is_refused(detr_adapter):
    (detr_adapter / "adapter_model.safetensors").unlink()
    torch.save({HEAD: torch.zeros(3)}, detr_adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        load_checkpoint(detr_adapter)


def test_a_side_that_no_picture_has_is_refused(detr_adapter):
    about = json.loads((detr_adapter / "origin.json").read_text())
    for side in ("64", [64], -1, 10**9, True):
        (detr_adapter / "origin.json").write_text(json.dumps(about | {"image_size": side}))
        with pytest.raises(UserError, match=r"origin\.json is damaged: its image_size is "):
            load_checkpoint(detr_adapter)


def test_saving_twice_writes_the_same_bytes(detr_adapter):
    names = json.loads((detr_adapter / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names), "a set's order differs from process to process"


# ---- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "missing", "reshaped", "other", "pickle", "no processor"])
def test_a_base_that_cannot_be_loaded_is_named_in_one_line(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = save_base(tmp_path / "base")
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        tensors.pop("class_labels_classifier.bias")
    elif damage == "reshaped":
        tensors["class_labels_classifier.bias"] = torch.zeros(9)
    elif damage == "other":
        tensors["stray.weight"] = torch.zeros(1)
    elif damage == "pickle":
        file.unlink()
        torch.save(Payload(tmp_path / "made"), folder / "pytorch_model.bin")
    else:
        (folder / "preprocessor_config.json").unlink()
    if damage in ("missing", "reshaped", "other"):
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_base(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    if damage in ("missing", "reshaped", "other"):
        assert ("stray.weight" if damage == "other" else "class_labels_classifier.bias") in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(UserError, match="there is no folder .*hub name .* or demo"):
        load_base(name)


@pytest.mark.parametrize("offline", ["1", ""])
def test_a_hub_name_without_network_ends_soon_with_a_remedy(offline, tmp_path):
    """In a fork with an empty cache and an address that nobody answers at, as a machine behind a firewall has it."""

    def ask():
        os.environ.update(HF_HUB_OFFLINE=offline, HTTPS_PROXY="http://127.0.0.1:9", HF_HUB_CACHE=str(tmp_path))
        import huggingface_hub.constants as constants

        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = offline == "1", str(tmp_path)
        load_base("facebook/detr-resnet-50")

    began = time.monotonic()
    code, text = in_child(ask, log=tmp_path / "log")
    assert code == 99 and "UserError: --model facebook/detr-resnet-50 is not in the local cache" in text, text
    assert "--model demo" in text and "local folder" in text
    assert time.monotonic() - began < 10


def test_a_model_that_is_no_detector_is_refused(tmp_path):
    save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.update(model_type="vit", architectures=["ViTForImageClassification"])
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no model for this task"):
        load_base(str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")


# ---- the Predictor ---------------------------------------------------------------------------------------------------


def test_the_predictor_finds_what_infer_finds_one_by_one_or_in_batches(detr_adapter, tmp_path):
    from PIL import Image

    from common.samples import Faults
    from data import Preprocess, collate, pictures_only
    from metrics import detect

    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 255, (40 + 20 * (i % 2), 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    predictor = Predictor(detr_adapter, device="cpu")
    processor = predictor.known[""].processor
    dataset = pictures_only(paths, Preprocess(processor, 0), Faults())
    batches = [collate([dataset[(0, i)]]) for i in range(3)]
    expected = [item for items in detect(predictor.model, processor, batches, with_loss=False) for item in items]
    together = predictor.predict_batch([paths[0], Image.open(paths[1]), np.array(Image.open(paths[2]))], threshold=0, nms=1)
    for path, found, answers in zip(paths, expected, together, strict=True):
        order = np.argsort(-found["scores"], kind="stable")
        assert [a["score"] for a in answers] == pytest.approx(found["scores"][order].tolist(), abs=1e-5)
        np.testing.assert_allclose([a["box"] for a in answers], found["boxes"][order], atol=1e-2)
        assert {a["class"] for a in answers} <= {"star", "dot"}
        alone = predictor.predict(path, threshold=(answers[2]["score"] + answers[3]["score"]) / 2, nms=1)
        assert [a["score"] for a in alone] == pytest.approx([a["score"] for a in answers[:3]], abs=1e-5)
    fewer = predictor.predict(paths[0], threshold=0, nms=0.2)  # boxes of one class that overlap are one object
    assert 0 < len(fewer) < len(together[0]) and fewer[0]["class"] == together[0][0]["class"]
    assert predictor.predict(paths[0], threshold=1) == [] and predictor.predict_batch([]) == []
    for wrong in ({"threshold": 2}, {"nms": -1}, {"threshold": "worst"}):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            predictor.predict(paths[0], **wrong)
    predictor.origin["threshold"] = (together[0][0]["score"] + together[0][1]["score"]) / 2
    assert predictor.predict(paths[0], "best") == predictor.predict(paths[0], predictor.origin["threshold"])
    check_picture_inputs(lambda picture: predictor.predict(picture, threshold=0), tmp_path)


def test_a_picture_size_that_the_base_fails_on_is_refused_before_training():
    base, processor, _ = load_base("demo")
    state = torch.get_rng_state()
    check_size(base.train(), processor, 64), check_size(base, processor, 0)
    assert base.training and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="17 x 17 pixels .*image_size"):
        check_size(base, processor, 17)


def test_a_model_that_has_become_nan_ends_in_a_loss_that_says_so():
    """Not in the library's traceback about boxes: the run stops at such a loss, and names the step."""
    model = with_classes(load_base("demo")[0], ["a", "b"])
    with torch.no_grad():
        model.model.decoder.bbox_embed[-1].layers[-1].bias.fill_(math.nan)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    loss = model(pixel_values=torch.rand(1, 3, 64, 64), labels=labels).loss
    loss.backward()
    assert loss.isnan()
