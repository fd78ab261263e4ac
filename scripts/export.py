"""Takes one script out of the project: copies it, with just what it imports, into a folder of your own.

    python scripts/export.py image_tasks/detection/train_lora.py ~/proj                  # the script and its few modules
    python scripts/export.py image_tasks/detection/train_lora.py ~/proj --single_file    # one file that stands alone

Follows `from common.x import ...` and imports of the script's neighbours, also those inside functions. Writes them, a
requirements.txt of the packages they import, and the small base model in demo_base/ (leave it with --no_demo). The copy
runs unchanged. Files that are there already and differ are kept, with an error, unless you say --overwrite.
"""

import argparse
import ast
import builtins
import re
import shlex
import symtable
import sys
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli  # noqa: E402

LINE_LENGTH = 130
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "sklearn": "scikit-learn", "skimage": "scikit-image", "cv2": "opencv-python"}
FINDER = (  # in one file there is no common/ to find
    "ROOT = next((p for p in Path(__file__).resolve().parents if (p / 'common').is_dir()), Path.cwd())",
    "sys.path.insert(0, str(ROOT))",
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


# What a script needs ---------------------------------------------------------------------------------------------------


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
    root = next((p for p in script.parents if (p / "common").is_dir()), None)
    if root is None:
        raise UserError(f"{script} is in no project: none of its parent folders holds common/")
    modules = {}

    def load(name):
        if name not in modules:
            path = script if name == script.stem else local_path(name, script.parent, root)
            modules[name] = read_module(name, path, script.parent, root, path.stat().st_mtime_ns)
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
    """The file of a module of the project, as a script in `folder` imports it; None where `name` is a package from elsewhere."""
    base = root if name.split(".")[0] == "common" else folder
    path = base.joinpath(*name.split(".")[:-1], name.split(".")[-1] + ".py")
    return path if path.is_file() else None


@cache
def read_module(name: str, path: Path, folder: Path, root: Path, changed: int) -> Module:
    """Parses a module and finds its local imports. UserError for bad syntax and for a local import of another form.

    folder: the script's. changed: when the file was; scripts share modules, and one that has not changed is read once.
    """
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    local = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "common" or local_path(a.name, folder, root)]
            if names:
                raise UserError(f"{path}:{node.lineno}: `import {names[0]}` must be `from {names[0]} import name`")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise UserError(f"{path}:{node.lineno}: write `from module import name`, without dots in front")
            found = local_path(node.module, folder, root)
            if node.module == "common":
                raise UserError(f"{path}:{node.lineno}: write `from common.module import name`, not a module as a whole")
            if node.module.startswith("common.") and not found:
                raise UserError(f"{path}:{node.lineno}: there is no module {node.module}")
            if found and any(a.asname or a.name == "*" for a in node.names):
                raise UserError(f"{path}:{node.lineno}: write `from {node.module} import name`, without * and as")
            if found:
                local.append((node, node.module))
    base = root if name.split(".")[0] == "common" else folder
    return Module(name, path, source, tree, local, str(path.relative_to(base)))


def at_import(tree):
    """The nodes that run when a module is imported: all but what functions hold."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, FUNCTIONS):
            yield from at_import(child)


def requirements(modules: list[Module]) -> list[str]:
    """Lines for requirements.txt: the packages that the modules import, with the bounds of the project's requirements.txt.

    What a library needs at run time, unseen in any import, stands in a comment line `# needs: scipy, timm (why)` of the module.
    """
    packages = set()
    for module in modules:
        ours = {id(node) for node, _ in module.local}
        for node in ast.walk(module.tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and id(node) not in ours else []
            packages |= {name.split(".")[0] for name in names}
        for line in re.findall(r"^\s*# needs: *([\w.-]+(?:, *[\w.-]+)*)", module.source, flags=re.MULTILINE):
            packages |= {name.strip() for name in line.split(",")}
    wanted = {DISTRIBUTIONS.get(name, name) for name in packages - sys.stdlib_module_names}
    script = modules[-1].path
    listed = next(p for p in script.parents if (p / "common").is_dir()) / "requirements.txt"
    bounds = {}
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []:
        line = line.split(" #")[0].strip()
        if line and line[0] not in "#-":
            bounds.setdefault(distribution(line), []).append(line)
    return [line for name in sorted(wanted, key=str.lower) for line in bounds.get(distribution(name), [name])]


def distribution(line: str) -> str:
    """The name in a line of requirements.txt, in the one spelling that package registries compare."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", line)[0]).lower()


# One file --------------------------------------------------------------------------------------------------------------


