"""Two processes with half of the pictures each get the gradient that one gets with all of them."""

import os
import socket

import pytest
import torch
from conftest import DETECTION, Child, use_task
from test_detection_model import CLASSES, save_base

TASK = DETECTION
use_task(TASK)

from model import load_base, with_classes  # noqa: E402

BOXES = (0, 1, 3, 2)  # in each of four pictures: the two halves have one and five


def pictures(kind):
    generator = torch.Generator().manual_seed(1)
    labels = []
    for count in BOXES:
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
        labels.append({"class_labels": torch.arange(count) % len(CLASSES), "boxes": boxes})
    return torch.rand(4, 3, 64, 64, generator=generator), labels


def gradient(folder, kind, which=slice(None)):
    """The flat gradient of the model in training mode for some of the four pictures, and its loss."""
    model = with_classes(load_base(str(folder))[0], CLASSES)
    model.config.num_denoising = model.model.config.num_denoising = 0  # its noise is each process's own
    pixels, labels = pictures(kind)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    loss = model(pixel_values=pixels[which], labels=labels[which]).loss
    loss.backward()
    named = [(name, p.grad if p.grad is not None else torch.zeros_like(p)) for name, p in model.named_parameters()]
    return torch.cat([grad.flatten() for _, grad in named]), loss.detach()


def one_of_two(rank, port, folder, kind, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    # The library divides by the number of processes that accelerate knows of, so it must know them here as in training.
    import accelerate

    assert accelerate.PartialState(cpu=True).num_processes == 2
    grad, loss = gradient(folder, kind, slice(2 * rank, 2 * rank + 2))
    for value in (grad, loss):
        torch.distributed.all_reduce(value)
        value /= 2  # what DistributedDataParallel does with gradients
    if rank == 0:
        torch.save({"grad": grad, "loss": loss}, out)
    torch.distributed.barrier()


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "rt_detr"])
def test_two_processes_at_half_the_batch_get_the_gradient_of_one(tmp_path, kind):
    folder = save_base(tmp_path, kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Child(one_of_two, r, port, folder, kind, tmp_path / "two.pt", log=tmp_path / f"{r}.log") for r in (0, 1)]
    assert [child.wait() for child in ranks] == [0, 0], ranks[0].text + ranks[1].text
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    grad, loss = gradient(folder, kind)
    assert torch.allclose(two["loss"], loss, rtol=1e-5)
    assert (two["grad"] - grad).norm() < 1e-4 * grad.norm()
