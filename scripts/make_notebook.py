"""Makes docs/lora_clip.ipynb, the tutorial as a notebook, of docs/lora_clip.md.

    python scripts/make_notebook.py

Blocks of commands and of Python become cells of code, all else stays text. What fetches data from the network stays text, too, so
that "run all" does not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import cli  # noqa: E402

TUTORIAL = ROOT / "docs" / "lora_clip.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)  # ```text is what a command prints
FETCHES = "data/dogs"
FIRST = "%cd ..\n# The notebook starts in docs/, the commands in the project's top folder."


def notebook(text: str) -> dict:
    """A notebook (nbformat 4.5) of a page of Markdown."""
    cells, done = [cell("code", FIRST)], 0
    for block in BLOCK.finditer(text):
        if block[1] in ("", "python") and FETCHES not in block[2]:
            cells += [cell("markdown", text[done : block.start()]), cell("code", block[2] if block[1] else magic(block[2]))]
            done = block.end()
    cells.append(cell("markdown", text[done:]))
    title = cells.pop(1)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    named = [{"id": f"cell-{number:02}", **each} for number, each in enumerate([title, *cells])]
    return {"cells": named, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def cell(kind: str, text: str) -> dict:
    of_code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, **of_code, "source": text.strip().splitlines(keepends=True)}


def magic(commands: str) -> str:
    """Shell commands as a notebook has them: a cd that lasts, all else in a shell."""
    return "\n".join(f"%{line}" if line.startswith("cd ") else f"!{line}" for line in commands.splitlines())


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    target = TUTORIAL.with_suffix(".ipynb")
    content = notebook(TUTORIAL.read_text(encoding="utf-8"))
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {target}: {len(content['cells'])} cells")


if __name__ == "__main__":
    cli(main)
