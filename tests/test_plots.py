"""Pictures are drawn without touching what a notebook has set, in any size and with any name, and say what they show."""

import resource
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import in_child
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from common import plots
from common.plots import draw_bars, draw_calibration, draw_confusion, draw_curves, drawn_text, figure, plot_text, save_figure

# Formulas, one of them broken; a line break; Hebrew; characters without a glyph, one of them not even UTF-8; a mark; a long one.
ODD_NAMES = ["$\\frac{$", "a$_$b", "two\nlines", "אבג", "猫 🐈", "bell\x07 \udce9", "right\u202eleft", "long " * 60, "_hidden"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were to be saved, in order."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda drawing, path: kept.append(drawing))
    return kept


def texts(drawing) -> list[str]:
    drawing.draw_without_rendering()  # which writes the labels at the ticks
    return [text.get_text() for text in drawing.findobj(matplotlib.text.Text) if text.get_text()]


def test_drawing_leaves_a_notebooks_backend_and_figures_alone(tmp_path):
    before = matplotlib.get_backend()
    try:
        plt.switch_backend("svg")
        mine = plt.figure()
        draw_bars({"a": 0.5, "b": None}, "Bars", "value", tmp_path / "deep" / "bars.png")
        assert matplotlib.get_backend() == "svg" and plt.get_fignums() == [mine.number]
    finally:
        plt.close("all")
        plt.switch_backend(before)
    assert Image.open(tmp_path / "deep" / "bars.png").size > (400, 300)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_is_drawn_as_it_can_be():
    assert [drawn_text(name) for name in ODD_NAMES[:7]] == [
        "$\\frac{$",
        "a$_$b",
        "two lines",
        "אבג",
        "\\u732b \\U0001f408",
        "bell\\x07 \\udce9",
        "rightleft",
    ]
    assert drawn_text("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb" and len(drawn_text(ODD_NAMES[7])) == 40
    assert plot_text("a$_$b") == r"a\$_\$b"


def test_pictures_with_odd_names_are_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(np.eye(len(ODD_NAMES)), ODD_NAMES, tmp_path / "confusion.png")
        draw_bars(dict.fromkeys(ODD_NAMES, 0.5), "Bars", "value", tmp_path / "bars.png")
        draw_bars({"one": 0.0}, "Bars", "value", tmp_path / "one.png")
        draw_bars(dict.fromkeys(ODD_NAMES), "Bars", "value", tmp_path / "none.png")
    for name in ("confusion", "bars", "one", "none"):
        assert np.ptp(np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))) > 100, name


# ---- size ------------------------------------------------------------------------------------------------------------


def test_no_picture_is_larger_than_a_screen_can_show(tmp_path):
    for height in (4, 400):
        save_figure(figure(1, 1, 6, height)[0], tmp_path / f"{height}.png")
    assert Image.open(tmp_path / "4.png").size == (720, 480)
    assert max(Image.open(tmp_path / "400.png").size) == 4000


def test_thousands_of_classes_cost_little_memory(tmp_path):
    """Half a gigabyte beside the libraries: the 5000 x 5000 counts are 100 MB of it."""
    names = [f"class {i}" for i in range(5000)]
    counts = np.eye(5000, dtype=np.int32)

    def draw():
        in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**29, in_use + 2**29))
        draw_confusion(counts, names, tmp_path / "confusion.png")
        draw_bars({name: i / 5000 for i, name in enumerate(names)}, "F1", "F1", tmp_path / "bars.png")

    save_figure(figure()[0], tmp_path / "warm.png")  # fonts and what drawing imports
    code, said = in_child(draw, log=tmp_path / "log")
    assert code == 0, said
    assert all(max(Image.open(tmp_path / f"{name}.png").size) < 4000 for name in ("confusion", "bars"))


def test_of_many_classes_the_most_confused_are_shown_and_the_rest_as_one(drawn):
    counts = 10 * np.eye(60, dtype=int)
    counts[7, 50], counts[50, 3] = 5, 2  # 7 is taken for 50, which is taken for 3
    draw_confusion(counts, [f"c{i}" for i in range(60)], "nowhere")
    said = texts(drawn[0])
    assert "Confusion matrix: the 30 most confused of 60 classes" in said and "any other class" in said
    assert {"c3 (10)", "c7 (15)", "c50 (12)"} <= set(said) and "5" in said and "2" in said
    draw_confusion(counts[:3, :3], ["a", "b", "c"], "nowhere")
    assert {"Confusion matrix", "a (10)", "b"} <= set(texts(drawn[1]))


def test_what_shown_classes_lose_to_others_is_counted():
    counts = np.arange(16).reshape(4, 4)
    shown = plots.with_rest(counts, np.array([0, 2]))
    assert shown.tolist() == [[0, 2, 1 + 3], [8, 10, 9 + 11], [4 + 12, 6 + 14, 0]]


