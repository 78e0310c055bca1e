"""The data option: the abstract class through which a run, a preview and an evaluation use their data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sftlab.common.values import Count
from sftlab.data.example_set import ExampleSet
from sftlab.data.examples import OVERLONG
from sftlab.data.forest import LAYOUTS
from sftlab.data.format import Format

Splits = tuple[ExampleSet, ExampleSet | None]


@dataclass(frozen=True, kw_only=True)
class DataOption(ABC):
    """How examples lie in rows and which are kept. A subclass says where they come from."""

    max_length: Count | None = None
    overlong: Literal["error", "drop", "truncate"] = "error"
    layout: Literal["tree", "packed", "padded"] = "tree"
    row_length: Count | None = None
    group_by_prefix: bool | None = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("overlong", self.overlong, OVERLONG)

    @property
    def groups_prefixes(self) -> bool:
        """Whether examples that share a prefix meet in one step."""
        return bool(self.group_by_prefix)

    @property
    @abstractmethod
    def formats(self) -> Mapping[str, Format]:
        """The formats by source name; the name of a single source is empty."""

    @property
    @abstractmethod
    def described_path(self) -> str:
        """Where the examples come from, for messages."""

    @abstractmethod
    def examples(self, tokenizer: Any, max_length: int) -> Splits:
        """Return the training and the validation examples, none longer than `max_length` tokens.

        The tokenizer must be prepared for the formats (template.prepare_tokenizer).
        """

    @abstractmethod
    def first(self, tokenizer: Any, num_rows: int, max_length: int) -> ExampleSet | None:
        """Return the examples of the first rows, to show before all are read; None if they give none.

        Validation examples that are held out may be among them.
        """

    @abstractmethod
    def evaluated(self, tokenizer: Any, max_length: int) -> ExampleSet:
        """Return the examples to evaluate on. Raises: ValueError if the option has none."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether the option names or holds out validation data."""


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `known`."""
    if value not in known:
        raise ValueError(f"data.{key}={value}: expected one of {', '.join(known)}")
