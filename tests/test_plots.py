"""Pictures are drawn without touching what a notebook has set."""

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image

from common.plots import draw_bars


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
