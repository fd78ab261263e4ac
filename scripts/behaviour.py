"""What a metric does not say of a full and a LoRA run: answers to corrupted inputs, time for one sample, drift from the base.

    python scripts/behaviour.py --full outputs/pose/full --lora outputs/pose/lora
    python scripts/behaviour.py --full ~/runs/clip/full_s0 --lora ~/runs/clip/lora_s0 --split val --data_dir ~/dogs

Corrupted: both are scored again with noise (pictures: also with blur, and with less contrast) on what the model gets. Time: one
sample by the base, by both runs, and by the adapter beside its base and merged into it. Drift: how far the features that the head
gets have moved from the base's. Nothing is trained. Leaves behaviour.json in <runs_dir>/<task>/compare/, for compare.py.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from bootstrap import drawn_values, intervals  # noqa: E402
from common.checkpoint import read_json, write_json  # noqa: E402
from common.config import Threads, cli, parse  # noqa: E402
from compare_runs import run_ids  # noqa: E402
from disagreements import LABELS, in_process, same_samples  # noqa: E402
from rank_curve import full_and_lora  # noqa: E402
from task_modules import (  # noqa: E402
    METRICS,
    EvalData,
    base_below,
    first_batches,
    load,
    open_data,
    outputs,
    samples_of,
)

NOISE = 0.5  # standard deviation of the noise, in those of the channel that it goes on
BLUR = 0.02  # standard deviation of the Gaussian that blurs a picture, in its longer side
CONTRAST = 0.4  # of a picture's contrast is left, about the grey that the base calls 0
CORRUPTED = {"voice_rvc": ("phone", 2), "medical_sam3d": ("inputs", 1)}  # key and channels of what a model gets; else pictures
LAST_LAYER = {"voice_rvc": "dec.conv_post"}  # of a task without a head: what it gets are the features
ROUNDS = 20  # of timing
SECONDS = 60.0  # after which no new round begins, three at least
MOST = 64  # samples whose features are compared


@dataclass
class BehaviourConfig:
    """Settings; the comment of a line is its help text."""

    full: str  # run folder of train.py
    lora: str  # run folder of train_lora.py, on the same base
    split: Literal["", "val", "test"] = ""  # whose samples; empty: test where both runs were scored on it, else val
    data_dir: str = ""  # where the data is now; empty: where it was in training
    output_dir: str = ""  # where behaviour.json goes; empty: compare/ beside the runs
    device: Literal["cpu", "cuda"] = "cpu"  # where the models are
    threads: Threads = 0  # CPU threads of this process; 0: as torch chooses


def behaviour(full: Path, lora: Path, folder: Path, split: str = "", data_dir: str = "") -> dict:
    """What behaviour.json of `folder` holds, made in a process of its own: one task each. UserError as of measure_behaviour."""
    flags = {"full": full, "lora": lora, "output_dir": folder, "split": split, "data_dir": data_dir}
    in_process(Path(__file__), {name: value for name, value in flags.items() if value})
    return read_json(Path(folder) / "behaviour.json")


def measure_behaviour(config: BehaviourConfig) -> dict:
    """What behaviour.json holds. This process is the runs' task's from then on.

    UserError where the runs are not of one task and base, or the base is not at hand.
    """
    import torch

    from common.folders import check_data_dir
    from common.runtime import quiet

    runs, found = full_and_lora(config)
    (full_folder, origin), (lora_folder, _) = found.values()
    task, (metric, higher) = origin["task"], METRICS[origin["task"]]
    split = same_samples(runs, config.split, metric)[0]
    check_data_dir(config.data_dir, origin)
    with quiet():
        loaded = {method: load(folder, device=config.device) for method, (folder, _) in found.items()}
        models, processor = {method: each[0] for method, each in loaded.items()}, loaded["full"][1]
        below = {method: base_below(*found[method], model) for method, model in models.items()}
        beside = load(lora_folder, merge=False, device=config.device)[0]
    data = open_data(full_folder, processor, origin, config.data_dir, split)
    one = data.loader.collate_fn([data.loader.dataset[0, 0]])  # the batch with the first sample alone
    timed = {"base": below["lora"][0], "full": models["full"], "lora": beside, "lora_merged": models["lora"]}
    shown = first_batches(task, data, MOST)
    return {
        "runs": run_ids(runs.values()),
        "metric": metric,
        "higher_is_better": higher,
        "split": split,
        "corrupted": scores_when_corrupted(task, models, processor, data, metric),
        "milliseconds": median_times(task, timed, one, config.device),
        "device": config.device,
        "threads": torch.get_num_threads(),
        "drift": {method: drift(task, model, *below[method], shown) for method, model in models.items()},
    }


# ---- corrupted inputs ------------------------------------------------------------------------------------------------


class ChangedBatches:
    """A loader whose batches are changed on their way: change(batch, number of it)."""

    def __init__(self, loader, change):
        self.loader, self.change, self.dataset = loader, change, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (self.change(batch, number) for number, batch in enumerate(self.loader))


def scores_when_corrupted(task: str, models: dict, processor, data: EvalData, metric: str) -> dict:
    """{corruption: {"full", "lora": the metric, "difference": 95 % interval of LoRA minus full}}, "none" first.

    The interval is of the samples alone (one seed), None of too few.
    """
    import numpy as np

    found = {}
    for name in corruptions(task):
        loader = (
            data.loader if name == "none" else ChangedBatches(data.loader, lambda *batch, name=name: corrupt(task, name, *batch))
        )
        records = [samples_of(task, model, processor, data._replace(loader=loader), metric) for model in models.values()]
        values = [float(drawn_values(record, np.ones((1, len(record["rows"])), int))[0]) for record in records]
        difference = intervals([{0: record} for record in records], list(models).index("full"))[list(models).index("lora")]
        found[name] = dict(zip(models, values, strict=True)) | {"difference": difference.get("difference")}
    return found


def corruptions(task: str) -> tuple[str, ...]:
    return ("none", "noise") if task in CORRUPTED else ("none", "noise", "blur", "contrast")


def corrupt(task: str, name: str, batch: dict, number: int) -> dict:
    """A batch with one of `corruptions` on what the model gets of its samples; the same for every model and call."""
    import torch
    from torchvision.transforms.v2.functional import gaussian_blur

    from common.batches import number_from

    key, channels = CORRUPTED.get(task, ("pixel_values", 1))
    values = batch[key]
    if name == "noise":
        drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(number_from("noise", number)))
        spread = values.std(dim=[d for d in range(values.ndim) if d != channels], keepdim=True)
        values = values + NOISE * spread * drawn.to(values)
    elif name == "blur":
        sigma = BLUR * max(values.shape[-2:])
        values = gaussian_blur(values, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)
    else:
        values = CONTRAST * values
    if "pixel_mask" in batch:  # of pictures that were padded to one size: what is beside them stays 0
        values = values * batch["pixel_mask"][:, None]
    return batch | {key: values}


# ---- time ------------------------------------------------------------------------------------------------------------


def median_times(task: str, models: dict, batch: dict, device: str) -> dict[str, float]:
    """Milliseconds of each model for a batch: medians over rounds in which all take turns, as a machine may be busy."""
    import numpy as np
    import torch

    def once(model) -> float:
        began = time.perf_counter()
        outputs(task, model, batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    for model in models.values():
        once(model)  # the first call allocates
    times, ends = {name: [] for name in models}, time.monotonic() + SECONDS
    while len(times["base"]) < 3 or (len(times["base"]) < ROUNDS and time.monotonic() < ends):
        for name, model in models.items():
            times[name].append(once(model))
    return {name: float(np.median(values)) for name, values in times.items()}


# ---- drift -----------------------------------------------------------------------------------------------------------


def drift(task: str, model, base, whole: tuple[str, ...], batches: list) -> float:
    """How far the features of a tuned model have moved from those of its base: |tuned - base| / |base|, over all batches.

    Features are what the first layer of the head gets. 0: they are the base's; 1: the change is as long as they are. It says how
    much of the base was left behind, and not whether that does harm.
    """
    layer = head_layer(task, model, whole)
    moved = length = 0.0
    for batch in batches:
        for mine, old in zip(*(features(task, each, layer, batch) for each in (model, base)), strict=True):
            moved += float((mine - old).square().sum())
            length += float(old.square().sum())
    return (moved / length) ** 0.5 if length else 0.0


def head_layer(task: str, model, whole: tuple[str, ...]) -> str:
    """The name of the first layer of the head. whole: names of the parts that train whole, the head's first."""
    from common.lora import is_within

    if task in LAST_LAYER:
        return LAST_LAYER[task]
    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    return next(name for part in whole for name in leaves if is_within(name, (part,)))


