"""Which modules of the project a script imports, directly or not. export.py copies them, single_file.py joins them."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.config import UserError

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(eq=False)  # told apart by identity, so that what is computed of one can be kept
class Module:
    name: str  # as one imports it: "common.config", "data"; the script itself: its file name without .py
    path: Path
    source: str
    tree: ast.Module
    local: list  # of (ast.ImportFrom, module name): its imports of other modules of the project
    target: str  # where a copy goes, below the folder of the export


def follow_imports(script: Path) -> list[Module]:
    """The script, last, and all modules of the project that it imports, directly or not, each after those it builds on.

    UserError where a local import is not of the form `from module import name`.
    """
    script = Path(script).expanduser().resolve()
    if not script.is_file():
        raise UserError(f"there is no script {script}")
    root = project_of(script)
    if root is None:
        raise UserError(f"{script} is in no project: none of its parent folders holds common/")
    modules = {}

    def load(name):
        if name not in modules:
            folder = root if name.split(".")[0] == "common" else script.parent
            path = script if name == script.stem else local_path(name, folder, root)
            modules[name] = read_module(name, path, folder, root, path.stat().st_mtime_ns)
        return modules[name]

    def imported(name):
        return [other for _, other in load(name).local]

    def imported_at_once(name):  # what must be defined above, where an import inside a function only has to exist
        at_once = set(at_import(load(name).tree))
        return [other for node, other in load(name).local if node in at_once]

    names = needed_first(needed_first([script.stem], imported), imported_at_once)
    if names[-1] != script.stem:
        raise UserError(f"{script} is imported by the modules that it imports; move what they share to a module of its own")
    return [modules[name] for name in names]


def project_of(script: Path) -> Path | None:
    """The nearest parent folder that holds common/."""
    return next((p for p in script.parents if (p / "common").is_dir()), None)


def needed_first(names, needs) -> list[str]:
    """`names` and everything that `needs(name)` leads to, each after what it needs."""
    ordered, seen = [], set()

    def visit(name):
        if name not in seen:
            seen.add(name)
            for other in needs(name):
                visit(other)
            ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def local_path(name: str, folder: Path, root: Path) -> Path | None:
    """The file of a module of the project, as one in `folder` imports it; None where `name` is a package from elsewhere."""
    base = root if name.split(".")[0] == "common" else folder
    path = base.joinpath(*name.split(".")[:-1], name.split(".")[-1] + ".py")
    return path if path.is_file() else None


@cache
def read_module(name: str, path: Path, folder: Path, root: Path, changed: int) -> Module:
    """Parses a module and finds its local imports. UserError for bad syntax and for a local import of another form.

    folder: where its neighbours are: the script's, or for a module of common/ the project's. changed: when the file was; scripts
    share modules, and one that has not changed is read once.
    """
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    local = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = local_module(node, folder, root, f"{path}:{node.lineno}")
            local += [(node, found)] if found else []
    return Module(name, path, source, tree, local, str(path.relative_to(folder)))


def local_module(node: ast.Import | ast.ImportFrom, folder: Path, root: Path, place: str) -> str | None:
    """The project's module that a statement imports from; None for packages. UserError, naming the place, for another form."""
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names if a.name.split(".")[0] == "common" or local_path(a.name, folder, root)]
        if names:
            raise UserError(f"{place}: `import {names[0]}` must be `from {names[0]} import name`")
        return None
    if node.level:
        raise UserError(f"{place}: write `from module import name`, without dots in front")
    if node.module == "common":
        raise UserError(f"{place}: write `from common.module import name`, not a module as a whole")
    found = local_path(node.module, folder, root)
    if node.module.startswith("common.") and not found:
        raise UserError(f"{place}: there is no module {node.module}")
    if found and any(a.asname or a.name == "*" for a in node.names):
        raise UserError(f"{place}: write `from {node.module} import name`, without * and as")
    return node.module if found else None


def at_import(tree):
    """The nodes that run when a module is imported: all but what functions hold."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, FUNCTIONS):
            yield from at_import(child)


def package_files(modules: list[Module]) -> dict[str, Path]:
    """The __init__.py of every package that a module lies in: where a copy goes -> the file."""
    found = {}
    for module in modules:
        folders = Path(module.target).parents  # common/vision, common, . of common/vision/pages.py
        for folder, place in zip(list(folders)[:-1], module.path.parents, strict=False):
            if (place / "__init__.py").is_file():
                found[str(folder / "__init__.py")] = place / "__init__.py"
    return found
