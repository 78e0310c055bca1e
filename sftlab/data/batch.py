"""The batch: rows as tensors, with every prediction listed. It is the scorer's input.

Nothing is shifted downstream: `at` says which hidden state predicts, `target` which token, `weight` how many examples
ask for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sftlab.data.forest import Row


class Noise(NamedTuple):
    """The noise on the embeddings of a step: `key` names the draw, `size` is the width of it times sqrt(features)."""

    key: int
    size: float


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank.

    Shapes: tokens, position (R, T) int64; reach (R, T) int32; at (P,) int64 into the flattened (R*T); target (P,)
    int64; weight (P,) float32. `num_tokens` counts tokens that are not padding. `noise` is set in training
    that asks for it.
    """

    tokens: Tensor
    position: Tensor
    reach: Tensor
    at: Tensor
    target: Tensor
    weight: Tensor
    num_examples: int
    num_tokens: int
    noise: Noise | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; from pinned memory the copy does not block."""
        return self.map(lambda v: v.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with every tensor changed."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def collate(rows: Sequence[Row], num_rows: int, length: int, pad_token: int = 0) -> Batch:
    """Return the batch of these rows: `num_rows` rows of `length` tokens.

    A padding token reaches only itself, so no other token sees it. A batch has at least two predictions; missing ones
    have weight 0. The head must run in every microbatch on every rank, or FSDP's collectives hang, and torch compiles
    its code once more for a single prediction.
    """
    tokens = np.full((num_rows, length), pad_token, np.int64)
    position = np.zeros((num_rows, length), np.int64)
    reach = np.tile(np.arange(1, length + 1, dtype=np.int32), (num_rows, 1))
    size = max(2, sum(len(r.at) for r in rows))
    at, target, weight = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.float32)
    end = 0
    for i, r in enumerate(rows):
        tokens[i, : len(r)], position[i, : len(r)], reach[i, : len(r)] = r.tokens, r.position, r.reach
        span = slice(end, end + len(r.at))
        at[span], target[span], weight[span] = r.at + i * length, r.target, r.weight
        end = span.stop
    return Batch(
        tokens=torch.from_numpy(tokens),
        position=torch.from_numpy(position),
        reach=torch.from_numpy(reach),
        at=torch.from_numpy(at),
        target=torch.from_numpy(target),
        weight=torch.from_numpy(weight),
        num_examples=sum(r.num_examples for r in rows),
        num_tokens=sum(len(r) for r in rows),
    )


@cache
def copy_stream(device: torch.device) -> Any:
    """Return the stream on which batches are copied, one for a run: each new one would keep memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`. On CUDA the next one is copied on a stream of its own while one is computed."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = copy_stream(device)
    computing = torch.cuda.current_stream(device)

    def copy(batch: Batch) -> tuple[Batch, Any]:
        with torch.cuda.stream(copying):
            return batch.to(device), copying.record_event()

    coming = copy(batches[0])
    for following in (*batches[1:], None):
        batch, arrived = coming
        if following is not None:
            coming = copy(following)
        computing.wait_event(arrived)
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # its memory is not reused for a copy before this is computed
        yield batch
