"""Several adapters on one base, in the Predictor of each task: to the bit what each says alone, in any order, from any thread."""

import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tasks import TASKS, in_task

# name -> (rank, which layers, number of classes, keypoints or voices, DoRA). Rank 0: a head alone. Those of PEFT's tasks.
ADAPTERS = {"": (4, "all-linear", 3, False), "narrow": (2, "qv", 2, True), "head": (0, "qv", 4, False)}
OWN_TARGETS = {"voice_rvc": ("default", "decoder"), "medical_sam3d": ("all", "attention")}
SETTINGS = SimpleNamespace(data_dir="", batch_size=1, seed=0)


def with_peft_adapter(task, folder, rank, targets, count, dora):
    """(model, processor, base, what origin.json says besides) of a picture task, its adapter and heads random."""
    from peft import LoraConfig

    import model as of_task
    from common.peft_adapters import add_adapter

    folder.mkdir()
    names = [f"kind_{i}" for i in range(count)]
    (folder / "origin.json").write_text(json.dumps({"classes": names}))
    points = {"names": names, "skeleton": [], "flip_pairs": [], "sigmas": [0.05] * count, "named": True}
    (folder / "keypoints.json").write_text(json.dumps(points))
    model = task.build("demo", folder)
    heads = getattr(of_task, "HEADS", None) or [getattr(of_task, "HEAD", None)]
    heads = of_task.class_layers(model) if heads == [None] else heads
    layers = of_task.lora_targets(model, targets, 0, rank)
    lora = LoraConfig(r=rank or 1, lora_alpha=8, target_modules=layers, use_dora=dora)
    _, processor, base = of_task.load_base("demo")
    about = {"classes": names, "image_size": 0, "data_format": "coco", "scale": getattr(model, "scale", 1.0)}
    return add_adapter(model, lora, heads), processor, base, about


def with_own_adapter(task, rank, targets, count):
    """The same of a task whose layers are the project's own."""
    import model as of_task

    model, processor, base = of_task.load_base("demo")
    lora = {"lora_alpha": 8, "lora_dropout": 0.0, "lora_last_k": 0, "lora_rank_pattern": "", "frozen_dtype": "fp32"}
    config = SimpleNamespace(lora_r=rank, lora_targets=OWN_TARGETS[task.name][targets == "qv"], **lora)
    add = of_task.add_lora if task.name == "voice_rvc" else of_task.setup_for_finetuning
    if task.name == "voice_rvc":
        processor.speakers = [f"kind_{i}" for i in range(count)]
    return add(model, config), processor, base, {}


def save_tuned(task, folder, rank, targets, count, dora):
    """A checkpoint as training leaves it, without its time: what would have trained is random."""
    from common.saved_models import make_origin, save_lora

    torch.manual_seed(rank)
    aside = folder.with_name(f"{folder.name}_aside")
    own = task.name in OWN_TARGETS
    found = with_own_adapter(task, rank, targets, count) if own else with_peft_adapter(task, aside, rank, targets, count, dora)
    model, processor, base, about = found
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter) + 0.01)
    save_lora(folder, model, processor, make_origin(task.name, "lora" if rank else "head", base, SETTINGS, **about))


def asked(task, predictor, **which):
    """All that a Predictor says of an input, as text in which no bit is lost."""
    rng = np.random.default_rng(0)
    if task.name == "voice_rvc":
        wave = np.sin(np.arange(2400) * 2 * np.pi * 150 / 16000).astype(np.float32)
        return predictor.predict((wave, 16000), **which)[0].tobytes().hex()
    if task.name == "medical_sam3d":
        ball = (np.indices((20, 20, 20)) - 9.5).__pow__(2).sum(0) < 36
        (mesh,) = predictor.predict((ball.astype(np.uint8), np.diag([2.0, 2, 2, 1])), **which).values()
        return mesh.vertices.tobytes().hex() + mesh.faces.tobytes().hex()
    pictures = rng.integers(0, 255, (2, 70, 90, 3), dtype=np.uint8)
    every = {"detection": {"threshold": 0, "nms": 1}, "pose": {}}.get(task.name, {"top_k": 99})
    return repr(predictor.predict(pictures[0], **every, **which)) + repr(
        predictor.predict_batch(list(pictures), **every, **which)
    )


