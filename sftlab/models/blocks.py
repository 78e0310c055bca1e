"""Attention by blocks, for a CPU: SDPA runs on each block of a row, because dense SDPA does not skip masked parts.

A row is cut where branches begin. Outside its block a token sees only the ancestors of the block's first token. So a
block computes `length * (ancestors + length)` pairs, not `length` times the row. On two cores a row of five trees of
211 tokens (8 heads of 32, forward and backward) took 6.0 ms by blocks and 20.2 ms dense.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_blocks"

# The fixed cost of a block, in pairs: it took 0.3 ms forward and backward, and 1,000 pairs took 0.024 ms.
BLOCK_PAIRS = 12_000


class Block(NamedTuple):
    """Consecutive tokens of a row. `above`, (a,), indexes `RowBlocks.ancestors`; `mask` is (length, a + length).

    A block without a mask is causal and has no ancestors.
    """

    length: int
    above: Tensor | None
    mask: Tensor | None


class RowBlocks(NamedTuple):
    """The blocks of a row, in order; `ancestors` are the row indices of all tokens above some block."""

    ancestors: Tensor
    blocks: tuple[Block, ...]


def cut(position: NDArray[np.integer[Any]]) -> list[int]:
    """Return where a row's blocks begin, and its end: the cuts with the least work, by dynamic programming.

    A token has as many ancestors as its depth, `position`. Neighbours at depth 0 (padding) stay in one block.
    """
    begins = (np.diff(position) != 1) & ((position[1:] > 0) | (position[:-1] > 0))
    bounds = np.concatenate([[0], 1 + np.flatnonzero(begins), [len(position)]])
    above = position[bounds[:-1]].astype(np.int64)
    least, last = np.zeros(len(bounds)), np.zeros(len(bounds), np.int64)
    for j in range(1, len(bounds)):
        length = bounds[j] - bounds[:j]
        work = least[:j] + length * (length + above[:j]) + BLOCK_PAIRS
        last[j] = work.argmin()
        least[j] = work[last[j]]
    cuts = [len(bounds) - 1]
    while cuts[-1]:
        cuts.append(int(last[cuts[-1]]))
    return [int(bounds[c]) for c in reversed(cuts)]


def row_blocks(mask: Tensor, reach: Tensor, position: Tensor) -> RowBlocks:
    """Return the blocks of one row; their masks are cut from `mask`, the row's boolean mask, (T, T)."""
    index = torch.arange(len(reach))
    bounds = cut(position.numpy())
    above = [index[:begin][reach[:begin] > begin] for begin in bounds[:-1]]
    ancestors = torch.unique(torch.cat(above))
    made = []
    for (begin, end), own in zip(pairwise(bounds), above, strict=True):
        seen = mask[begin:end, torch.cat([own, index[begin:end]])]
        made.append(block(torch.searchsorted(ancestors, own), seen))
    return RowBlocks(ancestors, tuple(made))


def block(above: Tensor, mask: Tensor) -> Block:
    """Return the block with this mask, or without one if the mask is plainly causal."""
    if len(above):
        return Block(len(mask), above, mask)
    return Block(len(mask), None, None if torch.equal(mask, torch.ones_like(mask).tril()) else mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return what transformers' SDPA returns, computed by the blocks on the mask; without blocks, call that SDPA.

    Shapes: query (R, H, T, D), key and value (R, G, T, D); the result (R, T, H, D). Compiled code takes the whole mask,
    because block sizes differ in every step and each would be compiled.
    """
    rows = getattr(attention_mask, "blocks", None)
    if rows is None or torch.compiler.is_compiling() or not kwargs.keys().isdisjoint(("softcap", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    attended = []
    for q, k, v, row in zip(*(t.chunk(len(rows)) for t in (query, key, value)), rows, strict=True):
        lengths = [b.length for b in row.blocks]
        # Gather once per row: indexing the row per block allocates row-sized gradients in backward.
        above_k, above_v = (t.index_select(2, row.ancestors) for t in (k, v))
        for qs, ks, vs, b in zip(*(t.split(lengths, 2) for t in (q, k, v)), row.blocks, strict=True):
            if b.above is not None:
                ks = torch.cat([above_k.index_select(2, b.above), ks], 2)
                vs = torch.cat([above_v.index_select(2, b.above), vs], 2)
            out = F.scaled_dot_product_attention(
                qs,
                ks,
                vs,
                attn_mask=b.mask,
                dropout_p=kwargs.get("dropout", 0.0),
                is_causal=b.mask is None,
                scale=kwargs.get("scaling"),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            attended.append(out.transpose(1, 2))
    return torch.cat(attended, 1).view(len(query), -1, *attended[0].shape[2:]), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for masks that are not ours
