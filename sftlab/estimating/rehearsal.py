"""The rehearsal: one optimiser step of rank 0, with tensors that have sizes and no memory, watched by the tracker.

It runs the code of a real run: the scorer, the parallelism over a process group that only pretends to have other ranks,
and the optimiser. So what any of them keeps is counted, whoever wrote it. The model is rehearsed with a few blocks
where it has many: every phase of a step takes memory that is linear in the number of blocks, so that two depths tell
all others (experiments/estimate compares).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface

from sftlab.checkpoints.pretrained import allocate
from sftlab.data.batch import Batch
from sftlab.estimating.tracker import PARTS, Tracker, flat
from sftlab.models import attention
from sftlab.models.architecture import uses_flex
from sftlab.models.decoder import decoder_blocks
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World, local_part
from sftlab.training.trainer import scale_down, squared_norm

FULL_DEPTH = 8  # blocks; models of no more are rehearsed whole
DEPTHS = (4, 6)  # of deeper ones
FLEX = "sftlab_rehearsed_flex"

Phases = dict[str, dict[str, float]]  # bytes by part, by phase


@dataclass(frozen=True)
class Rehearsal:
    """What a step of rank 0 takes, in bytes by part, in the phase with the most and between steps.

    `num_parameters` and `num_trained` are those of the whole model; `state_bytes` is this rank's optimiser state.
    """

    phases: Phases
    num_parameters: int
    num_trained: int
    parameter_bytes: float
    trained_bytes: float
    state_bytes: float

    @property
    def phase(self) -> str:
        """The phase with the most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part in that phase."""
        return self.phases[self.phase]

    @property
    def peak(self) -> float:
        """Bytes in that phase."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Stage:
    """Where and with what a step is rehearsed. `build` returns the sharded scorer, `optimizer` its optimiser."""

    config: Any
    build: Callable[[Any, World], Scorer]
    optimizer: Callable[[Scorer], Any]
    num_ranks: int
    cuda: bool


