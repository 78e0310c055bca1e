"""The data of a run: where examples come from, what they mean, which are kept and how they are dealt out.

`Data` is one data option; a mixture combines several (mixture.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sftlab.assets import locate
from sftlab.data.example_set import ExampleSet
from sftlab.data.examples import Examples
from sftlab.data.format import Format
from sftlab.data.option import DataOption, Splits, check_choice
from sftlab.data.source import is_local, open_source
from sftlab.data.store import ON_ERROR, store


@dataclass(frozen=True)
class Data(DataOption):
    """One data option: a source of rows of one format, and the layout of its examples.

    Validation data is `val_path` (of the same format), else `val_examples` held out of the training data in whole
    prefix groups, else `val_split` of a hub `path`. A local `path` without the first two has no validation data.
    """

    format: Format
    path: str
    split: str | None = "train"
    subset: str | None = None
    revision: str | None = None
    val_path: str | None = None
    val_split: str | None = None
    val_examples: int = 0
    limit: int | None = None
    on_error: str = "raise"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("on_error", self.on_error, ON_ERROR)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit={self.limit} counts rows: expected at least 1, or null for all")
        if self.val_examples < 0:
            raise ValueError(f"data.val_examples={self.val_examples} counts examples: expected at least 0")
        if self.val_examples and self.val_path:
            raise ValueError("data.val_examples and data.val_path both say what to validate on: set one of them")

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
        path = locate(self.path)
        train = self._read(path, self.split, f"{key}.path", tokenizer, self.limit)
        if self.val_path:
            return train, self._read(locate(self.val_path), self.val_split or self.split, f"{key}.val_path", tokenizer)
        if self.val_examples:
            return train.hold_out(self.val_examples, key)
        if self.val_split and not is_local(path):
            return train, self._read(path, self.val_split, f"{key}.path", tokenizer)
        return train, None

    def _read(self, path: str, split: str | None, key: str, tokenizer: Any, limit: int | None = None) -> Examples:
        source = open_source(path, split, self.format.rows, key, self.subset, self.revision)
        return Examples.of(store(source, self.format, tokenizer, limit, self.num_workers, self.on_error))

    def evaluated(self, tokenizer: Any, max_length: int) -> ExampleSet:
        """Return the examples to evaluate on: the validation data, or all of `path` if there is none.

        Where there is validation data, training data is read only if the validation examples are held out of it.
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
