"""Where the pictures come from: a folder of dog breeds (or of anything else that has one class a picture), or the demo data."""

from pathlib import Path

from common.config import UserError
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
    """What build_loaders needs of the data; opens no picture. UserError where there is none, or a list of other classes."""
    source = source_of(data_dir)
    tables = read_labelled(source, seed, exclude=exclude)
    check_class_list(source, tables[1])
    return tables


def build_loaders(config, processor, tables):
    """(train loader, validation loader, class names, facts for the summary); tables: what read_tables gave."""
    return labelled_loaders(config, processor, tables)


def load_for_eval(config, processor, origin: dict):
    """(loader, classes, name of the data) for eval: config.data_dir, or the data that the checkpoint was trained on."""
    return labelled_for_eval(config, processor, origin, source_of(config.data_dir or origin["data_dir"]))


def check_class_list(source: Path, classes: list[str]) -> None:
    """UserError where a classes.txt lies in the data folder (prepare_dog_dataset.py writes one) and names other classes."""
    file = source / "classes.txt"
    if not file.is_file():
        return
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    strange, missing = ([n for n in a if n not in b] for a, b in ((names, classes), (classes, names)))
    if strange or missing or len(set(names)) != len(names):
        only = [f"no pictures of {', '.join(strange[:3])}"] if strange else []
        only += [f"{', '.join(missing[:3])} not in the list"] if missing else []
        raise UserError(f"{file} does not fit the class folders ({'; '.join(only) or 'a name twice'}); correct or remove it")
