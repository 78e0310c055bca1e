"""Errors that end a run, in words that say what happened and what to change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sftlab.data.batch import Batch

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)
# What a CPU's allocator says, CUDA's driver and Triton (a kernel is loaded when it is first called), and cuBLAS.
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
FOREIGN_BYTES = 1 << 30  # a CUDA context of one's own takes about 0.5 GiB


class NonFinite(ArithmeticError):
    """A loss or gradient that is not a number. Raised on every rank, because both are sums over all ranks."""

    def __init__(self, step: int, loss: float, norm: float, ids: Sequence[str], skipped: int) -> None:
        before = f" {skipped} earlier steps were skipped (trainer.skip_nonfinite)." if skipped else ""
        super().__init__(
            f"step {step}: the loss is {loss} and the gradient norm {norm}; the update was not made.{before} Examples "
            f"of this step: {shown(ids)}. Lower optim.lr, look at these rows, or skip up to N such steps with "
            "trainer.skip_nonfinite=N; the last checkpoint is intact"
        )


class OutOfMemory(MemoryError):
    """The device's memory does not hold a microbatch."""


class RankLost(ConnectionError):
    """Another rank ended in the middle of a collective."""


def shown(ids: Sequence[str], most: int = 8) -> str:
    """Return the first ids as text."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


@contextmanager
def memory_for(batch: Batch) -> Iterator[None]:
    """Turn an out-of-memory error in this microbatch into OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        rows, length = batch.tokens.shape
        raise OutOfMemory(
            f"out of memory with a microbatch of {rows} rows of {length} tokens, {len(batch.at)} predictions. Lower "
            "trainer.rows_per_microbatch (slower, the same mathematics), data.row_length (not below the longest "
            "example) or data.max_length; trainer.activation_checkpointing=full also helps"
            + others(batch.tokens.device)
        ) from error


def others(device: torch.device) -> str:
    """Return a sentence on the memory that other processes hold on this GPU; nothing if they hold little."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - torch.cuda.memory_reserved(device)
    if held < FOREIGN_BYTES:
        return ""
    return (
        f". Other processes hold {held / 2**30:.1f} of this GPU's {total / 2**30:.1f} GiB (nvidia-smi lists them): "
        "choose a free GPU with CUDA_VISIBLE_DEVICES"
    )


def is_compile_error(error: Exception) -> bool:
    """Return whether an error comes from torch.compile or Triton, and not from the code that they compile."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException) or type(error).__module__.startswith("triton")


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn the network's error about a rank that has ended into RankLost."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        raise RankLost(
            "another rank has ended (killed, out of memory, or an error of its own: its output says which), so this "
            f"one cannot continue. The last checkpoint is intact; the same command resumes\n  {error}"
        ) from error
