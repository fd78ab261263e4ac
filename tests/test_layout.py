"""The rules that keep the project easy to read and to copy from: who imports whom, how long scripts are, what an import does."""

import ast
import difflib
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from documents import tracked

sys.path.insert(0, str(ROOT / "scripts"))
from local_imports import follow_imports, local_path  # noqa: E402

COMMON = sorted((ROOT / "common").rglob("*.py"))
TASKS = sorted({p.parent for p in [*ROOT.glob("*/train.py"), *ROOT.glob("*/*/train.py")] if "tests" not in p.parts})
TASK_FILES = [p for task in TASKS for p in sorted(task.glob("*.py"))]
TOOLS = sorted((ROOT / "scripts").glob("*.py"))
SOURCES = [*COMMON, *TASK_FILES, *TOOLS]
SCRIPTS = [p for p in [*TASK_FILES, *TOOLS] if '\nif __name__ == "__main__":\n' in p.read_text(encoding="utf-8")]
PAIRS = [(task / "train.py", task / "train_lora.py") for task in TASKS]
# What a script may do at top level besides imports, definitions and constants: find common/ without being installed.
FINDER = "ROOT = next((p for p in Path(__file__).resolve().parents if (p / 'common').is_dir()), Path.cwd())"
# Calls that only make a value: fine in a constant.
PLAIN_CALLS = {
    "Range",
    "Path",
    "Path().resolve",
    "re.compile",
    "frozenset",
    "set",
    "dict",
    "tuple",
    "range",
    "enumerate",
    "math.radians",
    "threading.Lock",
    "setting",
    "field",
}


@cache
def distributions():
    """Package name -> the distributions that hold it. Reading all their records takes a while."""
    return packages_distributions()


def short(path) -> str:
    return path.relative_to(ROOT).as_posix() if isinstance(path, Path) else str(path)


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=short)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """(module, statement) of every import, also inside functions."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node))
    return found


def neighbours(path: Path) -> set[str]:
    return {p.stem for p in path.parent.glob("*.py")}


def test_there_is_something_to_check():
    assert COMMON and TASKS and SCRIPTS and {ROOT / "image_tasks" / "detection", ROOT / "fine_tuning"} <= set(TASKS)
    assert (ROOT / "common" / "vision") in {path.parent for path in COMMON}
    assert all(pair.exists() for pairs in PAIRS for pair in pairs)


# ---- who imports whom ------------------------------------------------------------------------------------------------


@each(COMMON)
def test_common_imports_no_task(path):
    names = {p.stem for p in TASK_FILES} | {p.relative_to(ROOT).parts[0] for p in TASK_FILES} | {"scripts", "tests"}
    third_party = distributions().keys() | set(sys.stdlib_module_names)
    for module, node in imports(path):
        root = module.split(".")[0]
        assert root == "common" or root in third_party, f"{short(path)}:{node.lineno} imports {module}"
        assert root not in names or root in third_party, f"{short(path)}:{node.lineno} imports {module} of a task"


@each([path for path in COMMON if path.parent.name == "common"])
def test_what_every_task_shares_knows_no_pictures(path):
    for module, node in imports(path):
        assert module.split(".")[0] not in ("PIL", "torchvision"), f"{short(path)}:{node.lineno} belongs in common/vision/"
        assert not module.startswith("common.vision"), f"{short(path)}:{node.lineno}: vision builds on common, not the reverse"


@each(TASK_FILES)
def test_a_task_imports_common_and_its_own_modules_only(path):
    third_party = distributions().keys() | set(sys.stdlib_module_names)
    for module, node in imports(path):
        root = module.split(".")[0]
        assert root == "common" or root in neighbours(path) or root in third_party, f"{short(path)}:{node.lineno}: {module}"
        if root == "common":
            assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), f"{short(path)}:{node.lineno}: {module}"


@each(SOURCES)
def test_local_imports_have_the_form_that_export_can_follow(path):
    for module, node in imports(path):
        local = module.split(".")[0] == "common" or (module in neighbours(path) and path not in COMMON)
        assert not module.startswith("."), f"{short(path)}:{node.lineno}: a relative import"
        if local:
            assert isinstance(node, ast.ImportFrom), f"{short(path)}:{node.lineno}: write from {module} import ..."
            assert node.names[0].name != "*", f"{short(path)}:{node.lineno}: a star import"
            assert all(alias.asname is None for alias in node.names), f"{short(path)}:{node.lineno}: an import under another name"


@cache
def defined_in(path: Path) -> set[str]:
    """The names that a module's top level makes itself."""
    names = set()
    for node in tree(path).body:
        names |= {node.name} if hasattr(node, "name") else set()
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


