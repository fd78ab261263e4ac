"""How many ranks the update of a fine-tune needs: truncated to its largest singular values, and scored without training.

    python scripts/rank_curve.py --full outputs/pose/full --lora outputs/pose/lora
    python scripts/rank_curve.py --full ~/runs/clip/full_s0 --lora ~/runs/clip/lora_s0 --split val --data_dir ~/dogs

In the layers that have an adapter, what the full and the LoRA run changed is cut to rank 1, 2, 4 ... 64 (or a layer's own limit,
where that is less); all else (heads, norms, biases) stays as its run trained it. Leaves rank_curve.json and rank_curve.png in
<runs_dir>/<task>/compare/: the metric at each rank, and the bytes that an adapter of that rank has.
"""

import sys
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Literal, NamedTuple

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.checkpoint import folder_bytes, read_json, write_json  # noqa: E402
from common.config import Threads, UserError, cli, parse  # noqa: E402
from compare_runs import run_ids  # noqa: E402
from disagreements import LABELS, in_process, same_samples  # noqa: E402
from task_modules import METRICS, load, open_data, score, task_of  # noqa: E402

RANKS = (1, 2, 4, 8, 16, 32, 64)
ROUNDING = 2**-23  # of a weight's length: a singular value of its update that is smaller comes of fp32


@dataclass
class RankCurveConfig:
    """Settings; the comment of a line is its help text."""

    full: str  # run folder of train.py
    lora: str  # run folder of train_lora.py, on the same base
    split: Literal["", "val", "test"] = ""  # whose samples; empty: test where both runs were scored on it, else val
    data_dir: str = ""  # where the data is now; empty: where it was in training
    output_dir: str = ""  # where the files go; empty: compare/ beside the runs
    device: Literal["cpu", "cuda"] = "cpu"  # where the models are scored
    threads: Threads = 0  # CPU threads of this process; 0: as torch chooses


def rank_curve(full: Path, lora: Path, folder: Path, split: str = "", data_dir: str = "") -> dict:
    """What rank_curve.json of `folder` holds, made in a process of its own: one task each. UserError as of measure_rank_curve."""
    flags = {"full": full, "lora": lora, "output_dir": folder, "split": split, "data_dir": data_dir}
    in_process(Path(__file__), {name: value for name, value in flags.items() if value})
    return read_json(Path(folder) / "rank_curve.json")


# ---- updates ---------------------------------------------------------------------------------------------------------


class Update:
    """What a model changed in some layers of its base, split by singular values once, to be set in place at ranks up to `most`.

    model, base: plain models of the same layers; names: of those layers. Set at the rank that a layer's update has, or more,
    its weight is what it was.
    """

    def __init__(self, model, base, names, most: int = RANKS[-1]):
        import torch

        from common.lora import adaptable_layers
        from common.lora_layers import base_weight
        from low_rank import deltas

        layers, old = adaptable_layers(model), adaptable_layers(base)
        self.model, self.rank, self.parts = model, 0, {}  # rank: the largest that any layer's update has
        if lost := set(names) - layers.keys():
            raise UserError(f"{min(lost)} has an adapter of a kind that is no matrix to be cut ({len(lost)} in all)")
        for name, delta in deltas(model, base, names).items():
            u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)  # (..., out, k), (..., k), (..., k, in)
            left, right = (u * s[..., None, :])[..., :most].clone(), vh[..., :most, :].clone()  # the rest is freed
            start = base_weight(old[name]).detach().clone()
            self.parts[name] = layers[name], start, left, s, right
            rounding = max(float(s.max()) * 1e-6, float(start.float().norm()) * ROUNDING)
            self.rank = max(self.rank, int((s > rounding).sum(-1).max()))

    def set_rank(self, r: int) -> None:
        """The model's layers become base + their update at rank r; 0: the base's."""
        import torch

        from low_rank import matrix_of, set_weight

        with torch.no_grad():
            for layer, start, left, _, right in self.parts.values():
                weight = start.double().clone()
                matrix_of(layer, weight).add_(left[..., :r] @ right[..., :r, :])
                set_weight(layer, weight)

    def energy(self, r: int) -> float:
        """The share of the squared length of all updates together that is left at rank r."""
        kept = sum(float(s[..., :r].square().sum()) for _, _, _, s, _ in self.parts.values())
        whole = sum(float(s.square().sum()) for _, _, _, s, _ in self.parts.values())
        return kept / whole if whole else 1.0

    def numbers(self, r: int) -> int:
        """How many numbers an adapter of rank r for these layers has, no layer's rank above its own limit."""
        shapes = [(left.shape, right.shape) for _, _, left, _, right in self.parts.values()]
        return sum(min(r, own[-1]) * prod(own[:-2]) * (own[-2] + other[-1]) for own, other in shapes)


