"""Tables of somebody's: CSV files as spreadsheets, pandas and annotation tools write them; and our own."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint import naming
from common.config import UserError
from common.samples import Faults, read_text

SEPARATORS = "\t;|,"  # the comma last: in a line that also has others it may be a decimal point


def read_table(file: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of each line that is not empty, one after the other, the cells without spaces around them.

    The encoding is read_text's; the separator is what parts the first line into most cells, or what Excel's sep=; names.
    UserError where the file cannot be read, at the first line or wherever that shows.
    """
    try:
        text = read_text(file, faults)
        named = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)
        first = next(iter(text.lstrip().splitlines()), "")
        separator = named[1] if named else max(SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        for cells in lines:
            cells = [cell.strip() for cell in cells]
            if any(cells) and not (named and lines.line_num == 1):
                yield lines.line_num, cells
    except (OSError, csv.Error) as error:
        raise UserError(f"{file} is no CSV file that can be read: {error}") from None


def write_table(file: Path, columns: list[str], rows: list[list]) -> None:
    """A CSV file in UTF-8 with these columns. Bytes of a file name that is not UTF-8 are written as escapes."""
    with naming(file), open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as out:
        csv.writer(out).writerows([columns, *rows])
