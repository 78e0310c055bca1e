"""The attention rule of a forest row, in the form that each backend takes.

Token i attends to token j exactly when `j <= i < reach[j]`. That is plain causal attention, isolated packed documents,
shared prefixes and padding in one rule (see data/forest.py). Sliding-window layers add `position[i] - position[j] <
window`. They use depth, never row index: by index a tree row is off by 0.6 in Gemma 3's hidden states, by depth 2e-16.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sftlab.models import blocks
from sftlab.models.flex import block_mask

ATTENTION_LAYERS = ("full_attention", "sliding_attention")
Mask = Tensor | BlockMask
MaskFn = Callable[[Tensor, Tensor, int | None], Mask]


def boolean_mask(reach: Tensor, position: Tensor, window: int | None = None) -> Tensor:
    """Return the (R, 1, T, T) boolean mask, True where row token i (dim 2) sees token j (dim 3). For SDPA."""
    index = torch.arange(reach.shape[1], device=reach.device, dtype=reach.dtype)
    mask = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < reach[:, None, :])
    if window is not None:
        mask &= position[:, :, None] - position[:, None, :] < window
    return mask[:, None]


def expect_shapes(num: int) -> None:
    """Let torch.compile keep code for `num` shapes of one function; past its default limit, 8, it falls back to eager.

    Eager FlexAttention holds all T * T scores of a row.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num)


def cut_mask(reach: Tensor, position: Tensor, window: int | None = None) -> Tensor:
    """Return the boolean mask with the rows' blocks as an attribute, for `blocks.attend`."""
    mask = boolean_mask(reach, position, window)
    rows = zip(mask[:, 0], reach, position, strict=True)
    mask.blocks = [blocks.row_blocks(*row) for row in rows]  # type: ignore[attr-defined]
    return mask


MASKS: dict[str, MaskFn] = {"sdpa": boolean_mask, blocks.NAME: cut_mask, "flex_attention": block_mask}


def forest_mask(config: Any, reach: Tensor, position: Tensor) -> Mask | dict[str, Mask]:
    """Return what the model's `attention_mask` must be for these rows."""
    mask = MASKS[config._attn_implementation]
    return by_layer(config, lambda window: mask(reach, position, window))


def has_own_mask(model: Any) -> bool:
    """Return whether a model has layers that mix tokens without a mask, such as recurrent layers."""
    layer_types = getattr(model.config, "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False) or set(layer_types) - set(ATTENTION_LAYERS))


def require_alone(reach: Tensor) -> None:
    """Raise ValueError unless every row holds one example and padding."""
    own = torch.arange(1, reach.shape[1] + 1, device=reach.device, dtype=reach.dtype)
    if not bool(((reach == reach[:, :1]) | (reach == own)).all()):
        raise ValueError(
            "this model has layers that carry state from one example of a row to the next: use "
            "data.layout=padded, one example per row"
        )


def by_layer(config: Any, mask: Callable[[int | None], Mask]) -> Mask | dict[str, Mask]:
    """Return the masks for a model's layers; `mask` makes one from a window, or from None for full attention.

    transformers passes a four-dimensional mask through unchanged. Models differ in what they need: a dict of exactly
    the layer types if the config has them (Gemma 3, Qwen 3 with a window), else one sliding mask if it has a window
    (Mistral, Phi-3), else one full mask. A dict raises in Llama, Mistral and Phi-3.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        windows = dict(zip(ATTENTION_LAYERS, (None, window), strict=True))
        unknown = set(layer_types) - set(windows)
        if unknown:
            raise ValueError(f"layers of type {', '.join(sorted(unknown))} mix tokens by a rule other than attention")
        return {kind: mask(windows[kind]) for kind in set(layer_types)}
    return mask(window)
