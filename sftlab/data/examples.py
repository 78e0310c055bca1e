"""Examples: those kept from a store, cut to the length that the model takes, and what became of the others.

Every row of a source is kept, truncated, dropped for a reason, or skipped as unusable. All are counted and named here.
"""

import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sftlab.data.example import Example
from sftlab.data.example_set import Array, ExampleSet
from sftlab.data.plan import shuffled
from sftlab.data.store import Store, fingerprint

OVERLONG = ("error", "drop", "truncate")
TOO_LONG, NO_TARGET = "longer than max_length", "no supervised token"


@dataclass(frozen=True)
class Examples(ExampleSet):
    """Some examples of a store, in its order, none longer than `max_length`.

    `kept` are indices into the store; `dropped` are the indices of examples left out, by reason.
    """

    store: Store
    kept: Array
    max_length: int | None = None
    dropped: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> "Examples":
        """Return all examples of a store."""
        return cls(store, np.arange(len(store)))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        example: Example = self.store[int(self.kept[index])]
        if self.max_length is not None and len(example) > self.max_length:
            n = self.max_length
            return replace(
                example,
                tokens=example.tokens[:n],
                supervised=example.supervised[:n],
                weights=None if example.weights is None else example.weights[:n],
                num_prompt=min(n, example.num_prompt),
            )
        return example

    @property
    def parts(self) -> Mapping[str, "Examples"]:
        """The examples by source name: one source, under the empty name."""
        return {"": self}

    def source_of(self, index: int) -> str:
        """Return the empty name: there is one source."""
        return ""

    @property
    def fingerprint(self) -> str:
        """A hash of every token and target in these examples, and of their order."""
        return fingerprint(self.store.fingerprint, zlib.crc32(self.kept.tobytes()), len(self), self.max_length)

    @property
    def groups(self) -> Array:
        """Group keys, (n,)."""
        return self.store.groups[self.kept]

    @property
    def lengths(self) -> Array:
        """Lengths in tokens, (n,)."""
        lengths = self.store.lengths[self.kept]
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    @property
    def truncated(self) -> Array:
        """Indices into the store of the kept examples that were cut short."""
        if self.max_length is None:
            return np.empty(0, np.int64)
        return self.kept[self.store.lengths[self.kept] > self.max_length]

    @property
    def last_targets(self) -> Array:
        """The last token of every example that was not cut short and learns it."""
        whole = np.setdiff1d(self.kept, self.truncated)
        last: Array = self.store.last[whole[self.store.ends[whole]]]
        return last

    @property
    def num_dropped(self) -> int:
        """How many examples were left out, for any reason."""
        return sum(map(len, self.dropped.values()))

    @property
    def num_truncated(self) -> int:
        """How many examples were cut short."""
        return len(self.truncated)

    @property
    def num_skipped(self) -> int:
        """How many rows of the source gave no example (data.on_error=skip)."""
        return len(self.store.skipped)

    def where(self, index: int) -> str:
        """Return where in the source an example comes from, and its own id if it has one."""
        return self.store.named(int(self.kept[index]))

    def find_row(self, row: int) -> int:
        """Return the index of the example made from the source's row `row`, counted from 1.

        Raises: ValueError that says what became of the row, if it gave no example.
        """
        stored = self.store.rows
        at = int(np.searchsorted(stored, row - 1))
        if at < len(stored) and stored[at] == row - 1:
            index = int(np.searchsorted(self.kept, at))
            if index < len(self.kept) and self.kept[index] == at:
                return index
            reasons = [reason for reason, rows in self.dropped.items() if at in rows]
            raise ValueError(f"row={row} is no training example: {', '.join(reasons) or 'it is held out'}")
        num_rows = len(stored) + self.num_skipped
        what = "it was skipped" if 1 <= row <= num_rows else f"there are rows 1 to {num_rows}"
        raise ValueError(f"row={row} is no training example: {what}")

    def hold_out(self, num: int, key: str = "data") -> tuple["Examples", "Examples"]:
        """Return (the rest, at least `num` held-out examples); groups are held out whole, so that nothing leaks.

        Raises: ValueError if nothing would be left to train on.
        """
        groups, inverse, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)
        order = shuffled(len(groups), 0, 0)
        taken = order[: int(np.searchsorted(np.cumsum(sizes[order]), num)) + 1]
        held = np.isin(inverse, taken)
        if held.all():
            raise ValueError(
                f"{key}.val_examples={num} leaves no training example of {len(self)}: whole prefix groups are held "
                f"out; there are {len(groups)} groups, the largest with {sizes.max()} examples"
            )
        return replace(self, kept=self.kept[~held]), replace(self, kept=self.kept[held])

    def cut(self, max_length: int, overlong: str) -> "Examples":
        """Return the examples with those over `max_length` tokens refused, dropped or truncated.

        An example that has no target, or keeps none when truncated, is dropped: its computation would be wasted, and a
        step of such examples would have no loss. Raises: ValueError for overlong=error, naming the longest; also if no
        example is left.
        """
        lengths = self.store.lengths[self.kept]
        over = np.flatnonzero(lengths > max_length)
        if len(over) and overlong == "error":
            worst = int(over[np.argmax(lengths[over])])
            raise ValueError(
                f"{len(over)} of {len(self)} examples are longer than data.max_length={max_length} tokens; the "
                f"longest, {self.where(worst)}, has {lengths[worst]}. "
                "Raise data.max_length, or set data.overlong=drop or truncate"
            )
        cut = replace(self, max_length=max_length)
        too_long = over if overlong == "drop" else over[:0]
        masked = np.flatnonzero(self.store.num_supervised[self.kept] == 0)
        if overlong == "truncate":
            lost = [i for i in over if not cut[int(i)].supervised.any()]
            masked = np.union1d(masked, np.array(lost, np.int64))
        masked = np.setdiff1d(masked, too_long)
        dropped = {TOO_LONG: self.kept[too_long], NO_TARGET: self.kept[masked]}
        kept = np.delete(self.kept, np.concatenate([too_long, masked]))
        if len(kept) == 0:
            skipped = self.store.skipped[:1]
            raise ValueError(
                f"{self.store.source.name}: no example is left of {len(self)}: {len(too_long)} {TOO_LONG}, "
                f"{len(masked)} with {NO_TARGET} (data.max_length={max_length}, data.overlong={overlong})"
                + "".join(f"; {self.num_skipped} skipped, such as {s.where}: {s.reason}" for s in skipped)
            )
        return replace(cut, kept=kept, dropped={reason: rows for reason, rows in dropped.items() if len(rows)})


