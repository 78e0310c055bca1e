"""Greedy answers to tokenised prompts from the model in training, in batches padded on the left.

Under FSDP2 a plain `generate` fails, and a registered forward method hangs if ranks make unequal numbers of calls.
So every FSDP module is gathered first, each rank generates alone, and then all modules are sharded again. The scorer
must have run once before (the loss evaluator has run it). Otherwise FSDP initialises lazily at the wrong place and
training fails later.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from sftlab.models.scorer import Scorer


@dataclass(frozen=True)
class Generator:
    """Answer prompts with the scorer's model: greedy, until end-of-text or `max_new_tokens`."""

    scorer: Scorer
    tokenizer: Any
    device: torch.device
    max_new_tokens: int = 32
    batch_size: int = 32

    def answers(self, prompts: Sequence[NDArray[np.int32]]) -> list[str]:
        """Return the answer to each prompt, in order; prompts of similar length are batched together."""
        out: list[str] = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with gathered(self.scorer), inference(self.scorer):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                for i, answer in zip(chosen, self._batch([prompts[i] for i in chosen]), strict=True):
                    out[i] = answer
        return out

    def decode_text(self, tokens: NDArray[np.int32]) -> str:
        """Return tokens as text, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _batch(self, prompts: list[NDArray[np.int32]]) -> list[str]:
        eos = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos
        width = max(map(len, prompts))
        tokens = np.full((len(prompts), width), pad, np.int64)
        mask = np.zeros((len(prompts), width), np.int64)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
        out = self.scorer.model.generate(
            input_ids=torch.from_numpy(tokens).to(self.device),
            attention_mask=torch.from_numpy(mask).to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad
            ),
            synced_gpus=False,
        )
        return [self.decode_text(row).strip() for row in out[:, width:].cpu().numpy()]


@contextmanager
def gathered(scorer: Scorer) -> Iterator[None]:
    """Gather every parameter on every rank inside this context."""
    modules = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
    parameters = [p for p in scorer.parameters() if isinstance(p, DTensor)]
    in_shards = any(p.to_local().numel() < p.numel() for p in parameters)  # else blocks stay whole, as `fsdp2` says
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(in_shards and id(module) != id(scorer), recurse=False)


@contextmanager
def inference(scorer: Scorer) -> Iterator[None]:
    """Use no gradients, evaluation mode, SDPA and eager blocks inside: a cache grows, and each length would compile."""
    config = scorer.model.config
    attention = config._attn_implementation
    scorer.eval()
    config._attn_implementation = "sdpa"
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = attention
        scorer.train()
