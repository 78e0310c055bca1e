"""The data of a run: training and validation examples, cut to what the model takes, and how they are dealt out.

Two constructors, one for each thing that a data option describes: `Sources` says where the examples come from and what
they mean; `Layout` says which of them are kept, in what order they are met and how they lie in rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.assets import locate
from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS
from sftlab.data.format import Format
from sftlab.data.source import open_source
from sftlab.data.store import Store, store

OVERLONG = ("error", "drop", "truncate")


@dataclass(frozen=True)
class Data:
    """One data option: a source of rows of one format, and the layout of its examples.

    `val_path` names validation data of the same format; without it, `val_split` of a hub `path`, or `val_examples`
    held out of the training data in whole prefix groups. A local path with none of these has no validation.
    """

    format: Format
    path: str
    split: str | None = "train"
    val_path: str | None = None
    val_split: str | None = None
    val_examples: int = 0
    limit: int | None = None
    max_length: int | None = None
    overlong: str = "error"
    layout: str = "tree"
    row_length: int | None = None
    group_by_prefix: bool = False
    shuffle: bool = True
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for key, value, known in (("layout", self.layout, LAYOUTS), ("overlong", self.overlong, OVERLONG)):
            if value not in known:
                raise ValueError(f"data.{key}={value}: expected one of {', '.join(known)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit={self.limit} counts rows: expected at least 1, or null for all")

    def examples(self, tokenizer: Any, max_length: int) -> tuple["Examples", "Examples | None"]:
        """Return the training and the validation examples, none of more than `max_length` tokens."""
        path = locate(self.path)
        source = open_source(path, self.split, self.format.rows)
        train = Examples.of(store(source, self.format, tokenizer, self.limit, self.num_workers))
        val = None
        val_path = locate(self.val_path) if self.val_path else path
        if self.val_path or (self.val_split and not is_local(path)):
            val_source = open_source(val_path, self.val_split or self.split, self.format.rows)
            val = Examples.of(store(val_source, self.format, tokenizer, None, self.num_workers))
        elif self.val_examples:
            train, val = train.hold_out(self.val_examples)
        if val is not None:
            val = val.cut(max_length, self.overlong)
        return train.cut(max_length, self.overlong), val

    def evaluated(self, tokenizer: Any, max_length: int) -> "Examples":
        """Return the examples to evaluate on: the validation data, or all of a local path that has none.

        Training data is read only where the validation examples are held out of it.
        """
        if self.val_examples and not self.val_path:
            val = self.examples(tokenizer, max_length)[1]
            assert val is not None
            return val
        path, split = self.path, self.split
        if self.val_path or (self.val_split and not is_local(locate(path))):
            path, split = self.val_path or path, self.val_split or split
        whole = replace(self, path=path, split=split, val_path=None, val_split=None, val_examples=0, limit=None)
        return whole.examples(tokenizer, max_length)[0]

    @property
    def has_validation(self) -> bool:
        """Whether the option names or holds out validation data."""
        return bool(self.val_path or self.val_examples or (self.val_split and not is_local(locate(self.path))))


def is_local(path: str) -> bool:
    """Return whether a data path is a file or folder here."""
    from pathlib import Path

    return Path(path).expanduser().exists()


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Some examples of a store, in its order, none longer than `max_length`.

    `kept` are indices into the store; `num_dropped` and `num_truncated` say what became of those over `max_length`.
    """

    store: Store
    kept: NDArray[np.int64]
    max_length: int | None = None
    num_dropped: int = 0
    num_truncated: int = 0

    @classmethod
    def of(cls, store: Store) -> "Examples":
        """Return all examples of a store."""
        return cls(store, np.arange(len(store)))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        example: Example = self.store[int(self.kept[index])]
        if self.max_length is not None and len(example) > self.max_length:
            return replace(
                example, tokens=example.tokens[: self.max_length], supervised=example.supervised[: self.max_length]
            )
        return example

    @property
    def groups(self) -> NDArray[np.int64]:
        """Group keys, (n,)."""
        return self.store.groups[self.kept]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Lengths in tokens, (n,)."""
        lengths = self.store.lengths[self.kept]
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def hold_out(self, num: int) -> tuple["Examples", "Examples"]:
        """Return (the rest, whole groups of at least `num` examples in all); whole, so that nothing leaks.

        Raises: ValueError if nothing would be left to train on.
        """
        from sftlab.data.plan import shuffled

        groups, inverse, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)
        order = shuffled(len(groups), 0, 0)
        taken = order[: int(np.searchsorted(np.cumsum(sizes[order]), num)) + 1]
        held = np.isin(inverse, taken)
        if held.all():
            raise ValueError(
                f"data.val_examples={num} leaves no training example of {len(self)}, whole groups held out"
            )
        return replace(self, kept=self.kept[~held]), replace(self, kept=self.kept[held])

    def cut(self, max_length: int, overlong: str) -> "Examples":
        """Return the examples with those over `max_length` tokens refused, dropped or truncated.

        A truncated example that keeps no target is dropped. Raises: ValueError for overlong=error, naming the longest.
        """
        over = np.flatnonzero(self.lengths > max_length)
        if len(over) == 0:
            return self
        if overlong == "error":
            worst = self[int(over[np.argmax(self.lengths[over])])]
            raise ValueError(
                f"{len(over)} of {len(self)} examples are longer than data.max_length={max_length} tokens; "
                f"the longest, {worst.id}, has {len(worst)}. Raise data.max_length, or set data.overlong=drop, truncate"
            )
        cut = replace(self, max_length=max_length)
        drop = over if overlong == "drop" else np.array([i for i in over if not cut[int(i)].supervised.any()], int)
        return replace(cut, kept=np.delete(self.kept, drop), num_dropped=len(drop), num_truncated=len(over) - len(drop))
