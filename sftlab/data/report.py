"""The report: what became of every row, and how the layout arranges the examples. Preview and every start show it.

Counts come from the store's columns, so that they cost a start only milliseconds. The saving by sharing and packing is
measured: all steps, or the first few, are laid out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftlab.common.files import write_whole
from sftlab.data.example_set import Array, ExampleSet
from sftlab.data.examples import Examples
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.data.proof import KINDS

NAMED = 5  # examples named per finding
BARS = 12  # per histogram, at most


@dataclass(frozen=True)
class Finding:
    """How many rows a finding concerns, and some of them by name."""

    count: int
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Account:
    """What became of the rows of one source: `rows` were read, and `kept` examples are trained or validated on.

    A row gives several examples where its conversation is taken apart: `parts` counts those after each row's first.
    `control` are rows that hold control tokens as text; `kinds` counts the rows with each kind of turn.
    `columns_not_read` are those that the format asked for in no row, `keys_not_read` those of messages, each with the
    number of rows or messages; `files_not_read` lie in the folder and belong to no split.
    """

    rows: int
    kept: int
    skipped: Finding
    dropped: dict[str, Finding]
    truncated: Finding
    end_not_supervised: Finding
    duplicates: Finding
    tokens: int
    supervised_tokens: int
    columns_not_read: dict[str, int] = field(default_factory=dict)
    keys_not_read: dict[str, int] = field(default_factory=dict)
    files_not_read: list[str] = field(default_factory=list)
    parts: int = 0
    control: Finding = Finding(0)
    kinds: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Examples) -> "Account":
        """Count one source's rows."""
        store, kept = part.store, part.kept
        skipped = [f"{s.where}: {s.reason}" for s in store.skipped[:NAMED]]
        endless = np.union1d(kept[~store.ends[kept]], part.truncated)
        _, firsts = np.unique(store.digests[kept], return_index=True)
        _, first_of_row = np.unique(store.rows, return_index=True)
        return cls(
            rows=len(first_of_row) + len(store.skipped),
            parts=len(store) - len(first_of_row),
            kept=len(kept),
            skipped=Finding(len(store.skipped), skipped),
            dropped={reason: find(part, at) for reason, at in part.dropped.items()},
            truncated=find(part, part.truncated),
            end_not_supervised=find(part, endless),
            duplicates=find(part, np.delete(kept, firsts)),
            control=find(part, first_of_row[store.control[first_of_row] > 0]),
            kinds=count_kinds(store.kinds[first_of_row]),
            tokens=int(part.lengths.sum()),
            supervised_tokens=int(supervised(part).sum()),
            columns_not_read=store.keys.unread,
            keys_not_read=dict(sorted(store.keys.unknown.items())),
            files_not_read=list(store.source.left_alone),
        )


@dataclass(frozen=True)
class Arrangement:
    """How a layout arranged the examples of some steps.

    `tokens` counts tokens at one row per example, `nodes` those left after sharing, `padded` those with padding.
    """

    steps: int
    examples: int
    tokens: int
    nodes: int
    rows: int
    padded: int
    predictions: int

    @property
    def fill(self) -> float:
        """The share of the model's input tokens that are not padding."""
        return self.nodes / self.padded


