"""Joins a script and its modules in one file that stands alone, without what the script does not reach.

All modules share one namespace there, so their top-level names must differ (`find_clashes`). From the script's own code the
names are followed: a function, class or constant that nothing reached refers to is left out (`reached`), and with it comments
and imports that served it alone. Classes stay whole, and so does what does more than to define a name.
"""

import ast
import builtins
import re
import symtable
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from common.config import UserError
from local_imports import FUNCTIONS, Module

LINE_LENGTH = 130
FINDER = (  # in one file there is no common/ to find
    "ROOT = next((p for p in Path(__file__).resolve().parents if (p / 'common').is_dir()), Path.cwd())",
    "sys.path.insert(0, str(ROOT))",
)
SYNTHETIC = "synthetic"  # the module of a task that draws its demo data
NO_DEMO = 'raise UserError("this copy came without the demo: name your own data with --data_dir")'
NEEDS = re.compile(r"\s*# needs: *([\w.-]+(?:, *[\w.-]+)*)")  # packages that no import shows: `# needs: scipy, timm (why)`
LOOKUPS = {"globals", "eval", "exec", "__name__"}  # a function that uses one of these may look up a name by a string
IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def single_file(modules: list[Module], demo: bool = True) -> str:
    """One file: the script's docstring, the imports of packages, each module's code, the script's code. UserError for clashes.

    demo: False leaves out what draws the demo's data.
    """
    clashes = find_clashes(modules)
    if clashes:
        raise UserError("one file cannot hold these modules: " + "; ".join(clashes))
    script = modules[-1]
    parts = [part_of(module, module is script, demo or not demo_names(module)) for module in modules]
    kept = reached([piece for part in parts for piece in part.pieces], parts[-1].pieces)
    used = {name for piece in kept for name in piece.uses}
    imports = {found for module in modules for found in top_imports(module)}
    imports = {found for found in imports if found[0] == "__future__" or bound_by(found) in used}
    code = "\n\n\n".join(section(part, kept, imports) for part in parts if kept & set(part.pieces))

    groups = {"future": [], "standard library": [], "packages": []}
    for found in imports:
        package = found[0].split(".")[0]
        group = "packages" if package not in sys.stdlib_module_names else "standard library"
        groups["future" if package == "__future__" else group].append(found)
    head = ["\n".join(import_lines(group)) for group in groups.values() if group]
    if ast.get_docstring(script.tree) is not None:
        docstring = script.source.split("\n")[: script.tree.body[0].end_lineno]
        head.insert(0, "\n".join(line for line in docstring if demo or "  # demo" not in line))
    return "\n\n".join(head) + "\n\n" * bool(head) + code + "\n"


# A module's code without its imports ----------------------------------------------------------------------------------


@cache
def own_code(module: Module, is_script: bool, demo: bool = True) -> str:
    """A module's lines without its docstring, module-level imports, local imports and the lines that find common/.

    Of a module that is not the script `if __name__ == "__main__":` goes, too. A block that loses all its lines gets a `pass`.
    Without the demo, a statement that calls for synthetic data becomes an error that says so.
    """
    lines = module.source.split("\n")
    ours = {node for node, _ in module.local}
    gone = ours | {node for node in module.tree.body if only_for_modules(node, is_script)}
    if ast.get_docstring(module.tree) is not None:
        gone.add(module.tree.body[0])
    instead = {block[0].lineno: " " * block[0].col_offset + "pass" for block in emptied(module.tree, gone)}
    for node in [] if demo else demo_statements(module):
        gone.add(node)
        instead[node.lineno] = " " * node.col_offset + NO_DEMO

    dropped = set()  # line numbers, from 1
    for node in gone:
        first, last = node.lineno, node.end_lineno
        before = lines[first - 1].encode()[: node.col_offset].decode()  # columns are counted in bytes
        after = lines[last - 1].encode()[node.end_col_offset :].decode().strip()
        if before.strip() or after and after[0] != "#":
            raise UserError(f"{module.path}:{first}: give this statement a line of its own, so that the export can drop it")
        if node in module.tree.body and not isinstance(node, IMPORTS):  # with the comment above it
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
        dropped |= set(range(first, last + 1))
    for function in ast.walk(module.tree):
        if isinstance(function, FUNCTIONS):
            inside = [node for node in ours if function.lineno <= node.lineno <= function.end_lineno]
            again = sorted({a.name for node in inside for a in node.names} & bound_in(function)) if inside else []
            if again:  # without the import it would be unbound
                place = f"{module.path}:{function.lineno}"
                raise UserError(f"{place}: {again[0]} is imported here and then bound to something else; rename one")
    text = without_lines(lines, dropped, instead)
    finder_went = any(isinstance(node, ast.Assign) and ast.unparse(node) == FINDER[0] for node in module.tree.body)
    if finder_went and any(isinstance(node, ast.Name) and node.id == "ROOT" for node in ast.walk(ast.parse(text))):
        raise UserError(f"{module.path}: ROOT is used beyond finding common/; call project_root() of common.config instead")
    return text


