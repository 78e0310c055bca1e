"""NEFTune: uniform noise on the embeddings of a training step, a pure function of seed, step and text.

The noise of a token depends on the seed, the step, and the tokens from its example's first to itself. So it is the same
in every layout, on any number of ranks, with any accumulation and after a resume; and tokens that examples share, which
a tree row computes once, have one noise because they are one prefix. Examples that begin alike get the same noise on
what they share, and different noise from where they part. Evaluation and answers are without noise.
Its size is alpha / sqrt(L * width). Elsewhere L is the padded length of the batch, which would make the loss depend on
the layout. Here it is the mean length of the step's examples, which does not.
Source: Jain et al. 2023, "NEFTune", https://arxiv.org/abs/2310.05914; the draw from a hash of the prefix is ours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sftlab.data.batch import Batch, Noise
from sftlab.data.loader import Step
from sftlab.data.plan import hash64

DRAWN = 1 << 22  # numbers made at a time: they take 8 bytes each, several times over


def step_noise(step: int, arranged: Step, *, alpha: float, seed: int) -> Noise:
    """Return the noise of an optimiser step."""
    mean_length = arranged.num_effective_tokens / max(1, arranged.num_examples)
    return Noise(int(hash64(seed, step)[0].astype("int64")), alpha / math.sqrt(max(1.0, mean_length)))


@contextmanager
def noised(embeddings: nn.Module, batch: Batch) -> Iterator[None]:
    """Add a batch's noise to what the embeddings return, inside; nothing if it has none."""
    if (noise := batch.noise) is None:
        yield
        return

    def after(module: nn.Module, given: tuple[Any, ...], states: Tensor) -> Tensor:
        keys = mixed(prefix_keys(batch), noise.key)[:, : states.shape[1]]  # a model may be given less than the row
        size = noise.size / math.sqrt(states.shape[-1])
        return states + size * uniform(keys, states.shape[-1]).to(states.dtype)

    hook = embeddings.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def prefix_keys(batch: Batch) -> Tensor:
    """Return a hash of the tokens from each token's root to itself, (R, T) int64.

    It is the sum over a token's ancestors of a hash of (depth, token). Everything before a token in its row is summed,
    but for the subtrees that have ended: each is taken off where its `reach` says. Integers wrap, so this is exact.
    """
    own = mixed(mixed(torch.zeros_like(batch.tokens), batch.position), batch.tokens)
    ended = own.new_zeros(own.shape[0], own.shape[1] + 1).scatter_add_(1, batch.reach.long(), own)
    return own.cumsum(1) - ended[:, :-1].cumsum(1)


def uniform(keys: Tensor, width: int) -> Tensor:
    """Return `width` numbers in [-1, 1) for each key, (*keys, width) float32: multiples of 2^-23, the same anywhere."""
    columns = torch.arange(width, device=keys.device)
    parts = torch.split(keys.flatten(), max(1, DRAWN // width))
    drawn = [shifted(mixed(part[:, None], columns), 40).float() * 2.0**-23 - 1.0 for part in parts]
    return torch.cat(drawn).view(*keys.shape, width)


def mixed(state: Tensor, part: Tensor | int) -> Tensor:
    """Return the next 64-bit hash of a chain, as `data.plan.hash64` does; int64 arithmetic wraps."""
    z = state + part + signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def shifted(z: Tensor, bits: int) -> Tensor:
    """Return z shifted to the right with zeros coming in, as if it had no sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(constant: int) -> int:
    """Return the int64 with the bits of an unsigned constant."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant
