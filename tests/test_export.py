"""scripts/export.py: a copied script runs outside the project and does what the original does, both as files and as one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Script

sys.path.insert(0, str(ROOT / "scripts"))

from export import export, find_clashes, follow_imports, import_lines, requirements, single_file  # noqa: E402

from common.config import UserError  # noqa: E402

FINDER = """
# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))
"""

TRAIN = (
    '''"""Trains a thing.

    python train.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
'''
    + FINDER
    + '''
from common.config import Config, cli  # noqa: E402


@dataclass
class TrainConfig(Config):
    """What it needs."""

    rate: float = 0.5  # size of a step


def main(argv=None):
    config = TrainConfig()
    import json

    from data import load
    from model import Model  # the model

    if config.rate > 1:
        from common.plots import draw
    else:
        # nothing to draw

        print(json.dumps({"rate": config.rate}))

    try:
        from common.plots import draw
    except ImportError:
        raise
    print(Model(load("π")).name, draw(2), __doc__.splitlines()[0])


if __name__ == "__main__":
    cli(main)
'''
)

PROJECT = {
    "common/config.py": '''"""Settings.

Two paragraphs.
"""

import os
import sys


class Config:
    """The base of all settings."""

    text = """keep


    this import os
from nowhere"""


def cli(main):
    main(sys.argv[1:])  # one place
    print(repr(Config.text), os.sep)
''',
    "common/plots.py": '''"""Pictures."""

from math import pi

from common.runtime import twice  # noqa: E402


def draw(x):
    # a comment that stays
    return   round( twice(x) * pi, 3 )


if __name__ == "__main__":
    print("I am not to be run")
''',
    "common/runtime.py": """import os.path


def twice(x):
    from common.plots import draw  # imports each other, inside a function only

    return 2 * x if draw else os.path
""",
    "common/unused.py": "unused = 1\n",
    "tasks/shapes/data.py": '''"""Data."""

# needs: scipy, timm  (scipy: matching; timm: backbones, all of them)
import os
from pathlib import Path

HERE = Path(__file__).parent


def load(text):
    import yaml
    from PIL import Image

    assert os and yaml and Image
    return text + str((HERE / "demo_base" / "weights.bin").exists())
