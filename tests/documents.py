"""What the project's documents say: their commands with the folders in which a reader would type them, links, headings, tables.

A fenced block without a language (or `bash`) holds commands; what a command prints is fenced as `text`, files as what they are.
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import FOLDERS, ROOT

COMMANDS = ("", "bash", "sh")  # languages of blocks that hold commands
INLINE = re.compile(r"`((?:python|torchrun|pip|bash|sbatch|srun|tensorboard)\s[^`]+)`", re.DOTALL)
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    words: tuple  # as the shell splits them
    folders: tuple  # where a reader may be who types it
    place: str  # README.md:8, for messages
    fenced: bool

    def __str__(self):
        return f"{self.place}: {shlex.join(self.words)}"

    @property
    def folder(self) -> Path:
        """Of the folders the first that has the script (or whatever a path among the words is), else the first."""
        paths = [word for word in self.words if word.endswith((".py", ".sh")) or self.words[0] == "cd" and word != "cd"]
        return next((folder for folder in self.folders if paths and (folder / paths[0]).exists()), self.folders[0])


@cache
def tracked() -> list[Path]:
    """The files under version control; of a copy without its history, all but those that git would ignore."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    made = {"outputs", "data", "__pycache__", ".pytest_cache", ".ruff_cache"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not made & set(path.relative_to(ROOT).parts)]


@cache
def documents() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path) -> list[tuple[int, str, str]]:
    """(line, language, content) of each fenced block."""
    text = text_of(document)
    return [(text.count("\n", 0, found.start()) + 2, found[2], found[3]) for found in FENCE.finditer(text)]


@cache
def commands(document: Path) -> list[Command]:
    """All commands of a document: those in blocks in the order in which they are typed, then those within sentences."""
    start = document.parent if document.parent in FOLDERS else ROOT
    found, here, name = [], start, document.relative_to(ROOT)
    for line, language, content in blocks(document):
        if language not in COMMANDS:
            continue
        for number, text in joined_lines(content):
            for words in split_commands(text):
                elsewhere = FOLDERS if here.parts[0] == "~" else ()  # a script that was taken there
                command = Command(words, tuple(dict.fromkeys((here, start, ROOT, *elsewhere))), f"{name}:{line + number}", True)
                found.append(command)
                if words[0] == "cd":
                    here = Path(words[1]) if words[1][0] == "~" else (command.folder / words[1]).resolve()
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text_of(document))
    visited = [c.folder / c.words[1] for c in found if c.words[0] == "cd"]
    for inline in INLINE.finditer(prose):
        place = f"{name}:{prose.count(chr(10), 0, inline.start()) + 1}"
        words = tuple(shlex.split(inline[1]))
        words = words[:-1] if words[-1] == "..." and words[-2][:2] != "--" else words  # train.py ..., not --checkpoint ...
        if words[0] == "pip" or "-m" in words or any(word.endswith(".py") for word in words):  # else a part of one
            found.append(Command(words, tuple(dict.fromkeys((start, ROOT, *visited, *FOLDERS))), place, False))
    return found


def joined_lines(content: str) -> list[tuple[int, str]]:
    """(number, line) of a block, lines that end in a backslash joined with the next."""
    lines, number = [], 0
    for text in re.sub(r"\\\n", "\0", content).split("\n"):
        lines.append((number, text.replace("\0", " ")))
        number += 1 + text.count("\0")
    return lines


def split_commands(line: str) -> list[tuple]:
    """The commands of a line, a && b, each as its words; variables that are set before one, or alone, are left out."""
    if re.match(r"\w+=\$\(", line):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts = [[]]
    for word in lexer:
        if set(word) <= set("&;|"):
            parts.append([])
        elif parts[-1] or not re.match(r"[A-Z_]+=", word):
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def links(document: Path) -> list[str]:
    """Targets of links and pictures, in Markdown or HTML."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(document)))
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", prose)


@cache
def anchors(document: Path) -> set[str]:
    """What a link's #part may say: headings as GitHub names them."""
    names = {}
    for heading in headings(document):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.lstrip("# ")).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        many = names.setdefault(slug, 0)
        names[slug] += 1
        names.setdefault(f"{slug}-{many}" if many else slug, 1)
    return set(names)


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ .*", FENCE.sub("", text_of(document)), re.MULTILINE)


def tables(document: Path) -> list[list[list[str]]]:
    """The tables: rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", FENCE.sub("", text_of(document)), re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]
