"""FlexAttention's blocks straight from `reach`: which blocks of keys a block of queries sees, and which it sees whole.

`torch`'s own `create_block_mask` evaluates the rule for every pair of tokens. Compiled, it sorts blocks in code that
Inductor took up to 170 s to compile at some lengths (pytorch #182060); eager, it holds T * T values. Neither is needed.
For a block K of keys before a block Q of queries, some pair is seen exactly if max(reach[K]) > first query of Q, and
all pairs are seen exactly if min(reach[K]) >= end of Q. On the diagonal the rule decides pair by pair.
A window or a chunk adds bounds from the least and greatest `position` of each block. They admit a block too many at
times, which costs time and changes nothing, because a block that is not whole asks the rule.

Lengths are multiples of a block, and the kernel is told so. In code for all lengths torch does not find it out, and
compares every index with the length: on an H100 the backward took 7.8 ms a layer for 32,768 tokens in such code, and
5.1 in code for that one length.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

from sftlab.models.compiled import compiled

NAME = "flex_by_reach"
BLOCK = 128  # tokens; the kernel's default, and the least that it takes


def block_mask(reach: Tensor, position: Tensor, window: int | None = None, chunk: int | None = None) -> BlockMask:
    """Return the attention rule of these rows as a BlockMask, whose kernel skips blocks that are empty.

    Shapes: reach, position (R, T). Takes 1.4 ms for 16,384 tokens on one CPU thread; nothing is compiled.
    """
    rows, length = reach.shape

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (i < reach[b, j])
        if chunk is not None:
            seen = seen & (position[b, i] // chunk == position[b, j] // chunk)
        return seen if window is None else seen & (position[b, i] - position[b, j] < window)

    num = -(-length // BLOCK)
    short = num * BLOCK - length
    # Padding repeats the last token, so that no bound of the last block changes.
    ends, depths = (F.pad(t[None], (0, short), mode="replicate")[0].view(rows, num, BLOCK) for t in (reach, position))
    first = torch.arange(num, device=reach.device) * BLOCK
    before = first[:, None] > first[None, :]
    some = before & (ends.amax(-1)[:, None, :] > first[None, :, None])
    whole = before & (ends.amin(-1)[:, None, :] >= (first + BLOCK).clamp(max=length)[None, :, None])
    least, greatest = depths.amin(-1), depths.amax(-1)
    if chunk is not None:
        begin, end = least // chunk, greatest // chunk
        some &= (begin[:, :, None] <= end[:, None, :]) & (begin[:, None, :] <= end[:, :, None])
        whole &= (begin[:, :, None] == end[:, None, :]) & (begin[:, None, :] == end[:, :, None])
    if window is not None:
        some &= least[:, :, None] - greatest[:, None, :] < window
        whole &= greatest[:, :, None] - least[:, None, :] < window
    partial = (some & ~whole) | torch.eye(num, dtype=torch.bool, device=reach.device)
    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(whole & some), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (number of key blocks, their indices first) for every block of queries, as from_kv_blocks takes them."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def capped_at(cap: float) -> Callable[..., Tensor]:
    """Return what changes a score before its softmax: Gemma 2 caps it."""
    return lambda score, *_: cap * torch.tanh(score / cap)


@cache
def kernel() -> Any:
    """Return FlexAttention compiled by itself; compiled blocks contain it uncompiled."""
    return compiled(flex_attention)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention (R, T, H, D) by a BlockMask, and None. Shapes: query (R, H, T, D), key and value (R, G, T, D).

    `s_aux` (H,) are the sinks of GPT-OSS: one more score in each softmax, to which no value belongs. transformers' own
    function copies keys and values to every query head unless their number is a power of two, computes sinks in
    bfloat16, and compiles for one length first. It is called for masks that are not ours.
    """
    if not isinstance(attention_mask, BlockMask) or others.get("position_bias") is not None:
        given = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **others}
        return flex_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]

    divisible = True if query.shape[2] % BLOCK == 0 else False  # noqa: SIM210  a guard; torch would keep `==` unanswered
    found = (flex_attention if torch.compiler.is_compiling() else kernel())(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped_at(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"IS_DIVISIBLE": divisible},
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )
    if s_aux is not None:
        found, aux = found
        found = found * torch.sigmoid(aux.lse - s_aux[:, None].float())[..., None].to(found.dtype)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, flex_attention_mask)  # for masks that are not ours
