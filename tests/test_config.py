"""Settings: default < YAML < flag, strictness that helps, and --help that answers at once."""

import dataclasses
import errno
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

import pytest
import yaml
from conftest import DETECTION, FOLDERS, ROOT

from common.config import (
    VERSION,
    Count,
    LoadConfig,
    Range,
    TrainConfig,
    UserError,
    cli,
    field_kinds,
    parse,
    range_of,
    setting,
    write_yaml,
)


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
        (["--epoch", "3"], ["'epoch'", "'epochs'"]),  # no abbreviations: a later flag must not change what they mean
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

    for flags in ([], ["--input", ""]):  # as by `--input "$FILES"` where nobody has set it
        with pytest.raises(SystemExit):
            parse(Needs, flags)
        assert "--input is needed: what to read" in capsys.readouterr().err


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
        "passes, 100% of the data (default: 30; demo: 3; 1 to 1000000)",
        "the base model (default: big/base; demo: demo)",
        "how it counts (default: fast)",
        "--augment, --no_augment random flips (default: True)",
        "--mode {fast,exact}",
        "--batch_size BATCH_SIZE samples per process and backward pass (default: 8; 1 to 4096)",
    ):
        assert wanted in text
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in text or f"--{f.name}, --no_{f.name} " in text


@pytest.mark.parametrize("cls", [TrainConfig, LoadConfig])
def test_every_shared_setting_has_a_comment(cls):
    from common.config import field_comments

    assert {name for name, comment in field_comments(cls).items() if not comment} == set()


SCRIPTS = [folder / f"{name}.py" for folder in FOLDERS for name in ("train", "train_lora", "eval", "infer")]
SCRIPTS += [ROOT / "scripts" / f"{name}.py" for name in ("prepare_dog_dataset", "peft_table", "benchmark")]


def settings_of(script: Path):
    """The class of a script's settings, without what the script imports for its work."""
    spec = importlib.util.spec_from_file_location(f"settings_of_{script.parent.name}_{script.stem}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == spec.name)


def test_every_setting_of_a_tool_has_a_comment_wrapped_or_not(monkeypatch):
    from common.config import field_comments

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    tools = [path for path in (ROOT / "scripts").glob("*.py") if "config = parse(" in path.read_text()]
    assert len(tools) > 8
    silent = {path.stem: [name for name, text in field_comments(settings_of(path)).items() if not text] for path in tools}
    assert {tool: names for tool, names in silent.items() if names} == {}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.stem}")
def test_every_number_has_a_range_that_is_kept_and_shown(script, capsys, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    cls = settings_of(script)
    kinds = field_kinds(cls)
    numbers = [name for name, kind in kinds.items() if (get_args(kind) or [kind])[0] in (int, float)]
    assert numbers and [name for name in numbers if not range_of(kinds[name])] == []
    for name in numbers:
        for value in ("nan", "inf", "-inf", "-1", "1e30", "1" + 6000 * "0"):
            with pytest.raises(SystemExit) as leaving:
                parse(cls, [f"--{name}={value}"])
            lines = capsys.readouterr().err.splitlines()
            assert leaving.value.code == 2 and len(lines) == 1 and name in lines[0] and len(lines[0]) < 300
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in numbers if str(range_of(kinds[name])) not in text.partition(f"--{name} ")[2]] == []


