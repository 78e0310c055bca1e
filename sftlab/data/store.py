"""The store: tokenised examples as memory-mapped Arrow, built once and shared by every rank on the machine.

Keyed by the rows' content, the tokenizer and the format's version, so that a second start tokenises nothing and a
change of any of them is never overlooked. Host memory is the page cache's: a further rank adds almost nothing.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data.example import Example
from sftlab.data.format import Format
from sftlab.data.render import Renderer
from sftlab.data.source import Source

VERSION = 1  # of the columns below and of the renderer: raise it when either changes what is stored
BLOCK = 1000  # rows tokenised at a time, and the least worth a worker of its own


def store(source: Source, format: Format, tokenizer: Any, limit: int | None, num_workers: int | None) -> "Store":
    """Return the examples of the first `limit` rows of `source`, from the cache where they are there.

    Raises: ValueError that names file and row for a row that the format refuses.
    """
    import datasets
    from filelock import FileLock

    num_rows = len(source) if limit is None else min(limit, len(source))
    if num_rows == 0:
        raise ValueError(f"{getattr(source, 'path', getattr(source, 'name', 'the source'))}: it holds no row")
    key = fingerprint(source.fingerprint, format, format.version, tokenizer_hash(tokenizer), num_rows, VERSION)
    workers = max(1, min(num_workers or len(os.sched_getaffinity(0)), num_rows // BLOCK))
    blocks = [(start, min(start + BLOCK, num_rows)) for start in range(0, num_rows, BLOCK)]
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        supervised=datasets.List(datasets.Value("bool")),
        id=datasets.Value("string"),
        group=datasets.Value("int64"),
        num_prompt=datasets.Value("int32"),
        references=datasets.List(datasets.Value("string")),
    )
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sftlab"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / f"{key}.lock"):  # the first rank on a machine builds, the others find it built
            dataset = datasets.Dataset.from_generator(
                _tokenised,
                features=features,
                cache_dir=str(cache),
                gen_kwargs={"blocks": blocks, "source": source, "format": format, "tokenizer": tokenizer},
                num_proc=workers if workers > 1 else None,
                fingerprint=key,
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    return Store(dataset, key)


def _tokenised(
    blocks: list[tuple[int, int]], source: Source, format: Format, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each example. The list `blocks` is what datasets splits over workers."""
    renderer = Renderer(tokenizer)
    for start, stop in blocks:
        texts, wheres = [], []
        for where, fields in source.read(start, stop):
            try:
                texts.append(format.text(fields))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            wheres.append(where)
        for e in renderer.examples(texts, wheres):
            yield {**vars(e), "references": list(e.references)}


def fingerprint(*parts: Any) -> str:
    """Return a hash of what the parts print as."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything about a tokenizer that decides tokens."""
    return fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template)


class Store(Sequence[Example]):
    """Examples read straight from Arrow buffers, without copies of the token columns."""

    def __init__(self, dataset: Any, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        table = dataset.data
        self._chunks = table.table.to_batches() if hasattr(table, "table") else table.to_batches()
        self._starts = np.cumsum([0, *(len(c) for c in self._chunks)])
        self.groups: NDArray[np.int64] = np.concatenate([c.column("group").to_numpy() for c in self._chunks])
        self.lengths: NDArray[np.int64] = np.concatenate(
            [np.diff(c.column("tokens").offsets.to_numpy()) for c in self._chunks]
        ).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        columns, i = self._chunks[chunk], int(index - self._starts[chunk])
        tokens, supervised = columns.column("tokens")[i].values, columns.column("supervised")[i].values
        return Example(
            tokens=tokens.to_numpy(),
            supervised=supervised.to_numpy(zero_copy_only=False),
            id=columns.column("id")[i].as_py(),
            group=int(self.groups[index]),
            num_prompt=columns.column("num_prompt")[i].as_py(),
            references=tuple(columns.column("references")[i].as_py()),
        )
