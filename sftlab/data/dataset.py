"""The data of a run: where examples come from, what they mean, which are kept and how they are dealt out.

`Data` is one data option; a mixture combines several (mixture.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sftlab.assets import locate
from sftlab.common.values import Count, Whole
from sftlab.data.control import CONTROL_TOKENS
from sftlab.data.example_set import ExampleSet
from sftlab.data.examples import Examples
from sftlab.data.format import Format
from sftlab.data.keys import UNKNOWN
from sftlab.data.opening import Keys, is_local, open_source, split_names
from sftlab.data.option import DataOption, Splits, check_choice
from sftlab.data.source import Source
from sftlab.data.store import ON_ERROR, Store, store


@dataclass(frozen=True)
class Data(DataOption):
    """One data option: a source of rows of one format, and the layout of its examples.

    Validation data is `val_path` (of the same format), else `val_examples` held out of the training data in whole
    prefix groups, else `val_split` of `path`. A `subset` or `val_split` that ends with `?` counts only where the path
    has it. `unknown` says what becomes of keys in messages that nobody reads.
    """

    format: Format
    path: str
    split: str | None = "train"
    subset: str | None = None
    revision: str | None = None
    val_path: str | None = None
    val_split: str | None = None
    val_examples: Whole = 0
    limit: Count | None = None
    on_error: Literal["raise", "skip"] = "raise"
    unknown: Literal["error", "count"] = "error"
    control_tokens: Literal["count", "error", "escape"] = "count"
    num_workers: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("on_error", self.on_error, ON_ERROR)
        check_choice("unknown", self.unknown, UNKNOWN)
        if self.unknown != "error" and not self.format.message_keys:
            raise ValueError(f"data.unknown={self.unknown} has no effect: the rows of this format hold no messages")
        check_choice("control_tokens", self.control_tokens, CONTROL_TOKENS)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit={self.limit} counts rows: expected at least 1, or null for all")
        if self.val_examples < 0:
            raise ValueError(f"data.val_examples={self.val_examples} counts examples: expected at least 0")
        if self.val_examples and self.val_path:
            raise ValueError("data.val_examples and data.val_path both say what to validate on: set one of them")
        if self.val_examples and self.val_split and not self.val_split.endswith("?"):
            raise ValueError(
                f"data.val_split={self.val_split} has no effect: data.val_examples says what to validate on"
            )

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats by source name: one format, under the empty name."""
        return {"": self.format}

    def examples(self, tokenizer: Any, max_length: int) -> Splits:
        """Return the training and the validation examples, none longer than `max_length` tokens."""
        train, val = self.load(tokenizer)
        return train.cut(max_length, self.overlong), val.cut(max_length, self.overlong) if val is not None else None

    @property
    def described_path(self) -> str:
        """The path as it was given."""
        return self.path

    def load(self, tokenizer: Any, key: str = "data") -> tuple[Examples, Examples | None]:
        """Return all training and validation examples, of any length; errors name config keys below `key`."""
        train = self._read(self._source(key), tokenizer, key, self.limit)
        if self.val_examples and not self.val_path:
            return train.hold_out(self.val_examples, key)
        held = self._validation_source(key)
        return train, None if held is None else self._read(held, tokenizer, key)

    def first(self, tokenizer: Any, num_rows: int, max_length: int) -> Examples | None:
        """Return the examples of the first rows, to show before all are read; None if they give none."""
        source, limit = self._source("data"), min(num_rows, self.limit or num_rows)
        few = self._store(source, tokenizer, "data", limit, 1)
        try:
            return Examples.of(few).cut(max_length, self.overlong)
        except ValueError:  # all are too long, perhaps; the other rows may not be
            return None

    def _source(self, key: str) -> Source:
        """Return the training rows."""
        keys = Keys(f"{key}.path", f"{key}.split", key)
        return open_source(locate(self.path), self.split, self.format.rows, keys, self.subset, self.revision)

    def _validation_source(self, key: str) -> Source | None:
        """Return the rows of `val_path`, or of `val_split` of `path`; None if there are none."""
        place = self._validation_place()
        if place is None:
            return None
        path, split = place
        keys = Keys(f"{key}.val_path" if self.val_path else f"{key}.path", f"{key}.val_split", key)
        subset, revision = self.subset, self.revision
        if self.val_path and is_local(path):  # these are for `path`
            subset, revision = subset and f"{subset.removesuffix('?')}?", None
        return open_source(path, split, self.format.rows, keys, subset, revision)

    def _validation_place(self) -> tuple[str, str | None] | None:
        path, split = locate(self.val_path or self.path), self.val_split
        if not self.val_path and (self.val_examples or split is None):
            return None
        if not is_local(path):
            return path, split.removesuffix("?") if split else self.split
        there = split_names(path, self.subset)
        if split is not None and split.endswith("?"):
            split = split.removesuffix("?") if split.removesuffix("?") in there else None
        if split is not None or not self.val_path:
            return None if split is None else (path, split)
        return path, "validation" if "validation" in there else None if len(there) == 1 else self.split

    def _read(self, source: Source, tokenizer: Any, key: str, limit: Count | None = None) -> Examples:
        made = self._store(source, tokenizer, key, limit, self.num_workers)
        if len(made):
            made.keys.check(self.format, source.name, key)
        return Examples.of(made)

    def _store(self, source: Source, tokenizer: Any, key: str, limit: Count | None, num_workers: Count | None) -> Store:
        how = self.on_error, self.unknown, self.control_tokens
        return store(source, self.format, tokenizer, limit, num_workers, *how, key)

    def evaluated(self, tokenizer: Any, max_length: int) -> ExampleSet:
        """Return the examples to evaluate on: the validation data, or all of `path` if there is none.

        Where there is validation data, training data is read only if the validation examples are held out of it.
        """
        if self.val_examples and not self.val_path:
            val = self.examples(tokenizer, max_length)[1]
            assert val is not None
            return val
        source = self._validation_source("data") or self._source("data")
        return self._read(source, tokenizer, "data").cut(max_length, self.overlong)

    @property
    def has_validation(self) -> bool:
        """Whether the option names or holds out validation data."""
        return bool(self.val_examples) or self._validation_place() is not None