def test_a_range_holds_in_yaml_and_in_code_and_is_inherited(tmp_path):
    with pytest.raises(UserError, match=r"epochs is 0, but must be 1 to 1000000"):
        from_yaml(tmp_path, "epochs: 0\n")
    with pytest.raises(UserError, match="--lr is nan, but must be 1e-09 to 10"):
        Config(lr=float("nan"))
    assert field_kinds(Config)["epochs"] == Count
    assert Config(epochs=10**6).epochs == 10**6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 2020-13-45\n", "month"),
        ("seed: " + 6000 * "9" + "\n", "digits"),
        ("lr: " + 100_000 * "1:" + "1\n", "digits"),  # to the base of 60, as YAML has it
        ("lr: 1" + 500 * ":59" + ".5\n", "too large|digits"),
        ("lr: [" + 200_000 * "1," + "]\n", "entries"),
        ("lr: " + 50_000 * "[", "nested too deeply"),
        ("a: &a [l, l]\nlr: *a\n", "alias"),
        ("base: &base {lr: 1}\n<<: *base\n", "alias"),
        ("lr: 1\n#" + 2**20 * "-", "larger than"),
        ('data_dir: "a\\0b"\n', "text"),
        ("? [1, 2]\n: 3\n", "YAML"),
    ],
)
def test_yaml_that_would_hang_or_crash_a_reader_is_refused_at_once(tmp_path, text, words):
    began = time.process_time()
    with pytest.raises(UserError, match=words) as error:
        from_yaml(tmp_path, text)
    assert time.process_time() - began < 5 and len(str(error.value)) < 500


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match="pipe"):
        parse(Config, ["--config", str(tmp_path / "settings.yaml")])


def test_a_setting_of_the_other_script_is_told_from_a_slip(tmp_path, capsys):
    full, lora = (settings_of(DETECTION / f"{name}.py") for name in ("train", "train_lora"))
    (tmp_path / "settings.yaml").write_text("lora_r: 4\n")
    with pytest.raises(UserError, match="lora_r is a setting of train_lora.py, not of train.py"):
        parse(full, ["--config", str(tmp_path / "settings.yaml")])
    for cls, flag, words in (
        (lora, "--lr-backbone=1e-5", "lr_backbone is a setting of train.py, not of train_lora.py"),
        (full, "--bath_size=3", "unknown setting 'bath_size'; did you mean 'batch_size'?"),
        (full, "photos", "what is 'photos' for?"),
    ):
        with pytest.raises(SystemExit):
            parse(cls, [flag])
        assert capsys.readouterr().err == f"error: {words}; --help lists the settings\n"


def test_ranges_are_shown_as_they_are_written():
    told = {str(Range(0, 2**32 - 1)), str(Range(16, 4096, or_zero=True)), str(Range(1e-9, 10)), str(Range(0, 0.95))}
    assert told == {"0 to 4294967295", "0, or 16 to 4096", "1e-09 to 10", "0 to 0.95"}


def test_version_names_the_project_and_its_libraries(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(Config, ["--version"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and f"LoRA Workshop {VERSION}; Python 3." in text
    assert f"torch {metadata.version('torch')}, " in text


def test_a_terminal_that_has_no_letters_for_a_name_gets_the_rest_of_the_line(tmp_path):
    code = r"from common.config import cli; cli(print, 'caf\u00e9 \udce9 done')"
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (got.returncode, got.stdout) == (0, b"caf\\xe9 \\udce9 done\n")


def test_settings_that_are_no_utf_8_are_written_and_read_back(tmp_path):
    config = Config(data_dir="caf\udce9")
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(Config, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC, errno.EEXIST, errno.EISDIR])
def test_what_the_file_system_refuses_ends_in_one_line(capsys, number):
    def fails():
        raise OSError(number, os.strerror(number), "outputs/x")

    with pytest.raises(SystemExit) as leaving:
        cli(fails)
    assert leaving.value.code == 2 and capsys.readouterr().err == f"error: {os.strerror(number)}: outputs/x\n"


def test_cli_ends_in_one_line(capsys):
    def fails():
        raise UserError("the cat is on the keyboard")

    with pytest.raises(SystemExit) as leaving:
        cli(fails)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: the cat is on the keyboard\n"


def test_a_home_folder_of_nobody_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli(Path("~no-such-user/pictures").expanduser)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: a path starts with ~ and a name, and there is no such user here\n"


def test_a_word_of_thousands_of_letters_is_not_repeated_whole(capsys):
    with pytest.raises(SystemExit):
        parse(Config, [f"--{'9' * 10**5}"])
    assert len(capsys.readouterr().err) < 500


def test_an_error_stays_one_line_whatever_a_file_has_told(capsys):
    def fails():
        raise UserError("unknown key a\nb\x1b[31m\u202e")

    with pytest.raises(SystemExit):
        cli(fails)
    assert capsys.readouterr().err == "error: unknown key a b [31m \n"
