"""scripts/export.py: a copied script runs outside the project and does what the original does, both as files and as one file."""

import ast
import builtins
import contextlib
import io
import json
import os
import runpy
import subprocess
import symtable
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from conftest import CLASSIFICATION, ROOT, Script, import_for_scripts, in_child, of_project, show

sys.path.insert(0, str(ROOT / "scripts"))

from common.config import UserError  # noqa: E402
from export import export, packages_of_modules, requirements  # noqa: E402
from export import main as export_main  # noqa: E402
from local_imports import follow_imports  # noqa: E402
from single_file import find_clashes, import_lines, single_file  # noqa: E402

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
    "common/__init__.py": "",
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
    modules = {"data.py", "model.py", "common/__init__.py", "common/config.py", "common/plots.py", "common/runtime.py"}
    assert set(names) == {"train.py", "demo_base/weights.bin", "requirements.txt"} | (set() if one_file else modules)


def test_one_file_keeps_text_and_drops_what_is_not_needed(tmp_path):
    text = single_file(follow_imports(make_project(tmp_path)))
    assert text.startswith('"""Trains a thing.\n\n    python train.py\n"""\n\nimport os\nimport os.path\nimport sys\nfrom ')
    assert "    # a comment that stays\n    return   round( twice(x) * pi, 3 )\n" in text
    assert '    text = """keep\n\n\n    this import os\nfrom nowhere"""\n' in text
    assert "    rate: float = 0.5  # size of a step\n" in text and "# Two paragraphs." in text
    assert text.count("if __name__") == 1 and text.endswith('if __name__ == "__main__":\n    cli(main)\n')
    assert "HERE" in text and "ROOT" not in text and "Runs without installing" not in text and "noqa" not in text
    assert "    if config.rate > 1:\n        pass\n    else:\n        # nothing to draw\n\n        print(" in text
    assert "    try:\n        pass\n    except ImportError:\n        raise\n" in text
    assert "    import json\n\n    if config" in text  # no pile of blank lines where imports went
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert imported == {"dataclasses", "math", "pathlib", "PIL"} and text.count("\nimport os\n") == 1
    places = [text.index(f"# {name} ---") for name in ("common/config.py", "common/runtime.py", "common/plots.py", "train.py")]
    assert places == sorted(places)


def test_imports_of_the_finder_go_where_nothing_else_uses_them(tmp_path):
    config = "class Config:\n    pass\n\n\ndef cli(main):\n    main()\n"
    text = single_file(follow_imports(make_project(tmp_path, config=config, data="def load(text):\n    return text\n")))
    assert "import sys" not in text and "pathlib" not in text


def test_requirements_name_what_is_imported_with_the_bounds_of_the_project(tmp_path):
    script = make_project(tmp_path / "project")
    for one_file in (False, True):
        export(script, tmp_path / str(one_file), one_file)
        assert (tmp_path / str(one_file) / "requirements.txt").read_text() == "pillow>=10.1\npyyaml>=6\nscipy\nTIMM>=1,<2\n"


def test_requirements_leave_out_what_is_optional(tmp_path):
    (tmp_path / "requirements.txt").write_text("scipy>=1\n")
    (tmp_path / "requirements-optional.txt").write_text("av>=14  # other formats\nscipy\n")
    assert requirements({"av", "scipy", "rasterio"}, tmp_path) == ["rasterio", "scipy>=1"]


def test_requirements_that_are_there_stay(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "requirements.txt").write_text("Pillow==9.5\nflask")
    for _ in range(2):
        export(make_project(tmp_path / "project"), tmp_path / "copy")
        listed = (tmp_path / "copy" / "requirements.txt").read_text()
        assert listed == "Pillow==9.5\nflask\npyyaml>=6\nscipy\nTIMM>=1,<2\n"


def test_requirements_in_another_encoding_keep_their_bytes(tmp_path):
    script, theirs = make_project(tmp_path / "project"), tmp_path / "copy" / "requirements.txt"
    theirs.parent.mkdir()
    theirs.write_bytes(b"flask  # caf\xe9\n")
    export(script, theirs.parent)
    assert theirs.read_bytes().startswith(b"flask  # caf\xe9\n") and b"scipy\n" in theirs.read_bytes()


@pytest.mark.parametrize("in_the_way", ["copy", "copy/train.py", "copy/common", "copy/requirements.txt"])
def test_what_stands_in_the_way_of_a_copy_is_named(tmp_path, in_the_way):
    script, place = make_project(tmp_path / "project"), tmp_path / in_the_way
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if place.suffix else place.touch()  # a folder where a file goes, or a file where a folder goes
    with pytest.raises(UserError, match=f"cannot write the copy: .*{place.name}"):
        export_main([str(script), str(tmp_path / "copy")])


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