def only_for_modules(node: ast.stmt, is_script: bool) -> bool:
    """Whether a top-level statement has no place in one file: imports, finding common/, what a module does as a script."""
    if isinstance(node, ast.If):
        return not is_script and ast.unparse(node.test) == "__name__ == '__main__'"
    return isinstance(node, IMPORTS) or isinstance(node, (ast.Assign, ast.Expr)) and ast.unparse(node) in FINDER


def emptied(tree: ast.AST, gone: set[ast.stmt]) -> list[list[ast.stmt]]:
    """The blocks below the top level of which every statement is gone."""
    parents = [node for node in ast.walk(tree) if hasattr(node, "body") and not isinstance(node, ast.Module)]
    blocks = [getattr(parent, part, None) for parent in parents for part in ("body", "orelse", "finalbody")]
    return [block for block in blocks if isinstance(block, list) and block and gone.issuperset(block)]


def demo_names(module: Module) -> set[str]:
    """What a module's functions import from the module of synthetic data."""
    at_top = set(module.tree.body)
    return {a.name for node, name in module.local if name == SYNTHETIC and node not in at_top for a in node.names}


def demo_statements(module: Module) -> list[ast.stmt]:
    """The statements that use what a function imports from the module of synthetic data."""
    names = demo_names(module)
    simple = [node for node in ast.walk(module.tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    return [node for node in simple if names & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}]


def bound_in(function) -> set[str]:
    """The names that a function binds other than by imports."""
    nodes = list(ast.walk(function))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return names | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n is not function}


def without_lines(lines: list[str], dropped: set[int], instead: dict[int, str] | None = None) -> str:
    """The lines (from 1) but for the dropped ones, as text; instead: what stands in place of some of those.

    Blank lines below a gap go where there are as many above it, and where it stood first in its block.
    """
    kept, swallow = [], 0
    for number, line in enumerate(lines, start=1):
        if instead and number in instead:
            kept.append(instead[number])
        elif number in dropped:
            opens = kept and re.search(r':$|^ .*"""$', kept[-1])  # a block, or with a docstring
            swallow = len(lines) if opens else sum(1 for _ in takewhile(lambda above: not above.strip(), reversed(kept)))
        elif swallow and not line.strip():
            swallow -= 1
        else:
            kept.append(line)
            swallow = 0
    return "\n".join(kept).strip("\n")


# What the script reaches ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Piece:
    """A top-level statement of a module's own code."""

    first: int  # its lines, from 1, with decorators and the comment right above it
    last: int
    binds: set[str]  # the names that it defines
    uses: set[str]  # the names of the file's other top-level things that it refers to
    strings: set[str]  # the words in its strings without blanks: names, where code looks names up
    calls: set[str]  # of those, what runs when the module is imported: decorators, functions that make a constant
    acts: bool  # does more than to define names
    imports: (
        list  # of (lines, what they import): imports inside it that are not needed where the file imports the same at its top
    )


