"""Run folders of which the truth is known: what a comparison must find in them, or must not.

from planted_runs import plant, plant_task
"""

import json

import numpy as np

from common.record import write_samples

SIZES = {"full": 1_900_000, "lora": 240_000, "head": 20_000}
CLASSES = ("cat", "dog", "owl", "fox")


def plant(folder, method="full", seed=0, task="pose", better=0.0, samples=80, split=("val",), spread=0.0, ended=None, **changes):
    """A finished run whose metric is about 0.9, `better` by so much; what is hard is so for all runs.

    Each sample has an own difficulty and each run its own chance; spread: of the seeds, by which the runs of one differ, too.
    task "classification" has labels and guesses instead of values. changes: dotted keys of the summary, with __ for the dot.
    """
    rng = np.random.default_rng([seed, *method.encode()])
    name = {"classification": "balanced_accuracy", "pose": "pixel_error"}.get(task, "dice")
    up = task != "pose"
    shift = (better if up else -better) + spread * rng.normal()
    metrics = {}
    for where in split:
        hard = np.random.default_rng([7, len(where)]).normal(0, 0.2, samples)
        if task == "classification":
            right = hard + rng.normal(0, 0.2, samples) + shift > -0.35
            rows = [{"file": f"{i}.png", "label": i % 4, "guess": (i + int(not r)) % 4, "right": bool(r), "probability": 0.9}
                    for i, r in enumerate(right)]  # fmt: skip
            values = [np.mean(right[k::4]) for k in range(4)]
            metrics[where] = {name: float(np.mean(values)), "per_class_f1": dict(zip(CLASSES, map(float, values), strict=True))}
        else:
            values = 0.9 + hard + rng.normal(0, 0.05, samples) + shift
            rows = [{"file": f"{i}.png", "value": float(x)} for i, x in enumerate(values)]
            metrics[where] = {name: float(values.mean())}
        write_samples(folder / ("eval_test" if where == "test" else "") / "samples.json", name, up, rows)
        if where == "test":
            (folder / "eval_test.json").write_text(json.dumps({"split": "test", "metrics": metrics["test"]}))
    summary = {
        "schema_version": 1,
        "task": task,
        "method": method,
        "run_name": folder.name,
        "status": "finished",
        "ended": ended or f"2025-01-01T1{seed}:00:00+00:00",
        "config": {"epochs": 5, "max_steps_per_epoch": 0, "batch_size": 8, "lr": {"full": 1e-3}.get(method, 5e-3), "seed": seed},
        "base": {"name": "demo", "sha256": "b" * 64},
        "data": {"name": "data/demo", "sha256": "d" * 64, "train": 100, "val": samples},
        "parameters": {"total": 500_000, "trainable": SIZES.get(method, 300_000) // 4},
        "metrics": {"name": name, "higher_is_better": up, "before": {name: 0.25 if up else 9.0},
                    "best": {**metrics.get("val", metrics[split[0]]), "epoch": 4}, "final": {}},
        "seconds": 60.0,
        "train_seconds": 50.0 + seed,
        "samples_per_second": 10.0,
        "peak_memory_bytes": {"cpu": 700_000_000, "gpu": None},
        "checkpoint_bytes": SIZES.get(method, 300_000),
        "environment": {"python": "3.12.1", "torch": "2.9", "transformers": "5.1", "peft": "0.18", "device": "cpu, 2 cores"},
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = summary
        for part in parents:
            place = place[part]
        place[last] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def plant_task(runs_dir, task="pose", seeds=(0, 1, 2), methods=("full", "lora"), **options):
    """Runs of a task by each method and seed; lora: what is otherwise of the LoRA runs. The folder of the task."""
    lora = options.pop("lora", {})
    for method in methods:
        for seed in seeds:
            own = options | (lora if method == "lora" else {"better": -0.1} if method == "head" else {})
            plant(runs_dir / task / f"{method}_s{seed}", method, seed, task, **own)
    return runs_dir / task