# What one file leaves out ----------------------------------------------------------------------------------------------

MODEL = '''"""Models.

How they are built.
"""

from fractions import Fraction
from math import tau

# needs: psutil  (for what is left of this module)
from common.runtime import twice

# ---- numbers -------------------------------------------------------------------------------------------------------

# More than one can count.
MANY = 3


def third():
    """A third."""
    return Fraction(1, MANY)


# ---- the model -----------------------------------------------------------------------------------------------------

KINDS = {}
FEW = 2


def kept(function):
    KINDS[function.__name__] = function
    return function


# Found by its name, not by a reference.
@kept
def registered():
    return FEW


class Model:
    def __init__(self, name: "Text"):
        self.name = twice(globals()["by_name"](name))

    def never_called(self):
        return third


def by_name(name):
    MANY = name  # a local one
    return MANY


class Text:
    pass


def unreached():
    return tau, also_unreached


def also_unreached():
    return unreached
'''


def test_one_file_holds_what_is_reached_and_no_more(tmp_path):
    text = single_file(follow_imports(make_project(tmp_path, model=MODEL)))
    for there in (
        "def kept",
        "def registered",
        "FEW = 2",
        "def third",
        "MANY = 3",
        "def by_name",
        "class Text",
        "# Found by",
        "psutil",
    ):
        assert there in text
    for gone in ("unreached", "tau", "KINDS = 0"):
        assert gone not in text
    assert "# How they are built." in text and text.count("# ---- numbers ---") == 1
    assert "πTrueπTrue" in run_copy(tmp_path / "tasks" / "shapes" / "train.py", tmp_path)


def test_comments_and_imports_go_with_the_code_they_served(tmp_path):
    model = MODEL.replace("        return third\n", "        return 3\n").replace("MANY = 3\n", 'MANY = "Model"\n')
    model += "\n\ndef also_long():\n" + "    assert True\n" * 40
    text = single_file(follow_imports(make_project(tmp_path, model=model)))
    for gone in ("---- numbers", "third", 'MANY = "', "More than", "A third", "fractions", "How they are built", "also_long"):
        assert gone not in text
    assert "# Models.\n\n\n# needs: psutil" in text and text.count("# ---- the model ---") == 1 and "FEW = 2" in text
    assert "\n\n\n\n" not in text[text.index("# common/runtime.py") :]


def test_a_module_of_which_nothing_is_reached_leaves_no_trace(tmp_path):
    data = (
        PROJECT["tasks/shapes/data.py"]
        .replace("    import yaml\n", "    yaml = Image = 1\n")
        .replace("    from PIL import Image\n", "")
    )
    script = make_project(
        tmp_path / "project", data=data + "\n\ndef unreached():\n    from common.unused import unused\n\n    return unused\n"
    )
    unused = script.parents[2] / "common" / "unused.py"
    unused.write_text("# needs: rasterio\nimport flask\n\nunused = flask\n")
    text = single_file(follow_imports(script))
    assert "unused" not in text and "flask" not in text
    export(script, tmp_path / "copy", one_file=True)
    assert (tmp_path / "copy" / "requirements.txt").read_text() == "scipy\nTIMM>=1,<2\n"
    export(script, tmp_path / "files")
    assert "rasterio" in (tmp_path / "files" / "requirements.txt").read_text()


def test_statements_that_do_more_than_define_a_name_stay(tmp_path):
    model = PROJECT["tasks/shapes/model.py"]
    model = (
        "TABLE = {}\nTABLE['x'] = sorted\na = 1; b = print\nfor c in (1, 2):\n    TABLE[c] = b\n\n\ndef gone():\n    pass\n\n\n"
        + model
    )
    text = single_file(follow_imports(make_project(tmp_path, model=model)))
    assert "TABLE = {}\nTABLE['x'] = sorted\na = 1; b = print\nfor c in" in text and "gone" not in text


def test_what_a_decorator_registers_stays_however_it_is_called(tmp_path):
    model = """from functools import partial

KINDS = {}


def add(kind, made):
    KINDS[kind] = made
    return made


@partial(add, "new")
class Registered:
    pass


@partial(sorted)
class Gone:
    pass


"""
    text = single_file(follow_imports(make_project(tmp_path, model=model + PROJECT["tasks/shapes/model.py"])))
    assert '@partial(add, "new")\nclass Registered' in text and "KINDS[kind] = made" in text and "Gone" not in text


