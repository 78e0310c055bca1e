"""A mixture of sources: how many examples of each make up an epoch.

Exact and deterministic: an epoch holds every example of every source at least once, and the sources in the proportion
of their weights to within one example. So the source that its weight holds back most is met once an epoch, and the
others are repeated; nothing is left out, and what is met does not depend on the epoch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftlab.data.dataset import Data, Splits, check_layout
from sftlab.data.examples import Array, Examples, Joined
from sftlab.data.format import Format
from sftlab.data.plan import shuffled
from sftlab.data.template import prepare


@dataclass(frozen=True)
class Mixture:
    """Several data options as one. `weights` by the source's name; none: every source once, whole.

    Of a source counts what says where it comes from and what it means; how examples lie is the mixture's to say.
    """

    sources: Mapping[str, Data]
    weights: Mapping[str, float] | None = None
    max_length: int | None = None
    overlong: str = "error"
    layout: str = "tree"
    row_length: int | None = None
    group_by_prefix: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_layout(self.layout, self.overlong)
        if not self.sources:
            raise ValueError("data.sources is empty: a mixture needs one source at least")
        for name, weight in (self.weights or {}).items():
            if name not in self.sources:
                raise ValueError(f"data.weights.{name}: there is no such source; there are {', '.join(self.sources)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"data.weights.{name}={weight}: expected a number of at least 0")
        if self.weights and sum(self.weights.values()) == 0:
            raise ValueError("data.weights sum to zero: nothing would be drawn")

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats by the source's name."""
        return {name: source.format for name, source in self.sources.items()}

    @property
    def path(self) -> str:
        """The sources' paths, for messages."""
        return ", ".join(source.path for source in self.sources.values())

    def examples(self, tokenizer: Any, max_length: int) -> Splits:
        """Return the training and the validation examples; the latter are every source's, each once."""
        used = {n: s for n, s in self.sources.items() if not self.weights or self.weights.get(n, 0) > 0}
        prepare(tokenizer, [s.format for s in used.values()])
        train: dict[str, Examples] = {}
        val: dict[str, Examples] = {}
        for name, source in used.items():
            mine, held = source.load(tokenizer)
            train[name] = mine.cut(max_length, self.overlong)
            if held is not None:
                val[name] = held.cut(max_length, self.overlong)
        weights = [self.weights[name] for name in used] if self.weights else None
        return join(train, weights), join(val, None) if val else None


def join(parts: Mapping[str, Examples], weights: list[float] | None) -> Joined:
    """Return one epoch of the parts."""
    sizes = [len(p) for p in parts.values()]
    counts = quotas(sizes, weights) if weights else sizes
    drawn = [draw(size, count) for size, count in zip(sizes, counts, strict=True)]
    return Joined(parts, np.repeat(np.arange(len(parts)), counts), np.concatenate(drawn))


def quotas(sizes: list[int], weights: list[float]) -> list[int]:
    """Return how often each source is drawn from in an epoch: at least its size, in proportion to the weights.

    Rounded by largest remainder, so that every count is within one of the exact proportion and all add up.
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
    """Return `count` indices of `size` examples, each as often as any other or once more, in the source's order."""
    whole, rest = divmod(count, size)
    extra = np.sort(shuffled(size, 0, 0)[:rest])
    return np.sort(np.concatenate([np.tile(np.arange(size), whole), extra]), kind="stable")
