"""The warm-up: what happens once, before the first step, so that nothing slow or fatal happens later.

It runs each shape that the run will use once, with weights of 0, and discards the gradients. So everything that torch
compiles is compiled here, and memory runs out here or never. `trainer.rows_per_microbatch=auto` is decided here: the
largest microbatch is tried, and halved until it fits.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from sftlab.data.batch import Batch, collate
from sftlab.data.loader import BLOCK, Loader
from sftlab.models.architecture import uses_flex
from sftlab.models.compiled import tracing
from sftlab.models.scorer import Scorer, after_error, reshard
from sftlab.parallel.fsdp2 import run_eagerly
from sftlab.parallel.world import World, local_part
from sftlab.training.console import Console
from sftlab.training.faults import OutOfMemory, is_compile_error, memory_for


@dataclass(kw_only=True)
class WarmUp:
    """Try every shape of a run. On a CPU that compiles nothing there is nothing to warm up.

    `compiled` says whether the blocks are compiled, `evaluates` whether the run also scores without gradients, and
    `halves` whether fewer rows may be taken where memory runs out.
    """

    scorer: Scorer
    optimizer: Optimizer
    loader: Loader
    world: World
    console: Console
    compiled: bool
    evaluates: bool
    halves: bool

    def __call__(self) -> None:
        """Run each shape once. Collective. Raises: OutOfMemory if one row does not fit."""
        if self.world.device.type != "cuda" and not self.compiled:
            return
        with reserved(self.optimizer):
            if self.compiles:
                self.trace()
            while not self.fits():
                self.loader.row_layout.rows_per_microbatch = self.rows() // 2
        self.console.working("")
        reshard(self.scorer)
        if self.halves:
            rows, length = self.largest().tokens.shape
            self.console.say(f"microbatches of {rows} x {length:,} tokens fit in the device's memory")

    def trace(self) -> None:
        """Trace a short microbatch, after which torch compiles once for every length, not once for the first alone."""
        rows, length = self.largest().tokens.shape
        short = 2 * BLOCK if length != 2 * BLOCK else 3 * BLOCK
        with tracing():
            self.failed(collate([], rows, short, self.loader.row_layout.pad_token), training=False)

    def fits(self) -> bool:
        """Run each shape; return whether memory was enough, the same on every rank.

        Raises: OutOfMemory if there are no fewer rows to try.
        """
        for batch, training in self.shapes():
            began_s, before = time.perf_counter(), num_graphs()
            if self.compiles:
                self.console.working("compiling ...")
            failed = self.failed(batch, training)
            if self.world.any(failed is not None):
                if not self.halves or self.rows() == 1:
                    raise failed or OutOfMemory("another rank of this run is out of memory; its output says of what")
                rows, length = batch.tokens.shape
                if self.world.any(failed is None):  # what the others have sent is still waited for on the device
                    raise OutOfMemory(
                        f"a microbatch of {rows} x {length:,} tokens fits on some ranks and not on others. Start again "
                        f"with trainer.rows_per_microbatch={self.rows() // 2}"
                    )
                self.console.say(
                    f"a microbatch of {rows} x {length:,} tokens does not fit in the device's memory: halved"
                )
                return False
            if new := num_graphs() - before:
                self.console.say(f"compiled {new} graph{'s' * (new > 1)} in {time.perf_counter() - began_s:.0f} s")
        return True

    @property
    def compiles(self) -> bool:
        """Return whether anything is compiled: FlexAttention is by itself where the blocks are not."""
        return self.compiled or uses_flex(self.scorer.model.config)

    def rows(self) -> int:
        """Return how many rows the largest microbatch holds; joined rows may fill less than they may."""
        row_layout = self.loader.row_layout
        num, length = self.largest().tokens.shape
        used = -(-num * length // row_layout.row_length) if row_layout.joined else num
        return min(used, row_layout.rows_per_microbatch)  # lengths are rounded up

    def shapes(self) -> Iterator[tuple[Batch, bool]]:
        """Yield (microbatch, with gradients): the largest, and where the run evaluates the same without gradients."""
        largest = self.largest()
        yield largest, True
        if self.evaluates:
            yield largest, False

    def largest(self) -> Batch:
        """Return this rank's largest microbatch, as long as that of any rank: all decide the same. Collective."""
        own = self.loader.largest()
        return lengthened(own, int(self.world.max(own.tokens.shape[1])))

    def failed(self, batch: Batch, training: bool) -> OutOfMemory | None:
        """Score a microbatch once; return the error if memory ran out. Where compiled code fails, use eager code."""
        try:
            self.score(batch, training)
        except OutOfMemory as error:
            failure = error
            for each in filter(None, (error, error.__cause__)):
                each.__traceback__ = None  # else its frames would keep every tensor alive
        except Exception as error:
            if not self.compiled or not is_compile_error(error):
                raise
            self.compiled = False
            self.console.say(
                f"torch.compile failed ({first_line(error)}): the run continues with eager blocks, which is slower"
            )
            failure = None
        else:
            return None
        after_error(self.scorer)
        self.scorer.zero_grad(set_to_none=True)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        if failure is None:
            run_eagerly(self.scorer)
            if self.compiles:
                self.trace()  # FlexAttention is compiled by itself now
            return self.failed(batch, training)
        return failure

    def score(self, batch: Batch, training: bool) -> None:
        """Score a microbatch whose weights are 0, with its backward in training.

        Twice, if steps have several: then FSDP keeps whole gradients from one microbatch to the next.
        """
        batch = replace(batch, weight=torch.zeros_like(batch.weight)).to(self.world.device)
        several = training and any(len(step.microbatches) > 1 for step in self.loader.heaviest())
        with memory_for(batch), torch.set_grad_enabled(training):
            for last in (False, True) if several else (True,):
                self.scorer.set_requires_gradient_sync(last)  # type: ignore[operator]
                nll: Tensor = self.scorer(batch).nll
                if training:
                    nll.backward()  # type: ignore[no-untyped-call]
        self.scorer.zero_grad(set_to_none=True)


def lengthened(batch: Batch, length: int) -> Batch:
    """Return a batch with rows of `length` tokens, of which the last are padding."""
    rows, own = batch.tokens.shape
    tokens, position = (F.pad(t, (0, length - own)) for t in (batch.tokens, batch.position))
    alone = torch.arange(own + 1, length + 1, dtype=batch.reach.dtype).repeat(rows, 1)
    reach = torch.cat([batch.reach, alone], 1)
    return replace(batch, tokens=tokens, position=position, reach=reach, at=batch.at // own * length + batch.at % own)


def num_graphs() -> int:
    """Return how many graphs torch has traced in this process, since its counters were cleared."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its text, or two if the first only introduces the second."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"


@contextmanager
def reserved(optimizer: Optimizer) -> Iterator[None]:
    """Hold the memory that the optimiser's state will take: AdamW allocates two values per parameter in its first step.

    Those are 8 bytes in float32, and in adamw_bf16 too; Muon and 8-bit moments take less. Without this the largest
    microbatch would fit in the warm-up, and not in the second step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    held = [torch.empty_like(local_part(p), dtype=torch.float32) for p in parameters for _ in range(2)]
    yield
    held.clear()