def test_of_many_bars_the_lowest_and_the_highest_are_drawn(drawn):
    values = {f"c{i}": None if i == 9 else i / 100 for i in range(100)}
    draw_bars(values, "F1", "F1", "nowhere", counts=range(100))
    said = texts(drawn[0])
    assert "F1: the 20 lowest and 20 highest of 100" in said and {"c0 (0)", "c20 (20)", "c80 (80)", "c99 (99)"} <= set(said)
    assert not {"c9 (9)", "c21 (21)", "c79 (79)"} & set(said)
    draw_bars({"a": 0.5, "b": None}, "F1", "F1", "nowhere")
    assert {"F1", "a", "b", "0.50", "no samples"} <= set(texts(drawn[1]))


def test_bins_of_few_samples_are_faint_and_counted(drawn):
    draw_calibration(0.1, [(2, 0.4, 0.5), (30, 0.9, 0.8)], "nowhere")
    above, below = drawn[0].axes
    strengths = [container.lines[0].get_alpha() for container in above.containers]
    assert strengths == [0.3, 1] and {"2", "30"} <= set(texts(drawn[0]))
    assert any("32 samples" in text for text in texts(drawn[0])) and len(below.patches) == 2


# ---- curves ----------------------------------------------------------------------------------------------------------


def steps(*numbers, **more):
    return [{"step": n, "loss": 1 / n, "lr": n / 10, "grad_norm": 2.0, **more} for n in numbers]


EPOCHS = [
    {"epoch": 0, "step": 0, "val_loss": 2.0, "accuracy": 0.1, "recall": 0.1, "error": 9.0, "per_class_f1": {"a": 1.0}},
    {"epoch": 1, "step": 2, "train_loss": 1.0, "val_loss": 1.0, "accuracy": 0.8, "recall": 0.8, "error": 3.0, "map": None},
    {"epoch": 2, "step": 4, "train_loss": 0.5, "val_loss": 1.5, "accuracy": 0.7, "recall": 0.7, "error": 0.5, "map": 0.2},
]


def panels(drawing) -> dict[str, Axes]:
    return {axis.get_title(): axis for axis in drawing.axes if axis.get_visible()}


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_have_one_unit_to_an_axis_and_say_what_is_best(drawn):
    draw_curves([*EPOCHS, *steps(1, 2, 3, 4, loss_box=0.3, loss_box_1=0.2)], "accuracy", EPOCHS[1], [3], "nowhere")
    found = panels(drawn[0])
    assert list(found) == [
        "Loss",
        "Parts of the training loss",
        "Validation metrics",
        "Validation: error",
        "Learning rate",
        "Gradient",
    ]
    assert labels(found["Loss"]) == ["training, one step", "training, epoch mean", "validation", "best epoch (1)", "resumed"]
    assert labels(found["Validation metrics"]) == ["accuracy", "map", "best epoch (1)", "resumed"], "recall is the same curve"
    assert labels(found["Parts of the training loss"])[0] == "box" and labels(found["Validation: error"])[0] == "error"
    star = next(line for line in found["Validation metrics"].lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, 0.8)
    rate = found["Learning rate"].lines[0]
    assert rate.get_xdata().tolist() == [1, 2, 3, 4] and rate.get_ydata().tolist() == [0.1, 0.2, 0.3, 0.4]
    assert all("best epoch (1)" in labels(axis) for axis in found.values())


def test_legends_lie_below_their_panels(tmp_path, monkeypatch):
    kept = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: (savefig(self, path, **options), kept.append(self)))
    draw_curves([*EPOCHS, *steps(1, 2, 3, 4)], "accuracy", EPOCHS[1], [], tmp_path / "curves.png")
    for axis in panels(kept[0]).values():
        assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0


def test_losses_with_names_have_a_curve_each(drawn):
    lines = [{"step": 1, "loss_gen": 3.0, "loss_disc": 1.0, "loss_gen_mel": 2.0, "lr_gen": 0.1, "lr_disc": 0.2}]
    epochs = [{"epoch": 1, "step": 1, "train_loss_gen": 30.0, "train_loss_disc": 1.0, "val_loss": 2.0, "score": 7.5}]
    draw_curves([*lines, *epochs], "score", epochs[0], [], "nowhere")
    found = panels(drawn[0])
    assert labels(found["Loss"])[:4] == ["gen, one step", "gen, epoch mean", "disc, one step", "disc, epoch mean"]
    assert labels(found["Parts of the training loss"])[0] == "gen mel" and found["Loss"].get_yscale() == "log"
    assert labels(found["Learning rate"])[:2] == ["disc", "gen"] and "Validation: score" in found


def test_millimetres_have_a_panel_of_their_own_however_few_they_are():
    epochs = [{"step": step, "dice": 0.9, "nsd": 0.8, "assd": assd, "hd95": 2.0} for step, assd in ((0, 0.9), (10, 0.8))]
    shares, *others = plots.metric_panels(epochs, "dice")
    assert [line.key for line in shares.lines] == ["dice", "nsd"]
    assert {(panel.unit, panel.lines[0].key) for panel in others} == {("mm", "assd"), ("mm", "hd95")}
