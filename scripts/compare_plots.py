"""The pictures of a comparison. Colours go by method everywhere: full blue, LoRA orange, the head alone grey."""

import math
from pathlib import Path

from common.plots import extremes, figure, plot_text, save_figure
from compare_text import before_name, lora_of
from compare_words import megabytes, number

COLORS = {"full": "#1f6fd6", "lora": "#d9660d", "head": "#6b7280"}
OTHERS = ("#7b3fa0", "#15803d", "#b45374", "#0e7490", "#8a6d00")  # of further methods, in turn
MARKS = {"full": "s", "lora": "o", "head": "^"}


def looks(runs: list[dict]) -> list[dict]:
    """{"color", "marker"} of each row: by its method; a second row of one method has a colour of its own."""
    found, used = [], set()
    spare = iter(OTHERS * (1 + len(runs)))
    for run in runs:
        own = COLORS.get(run["method"])
        found.append({"color": next(spare) if own is None or own in used else own, "marker": MARKS.get(run["method"], "D")})
        used.add(found[-1]["color"])
    return found


def metric_label(record: dict) -> str:
    return f"{plot_text(record['metric'])} ({'higher' if record['higher_is_better'] else 'lower'} is better)"


# What a comparison of a few runs leaves: compare.png --------------------------------------------------------------------


def draw_bars_of_runs(record: dict, path: Path) -> None:
    """compare.png: the metric before training and at its best, checkpoint size, trained parameters, training time."""
    runs = record["runs"]
    drawing, (panels,) = figure(1, 4, width=max(3.4, 1.1 * len(runs)), height=4.2)
    colors = [look["color"] for look in looks(runs)]

    def bars(panel, key, shift=0.0, width=0.6, scale=1.0, show=number, **look):
        values = [run[key] for run in runs]
        drawn = panel.bar([i + shift for i in range(len(runs))], [(v or 0) / scale for v in values], width, color=colors, **look)
        panel.bar_label(drawn, [show(v) for v in values], padding=2, fontsize=8)

    bars(panels[0], "metric_before", -0.2, 0.38, alpha=0.35)
    bars(panels[0], "metric", 0.2, 0.38, show=lambda _: "")
    for i, run in enumerate(runs):
        ends, seeds = run.get("interval", []), seed_values(run)
        panels[0].vlines([i + 0.2] * len(ends[:1]), ends[:1], ends[1:], color="0.2", lw=1.5)
        panels[0].plot([i + 0.2] * len(seeds), seeds, ls="", marker="o", ms=3, color="0.2", mfc="white")
        place = (i + 0.2, max([run["metric"] or 0, *ends, *seeds]))  # above the interval, which would strike it through
        panels[0].annotate(number(run["metric"]), place, (0, 2), textcoords="offset points", ha="center", fontsize=8)
    panels[0].plot([], color="0.2", label="95 % interval")
    panels[0].set(title=plot_text(record["metric"]), ylabel=metric_label(record))
    panels[0].bar(0, 0, color="0.4", alpha=0.35, label="before training")  # for the legend alone
    panels[0].bar(0, 0, color="0.4", label="best epoch" if record["split"] == "val" else "test split")
    bars(panels[1], "checkpoint_bytes", scale=1e6, show=megabytes)
    panels[1].set(title="Checkpoint", ylabel="size (MB)")
    bars(panels[2], "trained_parameters", scale=1e6)
    panels[2].set(title="Trained parameters", ylabel="parameters (millions)")
    bars(panels[3], "train_seconds", show=lambda v: number(v, "s"))
    panels[3].set(title="Training time", ylabel="time in training steps (s)")
    for panel in panels:
        tilted = dict(rotation=20, ha="right") if sum(len(run["label"]) for run in runs) > 24 else {}
        panel.set_xticks(range(len(runs)), [plot_text(run["label"]) for run in runs], **tilted)
        panel.grid(axis="x", visible=False)
        panel.set_axisbelow(True)
        panel.margins(y=0.12)
    drawing.legend(fontsize=9, loc="outside lower left", ncols=3, frameon=False)
    drawing.suptitle(plot_text(record["heading"], 100))
    save_figure(drawing, path)


def seed_values(run: dict) -> list[float]:
    """What each of several seeds reaches; nothing of one, which is the mean itself."""
    values = [each["metric"] for each in run["runs"] if each["metric"] is not None]
    return values if len(values) > 1 else []


# Bytes against the metric -----------------------------------------------------------------------------------------------


def draw_pareto(records: list[dict], path: Path, columns: int = 3) -> None:
    """A panel for each comparison: size of the checkpoint (log) against the metric, 95 % intervals, and a dot for each seed."""
    columns = min(columns, len(records))
    drawing, axes = figure(math.ceil(len(records) / columns), columns, 5.2, 3.9)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, records, strict=False):
        pareto_panel(axis, record)
        axis.set_title(plot_text(record["title"], 60), fontsize=11)
    save_figure(drawing, path)


