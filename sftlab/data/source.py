"""Sources: where rows come from. A source is read in place, one range of rows at a time.

It knows how many rows it has, their hash and how to read any range of them, so that workers can share the reading. The
format says what a row means. Here are JSON and what combines sources; delimited.py has CSV, table.py what `datasets`
reads, and opening.py finds the source that a path names.
"""

import gzip
import hashlib
import io
import json
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data import limits
from sftlab.data.format import Fields

COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # and how each begins

RowsOf = Callable[[Any], list[Fields]]


class Source(ABC):
    """Rows that can be read by range. `name` is for messages, `fingerprint` a hash of the content.

    `left_alone` are files beside it that belong to no split.
    """

    name: str
    fingerprint: str
    left_alone: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Return the name of a row, counted from 0, for messages: file and line, or file and number."""

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows `start` to `stop`; in place of a row that cannot be read, the error that says why."""


@dataclass(frozen=True)
class Lines(Source):
    """JSON objects, one per line. `offsets`, (n, 2), are the number and first byte of each line that is not blank."""

    name: str
    fingerprint: str
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> "Lines":
        """Return the lines of a file, indexed in one pass that also hashes it."""
        digest, offsets, offset = hashlib.blake2b(digest_size=16), array("q"), 0
        with open_bytes(path) as file:
            for number, (line, length) in enumerate(limits.lines(file, path), 1):
                digest.update(line)
                if line.strip():
                    offsets.extend((number, offset))
                offset += length
        return cls(str(path), digest.hexdigest(), np.frombuffer(offsets, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, row: int) -> str:
        """Return file and line."""
        return f"{self.name}:{self.offsets[row, 0]}"

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows, found by their byte offsets."""
        stop = min(stop, len(self))
        if start >= stop:
            return
        with open_bytes(Path(self.name)) as file:
            file.seek(int(self.offsets[start, 1]))
            for _ in range(start, stop):
                line, _ = limits.read_line(file)
                while line and not line.strip():
                    line, _ = limits.read_line(file)
                yield _parse_line(line)


@dataclass(frozen=True)
class Document(Source):
    """The rows of one JSON document, which is read as a whole."""

    name: str
    fingerprint: str
    rows: list[Fields]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """Return name and row number, counted from 1."""
        return f"{self.name} row {row + 1}"

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows."""
        for row in self.rows[start:stop]:
            yield row if isinstance(row, dict) else ValueError(_not_an_object(row))


@dataclass(frozen=True)
class Several(Source):
    """Several sources in sequence: the files of a folder or glob."""

    name: str
    parts: Sequence[Source]
    left_alone: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """A hash of the parts' fingerprints."""
        return hashlib.blake2b(" ".join(p.fingerprint for p in self.parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def where(self, row: int) -> str:
        """Return the name that the part gives the row."""
        for part in self.parts:
            if row < len(part):
                return part.where(row)
            row -= len(part)
        raise IndexError(row)

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows."""
        for part in self.parts:
            if start < len(part) and stop > 0:
                yield from part.read_rows(max(0, start), min(stop, len(part)))
            start, stop = start - len(part), stop - len(part)


@dataclass(frozen=True)
class Stretch(Source):
    """Rows `first` to `last` of a source: a slice of a split."""

    whole: Source
    first: int
    last: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the whole."""
        return self.whole.name

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """A hash of the whole's fingerprint and the place in it."""
        parts = f"{self.whole.fingerprint} {self.first} {self.last}"
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def where(self, row: int) -> str:
        """Return the name that the whole gives the row."""
        return self.whole.where(self.first + row)

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows."""
        yield from self.whole.read_rows(self.first + start, min(self.first + stop, self.last))


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case, without that of its compression."""
    name = path.name.lower()
    return Path(next((name.removesuffix(c) for c in COMPRESSED if name.endswith(c)), name)).suffix


def file_digest(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def open_bytes(path: Path) -> Any:
    """Return an open file of bytes, decompressed if its name says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(Zstandard(path))
    return gzip.open(path, "rb") if suffix == ".gz" else path.open("rb")


class Zstandard(io.RawIOBase):
    """A Zstandard file as bytes, which can be read forward, and back by beginning anew; Python 3.14 has a module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        import pyarrow

        self.stream, self.at = pyarrow.CompressedInputStream(pyarrow.OSFile(str(self.path)), "zstd"), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; return how many there were."""
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte counted from the beginning, or from here."""
        offset += self.at if whence == io.SEEK_CUR else 0
        if offset < self.at:
            self._begin()
        while self.at < offset and (content := self.stream.read(min(2**20, offset - self.at))):
            self.at += len(content)
        return self.at

    def tell(self) -> int:
        """Return the number of bytes read."""
        return self.at


def open_json(path: Path, rows_of: RowsOf) -> Source:
    """Return the rows of a JSON document, or of one object per line despite the file's name."""
    with open_bytes(path) as file:
        content = limits.whole(file, path)
    try:
        document = parse(content)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            return Lines.open(path)
        raise ValueError(f"{path}: {explain(error)}") from None
    try:
        return Document(str(path), hashlib.blake2b(content, digest_size=16).hexdigest(), rows_of(document))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse(content: bytes) -> Any:
    """Return the value of JSON. Raises: ValueError, also for an object with the same key twice or nested too deeply."""
    try:
        return DECODER.decode(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def distinct(pairs: list[tuple[str, Any]]) -> Fields:
    """Return an object of these pairs. Raises: ValueError if a key stands twice: Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=distinct)


def explain(error: ValueError, what: str = "this") -> str:
    """Return in words why bytes are not JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"{what} is not UTF-8 ({error})"
    return (
        f"{what} is not JSON ({error})"
        if isinstance(error, json.JSONDecodeError)
        else f"{what} cannot be read: {error}"
    )


def _parse_line(line: bytes) -> Fields | ValueError:
    if len(line) > limits.ROW_BYTES:
        return ValueError(f"this line is longer than {limits.ROW_BYTES >> 20} MiB")
    try:
        row = parse(line)
    except ValueError as error:
        return ValueError(explain(error, "this line"))
    return row if isinstance(row, dict) else ValueError(_not_an_object(row))


def _not_an_object(row: Any) -> str:
    return f"expected a JSON object, found {type(row).__name__}"
