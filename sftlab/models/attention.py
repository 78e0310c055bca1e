"""The attention rule of a forest row, in the form that each backend takes.

Token i attends to token j exactly when `j <= i < reach[j]`. That is plain causal attention, isolated packed documents,
shared prefixes and padding in one rule (see data/forest.py). Sliding-window layers add `position[i] - position[j] <
window`, chunked layers (Llama 4) `position[i] // chunk == position[j] // chunk`. They use depth, never row index: by
index a tree row is off by 0.6 in Gemma 3's hidden states, by depth 2e-16.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sftlab.models import blocks, flex
from sftlab.models.architecture import LAYERS

Mask = Tensor | BlockMask
MaskFn = Callable[[Tensor, Tensor, int | None, int | None], Mask]
LimitedFn = Callable[[int | None, int | None], Mask]


def near(query: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor | None:
    """Return which keys of these depths lie in the window or chunk of a query; None if nothing limits it."""
    if window is not None:
        return query - key < window
    return None if chunk is None else query // chunk == key // chunk


def boolean_mask(reach: Tensor, position: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Return the (R, 1, T, T) boolean mask, True where row token i (dim 2) sees token j (dim 3). For SDPA."""
    index = torch.arange(reach.shape[1], device=reach.device, dtype=reach.dtype)
    mask = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < reach[:, None, :])
    if (limit := near(position[:, :, None], position[:, None, :], window, chunk)) is not None:
        mask &= limit
    return mask[:, None]


def cut_mask(reach: Tensor, position: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Return the boolean mask with the rows' blocks as an attribute, for `blocks.attend`."""
    mask = boolean_mask(reach, position, window, chunk)
    rows = zip(mask[:, 0], reach, position, strict=True)
    mask.blocks = [blocks.row_blocks(*row) for row in rows]  # type: ignore[attr-defined]
    return mask


def added_mask(reach: Tensor, position: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Return the mask that eager attention adds to its scores."""
    return added(boolean_mask(reach, position, window, chunk))


def added(mask: Tensor) -> Tensor:
    """Return a boolean mask as what is added to scores: 0, or so little that the weight is exactly 0."""
    least = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)


UNUSED_WINDOW = {"moshi"}  # transformers builds a mask without the window that stands in its config
MASKS: dict[str, MaskFn] = {
    "sdpa": boolean_mask,
    blocks.NAME: cut_mask,
    flex.NAME: flex.block_mask,
    "eager": added_mask,
}


def forest_mask(config: Any, reach: Tensor, position: Tensor) -> Mask | dict[str, Mask]:
    """Return what the model's `attention_mask` must be for these rows."""
    mask = MASKS[config._attn_implementation]
    return by_layer(config, lambda window, chunk: mask(reach, position, window, chunk))


def cached_mask(config: Any, sees: Tensor, position: Tensor, column_position: Tensor) -> Mask | dict[str, Mask]:
    """Return what `attention_mask` must be for new tokens before a cache.

    Shapes: sees (R, S, K), which columns of the cache each new token attends to; position (R, S); column_position
    (R, K).
    """

    def mask(window: int | None, chunk: int | None) -> Tensor:
        limit = near(position[:, :, None], column_position[:, None, :], window, chunk)
        seen = (sees if limit is None else sees & limit)[:, None]
        return added(seen) if config._attn_implementation == "eager" else seen

    return by_layer(config, mask)


def require_alone(reach: Tensor) -> None:
    """Raise ValueError unless every row holds one example and padding."""
    own = torch.arange(1, reach.shape[1] + 1, device=reach.device, dtype=reach.dtype)
    if not bool(((reach == reach[:, :1]) | (reach == own)).all()):
        raise ValueError(
            "this model cannot tell the examples of a row apart: use data.layout=padded, one example per row"
        )


def by_layer(config: Any, mask: LimitedFn) -> Mask | dict[str, Mask]:
    """Return the masks for a model's layers; `mask` makes one from a window and a chunk, both None for full attention.

    transformers passes a four-dimensional mask through unchanged. Models differ in what they need: a dict of exactly
    the layer types if the config has them (Gemma 3, Qwen 3 with a window), else one sliding mask if it has a window
    (Mistral, Phi-3), else one full mask. A dict raises in Llama, Mistral and Phi-3. What a model of text and images
    says of its layers stands in the config of its text part (Gemma 3 and 4).
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return mask(None if config.model_type in UNUSED_WINDOW else getattr(config, "sliding_window", None), None)
    if unknown := kinds - set(LAYERS):
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} mix tokens by a rule other than attention")

    def limit(kind: str, wanted: str) -> int | None:
        return getattr(config, wanted, None) if LAYERS[kind] == wanted else None

    return {kind: mask(limit(kind, "sliding_window"), limit(kind, "attention_chunk_size")) for kind in kinds}