class Adapter(NamedTuple):
    """What is known of an adapter: the names of its layers, its largest rank, how many numbers it has."""

    layers: list[str]
    rank: int
    numbers: int


def take_off(model) -> Adapter:
    """Puts the base's layers of an adapted model back, in place."""
    from common.lora import replace_modules

    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    ranks = [r for module in adapted.values() for r in (module.r.values() if hasattr(module.r, "values") else [module.r])]
    numbers = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    replace_modules(model, {module: module.base_layer for module in adapted.values()})
    return Adapter(list(adapted), max(ranks, default=0), numbers)


# ---- the curve -------------------------------------------------------------------------------------------------------


def full_and_lora(config) -> tuple[dict[str, Path], dict[str, tuple[Path, dict]]]:
    """(method -> run folder, method -> its checkpoint and origin) of config.full and config.lora.

    UserError where they are not a full run and one with an adapter, of one task and base.
    """
    runs = {method: Path(getattr(config, method)).expanduser().absolute() for method in LABELS}
    found = {method: task_of(run) for method, run in runs.items()}
    (_, full), (_, lora) = found.values()
    if full["task"] != lora["task"] or full["base"]["sha256"] != lora["base"]["sha256"]:
        raise UserError(f"{runs['full']} and {runs['lora']} are not of one task and base: their updates have nothing in common")
    if (full["method"], lora["method"]) != ("full", "lora"):
        methods = f"{full['method']} ({runs['full']}) and {lora['method']} ({runs['lora']})"
        raise UserError(f"expected a full run and one with an adapter, got {methods}")
    return runs, found


def measure_rank_curve(config: RankCurveConfig) -> dict:
    """What rank_curve.json holds. This process is the runs' task's from then on.

    UserError where the runs are not of one task and base, or where the adapter cannot be merged.
    """
    from common.folders import check_data_dir
    from common.runtime import quiet

    runs, found = full_and_lora(config)
    (full_folder, full), (lora_folder, _) = found.values()
    task, (metric, higher) = full["task"], METRICS[full["task"]]
    split = same_samples(runs, config.split, metric)[0]
    check_data_dir(config.data_dir, full)
    with quiet():
        models = {method: load(folder, device=config.device)[0] for method, (folder, _) in found.items()}
        base, processor, _ = load(lora_folder, merge=False, device=config.device)
    adapter = take_off(base)
    if any(hasattr(module, "base_layer") for module in models["lora"].modules()):
        raise UserError(f"the adapter of {runs['lora']} cannot be merged, so its update is no matrix to be cut")
    data = open_data(full_folder, processor, full, config.data_dir, split)
    updates = {method: Update(model, base, adapter.layers) for method, model in models.items()}
    scores = {method: scores_at_ranks(task, update, processor, data, metric) for method, update in updates.items()}
    rest = folder_bytes(lora_folder) - 4 * adapter.numbers  # of a checkpoint: heads, settings, the model card
    return {
        "runs": run_ids(runs.values()),
        "metric": metric,
        "higher_is_better": higher,
        "split": split,
        "layers": len(adapter.layers),
        "ranks": list(RANKS),
        **{method: [found[r] for r in RANKS] for method, found in scores.items()},
        "bytes": [rest + 4 * updates["lora"].numbers(r) for r in RANKS],
        "energy": {method: [update.energy(r) for r in RANKS] for method, update in updates.items()},
        "lora_rank": adapter.rank,
        "base": {method: found[0] for method, found in scores.items()},
        "whole": {method: found["whole"] for method, found in scores.items()},
    }