@dataclass(frozen=True)
class Report:
    """The accounts by split and source, the overlap of the splits, and the arrangement of the examples."""

    accounts: dict[str, dict[str, Account]]
    overlap: Finding
    lengths: dict[str, int]
    supervised_lengths: dict[str, int]
    arrangement: Arrangement
    saved_by_grouping: int | None

    def write_json(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")


def report(
    train: ExampleSet,
    val: ExampleSet | None,
    plan: Plan,
    row_layout: RowLayout,
    max_steps: int | None = None,
) -> Report:
    """Return the report; `max_steps` limits the steps that are laid out for it (None: one epoch)."""
    splits: dict[str, Mapping[str, Examples]] = {"training": train.parts}
    if val is not None:
        splits["validation"] = val.parts
    steps = min(plan.steps_per_epoch, max_steps or plan.steps_per_epoch)
    arrangement = arranged(train, plan, row_layout, steps)
    saved = None
    if plan.group_by_prefix:
        plain = arranged(train, replace(plan, group_by_prefix=False), row_layout, steps)
        # A partial epoch covers different examples, so compare per token.
        saved = round(arrangement.tokens * plain.nodes / plain.tokens) - arrangement.nodes
    return Report(
        accounts={split: {n: Account.of(p) for n, p in parts.items()} for split, parts in splits.items()},
        overlap=overlap(train, val),
        lengths=histogram(train.lengths),
        supervised_lengths=histogram(np.concatenate([supervised(p) for p in train.parts.values()])),
        arrangement=arrangement,
        saved_by_grouping=saved,
    )


def count_kinds(kinds: Array) -> dict[str, int]:
    """Return how many rows have each kind of turn; kinds that none has are left out."""
    counts = {kind: int((kinds >> i & 1).sum()) for i, kind in enumerate(KINDS)}
    return {kind: count for kind, count in counts.items() if count}


def arranged(examples: ExampleSet, plan: Plan, row_layout: RowLayout, steps: int) -> Arrangement:
    """Return the arrangement of the first `steps` steps of an epoch."""
    loader = Loader(examples, plan, replace(row_layout, pin_memory=False))
    made = [loader.step(step) for step in range(1, steps + 1)]
    return Arrangement(
        steps=steps,
        examples=sum(s.num_examples for s in made),
        tokens=sum(s.num_effective_tokens for s in made),
        nodes=sum(s.num_nodes for s in made),
        rows=sum(s.num_rows for s in made),
        padded=sum(s.num_tokens for s in made),
        predictions=sum(s.num_predictions for s in made),
    )


def supervised(part: Examples) -> Array:
    """Return the number of supervised tokens of each example, (n,)."""
    counts = part.store.num_supervised[part.kept]
    if part.num_truncated:
        counts = counts.copy()
        for i in np.flatnonzero(part.store.lengths[part.kept] > (part.max_length or 0)):
            counts[i] = part[int(i)].supervised.sum()
    return counts


def find(part: Examples, at: Array) -> Finding:
    """Return the finding on the examples `at` of a store, named by source row and own id."""
    return Finding(len(at), [part.store.named(int(i)) for i in at[:NAMED]])


def overlap(train: ExampleSet, val: ExampleSet | None) -> Finding:
    """Return the validation examples that equal a training example token for token."""
    if val is None:
        return Finding(0)
    known = np.concatenate([p.store.digests[p.kept] for p in train.parts.values()])
    found: list[str] = []
    count = 0
    for part in val.parts.values():
        at = part.kept[np.isin(part.store.digests[part.kept], known)]
        count += len(at)
        found += [part.store.named(int(i)) for i in at[:NAMED]]
    return Finding(count, found[:NAMED])


def histogram(values: Array) -> dict[str, int]:
    """Return counts by range of values, `from-to`, in at most BARS ranges of equal width."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // BARS)
    counts = np.bincount((values - low) // width)
    return {f"{low + i * width}-{min(high, low + (i + 1) * width - 1)}": int(n) for i, n in enumerate(counts)}


def short(found: Report) -> dict[str, str]:
    """Return the report as a few lines by name, for a run's list of facts."""
    lines: dict[str, str] = {}
    for split, accounts in found.accounts.items():
        for name, a in accounts.items():
            what = [read(a), *exceptions(a), *not_read(a)]
            lines[f"{split} {name}".strip()] = ", ".join(what)
    if found.overlap.count:
        lines["overlap"] = f"{found.overlap.count:,} validation examples are training examples too"
    lines["layout"] = layout(found)
    return lines


def read(a: Account) -> str:
    """Return how many rows were read and how many examples are kept, in words."""
    made = f" and taken apart into {a.rows - a.skipped.count + a.parts:,} examples" if a.parts else ""
    return f"{a.rows:,} rows read{made}, {a.kept:,} kept"


def exceptions(a: Account) -> list[str]:
    """Return the counts of an account besides rows read and kept, in words; zeros are left out."""
    counts: Sequence[tuple[int, str]] = [
        (a.skipped.count, "skipped"),
        *((f.count, f"dropped ({reason})") for reason, f in a.dropped.items()),
        (a.truncated.count, "truncated"),
        (a.end_not_supervised.count, "whose end is not supervised"),
        (a.duplicates.count, "duplicates"),
        (a.control.count, "rows that hold control tokens as text"),
        (a.rows + a.parts - a.kept - a.skipped.count - sum(f.count for f in a.dropped.values()), "in the other split"),
    ]
    return [f"{count:,} {what}" for count, what in counts if count]


def not_read(a: Account) -> list[str]:
    """Return what nobody reads, in words: columns, keys of messages, files. Empty if there is nothing of the kind."""
    keys = [f"{name} ({count:,})" for name, count in a.keys_not_read.items()]
    found = (("columns", list(a.columns_not_read)), ("keys of messages", keys), ("files", a.files_not_read))
    return [f"{what} not read: {', '.join(names)}" for what, names in found if names]


def layout(found: Report) -> str:
    """Return one line on how sharing and packing reduce the tokens."""
    a = found.arrangement
    line = (
        f"{a.tokens / a.examples:,.1f} tokens per example become {a.nodes / a.examples:,.1f} in {a.rows:,} rows, "
        f"{a.fill:.1%} full (first {a.steps:,} steps)"
    )
    if found.saved_by_grouping is not None:
        line += f"; grouping by prefix saves {found.saved_by_grouping / a.examples:,.1f} of them"
    return line


def write_skipped(path: Path, splits: Sequence[ExampleSet | None]) -> None:
    """Write one JSON line per skipped row; write no file if there is none."""
    parts = [part for split in splits if split is not None for part in split.parts.values()]
    rows: list[dict[str, Any]] = [asdict(s) for s in {s: None for part in parts for s in part.store.skipped}]
    if rows:
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