def pareto_panel(axis, record: dict) -> None:
    runs = [run for run in record["runs"] if run["checkpoint_bytes"] and run["metric"] is not None]
    for run, look in zip(runs, looks(runs), strict=True):
        size, (low, high) = run["checkpoint_bytes"] / 1e6, run.get("interval", [run["metric"]] * 2)
        ends = [[max(0.0, run["metric"] - low)], [max(0.0, high - run["metric"])]]
        axis.errorbar([size], [run["metric"]], ends, capsize=4, ms=8, ls="", label=plot_text(run["label"], 24), **look)
        seeds = seed_values(run)
        axis.plot([size] * len(seeds), seeds, ls="", marker=look["marker"], ms=4, mfc="white", color=look["color"], zorder=3)
    base_line(axis, record)
    if runs:
        axis.set_xscale("log")
        axis.margins(x=0.18)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter(lambda x, _: "")
    axis.set(xlabel="checkpoint, MB (log)", ylabel=metric_label(record))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)  # below: clear of points


def base_line(axis, record: dict) -> None:
    """A line for the base as it is; where that is so far off that nothing else could be told apart, a word in the legend."""
    before, (low, high) = record["before"], axis.get_ylim()
    if before is None:
        return
    far = not low - 2 * (high - low) <= before <= high + 2 * (high - low)
    label, style = before_name(record), {"color": "0.45", "ls": "--", "lw": 1}
    if far:
        axis.plot([], [], **style, label=f"{label}: {number(before)}, off the scale")
    else:
        axis.axhline(before, **style, label=label)


# What some folders have besides -----------------------------------------------------------------------------------------


def draw_sweep(record: dict, path: Path) -> None:
    """The metric over the learning rate of each method; a star marks the best rate, a ring the default."""
    drawing, ((axis,),) = figure(1, 1, 5.6, 3.9)
    for method, found in record["sweep"].items():
        color = COLORS.get(method, OTHERS[0])
        points = [(rate, y) for rate, y in zip(found["rates"], found["metric"], strict=True) if y is not None]
        axis.plot(*zip(*points, strict=True), marker=MARKS.get(method, "D"), ms=5, color=color, label=plot_text(method))
        for rate, mark, size in ((found.get("best"), "*", 15), (found.get("default"), "o", 13)):
            if rate in dict(points):
                axis.plot(rate, dict(points)[rate], mark, ms=size, color=color, mfc=color if mark == "*" else "none")
    axis.set_xscale("log")
    axis.set(
        xlabel="learning rate (log); star: best, ring: default", ylabel=metric_label(record), title="Learning rate of each method"
    )
    axis.legend(fontsize=8, frameon=False)
    save_figure(drawing, path)


def draw_ranks(record: dict, path: Path) -> None:
    """The metric of both updates, cut to their largest singular values, over the rank that is left."""
    curve = record["rank_curve"]
    drawing, ((axis,),) = figure(1, 1, 5.6, 3.9)
    for method, label in (("full", "full fine-tune's update, cut"), ("lora", "LoRA's update, cut")):
        points = [(r, y) for r, y in zip(curve["ranks"], curve[method], strict=True) if y is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker=MARKS[method], ms=5, color=COLORS[method], label=label)
    for run, look in zip(record["runs"], looks(record["runs"]), strict=True):
        if run["method"] in ("full", "lora") and curve.get("split") == record["split"] and run["metric"] is not None:
            axis.axhline(run["metric"], color=look["color"], ls=":", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(curve["ranks"], [str(rank) for rank in curve["ranks"]])
    title = f"Rank that is left, without training ({plot_text(str(curve.get('split', '')))} split)"
    axis.set(xlabel="rank (log)", ylabel=plot_text(str(curve["metric"])), title=title)
    axis.legend(fontsize=8, frameon=False)
    save_figure(drawing, path)


def draw_classes(record: dict, path: Path) -> None:
    """For each class (keypoint, organ, speaker) the difference of LoRA to full: the mean over seeds, a dot for each seed."""
    import numpy as np

    found, run = record["per_class"], lora_of(record)
    means = {name: float(np.mean(values)) for name, values in found["values"].items()}
    chosen, note = extremes(list(means.values()), 30)
    chosen = sorted(chosen, key=lambda i: list(means.values())[i])
    names, values = [list(means)[i] for i in chosen], [list(means.values())[i] for i in chosen]
    drawing, ((axis,),) = figure(1, 1, 5.6, max(2.6, 0.28 * len(names) + 1.4))
    better = [(v > 0) == record["higher_is_better"] for v in values]
    axis.barh(range(len(names)), values, height=0.62, color=[COLORS["lora" if b else "full"] for b in better], alpha=0.75)
    for i, name in enumerate(names):
        seeds = found["values"][name] if len(found["values"][name]) > 1 else []
        axis.plot(seeds, [i] * len(seeds), "o", ms=3.5, color="0.2", mfc="white")
    axis.axvline(0, color="0.3", lw=1)
    axis.set_yticks(range(len(names)), [plot_text(name, 24) for name in names], fontsize=8)
    axis.grid(axis="y", visible=False)
    label = f"{plot_text(found['metric'], 30)}: {plot_text(run['label'], 20)} minus {plot_text(record['compared_with'], 20)}"
    axis.set(xlabel=label, title=f"Difference of each{note}: orange where LoRA is better", ylim=(-0.6, len(names) - 0.4))
    axis.title.set_fontsize(10)
    save_figure(drawing, path)
