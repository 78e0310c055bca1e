"""CSV and TSV: every cell as it stands, every odd row by its number."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftlab.data.dataset import Data
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.opening import open_source
from tests.support import byte_tokenizer


def rows(path: Path, content: str | bytes) -> list[object]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = open_source(str(path), "train", lambda d: d)
    found = list(source.read_rows(0, 99))
    assert len(found) == len(source)
    for i in range(len(found)):  # any row alone is the row among the others
        assert str(list(source.read_rows(i, i + 1))) == str([found[i]])
    return found


BAD = [
    ("a.csv", "p,c\n1,2,3\n4,5\n", 0, "it has 3 fields, and the header has 2"),
    ("a.csv", "p,c\n4,5\n1\n", 1, "it has 1 fields, and the header has 2"),
    ("a.csv", "p,c\n4,5\n1,2,\n", 1, "it has 3 fields"),
    ("a.csv", 'p,c\n4,5\n"a" b,2\n6,7\n', 1, "its quotes do not match"),
    ("a.csv", 'p,c\n4,5\n"open,2\n6,7\n', 1, "its quotes do not match (unexpected end of data)"),
    ("a.csv", b"p,c\n4,5\ncaf\xe9,2\n6,7\n", 1, "this is not UTF-8"),
    ("a.tsv", 'p\tc\n4\t5\n5" pipe\t" five\nq2\ta2\nq3\ta3"\n6\t7\n', 1, "rows stand between its quotes"),
    ("a.tsv", "p\tc\n4\t5\na\tb\tc\n", 1, "it has 3 fields"),
    ("a.csv", "p,c\r\n4,5\r\n1,2,3\r\n", 1, "it has 3 fields"),
]


@pytest.mark.parametrize(("name", "content", "at", "said"), BAD)
def test_an_odd_row_is_named_and_the_others_are_read(
    name: str, content: str | bytes, at: int, said: str, tmp_path: Path
) -> None:
    found = rows(tmp_path / name, content)
    assert isinstance(found[at], ValueError) and said in str(found[at])
    good = [row for row in found if not isinstance(row, ValueError)]
    assert {"p": "4", "c": "5"} in good
    columns = PromptCompletion("p", "c")
    path, tokenizer = tmp_path / name, byte_tokenizer()
    with pytest.raises(ValueError, match=rf"{name} row {at + 1}: "):
        Data(columns, str(path)).load(tokenizer)
    kept, _ = Data(columns, str(path), on_error="skip").load(tokenizer)
    assert len(kept) == len(good) and kept.num_skipped == len(found) - len(good)


GOOD = {
    "a cell may hold the separator and line ends": ('p,c\n"a,b","c\nd\r\ne"\n', [{"p": "a,b", "c": "c\nd\r\ne"}]),
    "a doubled quote is one": ('p,c\n"say ""hi""",\n', [{"p": 'say "hi"', "c": ""}]),
    "a quote inside is text": ("p,c\n5\" pipe,it's\n", [{"p": '5" pipe', "c": "it's"}]),
    "blank lines are no rows": ("p,c\n\n1,2\n\n\n3,4", [{"p": "1", "c": "2"}, {"p": "3", "c": "4"}]),
    "white space stays": ("p,c\n a , b\t\n", [{"p": " a ", "c": " b\t"}]),
    "an index column without a name": (",p\n0,a\n", [{"": "0", "p": "a"}]),
    "a mark at the beginning": ("\ufeffp,c\n1,2\n", [{"p": "1", "c": "2"}]),
    "one column": ("p\n007\nNA\n", [{"p": "007"}, {"p": "NA"}]),
    "other line separators of Unicode": ("p,c\na\u2028b,c\x85d\n", [{"p": "a\u2028b", "c": "c\x85d"}]),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_csv_allows(name: str, tmp_path: Path) -> None:
    content, expected = GOOD[name]
    assert rows(tmp_path / "a.csv", content) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [("p,c,p\n1,2,3\n", "its header has 'p' more than once"), ("\n\n", "it has no header"),
     ('p,"c\n1,2\n', "its quotes do not match"), (b"p\xe9\n1\n", "this is not UTF-8")],
)  # fmt: skip
def test_a_bad_header_is_an_error_of_the_file(content: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a.csv: .*{said}"):
        rows(tmp_path / "a.csv", content)


def test_a_cell_as_long_as_a_book(tmp_path: Path) -> None:
    (row,) = rows(tmp_path / "a.csv", f"p,c\n{'x' * 300_000},1\n")
    assert isinstance(row, dict) and len(row["p"]) == 300_000


cells = st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=9),
                          min_size=2, max_size=2), min_size=1, max_size=6)  # fmt: skip


@given(cells)
def test_what_pythons_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[list[str]]
) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["p", "c"], *table])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    assert rows(path, text.getvalue()) == [{"p": p, "c": c} for p, c in table]