@each(SOURCES)
def test_a_name_is_imported_from_the_module_that_makes_it(path):
    """Else nobody guesses where it is, and the module on the way cannot be tidied."""
    for module, node in imports(path):
        file = local_path(module, path.parent, ROOT)
        if file and file not in SCRIPTS:  # eval_lora.py has all that it needs from eval.py
            strays = {alias.name for alias in node.names} - defined_in(file)
            assert not strays, f"{short(path)}:{node.lineno}: {module} only imports {strays}"


@each([p for p in TASK_FILES if p in SCRIPTS])
def test_scripts_import_no_scripts_but_lora_its_sibling(path):
    for module, node in imports(path):
        if (path.parent / f"{module}.py") in SCRIPTS:
            assert path.stem == f"{module}_lora", f"{short(path)}:{node.lineno} imports the script {module}"


# Names that the design gives to a task's modules; no distribution that is at all common installs a module of such a name.
OWN = {"data", "model", "metrics", "losses", "preprocess", "synthetic", "train", "infer", "eval"}


@each([*TASK_FILES, *TOOLS])
def test_no_file_hides_a_package(path):
    """The script's folder comes first on the path: a file named like a package would be imported in its place."""
    known = {"datasets", "evaluate", "types", "peft", "timm", "clip", "sam2", "monai", "skimage", "trimesh", "librosa", "utils"}
    assert path.stem not in known | set(sys.stdlib_module_names), f"{short(path)} hides a module of that name"
    installed = distributions()
    assert path.stem in OWN or path.stem not in installed, f"{short(path)} hides {installed.get(path.stem)}"


@each([*ROOT.glob("common/**/__init__.py"), *(p for task in TASKS for p in task.rglob("__init__.py"))])
def test_packages_are_empty(path):
    """export.py copies them unread, and importing one module must not import its siblings."""
    assert path.read_text(encoding="utf-8") == ""


# ---- how scripts read ------------------------------------------------------------------------------------------------


@each([path for pair in PAIRS for path in pair])
def test_train_scripts_fit_in_150_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("full, lora", PAIRS, ids=short)
def test_the_pair_differs_little(full, lora):
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (full, lora)]
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert 0 < len(changes) <= 60
    names = [{n.name for n in tree(path).body if hasattr(n, "name")} for path in (full, lora)]
    assert names[0] == names[1], "the same parts in both"
    for path in (full, lora):
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.If, ast.IfExp)):
                assert not re.search(r"\b(use_)?lora\b(?!_)", ast.unparse(node.test)), f"{short(path)}:{node.lineno}"


@each(SCRIPTS)
def test_a_script_opens_with_what_it_does_and_its_run_line(path):
    text = ast.get_docstring(tree(path)) or ""
    first, *rest = text.splitlines()
    assert first.endswith(".") or first.endswith(":") or rest, f"{short(path)} has no docstring"
    assert re.search(rf"^\s*python (\S*/)?{path.name}\b", text, re.MULTILINE), f"{short(path)}: no line `python {path.name} ...`"


# ---- how code reads --------------------------------------------------------------------------------------------------


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


@each(SOURCES)
def test_functions_but_main_fit_on_a_screen(path):
    assert not {node.name: length(node) for node in functions(path) if length(node) > 50 and node.name != "main"}


@each(COMMON)
def test_public_functions_of_common_say_what_they_do(path):
    holders = [tree(path), *(node for node in tree(path).body if isinstance(node, ast.ClassDef))]
    public = [node for holder in holders for node in holder.body if node in functions(path) and node.name[0] != "_"]
    for node in public:
        if length(node) > 6 and node.name not in ("forward", "backward"):  # torch says what these do
            assert ast.get_docstring(node), f"{short(path)}:{node.lineno}: {node.name} has {length(node)} lines and no docstring"


# ---- what happens at import ------------------------------------------------------------------------------------------


def call_names(node: ast.AST) -> set[str]:
    return {re.sub(r"\([^()]*\)", "()", ast.unparse(n.func)) for n in ast.walk(node) if isinstance(n, ast.Call)}


def allowed_at_top(node: ast.stmt) -> bool:
    text = ast.unparse(node)
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return True
    if isinstance(node, ast.If):
        return text.startswith("if __name__ == '__main__':")
    if text in (FINDER, "sys.path.insert(0, str(ROOT))"):
        return True
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        constants = all(isinstance(t, ast.Name) and t.id == t.id.upper() for t in targets)
        names_a_type = isinstance(node.value, ast.Subscript) and call_names(node) <= {"Range"}
        return names_a_type or constants and call_names(node) <= PLAIN_CALLS
    return False


