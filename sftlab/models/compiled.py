"""Compiled code: one graph for every length, and for evaluation too.

Left to itself, torch compiles a block for the first length, then once more for all other lengths, and again where
gradients are off. On an H100 each of these took 17 to 19 s. The first one was never used again: torch tries the newest
graph first, and the one for all lengths takes every length. So the first length is only traced, which tells
torch which sizes vary, and the next one is compiled. And evaluation runs the graph of training and drops what that
keeps for backward. (`dynamic=True` would take the width of a head for variable too.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

MOST_VERSIONS = 64  # of one function: torch compiles no more than 8 unless it is told
only_traces: ContextVar[bool] = ContextVar("only_traces", default=False)


@contextmanager
def tracing() -> Iterator[None]:
    """Only trace, inside, what `compiled` would compile. Use few tokens, of another length than later."""
    token = only_traces.set(True)
    try:
        yield
    finally:
        only_traces.reset(token)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled on its first call outside of `tracing`."""
    from torch._dynamo import config

    # Gemma 4 has six kinds of blocks, which share their code: six versions that are compiled, and six that are traced.
    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)
    # torch remembers the sizes that a function was traced for, whatever compiles what it traced.
    traced, made = torch.compile(function, backend="eager"), torch.compile(function)
    return lambda *given, **named: (traced if only_traces.get() else made)(*given, **named)


def compile_block(block: nn.Module) -> None:
    """Compile a block's forward in place. Hooks that are added to it later stay outside of what is compiled."""
    run = compiled(block.forward)
    learning: set[int | str] = {0}  # the arguments that have gradients in training: hidden states, for one

    def forward(*given: Any, **named: Any) -> Any:
        values: dict[int | str, Any] = dict(enumerate(given)) | named
        evaluates = block.training and not torch.is_grad_enabled() and not only_traces.get()
        if torch.is_grad_enabled():
            learning.clear()
            learning.update(k for k, v in values.items() if isinstance(v, Tensor) and v.requires_grad)
        elif not evaluates:  # answers, among others: their cache would keep all that made it
            return run(*given, **named)
        for key in learning & values.keys():
            value = values[key].detach().requires_grad_() if evaluates else values[key]
            # A view in both cases, as FSDP's hooks make one in training: torch compiles once more for what is none.
            values[key] = value.view_as(value)
        with torch.enable_grad():
            made = run(*(values[i] for i in range(len(given))), **{k: values[k] for k in named})
        return tree_map_only(Tensor, Tensor.detach, made) if evaluates else made

    block.forward = forward


def uncompile_block(block: nn.Module) -> None:
    """Take back what `compile_block` did."""
    vars(block).pop("forward", None)
