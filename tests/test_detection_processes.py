"""Two processes with half of the pictures each get the gradient that one gets with all of them."""

import os
import socket

import pytest
import torch
from conftest import DETECTION, Child, use_task
from test_detection_model import CLASSES, save_base

TASK = DETECTION
use_task(TASK)

from model import denoises, load_base, with_classes  # noqa: E402

# One of each way in which the library shares the number of boxes between processes, and one with a softmax over classes.
KINDS = ["detr", "conditional_detr", "rt_detr", "lw_detr"]
BOXES = (0, 1, 3, 2)  # in each of four pictures: the two halves have one and five


def pictures():
    generator = torch.Generator().manual_seed(1)
    labels = []
    for count in BOXES:
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
        labels.append({"class_labels": torch.arange(count) % len(CLASSES), "boxes": boxes})
    return torch.rand(4, 3, 64, 64, generator=generator), labels


def save_kind(folder, kind):
    if kind != "lw_detr":
        return save_base(folder, kind)
    import transformers

    save_base(folder)  # for its image processor
    backbone = transformers.LwDetrViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64,
        num_windows=4, num_windows_side=2, window_block_indices=[0], out_indices=[2],
    )  # fmt: skip
    config = transformers.LwDetrConfig(
        backbone_config=backbone, d_model=32, decoder_layers=2, decoder_self_attention_heads=2, dropout=0.0, decoder_n_points=2,
        decoder_cross_attention_heads=2, decoder_ffn_dim=48, num_queries=8, group_detr=2, num_feature_levels=1,
        projector_scale_factors=[1.0], id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(folder)
    return folder


def gradient(folder, which=slice(None)):
    """Of some of the four pictures: the flat gradient in training mode, the loss, its parts, and the loss in evaluation."""
    model = with_classes(load_base(str(folder))[0], CLASSES)
    model.config.num_denoising = model.model.config.num_denoising = 0  # its noise is each process's own
    pixels, labels = pictures()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    found = model(pixel_values=pixels[which], labels=labels[which])
    found.loss.backward()
    named = [(name, p.grad if p.grad is not None else torch.zeros_like(p)) for name, p in model.named_parameters()]
    with torch.no_grad():
        evaluated = model.eval()(pixel_values=pixels[which], labels=labels[which]).loss
    parts = torch.stack([found.loss_dict[name].detach() for name in sorted(found.loss_dict) if name in ("loss_ce", "loss_bbox")])
    return {
        "gradient": torch.cat([grad.flatten() for _, grad in named]),
        "loss": found.loss.detach(),
        "parts": parts,
        "evaluated": evaluated,
    }


def one_of_two(rank, port, folders, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    # The library divides by the number of processes that accelerate knows of, so it must know them here as in training.
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have made one
    assert accelerate.PartialState(cpu=True).num_processes == 2
    results = {}
    for kind, folder in folders.items():
        results[kind] = gradient(folder, slice(2 * rank, 2 * rank + 2))
        for name in ("gradient", "loss", "parts"):
            torch.distributed.all_reduce(results[kind][name])
            results[kind][name] /= 2  # what DistributedDataParallel does with gradients
    torch.save(results, out.with_suffix(f".{rank}"))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """(folders of bases, results of both processes)"""
    place = tmp_path_factory.mktemp("two")
    folders = {kind: save_kind(place / kind, kind) for kind in KINDS}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Child(one_of_two, r, port, folders, place / "two.pt", log=place / f"{r}.log") for r in (0, 1)]
    assert [child.wait() for child in ranks] == [0, 0], ranks[0].text + ranks[1].text
    return folders, [torch.load(place / f"two.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_at_half_the_batch_get_the_gradient_of_one(by_two, kind):
    folders, results = by_two
    two, one = results[0][kind], gradient(folders[kind])
    assert torch.allclose(two["loss"], one["loss"], rtol=1e-5) and torch.allclose(two["parts"], one["parts"], rtol=1e-5)
    assert len(one["parts"]) == (2 if kind in ("detr", "conditional_detr", "lw_detr") else 1)
    assert (two["gradient"] - one["gradient"]).norm() < 1e-4 * one["gradient"].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_a_process_has_the_loss_of_its_own_pictures(by_two, kind):
    folders, results = by_two
    for rank in (0, 1):
        alone = gradient(folders[kind], slice(2 * rank, 2 * rank + 2))["evaluated"]
        assert torch.allclose(results[rank][kind]["evaluated"], alone, rtol=1e-5), rank


def test_the_library_itself_is_left_as_it_is(by_two):
    from transformers.loss import loss_for_object_detection

    with_classes(load_base(str(by_two[0]["detr"]))[0], CLASSES)
    assert loss_for_object_detection.is_accelerate_available()


@pytest.mark.parametrize("kind", [*KINDS, "deformable_detr", "d_fine"])
def test_what_a_picture_without_boxes_has_no_use_for(tmp_path, kind):
    """There, and only there, processes must look for parameters without a gradient (run.prepare's find_unused)."""
    model = with_classes(load_base(str(save_kind(tmp_path, kind)))[0], CLASSES)
    pixels, labels = pictures()
    model.train()
    model(pixel_values=pixels[:1], labels=labels[:1]).loss.backward()  # the first has none
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == (["model.denoising_class_embed.weight"] if denoises(model) else [])
    assert denoises(model) == (kind in ("rt_detr", "d_fine"))
