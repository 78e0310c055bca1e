"""Sources: where rows come from. A hub id or local files, read in place, a range of rows at a time.

A source knows how many rows it has, what they hash to and how to read any range of them, so that workers can share the
reading. What a row means is the format's.
"""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data.format import Fields

LINES = (".jsonl", ".ndjson")
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


class Source(ABC):
    """Rows that can be read by range. `fingerprint` is a hash of their content."""

    fingerprint: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[tuple[str, Fields]]:
        """Yield (where, row) of rows start to stop; `where` names file and line for messages."""


@dataclass(frozen=True)
class Lines(Source):
    """JSON objects, one a line. `offsets` are the bytes at which the lines begin that hold more than white space."""

    path: Path
    fingerprint: str
    offsets: NDArray[np.int64]  # (n, 2): line number, byte offset

    @classmethod
    def open(cls, path: Path) -> "Lines":
        """Index the lines of a file, in one pass that also hashes it."""
        digest, offsets, offset = hashlib.blake2b(digest_size=16), [], 0
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    offsets.append((number, offset))
                offset += len(line)
        return cls(path, digest.hexdigest(), np.array(offsets, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Fields]]:
        """Yield rows; the error for a malformed one names its file and line."""
        with _open(self.path) as file:
            for number, offset in self.offsets[start:stop]:
                where = f"{self.path}:{number}"
                file.seek(offset)
                try:
                    row = json.loads(file.readline().decode())
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: this line is not UTF-8 ({error})") from None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: this line is not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row


@dataclass(frozen=True)
class Table(Source):
    """Rows of a `datasets.Dataset`: from the hub, Parquet or CSV; memory-mapped."""

    name: str
    dataset: Any

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The dataset's own."""
        return str(self.dataset._fingerprint)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Fields]]:
        """Yield rows by number, the first being 1."""
        for i in range(start, stop):
            yield f"{self.name} row {i + 1}", self.dataset[i]


@dataclass(frozen=True)
class Document(Source):
    """The rows of one JSON document, which is read whole."""

    path: Path
    fingerprint: str
    rows: list[Fields]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Fields]]:
        """Yield rows by number, the first being 1."""
        for i in range(start, min(stop, len(self.rows))):
            yield f"{self.path} row {i + 1}", self.rows[i]


def open_source(path: str, split: str | None, rows_of: Callable[[Any], list[Fields]]) -> Source:
    """Return the source at a local path, else that of the hub id; `rows_of` finds the rows in a JSON document.

    Raises: FileNotFoundError, ValueError or ConnectionError, with what to type instead.
    """
    local = Path(path).expanduser()
    kind = (local.with_suffix("") if local.suffix == ".gz" else local).suffix
    if local.is_file():
        if kind in LINES:
            return Lines.open(local)
        if kind == ".json":
            return _open_json(local, rows_of)
        if kind in TABLES:
            return Table(str(local), _load(TABLES[kind], data_files=str(local), split="train"))
        known = ", ".join([*LINES, ".json", *TABLES])
        raise ValueError(f"data.path={path}: cannot read a {kind or 'file without suffix'}; expected one of {known}")
    if local.is_dir():
        files = sorted(str(f) for f in local.rglob("*.parquet"))
        if not files:
            raise ValueError(f"data.path={path}: the folder holds no .parquet file; name a file")
        return Table(str(local), _load("parquet", data_files=files, split="train"))
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or kind in (*LINES, ".json", *TABLES):
        raise FileNotFoundError(f"data.path={path}: no such file or folder")
    return Table(path, _load(path, split=split))


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _open_json(path: Path, rows_of: Callable[[Any], list[Fields]]) -> Source:
    with _open(path) as file:
        content = file.read()
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line in spite of the name
            return Lines.open(path)
        raise ValueError(f"{path}: this is not JSON ({error})") from None
    try:
        return Document(path, hashlib.blake2b(content, digest_size=16).hexdigest(), rows_of(document))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None


def _load(name: str, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with errors that say what can be done."""
    import datasets

    from sftlab.hub import explain

    try:
        return datasets.load_dataset(name, **kwargs)
    except Exception as error:
        raise explain(error, name, "dataset", "data.path") from error