def test_without_the_demo_its_drawing_goes_and_the_script_says_what_it_needs(tmp_path):
    data = '''"""Data."""


def demo_data():
    """Draws it."""
    from synthetic import make_demo_data

    return once(make_demo_data)


def once(make):
    return make()


def load(text):
    return demo_data() if text == "π" else text
'''
    config = PROJECT["common/config.py"] + "\n\nclass UserError(Exception):\n    pass\n"
    train = TRAIN.replace(
        "    python train.py\n",
        "    python train.py              # demo: on pictures that it draws\n    python train.py --data_dir x\n",
    )
    script = make_project(tmp_path / "project", data=data, config=config, train=train)
    (script.parent / "synthetic.py").write_text("import random\n\n\ndef make_demo_data():\n    return str(random.random() < 2)\n")
    modules = follow_imports(script)
    whole, text = single_file(modules), single_file(modules, demo=False)
    assert "make_demo_data" in whole and "# demo: on pictures" in whole
    for gone in ("synthetic", "make_demo_data", "random", "def once", "# demo"):
        assert gone not in text
    assert '    """Draws it."""\n    raise UserError("' in text and "    python train.py --data_dir x\n" in text
    assert "TrueTrue" in run_copy(script, tmp_path)
    export(script, tmp_path / "bare", one_file=True, demo=False)
    result = subprocess.run([sys.executable, str(tmp_path / "bare" / "train.py")], capture_output=True, text=True)
    assert "without the demo" in result.stderr and "--data_dir" in result.stderr


# The real scripts ------------------------------------------------------------------------------------------------------

NAMES = [f"{name}{lora}.py" for name in ("train", "eval", "infer") for lora in ("", "_lora")]
FOLDERS = sorted({file.parent for pattern in ("*/train.py", "*/*/train.py") for file in ROOT.glob(pattern)})
SCRIPTS = [folder / name for folder in FOLDERS for name in NAMES if (folder / name).is_file()]
TOOLS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "\nif __name__ ==" in path.read_text()]