def scores_at_ranks(task: str, update: Update, processor, data, metric: str) -> dict:
    """{"whole", 0, 1, 2, 4 ...: the metric}; from the rank of the whole update on it is that of the model as it was trained."""
    from common.runtime import progress_bar

    def metric_now() -> float | None:
        value = score(task, update.model, processor, data)[metric]
        return value if value is not None and isfinite(value) else None

    scores = {"whole": metric_now()}
    for r in progress_bar((0, *RANKS), "ranks"):
        if r < update.rank:
            update.set_rank(r)
        scores[r] = metric_now() if r < update.rank else scores["whole"]
    return scores


def draw_ranks(curve: dict, path: Path) -> None:
    """rank_curve.png: the metric over the rank that is left, dotted as each run was trained, the adapter's rank marked."""
    from common.plots import RIGHT, figure, save_figure

    colors = {"full": "#555555", "lora": RIGHT}
    page, ((axis,),) = figure(1, 1, 7, 4.6)
    for method, label in LABELS.items():
        points = [(r, y) for r, y in zip(curve["ranks"], curve[method], strict=True) if y is not None]
        axis.plot(*zip(*points, strict=True), marker="o", color=colors[method], label=f"{label}: its update, cut to this rank")
        if curve["whole"][method] is not None:
            axis.axhline(curve["whole"][method], color=colors[method], ls=":", lw=1.2, label=f"{label}, as trained")
    mark = f"rank of the adapter: {curve['lora_rank']}"
    axis.axvline(max(1, curve["lora_rank"]), color=colors["lora"], ls="--", lw=1, label=mark)
    axis.set_xscale("log", base=2)
    ticks = [f"{r}\n{size / 1e6:.2f} MB" for r, size in zip(curve["ranks"], curve["bytes"], strict=True)]
    axis.set_xticks(curve["ranks"], ticks, fontsize=8)
    better = "higher" if curve["higher_is_better"] else "lower"
    axis.set(xlabel="rank, and size of an adapter of that rank", ylabel=f"{curve['metric']} ({better} is better)")
    axis.set_title(f"Updates of {curve['layers']} layers, cut to a rank without training; {curve['split']} split", fontsize=10)
    page.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_figure(page, path)


def main(argv=None):
    from common.folders import check_place

    config = parse(RankCurveConfig, argv)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    folder = Path(config.output_dir).expanduser() if config.output_dir else Path(config.full).expanduser().parent / "compare"
    check_place("--output_dir", folder)
    curve = measure_rank_curve(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "rank_curve.json", curve)
    draw_ranks(curve, folder / "rank_curve.png")
    print(f"{curve['metric']} with the updates of {curve['layers']} layers cut to a rank; heads, norms and biases as trained\n")
    print(table(curve))
    print(f"\nsaved rank_curve.json and rank_curve.png in {folder}")


def table(curve: dict) -> str:
    """Lines of text: a rank each, with the metric and the share of the squared length of the updates that is left."""

    def line(name, size, values, shares):
        values = ["null" if value is None else f"{value:.4f}" for value in values]
        return f"  {name:>6}{size:>14}" + "".join(f"{v:>12}{s:>9}" for v, s in zip(values, shares, strict=True))

    lines = [f"  {'rank':>6}{'bytes':>14}" + "".join(f"{label:>12}{'energy':>9}" for label in LABELS.values())]
    for i, r in enumerate(curve["ranks"]):
        shares = [f"{curve['energy'][method][i]:.1%}" for method in LABELS]
        lines.append(line(r, f"{curve['bytes'][i]:,}", [curve[method][i] for method in LABELS], shares))
    return "\n".join([*lines, line("whole", "", curve["whole"].values(), ["", ""])])


if __name__ == "__main__":
    cli(main)