@dataclass(frozen=True)
class MixedExamples(ExampleSet):
    """Examples of several sources as one sequence.

    Shapes: part, member (n,): the source, and the index in it, of each example.
    An example may appear several times, because a source of high weight is repeated. Those of the sources in `alone`
    have no group in common.
    """

    sources: Mapping[str, Examples]
    part: Array
    member: Array
    alone: Set[str] = frozenset()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        return list(self.sources.values())[int(self.part[index])][int(self.member[index])]

    @property
    def parts(self) -> Mapping[str, Examples]:
        """The examples by source name."""
        return self.sources

    def source_of(self, index: int) -> str:
        """Return the name of the source that an example comes from."""
        return list(self.sources)[int(self.part[index])]

    @property
    def fingerprint(self) -> str:
        """A hash of the sources' examples and of their order."""
        order = zlib.crc32(self.part.tobytes()), zlib.crc32(self.member.tobytes())
        return fingerprint(*(p.fingerprint for p in self.sources.values()), order)

    @property
    def groups(self) -> Array:
        """Group keys, (n,); negative, and each another, for examples of the sources in `alone`."""
        groups = self._each([p.groups for p in self.sources.values()])
        alone = np.flatnonzero(np.isin(self.part, [i for i, name in enumerate(self.sources) if name in self.alone]))
        groups[alone] = -1 - alone
        return groups

    @property
    def lengths(self) -> Array:
        """Lengths in tokens, (n,)."""
        return self._each([p.lengths for p in self.sources.values()])

    @property
    def num_dropped(self) -> int:
        """How many examples of the sources were left out."""
        return sum(p.num_dropped for p in self.sources.values())

    @property
    def num_truncated(self) -> int:
        """How many examples were cut short."""
        return sum(p.num_truncated for p in self.sources.values())

    @property
    def num_skipped(self) -> int:
        """How many rows of the sources gave no example."""
        return sum(p.num_skipped for p in self.sources.values())

    def where(self, index: int) -> str:
        """Return where in its source an example comes from."""
        name = self.source_of(index)
        return f"{name}: {self.sources[name].where(int(self.member[index]))}"

    def find_row(self, row: int) -> int:
        """Return the index of an example by its number in the epoch, counted from 1. Sources number their own rows."""
        if not 1 <= row <= len(self):
            raise ValueError(f"row={row}: the mixture has examples 1 to {len(self)}")
        return row - 1

    def _each(self, values: Sequence[Array]) -> Array:
        starts = np.cumsum([0, *map(len, values)])
        return np.concatenate(values)[starts[self.part] + self.member]
