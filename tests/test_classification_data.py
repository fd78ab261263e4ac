"""Classification data: training and eval find the same pictures where the settings or the checkpoint say they lie."""

from types import SimpleNamespace

from conftest import CLASSIFICATION, use_task
from test_labelled import CLASSES, fill, processor, settings

TASK = CLASSIFICATION
use_task(TASK)

from data import build_loaders, load_for_eval, read_tables  # noqa: E402


def test_eval_holds_out_the_pictures_that_training_held_out(tmp_path):
    fill(tmp_path, 12)
    _, val, *_ = build_loaders(settings(tmp_path), processor(), read_tables(str(tmp_path), 0))
    config = SimpleNamespace(data_dir="", split="val", subset=False, batch_size=0, num_workers=0)
    loader, *_ = load_for_eval(config, processor(), {"classes": CLASSES, "seed": 0, "batch_size": 2, "data_dir": str(tmp_path)})
    assert [s.name for s in loader.dataset.samples] == [s.name for s in val.dataset.samples]
