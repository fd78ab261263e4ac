"""Tables are read whatever program wrote them: separators, quotes, encodings, empty lines."""

import pytest

from common.config import UserError
from common.samples import Faults
from common.tables import read_table

ROWS = [["path", "label"], ["a, b.png", 'the "best"'], ["müll.png", "1;5"]]


def write(path, rows, separator=",", encoding="utf-8", head="", end="\r\n"):
    quoted = [separator.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_bytes((head + end.join([*quoted, ""])).encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_every_separator_and_encoding_gives_the_same_cells(tmp_path, separator, encoding):
    found = list(read_table(write(tmp_path / "t.csv", ROWS, separator, encoding), Faults()))
    assert found == [(number, row) for number, row in enumerate(ROWS, 1)]


def test_excels_first_line_names_the_separator_and_empty_lines_count_as_lines(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\n\nname;x,y\n ; \n a.png ; 1,5\n")
    assert list(read_table(tmp_path / "t.csv", Faults())) == [(3, ["name", "x,y"]), (5, ["a.png", "1,5"])]


def test_decimal_commas_part_no_cells_where_there_is_another_separator(tmp_path):
    (tmp_path / "t.csv").write_text("a.png;1,5;2,5\n")
    assert list(read_table(tmp_path / "t.csv", Faults())) == [(1, ["a.png", "1,5", "2,5"])]


def test_a_line_may_hold_thousands_of_cells_and_is_given_before_the_rest_is_read(tmp_path):
    (tmp_path / "t.csv").write_text(",".join(map(str, range(20_000))) + "\n" + "x" * 200_000 + "\n")
    table = read_table(tmp_path / "t.csv", Faults())
    assert len(next(table)[1]) == 20_000
    with pytest.raises(UserError, match="t.csv is no CSV file that can be read: field larger than"):
        next(table)


def test_what_is_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv is no CSV file that can be read"):
        list(read_table(tmp_path / "nowhere.csv", Faults()))
    (tmp_path / "t.csv").write_bytes(b"")
    assert list(read_table(tmp_path / "t.csv", Faults())) == []