def each(scripts, fast=None):
    """A test of each script. fast: those of other folders are slow."""
    slow = [path for path in scripts if fast and path.parent not in fast]
    params = [pytest.param(path, marks=pytest.mark.slow if path in slow else ()) for path in scripts]
    return pytest.mark.parametrize("script", params, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with another package named common in it, which says so when it is imported."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "foreign" / "common").mkdir(parents=True)
    (folder / "foreign" / "common" / "__init__.py").write_text("print('another common')\n")
    return folder


@cache
def copies(folder: Path, place: Path) -> dict[str, Path]:
    """The scripts in a folder of the project, taken out: "train.py one" -> the folder of the copy.

    Kinds: many files, one file, and one file without the demo (bare).
    """
    made = {}
    for script in [path for path in SCRIPTS if path.parent == folder]:
        for kind in ("many", "one", "bare"):
            made[f"{script.name} {kind}"] = copy = place / "_".join(folder.parts[-2:]) / f"{script.stem}_{kind}"
            if kind == "many":
                export(script, copy, demo=False)
            else:
                copy.mkdir(parents=True)
                (copy / script.name).write_text(single_file(follow_imports(script), demo=kind == "one"), encoding="utf-8")
    return made


def asked_of(name: str) -> str:
    """The kind of single file that is asked for --help: of twins one has the demo, the other not."""
    return "bare" if name.endswith("_lora.py") else "one"


@cache
def helps(folder: Path, place: Path) -> dict[str, tuple[int, str]]:
    """(exit code, output) of `--help` of the scripts in a folder and of their copies, all from one fork.

    Kinds: those of `copies`, which run beside another package named common; the script itself alone, and beside another common.
    """
    scripts = [path.name for path in [*SCRIPTS, *TOOLS] if path.parent == folder]
    runs = {f"{name} {kind}": folder for name in scripts for kind in ("alone", "beside")}
    runs |= {key: copy for key, copy in copies(folder, place).items() if key.split()[1] in ("many", asked_of(key.split()[0]))}
    import_for_scripts()  # one file imports all packages at its top, which takes a fresh process seconds
    answers = place / "answers.json"
    code, log = in_child(ask_all, runs, place / "foreign", answers, log=place / "log.txt")
    assert code == 0, show(log)
    return {key: tuple(answer) for key, answer in json.loads(answers.read_text()).items()}


def ask_all(runs: dict[str, Path], foreign: Path, file: Path) -> None:
    ast.parse = cache(ast.parse)  # for settings' comments inspect parses a whole file once for each class
    answers, elsewhere = {}, [path for path in sys.path if not path.startswith(str(ROOT))]
    packages = set(sys.modules) - {"common", *of_project()}
    for key, folder in runs.items():
        name, kind = key.split()
        for module in set(sys.modules) - packages:
            if module == "common" or (getattr(sys.modules[module], "__file__", None) or "").startswith(
                (str(ROOT), str(folder.parent))
            ):
                del sys.modules[module]
        if kind in ("one", "bare"):  # one file stands beside another common even where that was imported before
            sys.modules["common"] = ModuleType("common")
        sys.path[:] = [str(folder), *([] if kind == "alone" else [str(foreign)]), *elsewhere]  # as with PYTHONPATH
        sys.argv, said = [name, "--help"], io.StringIO()
        os.chdir(folder)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                runpy.run_path(str(folder / name), run_name="__main__")
                code = 0
            except SystemExit as leaving:
                code = leaving.code or 0
            except Exception as error:
                code = repr(error)
        if not folder.is_relative_to(ROOT):
            assert not of_project(), (key, of_project())
        answers[key] = code, said.getvalue()
    file.write_text(json.dumps(answers))


@each(SCRIPTS, fast=[CLASSIFICATION])
def test_every_script_can_be_taken_out(script, place):
    kind = asked_of(script.name)
    alone, many, one = (helps(script.parent, place)[f"{script.name} {which}"] for which in ("alone", "many", kind))
    code, text = alone
    assert code == 0 and "--config" in text and many == alone
    copy = copies(script.parent, place)[f"{script.name} many"]
    assert all((module.parent / "__init__.py").is_file() for module in copy.rglob("*/*.py"))
    if kind == "bare":  # it promises no demo
        text = "".join(line for line in text.splitlines(keepends=True) if "  # demo" not in line)
    assert one == (0, text)


@each([*SCRIPTS, *TOOLS], fast=[CLASSIFICATION, ROOT / "scripts"])
def test_another_package_named_common_is_not_imported_in_place_of_ours(script, place):
    said = helps(script.parent, place)
    assert said[f"{script.name} beside"] == said[f"{script.name} alone"]
    assert said[f"{script.name} alone"][0] == 0


def test_another_package_named_common_on_pythonpath(place):
    """As a user would meet it: in processes of their own."""
    script = SCRIPTS[0]
    for folder in (script.parent, copies(script.parent, place)[f"{script.name} many"]):
        env = {**os.environ, "PYTHONPATH": str(place / "foreign")}
        result = subprocess.run([sys.executable, script.name, "--help"], cwd=folder, env=env, capture_output=True, text=True)
        assert result.returncode == 0 and "--config" in result.stdout and "another common" not in result.stdout, result.stderr


@each(SCRIPTS, fast=[CLASSIFICATION])
def test_one_file_defines_all_that_it_uses_and_uses_all_that_it_imports(script, place):
    kind = asked_of(script.name)
    text = (copies(script.parent, place)[f"{script.name} {kind}"] / script.name).read_text(encoding="utf-8")
    top = symtable.symtable(text, script.name, "exec")
    tables, used = [top], set()
    for table in tables:
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or table is top)}
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    assert not used - bound - set(dir(builtins)) - {"__file__"}
    assert not {s.get_name() for s in top.get_symbols() if s.is_imported()} - used


@pytest.mark.slow
def test_a_copy_without_the_demo_says_that_it_needs_data(place):
    bare = [copies(folder, place)["train_lora.py bare"] for folder in FOLDERS]
    for copy in bare:
        text = (copy / "train_lora.py").read_text(encoding="utf-8")
        assert "make_demo_data" not in text and "synthetic.py" not in text
    done = Script(bare[0], "train_lora.py", ["--output_dir", place / "runs"], place / "bare").wait(expect=2)
    assert done.stderr.startswith("error: this copy came without the demo: name your own data with --data_dir")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ruff"), reason="ruff is not installed; the test above finds most of what it would")
def test_one_file_passes_ruff(place):
    for folder in FOLDERS:
        copies(folder, place)
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", place], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_requirements_of_the_project_name_what_its_scripts_need():
    listed = {line.split(" #")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    modules = {module for script in SCRIPTS for module in follow_imports(script)}
    assert not set(requirements(packages_of_modules(modules), ROOT)) - listed


def test_as_a_command(tmp_path):
    script = make_project(tmp_path / "project")
    said = run(ROOT / "scripts" / "export.py", script, tmp_path / "my copy", "--single-file", "--no-demo", cwd=tmp_path)
    assert "wrote to" in said and "python train.py" in said and "'" in said.split("cd ")[1]
    assert sorted(p.name for p in (tmp_path / "my copy").iterdir()) == ["requirements.txt", "train.py"]
    again = [sys.executable, str(ROOT / "scripts" / "export.py"), str(tmp_path / "nowhere.py"), str(tmp_path / "copy")]
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: there is no script") and result.stderr.count("\n") == 1
