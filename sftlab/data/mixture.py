"""A mixture of sources: how many examples of each make up an epoch.

The counts are exact and deterministic. An epoch holds every example of every source at least once, and the sources are
in proportion to their weights to within one example. So the source that is largest for its weight appears once per
epoch, and the others are repeated. Nothing is left out, and every epoch holds the same examples.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from sftlab.common.values import NotNegative
from sftlab.data.dataset import Data
from sftlab.data.example_set import Array, ExampleSet
from sftlab.data.examples import Examples, MixedExamples
from sftlab.data.format import Format
from sftlab.data.option import DataOption, Splits
from sftlab.data.plan import shuffled

# What the mixture decides for all its sources.
LAYOUT = [setting for setting in fields(DataOption) if setting.name != "group_by_prefix"]


@dataclass(frozen=True)
class Mixture(DataOption):
    """Several data options as one. `weights` are by source name; without them every source appears once, whole.

    From each source only location and format are used, and `group_by_prefix` where the mixture's own is None; the
    mixture decides how examples lie in rows.
    """

    sources: Mapping[str, Data]
    weights: Mapping[str, NotNegative] | None = None
    group_by_prefix: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ValueError("data.sources is empty: a mixture needs at least one source")
        for name, weight in (self.weights or {}).items():
            if name not in self.sources:
                raise ValueError(f"data.weights.{name}: there is no such source; there are {', '.join(self.sources)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"data.weights.{name}={weight}: expected a number of at least 0")
        if self.weights and sum(self.weights.values()) == 0:
            raise ValueError("data.weights sum to zero: nothing would be drawn")
        for name, source in self.sources.items():
            for setting in LAYOUT:
                value = getattr(source, setting.name)
                key = f"{setting.name}={value}"
                if value != setting.default:
                    raise ValueError(f"data.sources.{name}.{key} has no effect: in a mixture it is data.{key}")

    @property
    def used(self) -> Mapping[str, Data]:
        """The sources that are drawn from; a source of weight 0 is not read at all."""
        return {n: s for n, s in self.sources.items() if not self.weights or self.weights.get(n, 0) > 0}

    @property
    def groups_prefixes(self) -> bool:
        """Whether examples that share a prefix meet in one step, those of any source."""
        return self.alone != self.used.keys()

    @property
    def alone(self) -> Set[str]:
        """The sources whose examples are dealt one by one."""
        own = self.group_by_prefix
        return {n for n, s in self.used.items() if not (s.group_by_prefix if own is None else own)}

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats by source name."""
        return {name: source.format for name, source in self.used.items()}

    @property
    def described_path(self) -> str:
        """The paths of the sources."""
        return ", ".join(source.path for source in self.sources.values())

    def examples(self, tokenizer: Any, max_length: int) -> Splits:
        """Return the training and the validation examples; the latter hold those of every source once."""
        train: dict[str, Examples] = {}
        val: dict[str, Examples] = {}
        for name, source in self.used.items():
            mine, held = source.load(tokenizer, f"data.sources.{name}")
            train[name] = mine.cut(max_length, self.overlong)
            if held is not None:
                val[name] = held.cut(max_length, self.overlong)
        weights = [self.weights[name] for name in self.used] if self.weights else None
        return join(train, weights, self.alone), join(val, None, self.alone) if val else None

    def first(self, tokenizer: Any, num_rows: int, max_length: int) -> ExampleSet | None:
        """Return the examples of the first rows of the first source; None if they give none."""
        name, source = next(iter(self.used.items()))
        few = replace(source, overlong=self.overlong).first(tokenizer, num_rows, max_length)
        return None if few is None else join({name: few}, None)

    def evaluated(self, tokenizer: Any, max_length: int) -> ExampleSet:
        """Return the validation examples of every source, each once. Raises: ValueError if no source has any."""
        val = self.examples(tokenizer, max_length)[1]
        if val is None:
            raise ValueError("no source of this mixture has validation data: set data.sources.NAME.val_path=FILE")
        return val

    @property
    def has_validation(self) -> bool:
        """Whether any source names or holds out validation data."""
        return any(source.has_validation for source in self.used.values())


def join(parts: Mapping[str, Examples], weights: list[float] | None, alone: Set[str] = frozenset()) -> MixedExamples:
    """Return one epoch of the parts; the examples of those named in `alone` have no group."""
    sizes = [len(p) for p in parts.values()]
    counts = quotas(sizes, weights) if weights else sizes
    drawn = [draw(size, count) for size, count in zip(sizes, counts, strict=True)]
    return MixedExamples(parts, np.repeat(np.arange(len(parts)), counts), np.concatenate(drawn), alone)


def quotas(sizes: list[int], weights: list[float]) -> list[int]:
    """Return how many examples an epoch draws from each source: at least its size, in proportion to the weights.

    Counts are rounded by largest remainder, so that each is within one of the exact proportion and all add up.
    """
    shares = [w / sum(weights) for w in weights]
    total = max(math.ceil(size / share - 1e-9) for size, share in zip(sizes, shares, strict=True))
    exact = [total * share for share in shares]
    counts = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def draw(size: int, count: int) -> Array:
    """Return `count` indices of `size` examples, in the source's order; how often they appear differs by at most 1."""
    whole, rest = divmod(count, size)
    extra = np.sort(shuffled(size, 0, 0)[:rest])
    return np.sort(np.concatenate([np.tile(np.arange(size), whole), extra]), kind="stable")
