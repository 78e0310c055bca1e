"""The forest: how the examples of a step lie in rows. It is layout only: results change by no more than rounding.

A row holds prefix trees laid out depth first. `reach[j]` says where the subtree of token j ends, and token i attends to
token j exactly when `j <= i < reach[j]`; `position` is the depth. A path from a root to a token is one example's text,
so tokens that examples have in common are computed once. A single document is a tree without branches.
Source: Tree Training, https://arxiv.org/abs/2511.00413; the mask of one integer per token is ours.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

from sftlab.data.example import Example

LAYOUTS = ("tree", "packed", "padded")

# Neighbours that share fewer tokens than this (a BOS, a common opening) stay one tree up to SHORT_TREE tokens only.
# In a longer one every block of the row attends to that root, which costs more than its tokens do: on an H100 a root of
# 3 tokens over rows of 4,096 made FlexAttention's backward 4 times slower, which was a quarter of the step.
MIN_SHARED_TOKENS = 16
SHORT_TREE = 128  # a block of FlexAttention


@dataclass(frozen=True)
class Row:
    """One row before padding. Shapes: tokens, position, reach (n,); at, target, weight (p,).

    `paths` holds the row indices of each example's tokens, in the order in which the examples were laid.
    """

    tokens: NDArray[np.int32]
    position: NDArray[np.int32]
    reach: NDArray[np.int32]
    at: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]
    paths: tuple[NDArray[np.int32], ...]

    @property
    def num_examples(self) -> int:
        """Number of examples in the row."""
        return len(self.paths)

    def __len__(self) -> int:
        return len(self.tokens)


def lay_out(examples: Sequence[Example], layout: str, row_length: int, num_ranks: int = 1) -> list[Row]:
    """Return rows of at most `row_length` tokens that hold every example once; `pack` explains `num_ranks`.

    Raises: ValueError for an unknown layout, or an example longer than a row (names its id and length).
    """
    for e in examples:
        if len(e) > row_length:
            raise ValueError(f"example {e.id} has {len(e)} tokens, more than data.row_length={row_length}")
    if layout == "padded":
        return [row([[e]]) for e in examples]
    if layout == "packed":
        bins = pack([len(e) for e in examples], row_length, num_ranks)
        return [row([[examples[i]] for i in members]) for members in bins]
    if layout == "tree":
        units = shared_units(examples, row_length)
        bins = pack([size for _, size in units], row_length, num_ranks)
        return [row([units[i][0] for i in sorted(members)]) for members in bins]
    raise ValueError(f"data.layout={layout}: expected one of {', '.join(LAYOUTS)}")


def row(trees: Sequence[Sequence[Example]]) -> Row:
    """Return the row of these trees, each a list of examples in lexicographic order of their tokens.

    Each token that some example supervises is one prediction, made at the token's parent. Its weight is the number of
    examples that supervise it. So a branch point may have several predictions, and a shared answer token has one of
    higher weight.
    """
    length = sum(len(e) for tree in trees for e in tree)  # an upper bound; sharing makes it shorter
    tokens, position, parent, reach = (np.empty(length, np.int32) for _ in range(4))
    weight = np.zeros(length, np.float32)
    paths = []
    end = 0
    for tree in trees:
        path = np.empty(0, np.int32)  # row index of each token from the root to the last token laid
        previous = np.empty(0, np.int32)
        for e in tree:
            shared = common_prefix(previous, e.tokens)
            reach[path[shared:]] = end  # these branches end before this example's own tokens
            own = np.arange(end, end + len(e) - shared, dtype=np.int32)
            path = np.concatenate([path[:shared], own])
            tokens[own], position[own] = e.tokens[shared:], np.arange(shared, len(e))
            parent[own] = np.concatenate([path[max(shared - 1, 0) : shared], own])[: len(own)] if shared else own - 1
            weight[path] += e.target_weights
            end += len(own)
            previous = e.tokens
            paths.append(path)
        reach[path] = end
    scored = np.flatnonzero(weight[:end])
    return Row(
        tokens[:end],
        position[:end],
        reach[:end],
        at=parent[scored],
        target=tokens[scored],
        weight=weight[scored],
        paths=tuple(paths),
    )


def shared_units(
    examples: Sequence[Example], row_length: int, short_tree: int = SHORT_TREE
) -> list[tuple[list[Example], int]]:
    """Return (examples, tokens after sharing) per unit: its examples are worth one tree, which fits in a row.

    Neighbours that share few tokens are one unit while it has at most `short_tree` of them.
    """
    units: list[tuple[list[Example], int]] = []
    previous = np.empty(0, np.int32)
    for e in sorted(examples, key=sort_key):
        shared = common_prefix(previous, e.tokens)
        most = row_length if shared >= MIN_SHARED_TOKENS else min(row_length, short_tree) if shared else 0
        if units and (size := units[-1][1] + len(e) - shared) <= most:
            units[-1] = ([*units[-1][0], e], size)
        else:
            units.append(([e], len(e)))
        previous = e.tokens
    return units


def sort_key(e: Example) -> bytes:
    """Return bytes that sort as the token sequences do (big-endian, so that byte order is token order)."""
    return e.tokens.astype(">u4").tobytes()


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Return how many leading tokens two sequences share."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def pack(sizes: Sequence[int], capacity: int, num_ranks: int) -> list[list[int]]:
    """Return bins of item indices, each at most `capacity` in size, and as few as `best_fit` finds.

    For several ranks the number of bins may rise to the next multiple of `num_ranks`. Within that number, the largest
    bin is made as small as possible, because the slowest rank sets the pace.
    """
    bins = best_fit(sizes, capacity)
    if num_ranks == 1 or not bins:
        return bins  # full rows and one short row: if rows were even, each would be padded to a fixed length
    most = -(-len(bins) // num_ranks) * num_ranks
    low, high = max(sizes), capacity
    while low < high:
        middle = (low + high) // 2
        tried = best_fit(sizes, middle)
        if len(tried) <= most:
            bins, high = tried, middle
        else:
            low = middle + 1
    return bins


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of item indices, each at most `capacity` in size: best fit, largest first.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(rooms, (sizes[item], -1))
        room, which = rooms.pop(at) if at < len(rooms) else (capacity, len(bins))
        if which == len(bins):
            bins.append([])
        bins[which].append(item)
        insort(rooms, (room - sizes[item], which))
    return bins


def assign_to_ranks(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the row indices of each rank: similar total cost, and at most ceil(rows / ranks) rows per rank.

    The longest rows are assigned first, each to the least loaded rank. All ranks must run the same number of
    microbatches, or collectives hang; the cap keeps that number as low as possible.
    """
    most = -(-len(costs) // num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    free = [(0, rank) for rank in range(num_ranks)]  # (load, rank) of those that may have more rows: a heap
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = free[0]
        ranks[rank].append(item)
        if len(ranks[rank]) < most:
            heapreplace(free, (load + costs[item], rank))
        else:
            heappop(free)
    return ranks
