"""The loader: step k as this rank's microbatches, laid out ahead of the device on a thread.

Laying out is a pure function: every rank lays out the whole step and takes its share. So nothing is sent, and all ranks
know the step's number of targets, the loss's denominator, before the first forward. A thread is enough, because the
work is a few milliseconds of numpy; forked workers would inherit signal handlers and collectives.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from sftlab.data.batch import Batch, Noise, collate
from sftlab.data.example import Example
from sftlab.data.forest import assign_to_ranks, lay_out
from sftlab.data.plan import IntArray, Plan

AHEAD = 2  # steps laid out in advance
BLOCK = 128  # tokens; where shapes are compiled, lengths are multiples of FlexAttention's block


@dataclass(frozen=True)
class Step:
    """One optimiser step as one rank sees it: its microbatches, and sums over all ranks.

    `num_targets` is the sum of all weights. `num_tokens` counts tokens that go through the model, with padding;
    `num_nodes` counts them without. `num_effective_tokens` is what the examples have at one row each, unpadded. `pairs`
    counts (token, token it attends to).
    """

    microbatches: list[Batch]
    num_targets: float
    num_examples: int
    num_tokens: int
    num_effective_tokens: int
    num_predictions: int
    num_nodes: int
    num_rows: int
    pairs: int
    indices: IntArray


@dataclass
class RowLayout:
    """How the examples of a step become microbatches: the layout's settings and this rank's place.

    `joined` rows lie end to end: a microbatch is one row of up to `rows_per_microbatch * row_length` tokens. So only
    the last microbatch of a step is not full. That suits FlexAttention, which skips blocks that nothing sees.

    With `fixed_shapes` every microbatch has the same number of rows, and lengths are multiples of BLOCK. torch compiles
    code for the first length, and once more for all other lengths. Lengths start at two blocks: torch compiles a
    dimension of size 1 on its own.

    `rows_per_microbatch` is the one value that changes: the trainer's warm-up may find that fewer rows fit.
    """

    layout: str
    row_length: int
    rows_per_microbatch: int
    rank: int
    num_ranks: int
    pad_token: int
    fixed_shapes: bool = False
    pin_memory: bool = False
    joined: bool = False

    def arrange(self, examples: Sequence[Example], indices: IntArray) -> Step:
        """Return the step of these examples; every rank gets the same number of microbatches; some may be empty."""
        length, per = self.row_length, self.rows_per_microbatch
        if self.joined:
            length, per = length * per, 1
        rows = lay_out(examples, self.layout, length, self.num_ranks)
        shares = assign_to_ranks([len(r) for r in rows], self.num_ranks)
        num_microbatches = max(1, *(-(-len(share) // per) for share in shares))
        shapes: list[tuple[int, int]] = []
        mine: list[Batch] = []
        for rank, share in enumerate(shares):
            share = sorted(share, key=lambda i: -len(rows[i]))  # a microbatch gets rows of similar length
            for m in range(num_microbatches):
                chosen = [rows[i] for i in share[m * per : (m + 1) * per]]
                shapes.append(self.shape([len(r) for r in chosen], per))
                if rank == self.rank:
                    batch = collate(chosen, *shapes[-1], pad_token=self.pad_token)
                    mine.append(batch.pin_memory() if self.pin_memory else batch)
        return Step(
            microbatches=mine,
            num_targets=float(sum(float(r.weight.sum()) for r in rows)),
            num_examples=len(examples),
            num_tokens=sum(r * t for r, t in shapes),
            num_effective_tokens=sum(len(e) for e in examples),
            num_predictions=sum(len(r.at) for r in rows),
            num_nodes=sum(map(len, rows)),
            num_rows=len(rows),
            pairs=sum(int(r.position.sum(dtype="int64")) + len(r) for r in rows),
            indices=indices,
        )

    def shape(self, lengths: Sequence[int], per: int) -> tuple[int, int]:
        """Return (rows, tokens per row) of a microbatch that holds rows of these lengths."""
        longest = max(lengths, default=1)
        if self.fixed_shapes:
            return per, max(round_up(longest, BLOCK), 2 * BLOCK)
        return max(1, len(lengths)), round_up(longest, 16)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest positive multiple of `multiple` that is at least n."""
    return max(1, -(-n // multiple)) * multiple


@dataclass(frozen=True)
class Loader:
    """Steps of a plan over examples, arranged for this rank. `lengths`, if given, saves reading every example.

    `noise` returns the noise of a step's embeddings, which every microbatch of the step is marked with.
    """

    examples: Sequence[Example]
    plan: Plan
    row_layout: RowLayout
    lengths: IntArray | None = None
    noise: Callable[[int, Step], Noise] | None = None

    def step(self, step: int) -> Step:
        """Return optimiser step `step`, computed from nothing but its number."""
        indices = self.plan.examples(step)
        arranged = self.row_layout.arrange([self.examples[int(i)] for i in indices], indices)
        if self.noise is None:
            return arranged
        noise = self.noise(step, arranged)
        return replace(arranged, microbatches=[replace(batch, noise=noise) for batch in arranged.microbatches])

    def largest(self) -> Batch:
        """Return the largest microbatch among the heaviest steps."""
        return max((b for s in self.heaviest() for b in s.microbatches), key=lambda b: (b.tokens.numel(), len(b.at)))

    def heaviest(self, most: int = 4) -> list[Step]:
        """Return the steps of an epoch with the most tokens, and those with the longest examples.

        Lays out `most` steps of each kind. Laying out every step would be exact, but take 7 s for SQuAD at each start.
        """
        lengths = np.array([len(e) for e in self.examples]) if self.lengths is None else self.lengths
        steps = range(1, self.plan.steps_per_epoch + 1)
        ours = [lengths[self.plan.examples(step)] for step in steps]
        looks = [sorted(steps, key=lambda s: -measure(ours[s - 1]))[:most] for measure in (np.sum, np.max)]
        return [self.step(s) for s in sorted({s for look in looks for s in look})]

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield steps first to last, each laid out while the ones before it train."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ready: deque[Future[Step]] = deque()
            for step in range(first, last + 1 + AHEAD):
                if step <= last:
                    ready.append(thread.submit(self.step, step))
                if ready and (step >= first + AHEAD or step > last):
                    yield ready.popleft().result()
