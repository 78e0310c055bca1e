"""A set of examples of one source or of a mixture: the interface for the plan, the report and the evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftlab.data.example import Example

if TYPE_CHECKING:
    from sftlab.data.examples import Examples

Array = NDArray[np.int64]


class ExampleSet(Sequence[Example], ABC):
    """Examples in a fixed order. `examples[i]` is an Example."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """Return one example."""

    @property
    @abstractmethod
    def parts(self) -> "Mapping[str, Examples]":
        """The examples of each source by its name; the name of a single source is empty."""

    @abstractmethod
    def source_of(self, index: int) -> str:
        """Return the name of the source that an example comes from."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of every token and target, and of the order."""

    @property
    @abstractmethod
    def groups(self) -> Array:
        """Group keys, (n,)."""

    @property
    @abstractmethod
    def lengths(self) -> Array:
        """Lengths in tokens, (n,)."""

    @property
    @abstractmethod
    def num_dropped(self) -> int:
        """How many examples were left out, for any reason."""

    @property
    @abstractmethod
    def num_truncated(self) -> int:
        """How many examples were cut short."""

    @property
    @abstractmethod
    def num_skipped(self) -> int:
        """How many rows gave no example (data.on_error=skip)."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return where in its source an example comes from, and its own id if it has one."""

    @abstractmethod
    def find_row(self, row: int) -> int:
        """Return the index of the example that a person calls row `row`, counted from 1. Raises: ValueError."""
