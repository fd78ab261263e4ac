"""Settings: default < YAML < flag, strictness that helps, and --help that answers at once."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from common.config import LoadConfig, TrainConfig, UserError, cli, parse, setting, write_yaml


@dataclass
class Config(TrainConfig):
    """The docstring of the class is not a comment."""

    model: str = setting("big/base", demo="demo")  # the base model
    epochs: int = setting(30, demo=3)  # passes, 100% of the data
    lr: float = setting(1e-4, demo=1e-2)  # peak rate
    mode: Literal["fast", "exact"] = "fast"  # how it counts
    augment: bool = True  # random flips
    limit: int | None = None  # at most so many; empty: all


def from_yaml(tmp_path, text: str, *flags):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return parse(Config, ["--config", str(path), *flags])


def test_precedence(tmp_path):
    assert parse(Config, []).seed == 0
    config = from_yaml(tmp_path, "warmup_steps: 7\nseed: 3\n", "--seed", "4")
    assert (config.warmup_steps, config.seed, config.batch_size) == (7, 4, 8)
    # A flag that says the default still wins over the file.
    assert from_yaml(tmp_path, "seed: 3\naugment: false\n", "--seed", "0", "--augment") == parse(Config, [])


@pytest.mark.parametrize(
    ("flags", "base", "epochs", "lr"),
    [
        ([], "demo", 3, 1e-2),
        (["--data_dir", "x"], "big/base", 30, 1e-4),
        (["--data_dir", "x", "--model", "demo"], "demo", 3, 1e-2),
        (["--model", "my/base"], "my/base", 30, 1e-4),
        (["--epochs", "5"], "demo", 5, 1e-2),
        (["--data_dir", "x", "--model", ""], "big/base", 30, 1e-4),
    ],
)
def test_real_and_demo_defaults(flags, base, epochs, lr):
    config = parse(Config, flags)
    assert (config.model, config.epochs, config.lr) == (base, epochs, lr)


def test_demo_rule_follows_the_yaml(tmp_path):
    assert from_yaml(tmp_path, "data_dir: x\n").epochs == 30
    assert from_yaml(tmp_path, "data_dir: x\nmodel: demo\n").epochs == 3


def test_spellings():
    assert parse(Config, ["--batch-size", "3"]).batch_size == 3
    assert parse(Config, ["--batch_size=3"]).batch_size == 3
    for flag in ("--no_augment", "--no-augment"):
        assert parse(Config, [flag]).augment is False
    assert parse(Config, ["--no_augment", "--augment"]).augment is True
    assert parse(Config, ["--lr", "1e-3"]).lr == 1e-3
    assert parse(Config, ["--limit", "4"]).limit == 4
    assert parse(Config, ["--limit", ""]).limit is None


@dataclass
class Dashes:
    two_words_here: bool = True  # both


def test_every_mixture_of_dashes_negates():
    for flag in ("--no_two_words_here", "--no-two-words-here", "--no-two_words_here", "--no_two-words-here"):
        assert parse(Dashes, [flag]).two_words_here is False


def test_yaml_numbers(tmp_path):
    config = from_yaml(tmp_path, "lr: 1e-3\nweight-decay: 1\nepochs: 4.0\nlimit: null\nprecision: bf16\n")
    assert (config.lr, config.weight_decay, config.epochs, config.limit) == (1e-3, 1.0, 4, None)
    assert (type(config.lr), type(config.weight_decay), type(config.epochs)) == (float, float, int)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bath_size: 3\n", ["bath_size", "batch_size"]),
        ("epochs: many\n", ["epochs", "many", "whole number"]),
        ("epochs: 2.5\n", ["epochs", "2.5", "whole number"]),
        ("epochs: true\n", ["epochs", "True", "whole number"]),
        ("augment: 1\n", ["augment", "true or false"]),
        ("data_dir: 2024\n", ["data_dir", "2024", "text"]),
        ("lr: [1, 2]\n", ["lr", "number"]),
        ("lr:\n", ["lr", "number"]),
        ("mode: slow\n", ["mode", "slow", "fast", "exact"]),
        ("seed: 1\nseed: 2\n", ["seed", "twice"]),
        ("batch_size: 1\nbatch-size: 2\n", ["batch", "twice"]),
        ("seed: 1\n  lr: 2\n", ["YAML"]),
        ("- 1\n- 2\n", ["name: value"]),
        ("data_dir: !!python/object/apply:os.getcwd []\n", ["YAML"]),
    ],
)
def test_yaml_faults_name_themselves(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, text)
    message = str(error.value)
    assert "settings.yaml" in message and "\n" not in message
    assert [word for word in words if word not in message] == []


def test_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        parse(Config, ["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epoch", "3"], ["--epoch"]),  # no abbreviations: a later flag must not change what they mean
        (["--epochs", "3.5"], ["epochs", "3.5", "whole number"]),
        (["--mode", "slow"], ["mode", "fast", "exact"]),
        (["--precision", "fp8"], ["precision", "fp32", "bf16"]),
        (["--augment", "yes"], ["yes"]),
    ],
)
def test_flag_faults_name_themselves(capsys, flags, words):
    with pytest.raises(SystemExit) as leaving:
        parse(Config, flags)
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []


def test_needed_setting(capsys):
    @dataclass
    class Needs:
        input: str  # what to read

    with pytest.raises(SystemExit):
        parse(Needs, [])
    assert "--input" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--data_dir", "a b/#1: 'x'", "--no_augment", "--lr", "3e-5", "--run_name", "off", "--limit", "5"],
        ["--data_dir", "2024", "--model", "1e3", "--run_name", "äöü", "--mode", "exact", "--resume"],
        ["--data_dir", "null", "--model", "~", "--output_dir", "C:\\x\ny", "--weight_decay", "0"],
    ],
)
def test_written_yaml_reads_back_equal(tmp_path, flags):
    config = parse(Config, flags)
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(Config, ["--config", str(tmp_path / "config.yaml")]) == config
    text = (tmp_path / "config.yaml").read_text()
    assert "# passes, 100% of the data" in text and "# peak rate" in text
    assert yaml.safe_load(text) == dataclasses.asdict(config)


def test_help_shows_comment_and_default_of_every_setting(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(Config, ["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("--limit") == 1
    for wanted in (
        "passes, 100% of the data (default: 30; demo: 3)",
        "the base model (default: big/base; demo: demo)",
        "how it counts (default: fast)",
        "--mode {fast,exact}",
        "--batch_size BATCH_SIZE, --batch-size BATCH_SIZE samples per process and backward pass (default: 8)",
    ):
        assert wanted in text
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in text


@pytest.mark.parametrize("cls", [TrainConfig, LoadConfig])
def test_every_shared_setting_has_a_comment(cls):
    from common.config import field_comments

    assert {name for name, comment in field_comments(cls).items() if not comment} == set()


@pytest.mark.parametrize("flag", ["--batch_size", "--gradient_accumulation_steps", "--epochs"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_that_cannot_train_are_refused(flag, value):
    with pytest.raises(UserError, match=flag.strip("-")):
        parse(Config, [flag, value])


def test_cli_ends_in_one_line(capsys):
    def fails():
        raise UserError("the cat is on the keyboard")

    with pytest.raises(SystemExit) as leaving:
        cli(fails)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: the cat is on the keyboard\n"


def test_an_error_stays_one_line_whatever_a_file_has_told(capsys):
    def fails():
        raise UserError("unknown key a\nb\x1b[31m\u202e")

    with pytest.raises(SystemExit):
        cli(fails)
    assert capsys.readouterr().err == "error: unknown key a b [31m \n"