@cache
def own_code(module: Module, is_script: bool) -> str:
    """A module's lines without its docstring, module-level imports, local imports and the lines that find common/.

    Of a module that is not the script `if __name__ == "__main__":` goes, too. A block that loses all its lines gets a `pass`.
    """
    lines = module.source.split("\n")
    ours = {node for node, _ in module.local}
    gone = set(ours)
    for node in module.tree.body:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        finds_common = isinstance(node, (ast.Assign, ast.Expr)) and ast.unparse(node) in FINDER
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (is_main and not is_script) or finds_common:
            gone.add(node)
    if ast.get_docstring(module.tree) is not None:
        gone.add(module.tree.body[0])

    dropped, passes = set(), {}  # line numbers, from 1
    for node in gone:
        first, last = node.lineno, node.end_lineno
        before = lines[first - 1].encode()[: node.col_offset].decode()  # columns are counted in bytes
        after = lines[last - 1].encode()[node.end_col_offset :].decode().strip()
        if before.strip() or after and after[0] != "#":
            raise UserError(f"{module.path}:{first}: give this statement a line of its own, so that the export can drop it")
        if node in module.tree.body and not isinstance(node, (ast.Import, ast.ImportFrom)):  # with the comment above it
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
        dropped |= set(range(first, last + 1))
    for parent in ast.walk(module.tree):
        for block in (getattr(parent, part, None) for part in ("body", "orelse", "finalbody")):
            if parent is not module.tree and isinstance(block, list) and block and all(node in gone for node in block):
                passes[block[0].lineno] = " " * block[0].col_offset + "pass"
        if isinstance(parent, FUNCTIONS):
            check_not_bound_again(parent, module, ours)

    kept, swallow = [], 0  # blank lines below a gap are swallowed where there are as many above it
    for number, line in enumerate(lines, start=1):
        if number in passes:
            kept.append(passes[number])
        elif number in dropped:
            opened = kept and kept[-1].endswith(":")
            swallow = len(lines) if opened else sum(1 for _ in takewhile(lambda above: not above.strip(), reversed(kept)))
        elif swallow and not line.strip():
            swallow -= 1
        else:
            kept.append(line)
            swallow = 0
    text = "\n".join(kept).strip("\n")
    finder_went = any(isinstance(node, ast.Assign) and ast.unparse(node) == FINDER[0] for node in module.tree.body)
    if finder_went and any(isinstance(node, ast.Name) and node.id == "ROOT" for node in ast.walk(ast.parse(text))):
        raise UserError(f"{module.path}: ROOT is used beyond finding common/; call project_root() of common.config instead")
    return text


def check_not_bound_again(function, module, ours) -> None:
    """UserError where a function imports a local name and assigns it, too: without the import it would be unbound."""
    nodes = list(ast.walk(function))
    imported = {a.name for node in nodes if node in ours for a in node.names}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n is not function}
    if imported & bound:
        name = sorted(imported & bound)[0]
        raise UserError(f"{module.path}:{function.lineno}: {name} is imported here and then bound to something else; rename one")


