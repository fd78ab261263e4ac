"""Takes one script out of the project: copies it, with just what it imports, into a folder of your own.

    python scripts/export.py image_tasks/detection/train_lora.py ~/proj                  # the script and its few modules
    python scripts/export.py image_tasks/detection/train_lora.py ~/proj --single_file    # one file that stands alone

Follows `from common.x import ...` and imports of the script's neighbours, also those inside functions. Writes them, a
requirements.txt of the packages they import, and the small base model in demo_base/ (leave it with --no_demo). The copy
runs unchanged. Files that are there already and differ are kept, with an error, unless you say --overwrite.

The one file leaves out functions, classes and constants that the script does not reach, and with --no_demo the drawing of
synthetic data, too: then it needs --data_dir.
"""

import argparse
import ast
import re
import shlex
import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli  # noqa: E402
from local_imports import Module, follow_imports, package_files, project_of  # noqa: E402
from single_file import NEEDS, single_file  # noqa: E402

DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "cv2": "opencv-python",
    "faiss": "faiss-cpu",
}


def packages_of(source: str, local=frozenset()) -> set[str]:
    """The packages that a file imports, by the names that imports give them, but for the project's modules in `local`.

    What a library needs at run time, unseen in any import, stands in a comment line `# needs: scipy, timm (why)`.
    """
    packages = set()
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module not in local else []
        packages |= {name.split(".")[0] for name in names}
    for line in filter(None, map(NEEDS.match, source.splitlines())):
        packages |= {name.strip() for name in line[1].split(",")}
    return packages - sys.stdlib_module_names


def packages_of_modules(modules: list[Module]) -> set[str]:
    return set().union(*(packages_of(module.source, {name for _, name in module.local}) for module in modules))


def requirements(packages: set[str], root: Path) -> list[str]:
    """Lines for requirements.txt: the packages, with the bounds that the requirements.txt of the project at `root` gives them.

    What its requirements-optional.txt names is left out: scripts do without, and say so.
    """
    wanted = {DISTRIBUTIONS.get(name, name) for name in packages}
    bounds, optional = bounds_in(root / "requirements.txt"), bounds_in(root / "requirements-optional.txt")
    wanted = {name for name in wanted if distribution(name) in bounds or distribution(name) not in optional}
    return [line for name in sorted(wanted, key=str.lower) for line in bounds.get(distribution(name), [name])]


def bounds_in(file: Path) -> dict[str, list[str]]:
    """Distribution -> the lines of a requirements file for it; {} where there is no such file."""
    bounds = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        line = line.split(" #")[0].strip()
        if line and line[0] not in "#-":
            bounds.setdefault(distribution(line), []).append(line)
    return bounds


def distribution(line: str) -> str:
    """The name in a line of requirements.txt, in the one spelling that package registries compare."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", line)[0]).lower()


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
        text = single_file(modules, demo)
        files, packages = {script.name: text.encode()}, packages_of(text)
    else:
        files = {module.target: module.path.read_bytes() for module in reversed(modules)}
        files |= {name: path.read_bytes() for name, path in package_files(modules).items()}
        packages = packages_of_modules(modules)
    if demo:
        base = script.parent / "demo_base"
        files |= {str(p.relative_to(script.parent)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}

    differ = [name for name, data in files.items() if (folder / name).exists() and (folder / name).read_bytes() != data]
    if differ and not overwrite:
        raise UserError(f"{folder} already holds another {', another '.join(differ)}; --overwrite replaces what differs")
    files["requirements.txt"] = merged_requirements(folder / "requirements.txt", requirements(packages, project_of(script)))
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return list(files)


def merged_requirements(file: Path, lines: list[str]) -> bytes:
    """The content of a requirements.txt, with the lines for what it does not name yet at its end."""
    # The user's file: in whatever encoding it is, its lines stay as they are.
    there = file.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n") if file.is_file() else ""
    named = {distribution(line.strip()) for line in there.splitlines()}
    new = [line for line in lines if distribution(line) not in named]
    return ("\n".join([there] * bool(there) + new) + "\n").encode(errors="surrogateescape")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("script", help="the script to take out, such as image_tasks/detection/train_lora.py")
    parser.add_argument("folder", help="where the copy goes; made if it is not there")
    parser.add_argument("--single_file", "--single-file", action="store_true", help="write one file that stands alone")
    parser.add_argument("--no_demo", "--no-demo", action="store_true", help="leave out demo_base/, the small base model")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    args = parser.parse_args(argv)
    try:
        names = export(args.script, args.folder, args.single_file, not args.no_demo, args.overwrite)
    except OSError as error:  # a file where a folder must be, a folder where a file must be, no permission
        raise UserError(f"cannot write the copy: {error.filename}: {error.strerror}") from None
    folder = Path(args.folder).expanduser().resolve()
    print(f"wrote to {folder}: " + ", ".join(names))
    data = " --data_dir ..." if args.no_demo and "train" in Path(args.script).name else ""
    run = f"python {Path(args.script).name}{data}"
    print(f"run it: cd {shlex.quote(str(folder))} && pip install -r requirements.txt && {run}")


if __name__ == "__main__":
    cli(main)