@each(SOURCES)
def test_no_module_does_work_when_it_is_imported(path):
    for node in tree(path).body:
        assert allowed_at_top(node), f"{short(path)}:{node.lineno}: {ast.unparse(node)[:100]}"


@each(SOURCES)
def test_nothing_is_loaded_that_could_run_code(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith("torch.load"):
                flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert flags.get("weights_only") is True, f"{short(path)}:{node.lineno}: torch.load without weights_only=True"
            assert name not in ("eval", "exec", "yaml.unsafe_load", "os.system"), f"{short(path)}:{node.lineno}: {name}"
            assert not name.startswith(("pickle.", "joblib.", "dill.")), f"{short(path)}:{node.lineno}: {name}"


@each(SOURCES)
def test_no_plot_switches_the_backend_of_a_notebook(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    names = [(ast.unparse(node.func), node.lineno) for node in calls]
    assert not [(name, line) for name, line in names if name in ("matplotlib.use", "mpl.use") or name.endswith("switch_backend")]


def refuses_code(call: ast.Call, function: ast.FunctionDef) -> bool:
    """Whether a call says trust_remote_code=False, itself or by **options that the function puts together or passes on."""
    refused = [k for k in call.keywords if k.arg == "trust_remote_code" and getattr(k.value, "value", None) is False]
    shared = {k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)}
    if function.args.kwarg and function.args.kwarg.arg in shared:
        return True
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and shared & {ast.unparse(target) for target in node.targets}:
            refused += [ast.unparse(node)] if re.search(r"trust_remote_code['\"]?[=:] ?False", ast.unparse(node)) else []
    return bool(refused)


@each(SOURCES)
def test_no_model_is_built_by_code_from_its_repository(path):
    """Auto classes, also under another name (kind.from_pretrained), run a repository's own code where they are told to."""
    for call in [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]:
        owner, _, method = ast.unparse(call.func).rpartition(".")
        of_a_library = re.search(r"(^|\.)(?!Auto)[A-Z]\w*$", owner)  # ViTModel, PeftModel
        if method in ("from_pretrained", "from_config") and not of_a_library:
            holders = [function for function in functions(path) if call in ast.walk(function)]
            place = f"{short(path)}:{call.lineno}: {owner}.{method}"
            assert any(refuses_code(call, function) for function in holders), f"{place} without trust_remote_code=False"


# ---- requirements ----------------------------------------------------------------------------------------------------


def test_each_import_is_in_the_requirements_and_each_requirement_is_imported():
    files = [ROOT / name for name in ("requirements.txt", "requirements-optional.txt")]
    texts = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line.partition("#")[0].strip() for line in texts]
    required = {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("_", "-") for line in lines if line}
    installed, used = distributions(), set()
    for path in [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]:
        local = {"common", *(p.stem for p in SOURCES), *neighbours(path)}
        for module, node in imports(path):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in local:
                continue
            names = {name.lower().replace("_", "-") for name in installed.get(root, [root])}
            assert names & required, f"{short(path)}:{node.lineno} imports {root}, which requirements.txt does not name"
            used |= names
        for needs in re.findall(r"^# needs: ([\w, .-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            named = {name.strip().lower().replace("_", "-") for name in needs.split(",")}
            assert named <= required, f"{short(path)} needs {sorted(named - required)}, which requirements.txt does not name"
            used |= named
    used |= {"setuptools"}  # for pyworld, which does not ask for it
    assert required <= used, f"requirements.txt names {sorted(required - used)}, which nothing imports"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_no_file_is_large():
    assert not {short(path): size for path in tracked() if (size := path.stat().st_size) > 2_500_000}


@each([path for path in [*COMMON, *TASK_FILES] if path.name != "__init__.py"])
def test_the_map_of_the_project_has_each_module(path):
    assert f"`{path.name}`" in (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")


@each(SCRIPTS)
def test_a_name_stands_for_one_thing_along_the_imports_of_a_script(path):
    """An export as one file puts all of them into one module. (Not of a script that works on any task: that takes its folder.)"""
    place, modules = {}, follow_imports(path)
    if any(module.path == ROOT / "scripts" / "task_modules.py" for module in modules):
        return
    for module in modules:
        for node in tree(module.path).body:
            named = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                named = [
                    t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(t, ast.Name)
                ]
            for name in named:
                assert place.setdefault(name, module.path) == module.path or name in ("ROOT", "HERE"), (
                    f"{name}: {short(module.path)}"
                )