def top_imports(module: Module) -> list[tuple[str, str, str]]:
    """The module-level imports of packages as (package, name, alias): name is "" for `import package`, alias "" for no `as`."""
    ours = {node for node, _ in module.local}
    found = []
    for node in module.tree.body:
        if isinstance(node, ast.Import):
            found += [(a.name, "", a.asname or "") for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in ours:
            if node.names[0].name == "*":
                raise UserError(f"{module.path}:{node.lineno}: name what you import instead of *")
            found += [(node.module, a.name, a.asname or "") for a in node.names]
    return found


def find_clashes(modules: list[Module]) -> list[str]:
    """Top-level names that mean different things in different modules, a phrase for each; [] when one file can hold them all."""
    meanings = {}  # name -> {what it is bound to: module}
    for module in modules:
        for package, name, alias in top_imports(module):
            if name:
                bound, thing = alias or name, f"{package}.{name}"
            else:  # `import a.b` binds a, `import a.b as c` binds a.b
                bound, thing = (alias, package) if alias else (package.split(".")[0],) * 2
            meanings.setdefault(bound, {}).setdefault(thing, module.name)
        table = symtable.symtable(own_code(module, module is modules[-1]), str(module.path), "exec")
        for name in (s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()):
            meanings.setdefault(name, {})[f"{module.name}.{name}"] = module.name
    clashes = []
    for name, things in meanings.items():
        if len(things) > 1:
            clashes.append(f"{name} is " + " and ".join(f"{thing} in {where}" for thing, where in things.items()))
        elif hasattr(builtins, name) and not name.startswith("__"):
            clashes.append(f"{name} of {next(iter(things.values()))} hides Python's own {name} from the other modules")
    return clashes


def single_file(modules: list[Module]) -> str:
    """One file: the script's docstring, the imports of packages, each module's code, the script's code. UserError for clashes."""
    clashes = find_clashes(modules)
    if clashes:
        raise UserError("one file cannot hold these modules: " + "; ".join(clashes))
    script = modules[-1]
    parts = []
    for module in modules:
        docstring = ast.get_docstring(module.tree) if module is not script else ""
        heading = f"# {module.target} ".ljust(120, "-")
        comment = "".join(f"\n# {line}".rstrip(" ") for line in (docstring or "").splitlines())
        parts.append(heading + (f"\n#{comment}" if comment else "") + "\n\n\n" + own_code(module, module is script))
    code = "\n\n\n".join(parts)

    imports = {found for module in modules for found in top_imports(module)}
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    imports -= {found for found in [("sys", "", ""), ("pathlib", "Path", "")] if (found[1] or found[0]) not in used}
    sections = {"future": [], "standard library": [], "packages": []}
    for found in imports:
        package = found[0].split(".")[0]
        section = "packages" if package not in sys.stdlib_module_names else "standard library"
        sections["future" if package == "__future__" else section].append(found)
    head = ["\n".join(import_lines(section)) for section in sections.values() if section]
    if ast.get_docstring(script.tree) is not None:
        head.insert(0, "\n".join(script.source.split("\n")[: script.tree.body[0].end_lineno]))
    return "\n\n".join(head) + "\n\n" * bool(head) + code + "\n"


def import_lines(imports) -> list[str]:
    """Import statements, one for each package, in the order that isort and ruff keep."""
    lines = []
    for package, _, alias in sorted((f for f in imports if not f[1]), key=lambda f: (f[0].lower(), f)):
        lines.append(f"import {package}" + (f" as {alias}" if alias else ""))
    by_package = {}
    for package, name, alias in imports:
        if name:
            by_package.setdefault(package, set()).add(name + (f" as {alias}" if alias else ""))

    def kind(name):  # constants, classes, the rest
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)

    for package in sorted(by_package, key=lambda p: (p.lower(), p)):
        renamed = sorted((n for n in by_package[package] if " as " in n), key=kind)
        plain = sorted(by_package[package] - set(renamed), key=kind)
        line = f"from {package} import " + ", ".join(plain)
        if len(line) > LINE_LENGTH:
            line = f"from {package} import (\n" + "".join(f"    {name},\n" for name in plain) + ")"
        lines += [line] if plain else []
        lines += [f"from {package} import {name}" for name in renamed]
    return lines


# Writing ---------------------------------------------------------------------------------------------------------------


def export(script: Path, folder: Path, one_file=False, demo=True, overwrite=False) -> list[str]:
    """Writes the copy and returns the names of its files, as they stand below `folder`.

    UserError, before anything is written, where a file is there already and differs. A requirements.txt that is there stays
    and gets the lines for packages that it does not name yet.
    """
    modules = follow_imports(script)
    script, folder = modules[-1].path, Path(folder).expanduser().resolve()
    if folder == script.parent or any((folder / module.target).resolve() == module.path for module in modules):
        raise UserError(f"{folder} is the project itself; choose a folder of your own")
    if one_file:
        files = {script.name: single_file(modules).encode()}
    else:
        files = {module.target: module.path.read_bytes() for module in reversed(modules)}
    if demo:
        base = script.parent / "demo_base"
        files |= {str(p.relative_to(script.parent)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}

    differ = [name for name, data in files.items() if (folder / name).exists() and (folder / name).read_bytes() != data]
    if differ and not overwrite:
        raise UserError(f"{folder} already holds another {', another '.join(differ)}; --overwrite replaces what differs")
    listed = folder / "requirements.txt"
    there = listed.read_text(encoding="utf-8").rstrip("\n") if listed.is_file() else ""
    named = {distribution(line.strip()) for line in there.splitlines()}
    lines = [there] * bool(there) + [line for line in requirements(modules) if distribution(line) not in named]
    files["requirements.txt"] = ("\n".join(lines) + "\n").encode()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return list(files)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("script", help="the script to take out, such as image_tasks/detection/train_lora.py")
    parser.add_argument("folder", help="where the copy goes; made if it is not there")
    parser.add_argument("--single_file", "--single-file", action="store_true", help="write one file that stands alone")
    parser.add_argument("--no_demo", "--no-demo", action="store_true", help="leave out demo_base/, the small base model")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    args = parser.parse_args(argv)
    names = export(args.script, args.folder, args.single_file, not args.no_demo, args.overwrite)
    folder = Path(args.folder).expanduser().resolve()
    print(f"wrote to {folder}: " + ", ".join(names))
    print(f"run it: cd {shlex.quote(str(folder))} && pip install -r requirements.txt && python {Path(args.script).name}")


if __name__ == "__main__":
    cli(main)
