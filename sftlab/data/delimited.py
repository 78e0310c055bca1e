"""CSV and TSV files: every cell is text, as it stands in the file.

`datasets` reads them with pandas, which shifts the columns of a row that has one field too many (pandas #15203), turns
digits into numbers and `NA` into nothing. Here a row with more or fewer fields than the header is an error.
"""

import csv
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data import limits
from sftlab.data.format import Fields
from sftlab.data.source import Source, open_bytes

csv.field_size_limit(2**31 - 1)  # a cell may hold a book


@dataclass(frozen=True)
class Delimited(Source):
    """The rows of a file of cells. `offsets`, (n,), are the first bytes of the rows below the header."""

    name: str
    fingerprint: str
    separator: str
    header: tuple[str, ...]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, separator: str) -> "Delimited":
        """Return the rows of a file, indexed in one pass that also hashes it. Raises: ValueError for a bad header."""
        digest, offsets = hashlib.blake2b(digest_size=16), array("q")
        with open_bytes(path) as file:
            for line, _ in limits.lines(file, path):
                digest.update(line)
        with open_bytes(path) as file:
            found = records(file, separator, 0)
            _, header = next(found, (0, []))
            if isinstance(header, ValueError) or not header:
                raise ValueError(f"{path}: cannot read this file: {header or 'it has no header'}")
            twice = {name for name, times in Counter(header).items() if times > 1}
            if twice:
                raise ValueError(f"{path}: its header has {', '.join(map(repr, sorted(twice)))} more than once")
            for offset, _ in found:
                offsets.append(offset)
        return cls(str(path), digest.hexdigest(), separator, tuple(header), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, row: int) -> str:
        """Return name and row number, counted from 1 below the header."""
        return f"{self.name} row {row + 1}"

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows, found by their byte offsets."""
        stop = min(stop, len(self))
        if start >= stop:
            return
        with open_bytes(Path(self.name)) as file:
            offset = int(self.offsets[start])
            file.seek(offset)
            for _, (_, cells) in zip(range(start, stop), records(file, self.separator, offset), strict=False):
                yield cells if isinstance(cells, ValueError) else self._row(cells)

    def _row(self, cells: list[str]) -> Fields | ValueError:
        if len(cells) == len(self.header):
            return dict(zip(self.header, cells, strict=True))
        return ValueError(
            f"it has {len(cells)} fields, and the header has {len(self.header)}: a field that holds {self.separator!r} "
            f"or a line break must stand in quotes; the row is {cells!r:.200}"
        )


def records(file: Any, separator: str, offset: int) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Yield (first byte, cells) of each record from here on that is not blank; in place of cells, what is wrong.

    After an error the next line is a record of its own, so that one stray quote does not take the rest of the file.
    """
    lines = Lines(file, offset)
    while True:
        begin, lines.taken = lines.offset, []
        try:
            cells = next(csv.reader(lines, delimiter=separator, strict=True), None)
            if cells is None:
                return
            if len(lines.taken) > 1 and separator == "\t" and swallowed(lines.taken):
                raise csv.Error("rows stand between its quotes; a quote that is text must be doubled, in quotes")
        except (csv.Error, UnicodeDecodeError) as error:
            lines.back_to_second()
            what = "this is not UTF-8" if isinstance(error, UnicodeDecodeError) else "its quotes do not match"
            yield begin, ValueError(f"{what} ({error}): {lines.taken[0]!r:.200}")
            continue
        if cells:
            yield begin, cells


class Lines:
    """The lines of a file as text. It knows where the next begins, and can take lines back."""

    def __init__(self, file: Any, offset: int) -> None:
        self.file, self.offset = file, offset
        self.taken: list[bytes] = []

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line: bytes = self.file.readline()
        if not line:
            raise StopIteration
        first = self.offset == 0
        self.offset += len(line)
        self.taken.append(line)
        return line.decode("utf-8-sig" if first else "utf-8")

    def back_to_second(self) -> None:
        """Read on with the second of the lines taken."""
        more = sum(map(len, self.taken[1:]))
        if more:
            self.offset -= more
            self.file.seek(self.offset)


def swallowed(lines: list[bytes]) -> bool:
    """Return whether each of several lines looks like a row of its own: all have the same number of tabs, not zero.

    Tabs are rare in text, so one that stands in each line of a quoted cell is a sign of a quote that was meant as text.
    """
    return len({line.count(b"\t") for line in lines}) == 1 and b"\t" in lines[0]
