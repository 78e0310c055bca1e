"""Greedy answers to tokenised prompts from the model in training, decoded as after it (decoding.py).

Under FSDP2 parameters lie in shards, and ranks that make unequal numbers of forwards would wait for each other for
ever. Either every FSDP module is gathered first, each rank decodes alone, and all modules are sharded again. Or, where
the whole model does not fit, every forward runs inside FSDP's root, which gathers one block at a time, and ranks that
have finished compute one token until all have. The scorer must have run once before (the loss evaluator has run it).
Otherwise FSDP initialises lazily at the wrong place and training fails later.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftlab.common.progress import counted
from sftlab.inference.decoding import at_once, decode
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.shared_rows import Forward
from sftlab.models.architecture import cached_attention
from sftlab.models.scorer import Scorer, reshard
from sftlab.parallel.device import free_bytes
from sftlab.parallel.world import World, local_part


@dataclass(frozen=True)
class Generator:
    """Answer prompts with the scorer's model: greedy, until one of `ends` or `max_new_tokens`.

    `gather` is true (the whole model on every rank), false (one block at a time), or `auto`: whole if it fits.
    """

    scorer: Scorer
    tokenizer: Any
    ends: frozenset[int]
    world: World
    max_new_tokens: int = 32
    batch_size: int = 32
    gather: bool | str = "auto"

    def answers(self, prompts: Sequence[NDArray[np.int32]]) -> list[str]:
        """Return the answer to each prompt, in order. Collective."""
        out: list[str] = [""] * len(prompts)
        how = DecodingSettings(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        whole = fits(self.scorer, self.world) if self.gather == "auto" else self.gather
        with inference(self.scorer), gathered(self.scorer) if whole else in_step(self.scorer, self.world) as forward:
            answers = decode(self.scorer, prompts, how, self.ends, forward=forward)
            for i, tokens in counted("answers", answers, len(prompts)):
                out[i] = self.decode_text(tokens).strip()
        return out

    def decode_text(self, tokens: Sequence[int] | NDArray[np.int32]) -> str:
        """Return tokens as text, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def fits(scorer: Scorer, world: World) -> bool:
    """Return whether the whole model takes at most half of what is free on every rank's device."""
    state: Any = scorer._get_fsdp_state() if isinstance(scorer, FSDPModule) else None
    dtype = state and state._mp_policy.param_dtype
    parts = [(p, local_part(p)) for p in scorer.parameters()]
    missing = sum(
        (whole.numel() - (part.numel() if part.device == world.device else 0)) * (dtype or whole.dtype).itemsize
        for whole, part in parts
    )
    return not world.any(missing > free_bytes(world.device) // 2)


@contextmanager
def gathered(scorer: Scorer) -> Iterator[Forward]:
    """Gather every parameter on every rank inside this context; forwards then run at once."""
    modules = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        if scorer.reshards:
            module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield at_once
    finally:
        for module in modules:
            module.reshard()
            if scorer.reshards:
                module.set_reshard_after_forward(id(module) != id(scorer), recurse=False)


@contextmanager
def in_step(scorer: Scorer, world: World) -> Iterator[Forward]:
    """Yield what runs a forward inside FSDP's root; all ranks run as many, whatever each of them computes."""

    def forward(compute: Callable[[], Tensor]) -> Tensor:
        world.any(True)
        return scorer(None, inside=lambda scorer, batch: compute())  # type: ignore[no-any-return]

    one = torch.zeros((1, 1), dtype=torch.int64, device=world.device)
    try:
        yield forward
    finally:
        while world.any(False):
            scorer(None, inside=lambda scorer, batch: scorer.model(input_ids=one, use_cache=False).logits)
        reshard(scorer)


@contextmanager
def inference(scorer: Scorer) -> Iterator[None]:
    """Use no gradients, evaluation mode, attention for a cache and uncompiled blocks inside."""
    config = scorer.model.config
    attention = config._attn_implementation
    scorer.eval()
    config._attn_implementation = cached_attention(config)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = attention
        scorer.train()
