"""The store: tokenised examples as memory-mapped Arrow, built once and shared by every rank on the machine.

The cache key covers the rows' content, the tokenizer and the format's version. So a second start tokenises nothing, and
a change of any of them is never overlooked. The data lies in the page cache: a further rank adds almost no host memory.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data.example import Example
from sftlab.data.format import Format
from sftlab.data.render import Rendered, Renderer, bytes_hash
from sftlab.data.source import Source

VERSION = 3  # raise it when the columns below or the renderer change what is stored
BLOCK = 1000  # rows tokenised at a time, and the fewest worth another worker
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
) -> "Store":
    """Return the examples of the first `limit` rows of `source`, from the cache if they are there.

    Raises: ValueError that names file and row if a row cannot be used, unless on_error=skip.
    """
    import datasets
    from filelock import FileLock

    from sftlab.data.arrow import build

    num_rows = len(source) if limit is None else min(limit, len(source))
    if num_rows == 0:
        raise ValueError(f"{source.name}: it holds no row")
    key = fingerprint(
        source.fingerprint, format, format.version, tokenizer_hash(tokenizer), num_rows, on_error, VERSION
    )
    workers = max(1, min(num_workers or len(os.sched_getaffinity(0)), num_rows // BLOCK))
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        supervised=datasets.List(datasets.Value("bool")),
        id=datasets.Value("string"),
        group=datasets.Value("int64"),
        num_prompt=datasets.Value("int32"),
        references=datasets.List(datasets.Value("string")),
        row=datasets.Value("int64"),
        digest=datasets.Value("int64"),
        num_supervised=datasets.Value("int64"),
        ends=datasets.Value("int64"),
        error=datasets.Value("string"),
    )
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sftlab"
    cache.mkdir(parents=True, exist_ok=True)
    arguments = {"source": source, "format": format, "tokenizer": tokenizer, "on_error": on_error}
    arguments["ranges"] = split(num_rows, workers)
    with FileLock(cache / f"{key}.lock"):  # the first rank on a machine builds, the others find it built
        dataset = build(_tokenised, arguments, features, key, cache, workers)
    return Store(dataset, key, source)


def split(num_rows: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` ranges of nearly equal length; each worker reads one, from beginning to end."""
    ends = [num_rows * i // parts for i in range(parts + 1)]
    return list(pairwise(ends))


def _tokenised(
    ranges: list[tuple[int, int]], source: Source, format: Format, tokenizer: Any, on_error: str
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each block of rows. `datasets` splits the list `ranges` over the workers."""
    renderer = Renderer(tokenizer)
    for start, stop in ranges:
        rows = source.read_rows(start, stop)
        for first in range(start, stop, BLOCK):
            good: list[tuple[int, Rendered]] = []
            bad: list[tuple[int, str]] = []
            for number, fields in zip(range(first, min(first + BLOCK, stop)), rows, strict=False):
                try:
                    if isinstance(fields, ValueError):
                        raise fields
                    good.append((number, renderer.render(format.to_text(fields))))
                except ValueError as error:
                    if on_error == "raise":
                        raise ValueError(f"{source.where(number)}: {error}") from None
                    bad.append((number, str(error)))
            wheres = [source.where(n) for n, _ in good]
            examples = renderer.examples([r for _, r in good], wheres)
            yield columns(
                [*examples, *[NOTHING] * len(bad)],
                rows=[number for number, _ in [*good, *bad]],
                # Don't store ids for rows that have none: the same rows may be in another file next time.
                id=[*(None if r.source.id is None else str(r.source.id) for _, r in good), *[None] * len(bad)],
                error=[*[None] * len(good), *(reason for _, reason in bad)],
            )


NOTHING = Example(np.empty(0, np.int32), np.empty(0, bool), "")


def columns(examples: list[Example], rows: list[int], **more: list[str | None]) -> dict[str, Any]:
    """Return the stored columns of examples from the source's rows `rows`, one value per example."""
    from sftlab.data.arrow import lists

    return {
        "tokens": lists([e.tokens for e in examples], np.int32),
        "supervised": lists([e.supervised for e in examples], np.bool_),
        "group": [e.group for e in examples],
        "num_prompt": [e.num_prompt for e in examples],
        "references": [list(e.references) for e in examples],
        "row": rows,
        "digest": [bytes_hash(e.tokens.tobytes() + e.supervised.tobytes()) for e in examples],
        "num_supervised": [int(e.supervised.sum()) for e in examples],
        "ends": [int(len(e) > 0 and e.supervised[-1]) for e in examples],
        **more,
    }


def fingerprint(*parts: Any) -> str:
    """Return a hash of the parts' `repr`."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything about a tokenizer that decides tokens."""
    return fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template)


class Store(Sequence[Example]):
    """Examples read straight from Arrow buffers, without copies of the token columns.

    `groups`, `lengths`, `num_supervised`, `ends`, `rows` and `digests` are one number per example, (n,). Skipped rows
    are in `skipped` and are not examples.
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
        self._at = np.delete(self._at, bad)
        self.rows = rows[self._at]
        self.groups = self._column("group")[self._at]
        self.digests = self._column("digest")[self._at]
        self.lengths = self._lengths()[self._at]
        self.num_supervised = self._column("num_supervised")[self._at]
        self.ends = self._column("ends")[self._at].astype(bool)  # whether the last token is supervised

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        at = int(self._at[index])
        chunk, i = self._chunk(at)
        return Example(
            tokens=chunk.column("tokens")[i].values.to_numpy(),
            supervised=chunk.column("supervised")[i].values.to_numpy(zero_copy_only=False),
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


def valid(column: Any) -> list[int]:
    """Return the indices at which an Arrow column is not null."""
    if column.null_count == len(column):
        return []
    return [int(i) for i in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))]