def features(task: str, model, layer: str, batch: dict) -> list:
    """What a layer gets in each of its calls while a model answers to a batch."""
    kept = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].double().cpu()))
    try:
        outputs(task, model, batch)
    finally:
        hook.remove()
    return kept


# ---- putting it together ---------------------------------------------------------------------------------------------


def main(argv=None):
    from common.folders import check_place

    config = parse(BehaviourConfig, argv)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    folder = Path(config.output_dir).expanduser() if config.output_dir else Path(config.full).expanduser().parent / "compare"
    check_place("--output_dir", folder)
    found = measure_behaviour(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "behaviour.json", found)
    print(in_lines(found))
    print(f"\nsaved behaviour.json in {folder}")


def in_lines(found: dict) -> str:
    """Lines of text: the metric under each corruption, the drift, the milliseconds."""
    names = [LABELS[method] for method in LABELS]
    lines = [f"{found['metric'] + ', ' + found['split'] + ' split':28}" + "".join(f"{name:>12}" for name in names)]
    for name, scores in found["corrupted"].items():
        lines.append(f"  {'as it is' if name == 'none' else name:26}" + "".join(f"{scores[method]:12.4f}" for method in LABELS))
    lines.append(f"{'drift from the base':28}" + "".join(f"{found['drift'][method]:12.4f}" for method in LABELS))
    times = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in found["milliseconds"].items())
    return "\n".join([*lines, f"ms for one sample: {times} ({found['device']}, threads: {found['threads']})"])


if __name__ == "__main__":
    cli(main)