def rehearse(stage: Stage, batch: Batch, num_microbatches: int, *, whole: bool = False) -> Rehearsal:
    """Return what a step of microbatches like `batch` takes. Of many blocks a few are rehearsed, unless `whole`."""
    depth = stage.config.get_text_config().num_hidden_layers
    with pretended_ranks(stage.num_ranks) as world:
        if depth <= FULL_DEPTH or whole:
            return perform(stage, stage.config, batch, num_microbatches, world)
        low, high = (perform(stage, shallow(stage.config, d), batch, num_microbatches, world) for d in DEPTHS)
    return deeper(low, high, (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def deeper(low: Rehearsal, high: Rehearsal, times: float) -> Rehearsal:
    """Return low + times * (high - low), number by number."""

    def line(a: float, b: float) -> float:
        return a + times * (b - a)

    phases = {
        phase: {part: line(parts[part], high.phases[phase][part]) for part in PARTS}
        for phase, parts in low.phases.items()
    }
    return Rehearsal(
        phases,
        round(line(low.num_parameters, high.num_parameters)),
        round(line(low.num_trained, high.num_trained)),
        line(low.parameter_bytes, high.parameter_bytes),
        line(low.trained_bytes, high.trained_bytes),
        line(low.state_bytes, high.state_bytes),
    )


def shallow(config: Any, depth: int) -> Any:
    """Return a config of fewer blocks; lists with an entry for each block are cut."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    before = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    made._attn_implementation = config._attn_implementation
    return made


def perform(stage: Stage, config: Any, batch: Batch, num_microbatches: int, world: World) -> Rehearsal:
    """Return what one step takes at this depth. It is the second step of a run: the optimiser has its state already."""
    if stage.cuda and uses_flex(config):
        config = copy.deepcopy(config)
        config._attn_implementation = FLEX
    scorer = stage.build(config, world)
    scorer.mask = lambda batch: masks(stage, config, batch)  # type: ignore[method-assign]
    sizes = [p.numel() for p in scorer.parameters()]
    trained = [p.numel() for p in scorer.parameters() if p.requires_grad]
    tracker = Tracker()
    tracker.num_distinct = len(np.unique(batch.at.numpy()))
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        with tracker.made_by("parameters"):
            allocate(scorer, world.device)
        if len(trained) < len(sizes):
            tracker.mark([p for p in scorer.parameters() if p.requires_grad], "adapter")
        optimizer = stage.optimizer(scorer)
        for p in scorer.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.mark(list(optimizer.state.values()), "optimiser")
        later_half(scorer, tracker)
        tracker.peaks.clear()
        for i in range(min(num_microbatches, 2)):
            tracker.begin("forward")
            scorer.set_requires_gradient_sync(i == min(num_microbatches, 2) - 1)  # type: ignore[operator]
            nll = scorer(batch).nll
            tracker.begin("backward")
            nll.backward()
            del nll
        tracker.mark([p.grad for p in scorer.parameters() if p.grad is not None], "gradients")
        tracker.begin("update")
        scale_down(scorer, 1.0, squared_norm(scorer).sqrt())
        optimizer.step()
        tracker.begin("end")
        state_bytes = tracker.bytes_of("optimiser")
        optimizer.zero_grad(set_to_none=True)
    phases = {name: {k: float(v) for k, v in peak.parts().items()} for name, peak in tracker.peaks.items()}
    return Rehearsal(
        {name: parts for name, parts in phases.items() if name not in ("start", "end")},
        sum(sizes),
        sum(trained),
        float(sum(local_bytes(p) for p in scorer.parameters())),
        float(sum(local_bytes(p) for p in scorer.parameters() if p.requires_grad)),
        float(state_bytes),
    )


def local_bytes(parameter: Tensor) -> int:
    """Return the bytes of this rank's part of a parameter."""
    return sum(t.untyped_storage().nbytes() for t in flat(local_part(parameter)))


def later_half(scorer: Scorer, tracker: Tracker) -> None:
    """Begin a phase of its own when backward has done half of the blocks.

    The peak of a backward is at one of its ends: at first all activations live, at last all gradients. Each is linear
    in the depth, the greater of both is not.
    """
    blocks = decoder_blocks(scorer.model)
    if len(blocks) < 2:
        return

    def after(module: nn.Module, given: Any, made: Any) -> None:
        states = made[0] if isinstance(made, tuple) else made
        if isinstance(states, Tensor) and states.requires_grad:
            states.register_hook(lambda _: tracker.begin("backward, later half"))  # type: ignore[no-untyped-call]

    getattr(blocks[len(blocks) // 2 - 1][0], blocks[len(blocks) // 2 - 1][1]).register_forward_hook(after)


def masks(stage: Stage, config: Any, batch: Batch) -> Any:
    """Return what a model's `attention_mask` is for a batch, made of real numbers; FlexAttention's is small."""
    if config._attn_implementation == FLEX:
        return attention.by_layer(config, lambda window, chunk: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with unset_fake_temporarily():
        return attention.forest_mask(config, batch.reach, batch.position)


def rehearsed_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return something of the size that FlexAttention returns; backward keeps what its backward keeps."""
    groups = query.shape[1] // key.shape[1]
    made = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=groups > 1
    )
    return made.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, rehearsed_flex)


@contextmanager
def pretended_ranks(num: int) -> Iterator[World]:
    """Join a process group of `num` ranks of which only this one exists; its collectives return at once."""
    if dist.is_initialized():
        raise ValueError("an estimate needs a process of its own, and this one belongs to a run")
    dist.init_process_group("fake", rank=0, world_size=num, store=FakeStore())
    try:
        yield World(0, num, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def full_rows(num_rows: int, length: int, num_predictions: int) -> Batch:
    """Return a batch of full causal rows with evenly spread predictions."""
    total = num_rows * length
    at = torch.from_numpy(np.linspace(0, total - 1, max(2, num_predictions)).astype(np.int64))
    return Batch(
        tokens=torch.zeros(num_rows, length, dtype=torch.int64),
        position=torch.arange(length).repeat(num_rows, 1),
        reach=torch.full((num_rows, length), length, dtype=torch.int32),
        at=at,
        target=torch.zeros_like(at),
        weight=torch.ones(len(at)),
        num_examples=num_rows,
        num_tokens=total,
    )