@dataclass(eq=False)
class Part:
    """A module's own code, line by line and statement by statement."""

    module: Module
    is_script: bool
    lines: list[str]
    pieces: list[Piece]


@cache
def part_of(module: Module, is_script: bool, demo: bool) -> Part:
    code = own_code(module, is_script, demo)
    part = Part(module, is_script, code.split("\n"), [])
    for node in ast.parse(code).body:
        decorators = getattr(node, "decorator_list", [])
        begin = first = min(at.lineno for at in (node, *decorators))
        above = part.pieces[-1].last if part.pieces else 0
        while first - 1 > above and part.lines[first - 2].startswith("#") and not NEEDS.match(part.lines[first - 2]):
            first -= 1
        binds = defined_by(node)
        # Of a decorator all names, since `@partial(register, Base)` calls register, too.
        called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
        at_import = decorators if isinstance(node, DEFINITIONS) else called
        calls = {n.id for each in at_import for n in ast.walk(each) if isinstance(n, ast.Name)}
        uses = names_used("\n".join(part.lines[begin - 1 : node.end_lineno]))
        shares_line = above >= first  # as in `a = 1; b = 2`
        if shares_line:
            part.pieces[-1].acts = True
        acts = binds is None or shares_line
        piece = Piece(first, node.end_lineno, binds or set(), uses, words_in_strings(node), calls, acts, inner_imports(node))
        part.pieces.append(piece)
    return part


def defined_by(node: ast.stmt) -> set[str] | None:
    """The names that a statement defines; None where it may do more than that, such as a loop or an assignment to x["key"]."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return None
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets} if all(isinstance(target, ast.Name) for target in targets) else None


def names_used(code: str) -> set[str]:
    """The global names that a statement refers to, also inside functions and in annotations that are strings."""
    names, tables = set(), [symtable.symtable(code, "piece", "exec")]
    for table in tables:
        tables += table.get_children()
        inside = table.get_type() == "function"  # where a name that is bound is local
        names |= {s.get_name() for s in table.get_symbols() if s.is_global() or s.is_referenced() and not inside}
    annotations = [getattr(n, "annotation", None) or getattr(n, "returns", None) for n in ast.walk(ast.parse(code))]
    return names.union(*(words_in_strings(a) for a in annotations if isinstance(a, ast.Constant)))


def words_in_strings(node: ast.AST) -> set[str]:
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {word for text in texts if not re.search(r"\s", text) for word in re.findall(r"\w+", text)}


def reached(pieces: list[Piece], start: list[Piece]) -> set[Piece]:
    """The pieces at the start, those that act, and all that these refer to, directly or not.

    One that calls the project's own code when it is imported may register something there, so it counts as acting. Where code
    may look names up by strings, strings refer to what they name.
    """
    definers = defaultdict(list)
    for piece in pieces:
        for name in piece.binds:
            definers[name].append(piece)
    by_string = any(piece.uses & LOOKUPS for piece in pieces if not piece.acts)
    todo = [*start, *(piece for piece in pieces if piece.acts or piece.calls & definers.keys())]
    found = set(todo)
    while todo:
        piece = todo.pop()
        for name in (piece.uses | piece.strings if by_string else piece.uses) & definers.keys():
            new = set(definers[name]) - found
            found |= new
            todo += new
    return found


def section(part: Part, kept: set[Piece], imports: set) -> str:
    """A module's part of the file: heading, docstring as a comment (its first line where most of the code is gone), code."""
    module = part.module
    size, left = (sum(p.last - p.first + 1 for p in some) for some in (part.pieces, kept & set(part.pieces)))
    docstring = (ast.get_docstring(module.tree) or "").splitlines() if not part.is_script else []
    comment = "".join(f"\n# {line}".rstrip(" ") for line in docstring[: None if 2 * left >= size else 1])
    heading = f"# {module.target} ".ljust(120, "-") + (f"\n#{comment}" if comment else "")
    dropped = orphaned_comments(part, kept)
    for piece in part.pieces:
        if piece not in kept:
            dropped |= set(range(piece.first, piece.last + 1))
        for lines, found in piece.imports:
            if found <= imports:
                dropped |= set(lines)
    return f"{heading}\n\n\n{without_lines(part.lines, dropped)}"