def check_answers(task, folders):
    """Whatever was asked before, from one thread or several, merged or not; and the base stays what it was."""
    import predictor as of_task

    loads, (load_base, *others) = [], of_task.Predictor.model_functions
    counted_load = lambda *args, **kwargs: loads.append(args) or load_base(*args, **kwargs)  # noqa: E731
    of_task.Predictor.model_functions = counted_load, *others
    alone = {name: asked(task, of_task.Predictor(folder, device="cpu")) for name, folder in folders.items()}
    assert len(set(alone.values())) == len(folders)
    shared = of_task.Predictor(folders[""], device="cpu")
    for name in ("narrow", "head"):
        shared.add(folders[name], name)
        folders[name].rename(folders[name].with_name("moved"))  # what was added is there, whatever becomes of its file
        assert asked(task, shared, model=name) == alone[name]
        folders[name].with_name("moved").rename(folders[name])
    assert len(loads) == 1
    before = {key: t.clone() for key, t in shared.base[0].state_dict().items()}
    jobs = ["", "narrow", "", "head"]
    with ThreadPoolExecutor(3) as pool:
        for ask in (map, pool.map):
            assert list(ask(lambda name: asked(task, shared, model=name), jobs)) == [alone[name] for name in jobs]
    assert all(torch.equal(before[key], t) for key, t in shared.base[0].state_dict().items())
    check_memory(shared, folders)
    beside = of_task.Predictor(folders["narrow"], device="cpu", merge=False)
    own, expected = [weakref.ref(tensor) for tensor in beside.model.parameters()], asked(task, beside)
    with ThreadPoolExecutor(2) as pool:
        answers = pool.submit(lambda: [asked(task, beside) for _ in range(2)])
        pool.submit(beside.add, folders["head"], "head").result()
        assert answers.result() == [expected] * 2
    assert asked(task, beside, model="head") == alone["head"] and asked(task, beside) == expected
    assert not any(tensor() is not None for tensor in own)  # the first one's copy of the base is gone, not only unused


def check_memory(shared, folders):
    """An adapter more takes no more memory than its files say."""
    base = {t.data_ptr() for t in [*shared.base[0].parameters(), *shared.base[0].buffers()]}
    for name, folder in folders.items():
        model = shared.known[name].model
        own = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()] if t.data_ptr() not in base}
        assert 0 < sum(own.values()) <= sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_refusals(task, folders, scratch):
    from common.config import UserError
    from predictor import Predictor

    def variant(name, weights="", **changes):
        folder = scratch / name
        shutil.copytree(folders[""], folder)
        (folder / "manifest.json").unlink()
        origin = json.loads((folder / "origin.json").read_text())
        (folder / "origin.json").write_text(json.dumps({**origin, **changes}))
        if weights:
            (folder / "adapter_model.safetensors").rename(folder / weights)
        return folder

    shared = Predictor(folders[""], device="cpu")
    first = asked(task, shared)
    moved = folders[""].rename(scratch / "moved")  # from which it is read again when a second one comes
    with pytest.raises(UserError, match="there is no folder"):
        shared.add(folders["narrow"], "b")
    assert asked(task, shared) == first
    moved.rename(folders[""])
    whole = variant("whole", "model.safetensors", method="full")
    for wrong, name, told in (
        (whole, "b", f"{whole} is a whole model: only adapters share a base; make a Predictor of its own"),
        (variant("other", base={"name": "some/base", "sha256": "0"}), "b", r"adapter for another base \(some/base, not demo\)"),
        (variant("weather", task="weather"), "b", "is a checkpoint of weather"),
        (folders["narrow"], "", "the name '' is taken, or none"),
        (folders["narrow"], ["b"], "each adapter needs one of its own"),
        (variant("labels", classes=["one"]), "b", "does not fit this base: .*classifier.weight"),
        (scratch / "nowhere", "b", "there is no folder"),
    ):
        with pytest.raises(UserError, match=told):
            shared.add(wrong, name)
    for name in ("b", ["b"], None):
        with pytest.raises(UserError, match="there is no model .*; added were: none"):
            asked(task, shared, model=name)
    with ThreadPoolExecutor(2) as pool:  # of two who want one name at once, one gets it
        jobs = [pool.submit(shared.add, folders[which], "b") for which in ("narrow", "head")]
        refused = [str(job.exception()) for job in jobs if job.exception()]
    assert len(refused) == 1 and "the name 'b' is taken" in refused[0]
    assert asked(task, shared) == first


# One of PEFT's tasks and one with layers of its own stand for the others in a quick run.
QUICK = ("classification", "medical_sam3d")
EACH = [pytest.param(task, id=str(task), marks=[] if str(task) in QUICK else [pytest.mark.slow]) for task in TASKS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("task", EACH)
def test_adapters_of_any_kind_answer_on_one_base_as_each_does_alone(task, tmp_path):
    folders = {name: tmp_path / (name or "first") for name in ADAPTERS}

    def check():
        for name, folder in folders.items():
            save_tuned(task, folder, *ADAPTERS[name])
        check_answers(task, folders)
        if task.name == "classification":
            check_refusals(task, folders, tmp_path)

    in_task(task, check)
