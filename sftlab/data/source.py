"""Sources: where rows come from. A source is a hub id or local files, read in place, one range of rows at a time.

It knows how many rows it has, their hash and how to read any range of them, so that workers can share the reading. The
format says what a row means.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data.format import Fields

LINES = (".jsonl", ".ndjson")
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
KINDS = (*LINES, ".json", *TABLES)
TABLE_ROWS = 1000  # rows of a table turned into Python objects at a time

RowsOf = Callable[[Any], list[Fields]]


class Source(ABC):
    """Rows that can be read by range. `name` is for messages, `fingerprint` a hash of the content."""

    name: str
    fingerprint: str

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
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    offsets.extend((number, offset))
                offset += len(line)
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
        with _open(Path(self.name)) as file:
            file.seek(int(self.offsets[start, 1]))
            for _ in range(start, stop):
                line = file.readline()
                while line and not line.strip():
                    line = file.readline()
                yield _parse_line(line)


@dataclass(frozen=True)
class Table(Source):
    """Memory-mapped rows of a `datasets.Dataset`, from the hub, Parquet or CSV."""

    name: str
    dataset: Any

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The dataset's own fingerprint."""
        return str(self.dataset._fingerprint)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, row: int) -> str:
        """Return name and row number, counted from 1."""
        return f"{self.name} row {row + 1}"

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows."""
        for first in range(start, min(stop, len(self)), TABLE_ROWS):
            columns = self.dataset[first : min(first + TABLE_ROWS, stop)]
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


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


def open_source(
    path: str,
    split: str | None,
    rows_of: RowsOf,
    key: str = "data.path",
    subset: str | None = None,
    revision: str | None = None,
) -> Source:
    """Return the source at a local path, else of a hub id; `rows_of` finds the rows in a JSON document.

    `key` is the config key of `path`, for messages. Raises: FileNotFoundError, ValueError or ConnectionError, which say
    what to type instead.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _open_file(local, rows_of, key)
    is_glob = re.search(r"[*?\[]", path) is not None
    if local.is_dir() or is_glob:
        found = map(Path, glob.glob(str(local), recursive=True)) if is_glob else local.rglob("*")
        files = sorted(f for f in found if f.is_file() and kind_of(f) in KINDS)
        if not files:
            what = "no file matches" if is_glob else "the folder holds no file that can be read"
            raise FileNotFoundError(f"{key}={path}: {what}; expected {', '.join(KINDS)}, each perhaps with .gz")
        parts = [_open_file(file, rows_of, key) for file in files]
        return parts[0] if len(parts) == 1 else Several(path, parts)
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or kind_of(local) in KINDS:
        raise FileNotFoundError(f"{key}={path}: no such file or folder")
    return Table(path, _load(path, key, subset=subset, split=split, revision=revision))


def is_local(path: str) -> bool:
    """Return whether a data path is a local file, folder or glob."""
    return Path(path).expanduser().exists() or re.search(r"[*?\[]", path) is not None


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _open_file(path: Path, rows_of: RowsOf, key: str) -> Source:
    kind = kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{key}={path}: cannot read a {kind or 'file without suffix'}; expected {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{key}={path}: the file is empty")
    try:
        if kind in LINES:
            return Lines.open(path)
        if kind == ".json":
            return _open_json(path, rows_of)
        options: dict[str, Any] = {"data_files": str(path), "split": "train"}
        if TABLES[kind] == "csv":
            options |= _as_text(path, "\t" if kind == ".tsv" else ",")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read this file: {type(error).__name__}: {error}") from None
    return Table(str(path), _load(TABLES[kind], key, shown=str(path), **options))


def _as_text(path: Path, separator: str) -> dict[str, Any]:
    """Return the options that keep the cells of a CSV file as text.

    By default pandas turns a column of digits into numbers, and "NA" and empty cells into missing values.
    """
    import datasets

    with io.TextIOWrapper(_open(path), "utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator, "encoding": "utf-8-sig"}


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _open_json(path: Path, rows_of: RowsOf) -> Source:
    with _open(path) as file:
        content = file.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, despite its name
            return Lines.open(path)
        raise ValueError(f"{path}: this is not JSON ({error})") from None
    try:
        return Document(str(path), hashlib.blake2b(content, digest_size=16).hexdigest(), rows_of(document))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_line(line: bytes) -> Fields | ValueError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"this line is not UTF-8 ({error})")
    except json.JSONDecodeError as error:
        return ValueError(f"this line is not JSON ({error})")
    return row if isinstance(row, dict) else ValueError(_not_an_object(row))


def _not_an_object(row: Any) -> str:
    return f"expected a JSON object, found {type(row).__name__}"


def _load(name: str, key: str, subset: str | None = None, shown: str | None = None, **options: Any) -> Any:
    """Return what `datasets.load_dataset` returns; errors say what can be done."""
    import datasets

    from sftlab.common.hub import explain

    try:
        return datasets.load_dataset(name, subset, **options)
    except Exception as error:
        if shown is None:
            raise explain(error, name, "dataset", key) from error
        cause = error.__cause__ or error
        raise ValueError(f"{shown}: cannot read this file: {type(cause).__name__}: {cause}") from error