def orphaned_comments(part: Part, kept: set[Piece]) -> set[int]:
    """The lines of comments between pieces, such as headings, of which all pieces up to the next one are gone."""
    orphaned, comments, below = set(), [], []
    starts = {piece.first: piece for piece in part.pieces}
    within = {number for piece in part.pieces for number in range(piece.first, piece.last + 1)}
    for number, line in [*enumerate(part.lines, start=1), (0, "the end")]:
        if number in starts:
            below.append(starts[number])
        elif number not in within and line.strip() and not NEEDS.match(line):
            if below:
                orphaned |= set() if kept & set(below) else set(comments)
                comments, below = [], []
            comments.append(number)
    return orphaned


# Imports --------------------------------------------------------------------------------------------------------------


def top_imports(module: Module) -> list[tuple[str, str, str]]:
    """The module-level imports of packages as (package, name, alias): name is "" for `import package`, alias "" for no `as`."""
    ours = {node for node, _ in module.local}
    found = []
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            raise UserError(f"{module.path}:{node.lineno}: name what you import instead of *")
        if isinstance(node, IMPORTS) and node not in ours:
            found += imports_of(node)
    return found


def imports_of(node: ast.Import | ast.ImportFrom) -> list[tuple[str, str, str]]:
    if isinstance(node, ast.Import):
        return [(a.name, "", a.asname or "") for a in node.names]
    return [(node.module, a.name, a.asname or "") for a in node.names]


def bound_by(found: tuple[str, str, str]) -> str:
    """The name that an import binds: `import a.b` binds a, `import a.b as c` c, `from a import b` b."""
    package, name, alias = found
    return alias or name or package.split(".")[0]


def inner_imports(piece: ast.stmt) -> list[tuple[range, set]]:
    """(lines, imports) of the import statements inside a top-level statement that could go if the file's top had the same ones.

    Not where their names are bound to something else, too, where nothing else is in their block, or something in their line.
    """
    found = {node for node in ast.walk(piece) if isinstance(node, IMPORTS) and node is not piece}
    if not found:
        return []
    bound, others = bound_in(piece), {n.lineno for n in ast.walk(piece) if isinstance(n, ast.stmt) and n not in found}
    found -= {node for block in emptied(piece, found) for node in block}
    return [
        (range(node.lineno, node.end_lineno + 1), set(imports_of(node)))
        for node in found
        if not bound & {bound_by(one) for one in imports_of(node)} and not others & {node.lineno, node.end_lineno}
    ]


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


def find_clashes(modules: list[Module]) -> list[str]:
    """Top-level names that mean different things in different modules, a phrase for each; [] when one file can hold them all."""
    meanings = {}  # name -> {what it is bound to: module}
    for module in modules:
        for found in top_imports(module):
            package, name, alias = found
            thing = f"{package}.{name}" if name else package if alias else package.split(".")[0]
            meanings.setdefault(bound_by(found), {}).setdefault(thing, module.name)
        for name in top_names(module, module is modules[-1]):
            meanings.setdefault(name, {})[f"{module.name}.{name}"] = module.name
    clashes = []
    for name, things in meanings.items():
        if len(things) > 1:
            clashes.append(f"{name} is " + " and ".join(f"{thing} in {where}" for thing, where in things.items()))
        elif hasattr(builtins, name) and not name.startswith("__"):
            clashes.append(f"{name} of {next(iter(things.values()))} hides Python's own {name} from the other modules")
    return clashes


@cache
def top_names(module: Module, is_script: bool) -> list[str]:
    """The names that a module's own code binds at its top level."""
    table = symtable.symtable(own_code(module, is_script), str(module.path), "exec")
    return [s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()]
