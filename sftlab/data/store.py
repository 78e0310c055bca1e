"""The store: tokenised examples as memory-mapped Arrow, built once and shared by every rank on the machine.

The cache key covers the rows' content, the tokenizer and the format's version. So a second start tokenises nothing, and
a change of any of them is never overlooked. The data lies in the page cache: a further rank adds almost no host memory.
"""

import hashlib
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.common.files import open_plain, read_json, remove, write_json
from sftlab.data import kept
from sftlab.data.example import Example
from sftlab.data.format import Format
from sftlab.data.keys import Keys
from sftlab.data.source import Source
from sftlab.data.tokenise import BLOCK, Tokenised, blocks

log = logging.getLogger(__name__)
VERSION = 7  # raise it when the columns below or the renderer change what is stored
ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class Skipped:
    """A row that gave no example: where it is, and why."""

    where: str
    reason: str


def store(
    source: Source,
    format: Format,
    tokenizer: Any,
    limit: int | None = None,
    num_workers: int | None = None,
    on_error: str = "raise",
    unknown: str = "error",
    control_tokens: str = "count",
    key: str = "data",
) -> "Store":
    """Return the examples of the first `limit` rows of `source`, from the cache if they are there.

    `key` is the config key of the data option, for messages. Raises: ValueError that names file and row if a row cannot
    be used, unless on_error=skip.
    """
    import datasets
    from filelock import FileLock

    from sftlab.data.arrow import build

    num_rows = len(source) if limit is None else min(limit, len(source))
    if num_rows == 0:
        raise ValueError(f"{source.name}: it holds no row")
    name = fingerprint(
        source.fingerprint,
        format,
        format.version,
        tokenizer_hash(tokenizer, format),
        num_rows,
        on_error,
        unknown,
        control_tokens,
        VERSION,
    )
    workers = max(1, min(num_workers or len(os.sched_getaffinity(0)), num_rows // BLOCK))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sftlab"
    cache.mkdir(parents=True, exist_ok=True)
    made = Tokenised(source, format, tokenizer, on_error, unknown, control_tokens, key)
    arguments = {"made": made, "ranges": split(num_rows, workers)}
    with FileLock(cache / f"{name}.lock"):  # the first rank on a machine builds, the others find it built
        dataset = build(blocks, arguments, features(), name, cache, workers, num_rows)
        if not as_written(dataset, cache / f"{name}.json"):
            log.warning("the tokenised examples of %s in %s have changed on the disk: made anew", source.name, cache)
            forget(dataset, cache / f"{name}.json")
            dataset = build(blocks, arguments, features(), name, cache, workers, num_rows)
            as_written(dataset, cache / f"{name}.json")
        kept.note(cache, name, source.name, num_rows)
    return Store(dataset, name, source)


def features() -> Any:
    """Return the types of the stored columns."""
    import datasets

    return datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        supervised=datasets.List(datasets.Value("bool")),
        weights=datasets.List(datasets.Value("float32")),  # empty where every target counts once
        id=datasets.Value("string"),
        group=datasets.Value("int64"),
        num_prompt=datasets.Value("int32"),
        references=datasets.List(datasets.Value("string")),
        row=datasets.Value("int64"),
        digest=datasets.Value("int64"),
        num_supervised=datasets.Value("int64"),
        ends=datasets.Value("int64"),
        control=datasets.Value("int64"),
        kinds=datasets.Value("int64"),
        error=datasets.Value("string"),
        keys=datasets.Value("string"),
    )


def as_written(dataset: Any, record: Path) -> bool:
    """Return whether the files of a cached dataset are those that were written; the first time, note what they are.

    xxh3 reads 10 GB per second: it finds a damaged or edited cache, and adds nothing to see in the time of a start.
    """
    found = {Path(file["filename"]).name: arrow_digest(Path(file["filename"])) for file in dataset.cache_files}
    noted = read_json(record)
    if not noted:
        write_json(record, found)
    return not noted or noted == found


def arrow_digest(path: Path) -> str:
    """Return a hash of a file, read as it lies in the page cache."""
    import xxhash

    with open_plain(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return str(xxhash.xxh3_128_hexdigest(content))


def forget(dataset: Any, record: Path) -> None:
    """Remove a cached dataset, so that the next build makes it."""
    for folder in {Path(file["filename"]).parent for file in dataset.cache_files}:
        remove(folder)
    record.unlink(missing_ok=True)


def split(num_rows: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` ranges of nearly equal length; each worker reads one, from beginning to end."""
    ends = [num_rows * i // parts for i in range(parts + 1)]
    return list(pairwise(ends))


def fingerprint(*parts: Any) -> str:
    """Return a hash of the parts' `repr`."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any, format: Format | None = None) -> str:
    """Return a hash of everything about a tokenizer that decides tokens, and the date where its template writes one."""
    template = tokenizer.chat_template
    dated = format is not None and format.converses and "strftime_now" in str(template)
    today = (format.date or str(date.today())) if format is not None and dated else None
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, template)
    return fingerprint(*parts, *([today] if dated else []))


class Store(Sequence[Example]):
    """Examples read straight from Arrow buffers, without copies of the token columns.

    `groups`, `lengths`, `num_supervised`, `ends`, `last`, `control`, `kinds`, `rows` and `digests` are one number per
    example, (n,). Skipped rows are in `skipped` and are not examples. `keys` counts the columns and keys of the rows.
    """

    def __init__(self, dataset: Any, fingerprint: str, source: Source) -> None:
        self.fingerprint = fingerprint
        self.source = source
        table = dataset.data
        self._chunks = table.table.to_batches() if hasattr(table, "table") else table.to_batches()
        self._starts = np.cumsum([0, *(len(c) for c in self._chunks)])
        self._at: NDArray[np.int64] = np.arange(int(self._starts[-1]))
        rows = self._column("row")
        bad = [int(self._starts[k]) + i for k, c in enumerate(self._chunks) for i in valid(c.column("error"))]
        found = [(at, *self._chunk(at)) for at in bad]
        self.skipped = [Skipped(source.where(int(rows[at])), c.column("error")[i].as_py()) for at, c, i in found]
        self.keys = Keys()
        for chunk in self._chunks:
            for i in valid(chunk.column("keys")):
                self.keys.add(chunk.column("keys")[i].as_py())
        self._at = np.delete(self._at, bad)
        self.rows = rows[self._at]
        self.groups = self._column("group")[self._at]
        self.digests = self._column("digest")[self._at]
        self.lengths = self._lengths()[self._at]
        self.num_supervised = self._column("num_supervised")[self._at]
        self.control = self._column("control")[self._at]
        self.kinds = self._column("kinds")[self._at]
        self.ends = self._column("ends")[self._at].astype(bool)  # whether the last token is supervised
        self.last = self._last()[self._at]  # the last token

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        at = int(self._at[index])
        chunk, i = self._chunk(at)
        return Example(
            tokens=chunk.column("tokens")[i].values.to_numpy(),
            supervised=chunk.column("supervised")[i].values.to_numpy(zero_copy_only=False),
            weights=weights if len(weights := chunk.column("weights")[i].values.to_numpy()) else None,
            id=chunk.column("id")[i].as_py() or self.where(index),
            group=int(self.groups[index]),
            num_prompt=chunk.column("num_prompt")[i].as_py(),
            references=tuple(chunk.column("references")[i].as_py()),
        )

    def where(self, index: int) -> str:
        """Return where in the source an example comes from."""
        return self.source.where(int(self.rows[index]))

    def named(self, index: int) -> str:
        """Return where in the source an example comes from, and its own id if it has one."""
        where, own = self.where(index), self[index].id
        return where if own == where else f"{where} (id {own})"

    def _chunk(self, at: int) -> tuple[Any, int]:
        """Return the record batch that holds stored row `at`, and the row's index in it."""
        k = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self._chunks[k], at - int(self._starts[k])

    def _column(self, name: str) -> NDArray[np.int64]:
        columns = [c.column(name).to_numpy() for c in self._chunks]
        return np.concatenate(columns) if columns else np.empty(0, np.int64)

    def _lengths(self) -> NDArray[np.int64]:
        parts = [np.diff(c.column("tokens").offsets.to_numpy()) for c in self._chunks]
        return np.concatenate(parts).astype(np.int64)

    def _last(self) -> NDArray[np.int64]:
        columns = [c.column("tokens") for c in self._chunks]
        ends = [np.maximum(c.offsets.to_numpy()[1:], 1) - 1 for c in columns]  # a skipped row has no token
        parts = [c.values.to_numpy()[at] if len(c.values) else at for c, at in zip(columns, ends, strict=True)]
        return np.concatenate(parts).astype(np.int64)


def valid(column: Any) -> list[int]:
    """Return the indices at which an Arrow column is not null."""
    if column.null_count == len(column):
        return []
    return [int(i) for i in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))]
