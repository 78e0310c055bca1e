"""The plan: which examples make up optimiser step k.

A pure function of the examples' order and groups, seed, batch size, `shuffle` and `group_by_prefix`; never of ranks,
accumulation, packing or hardware. So a run resumed on other hardware goes on with the same mathematics, and nothing is
replayed to find the place: step k is computed, not iterated to. What the examples look like in rows is the forest's.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def hash64(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of the parts, element by element (splitmix64, chained).

    Written out because it must give the same order for ever; numpy's generators may change between releases (NEP 19).
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        z = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return state


def shuffled(num: int, seed: int, epoch: int) -> IntArray:
    """Return a permutation of `num` items that depends on seed and epoch only."""
    return np.argsort(hash64(seed, epoch, np.arange(num, dtype=np.uint64)), kind="stable")


@dataclass(frozen=True)
class Plan:
    """Deal examples to optimiser steps. `groups` is (num_examples,): equal for examples worth keeping together."""

    groups: IntArray
    batch_size: int
    seed: int
    shuffle: bool = True
    group_by_prefix: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(
                f"trainer.batch_size counts examples per optimiser step: got {self.batch_size}, need at least 1"
            )
        if len(self.groups) == 0:
            raise ValueError("the training data holds no example (see data.path, data.limit and data.overlong)")
        object.__setattr__(self, "_orders", {})

    @property
    def steps_per_epoch(self) -> int:
        """Every example once; the last step of an epoch may be short."""
        return -(-len(self.groups) // self.batch_size)

    def examples(self, step: int) -> IntArray:
        """Return the indices of the examples of optimiser step `step` (the first is step 1)."""
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        return self.order(epoch)[window * self.batch_size : (window + 1) * self.batch_size]

    def order(self, epoch: int) -> IntArray:
        """Return all example indices in the order of `epoch`; cut every `batch_size` it gives the steps."""
        orders: dict[int, IntArray] = object.__getattribute__(self, "_orders")
        if epoch not in orders:
            while len(orders) > 1:  # the epoch being trained and the one being prefetched
                orders.pop(next(iter(orders)))
            orders[epoch] = self._order(epoch)
        return orders[epoch]

    def _order(self, epoch: int) -> IntArray:
        num = len(self.groups)
        order = shuffled(num, self.seed, epoch) if self.shuffle else np.arange(num)
        if not self.group_by_prefix:
            return order
        groups = self.groups[order]
        by_group = np.argsort(groups, kind="stable")  # members of a group side by side, in this epoch's order
        begins = np.flatnonzero(np.diff(groups[by_group], prepend=groups[by_group[0]] - 1))
        # A group larger than half a step (all rows of one system prompt) is dealt out in pieces, or steps would be of
        # one kind only.
        piece = max(1, self.batch_size // 2)
        sizes = np.diff(begins, append=num)
        pieces = -(-sizes // piece)
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(begins, pieces) + within * piece
        lengths = np.diff(starts, append=num)
        # In the order in which their first member comes; drawn anew if shuffled, or large groups would come first.
        dealt = np.argsort(by_group[starts], kind="stable")
        if self.shuffle:
            dealt = dealt[shuffled(len(dealt), self.seed, epoch)]
        starts, lengths = starts[dealt], lengths[dealt]
        begin, length = pack_groups(starts, lengths, self.batch_size)
        places = np.repeat(begin - np.cumsum(length) + length, length) + np.arange(num)
        return order[by_group[places]]


def pack_groups(
    starts: IntArray, lengths: IntArray, batch_size: int, look_ahead: int = 64
) -> tuple[IntArray, IntArray]:
    """Return (starts, lengths) of the same groups in an order in which few are cut at a multiple of `batch_size`.

    A step is filled with the next group; then, among the next `look_ahead` groups, with the first that fits. When none
    fits, the next group is cut, its rest opening the following step. On SQuAD (18,891 groups, steps of 64) 6 % of
    the groups are cut, against 23 % by plain concatenation.
    """
    waiting: list[tuple[int, int]] = []
    out_starts, out_lengths = array("q"), array("q")
    coming = 0  # the first group that is not waiting yet
    room = batch_size
    while waiting or coming < len(starts):
        more = look_ahead - len(waiting)
        if more > 0 and coming < len(starts):
            window = slice(coming, coming + more)
            waiting += zip(starts[window].tolist(), lengths[window].tolist(), strict=True)
            coming += more
        fits = next((i for i, (_, length) in enumerate(waiting) if length <= room), None)
        if fits is not None:
            start, length = waiting.pop(fits)
        else:
            start, length = waiting[0][0], room
            waiting[0] = (start + room, waiting[0][1] - room)
        out_starts.append(start)
        out_lengths.append(length)
        room = (room - length) or batch_size
    return np.frombuffer(out_starts, np.int64), np.frombuffer(out_lengths, np.int64)
