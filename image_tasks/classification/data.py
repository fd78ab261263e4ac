"""The data of classification: pictures with one class each, the user's own or the demo's synthetic ones."""

from pathlib import Path

from common.folders import make_once
from common.vision.labelled import labelled_for_eval, labelled_loaders, read_labelled

HERE = Path(__file__).resolve().parent


def demo_data() -> Path:
    """The folder of the synthetic target data, drawn at the first call (a few seconds)."""
    from synthetic import make_demo_data

    return make_once(HERE / "data" / "demo", make_demo_data)


def source_of(data_dir: str) -> Path:
    return Path(data_dir).expanduser() if data_dir else demo_data()


def read_tables(data_dir: str, seed: int, exclude: str = ""):
    """What build_loaders needs of the data; opens no picture. UserError where there is no such data."""
    return read_labelled(source_of(data_dir), seed, exclude=exclude)


def build_loaders(config, processor, tables):
    """(train loader, validation loader, class names, facts for the summary); tables: what read_tables gave."""
    return labelled_loaders(config, processor, tables)


def load_for_eval(config, processor, origin: dict):
    """(loader, classes, name of the data) for eval: config.data_dir, or the data that the checkpoint was trained on."""
    return labelled_for_eval(config, processor, origin, source_of(config.data_dir or origin["data_dir"]))
