"""Compiled blocks: one graph for every length, and for evaluation too.

Left to itself, torch compiles a block for the first length, then once more for all other lengths, and again where
gradients are off. On an H100 each of these took 17 to 19 s. The first one was never used again: torch tries the newest
graph first, and the one for all lengths takes every length. So a block is compiled for all lengths from the start, and
evaluation runs the graph of training and drops what it keeps for backward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def compile_block(block: nn.Module) -> None:
    """Compile a block's forward in place. Hooks that are added to it later stay outside of what is compiled."""
    run = torch.compile(block.forward, dynamic=True)

    def forward(*given: Any, **named: Any) -> Any:
        if not given or not (block.training or torch.is_grad_enabled()):
            return run(*given, **named)  # answers, among others: their cache would keep all that made it
        states, *others = given
        # A view in both cases, as FSDP's hooks make one in training: torch compiles once more for what is none.
        if torch.is_grad_enabled():
            return run(states.view_as(states), *others, **named)
        with torch.enable_grad():
            made = run(states.detach().requires_grad_().view_as(states), *others, **named)
        return tree_map_only(Tensor, Tensor.detach, made)

    block.forward = forward


def uncompile_block(block: nn.Module) -> None:
    """Take back what `compile_block` did."""
    vars(block).pop("forward", None)