''',
    "tasks/shapes/model.py": """class Model:
    def __init__(self, name):
        from common.runtime import twice

        self.name = twice(name)
""",
    "tasks/shapes/train.py": TRAIN,
    "tasks/shapes/demo_base/weights.bin": "weights",
    "requirements.txt": "# what all tasks use\ntorch>=2.4\npillow>=10.1  # pictures\npyyaml>=6\nscipy\nTIMM>=1,<2\n",
}


def make_project(folder, **changes) -> Path:
    """Writes PROJECT below `folder`; `changes` replaces files by the stem of their names. Returns the script."""
    for name, text in PROJECT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(path.stem, text), encoding="utf-8")
    return folder / "tasks" / "shapes" / "train.py"


def run(script, *args, cwd=None):
    result = subprocess.run([sys.executable, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("one_file", [False, True])
def test_a_copy_prints_what_the_original_prints(tmp_path, one_file):
    script = make_project(tmp_path / "project")
    names = export(script, tmp_path / "copy", one_file)
    original = run(script, cwd=script.parent)
    assert "πTrueπTrue" in original
    (tmp_path / "project").rename(tmp_path / "away")  # nothing of the project is in reach
    assert run(tmp_path / "copy" / "train.py", cwd=tmp_path) == original
    modules = {"data.py", "model.py", "common/config.py", "common/plots.py", "common/runtime.py"}
    assert set(names) == {"train.py", "demo_base/weights.bin", "requirements.txt"} | (set() if one_file else modules)


def test_one_file_keeps_text_and_drops_what_is_not_needed(tmp_path):
    text = single_file(follow_imports(make_project(tmp_path)))
    assert text.startswith('"""Trains a thing.\n\n    python train.py\n"""\n\nimport os\nimport os.path\nimport sys\nfrom ')
    assert "    # a comment that stays\n    return   round( twice(x) * pi, 3 )\n" in text
    assert '    text = """keep\n\n\n    this import os\nfrom nowhere"""\n' in text
    assert "    rate: float = 0.5  # size of a step\n" in text and "# Two paragraphs." in text
    assert text.count("if __name__") == 1 and text.endswith('if __name__ == "__main__":\n    cli(main)\n')
    assert "ROOT" not in text and "Runs without installing" not in text and "noqa" not in text
    assert "    if config.rate > 1:\n        pass\n    else:\n        # nothing to draw\n\n        print(" in text
    assert "    try:\n        pass\n    except ImportError:\n        raise\n" in text
    assert "    import json\n\n    if config" in text  # no pile of blank lines where imports went
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert imported == {"dataclasses", "math", "pathlib", "PIL"}
    places = [text.index(f"# {name} ---") for name in ("common/config.py", "common/runtime.py", "common/plots.py", "train.py")]
    assert places == sorted(places)


def test_imports_of_the_finder_go_where_nothing_else_uses_them(tmp_path):
    config = "class Config:\n    pass\n\n\ndef cli(main):\n    main()\n"
    text = single_file(follow_imports(make_project(tmp_path, config=config, data="def load(text):\n    return text\n")))
    assert "import sys" not in text and "pathlib" not in text


def test_requirements_name_what_is_imported_with_the_bounds_of_the_project(tmp_path):
    script = make_project(tmp_path / "project")
    assert requirements(follow_imports(script)) == ["pillow>=10.1", "pyyaml>=6", "scipy", "TIMM>=1,<2"]
    export(script, tmp_path / "copy", one_file=True)
    assert (tmp_path / "copy" / "requirements.txt").read_text() == "pillow>=10.1\npyyaml>=6\nscipy\nTIMM>=1,<2\n"


def test_requirements_that_are_there_stay(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "requirements.txt").write_text("Pillow==9.5\nflask")
    for _ in range(2):
        export(make_project(tmp_path / "project"), tmp_path / "copy")
        listed = (tmp_path / "copy" / "requirements.txt").read_text()
        assert listed == "Pillow==9.5\nflask\npyyaml>=6\nscipy\nTIMM>=1,<2\n"


def test_files_that_differ_are_kept_unless_overwrite(tmp_path):
    script = make_project(tmp_path / "project")
    export(script, tmp_path / "copy")
    export(script, tmp_path / "copy")  # the same again is fine
    mine = tmp_path / "copy" / "data.py"
    mine.write_text("mine")
    (tmp_path / "copy" / "model.py").unlink()
    with pytest.raises(UserError, match="data.py.*--overwrite"):
        export(script, tmp_path / "copy")
    assert mine.read_text() == "mine" and not (tmp_path / "copy" / "model.py").exists()
    export(script, tmp_path / "copy", overwrite=True)
    assert mine.read_text() == PROJECT["tasks/shapes/data.py"]


def test_no_demo_leaves_the_base_model_out(tmp_path):
    script = make_project(tmp_path / "project")
    export(script, tmp_path / "copy", demo=False)
    assert not (tmp_path / "copy" / "demo_base").exists()


def test_the_project_itself_is_no_place_for_a_copy(tmp_path):
    script = make_project(tmp_path)
    for folder in (script.parent, tmp_path):
        with pytest.raises(UserError, match="the project itself"):
            export(script, folder)
    assert not (script.parent / "common").exists()


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("model", "def load():\n    pass\n\n\nclass Model:\n    pass\n", ["load", "data", "model"]),
        ("model", "HERE = 1\n\n\nclass Model:\n    pass\n", ["HERE", "data", "model"]),
        ("model", "from posixpath import join as pi\n\n\nclass Model:\n    pass\n", ["pi", "math.pi", "posixpath.join", "model"]),
        ("model", "import numpy as Path\n\n\nclass Model:\n    pass\n", ["Path", "pathlib.Path", "numpy", "model"]),
        ("model", "for load in ():\n    pass\n\n\nclass Model:\n    pass\n", ["load", "data", "model"]),
        ("model", "def print():\n    pass\n\n\nclass Model:\n    pass\n", ["print", "model", "Python's own"]),
    ],
)
def test_a_clash_of_names_is_an_error_that_names_both(tmp_path, module, text, words):
    script = make_project(tmp_path / "project", **{module: text})
    (clash,) = find_clashes(follow_imports(script))
    with pytest.raises(UserError) as error:
        export(script, tmp_path / "copy", one_file=True)
    for word in words:
        assert word in clash and word in str(error.value)
    assert not (tmp_path / "copy").exists()
    export(script, tmp_path / "copy")  # separate files do not clash


def test_names_that_only_look_alike_are_no_clash(tmp_path):
    """Locals, comprehension variables and the same import twice."""
    model = "import os\nfrom pathlib import Path\n\nSQUARES = [load * load for load in range(3)]\n\n\n"
    model += "class Model:\n    load = 1\n\n"
    model += "    def __init__(self, name):\n        HERE = os.fspath(Path(name))\n        self.name = HERE\n"
    script = make_project(tmp_path / "project", model=model)
    assert find_clashes(follow_imports(script)) == []
    assert "πTrue" in run_copy(script, tmp_path)


def run_copy(script, tmp_path):
    export(script, tmp_path / "copy", one_file=True)
    return run(tmp_path / "copy" / script.name, cwd=tmp_path)


def test_future_imports_stand_first(tmp_path):
    model = PROJECT["tasks/shapes/model.py"]
    script = make_project(tmp_path / "project", model="from __future__ import annotations\n\n\n" + model)
    assert "πTrueπTrue" in run_copy(script, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import data\n", "from data import name"),
        ("import common.plots\n", "from common.plots import name"),
        ("from data import load as load_data\n", "without"),
        ("from data import *\n", "without"),
        ("from common import plots\n", "from common.module import name"),
        ("from .data import load\n", "without dots"),
        ("from common.nowhere import load\n", "no module common.nowhere"),
        ("def broken(:\n", "model.py:1"),
    ],
)
def test_other_forms_of_local_imports_are_errors(tmp_path, text, words):
    script = make_project(tmp_path, model=text + PROJECT["tasks/shapes/model.py"])
    with pytest.raises(UserError, match=words):
        follow_imports(script)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("from data import load\n", "from data import load; print(1)\n", "line of its own"),
        ('load("π")', 'print(load := load("π"))', "load is imported here"),
        ("    import json\n", "    import json\n    print(ROOT)\n", "project_root"),
        ("import sys\n", "import sys\nfrom math import *\n", "instead of"),
    ],
)
def test_what_one_file_cannot_hold_is_an_error(tmp_path, old, new, words):
    script = make_project(tmp_path, train=TRAIN.replace(old, new))
    with pytest.raises(UserError, match=words):
        single_file(follow_imports(script))


def test_module_level_needs_win_over_imports_inside_functions(tmp_path):
    """runtime is needed by plots only inside a function, but plots needs runtime at once, whichever is reached first."""
    twice, draw = "    from common.runtime import twice\n", "    from common.plots import draw\n"
    for imports in (twice + draw, draw + twice):
        uses = f"def load(text):\n{imports}\n    return text + str(draw(twice(1)))\n"
        plots = PROJECT["common/plots.py"].replace("\n\ndef draw", "\nFOUR = twice(2)\n\n\ndef draw")
        script = make_project(tmp_path, data=uses, plots=plots)
        names = [module.name for module in follow_imports(script)]
        assert names.index("common.runtime") < names.index("common.plots") and names[-1] == "train"


def test_import_lines_are_in_the_order_of_isort():
    found = {("torch", "", ""), ("numpy", "", "np"), ("torch", "nn", ""), ("torch.nn", "functional", "F"), ("PIL", "Image", ""),
             ("a", "CONSTANT", ""), ("a", "function", ""), ("a", "Class", "")}  # fmt: skip
    assert import_lines(found) == [
        "import numpy as np",
        "import torch",
        "from a import CONSTANT, Class, function",
        "from PIL import Image",
        "from torch import nn",
        "from torch.nn import functional as F",
    ]


# The real scripts ------------------------------------------------------------------------------------------------------

NAMES = [f"{name}{lora}.py" for name in ("train", "eval", "infer") for lora in ("", "_lora")]
FOLDERS = [*sorted(ROOT.glob("image_tasks/*")), ROOT / "fine_tuning", ROOT / "medical_sam3d", ROOT / "voice_rvc"]
SCRIPTS = [folder / name for folder in FOLDERS for name in NAMES if (folder / name).is_file()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_can_be_taken_out(script, tmp_path):
    def ask(folder):  # in a fork: one file imports all packages at its top, which takes a fresh process seconds
        return Script(folder, script.name, ["--help"], tmp_path / "log").wait().stdout

    original = ask(script.parent)
    for one_file in (False, True) if script.stem.endswith("_lora") else (True,):  # the twins share all that could differ
        folder = tmp_path / ("one" if one_file else "many")
        export(script, folder, one_file, demo=False)
        assert ask(folder) == original
        assert not (folder / "common").exists() or not one_file


def test_requirements_of_the_project_name_what_its_scripts_need():
    listed = {line.split(" #")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    needed = {line: script.relative_to(ROOT) for script in SCRIPTS for line in requirements(follow_imports(script))}
    assert not {line: script for line, script in needed.items() if line not in listed}


def test_as_a_command(tmp_path):
    script = make_project(tmp_path / "project")
    said = run(ROOT / "scripts" / "export.py", script, tmp_path / "my copy", "--single-file", "--no-demo", cwd=tmp_path)
    assert "wrote to" in said and "python train.py" in said and "'" in said.split("cd ")[1]
    assert sorted(p.name for p in (tmp_path / "my copy").iterdir()) == ["requirements.txt", "train.py"]
    again = [sys.executable, str(ROOT / "scripts" / "export.py"), str(tmp_path / "nowhere.py"), str(tmp_path / "copy")]
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: there is no script") and result.stderr.count("\n") == 1
