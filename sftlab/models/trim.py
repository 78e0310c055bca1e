"""The last block's MLP runs only where something is scored, as the head does: nothing else reads what it returns.

An MLP computes each token from that token alone, and after the last block only scored tokens are used. In SQuAD's rows
those are 6 % of the tokens, and the MLPs are three quarters of a small Llama's matrix products: with six blocks a step
on a CPU is a tenth shorter. Compiled blocks are left alone, because the number of scored tokens differs in every
microbatch, and recomputed ones, because backward would have to know which tokens they were.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sftlab.models.decoder import decoder_blocks
from sftlab.models.nf4 import NF4Linear


def position_wise(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the MLP of a model's last block if it is made of matrices only; nothing for experts and other kinds."""
    mlp = getattr(decoder_blocks(model)[-1][2], "mlp", None)
    if not isinstance(mlp, nn.Module):
        return ()
    owners = [m for m in mlp.modules() if next(m.parameters(recurse=False), None) is not None]
    return (mlp,) if owners and all(type(m) in (nn.Linear, Conv1D, NF4Linear) for m in owners) else ()


@contextmanager
def only_at(modules: Sequence[nn.Module], at: Tensor) -> Iterator[None]:
    """Run modules on the tokens `at` of the flattened (R*T) only, inside; they return zeros for the others."""
    chosen = torch.unique(at) if modules else at  # a branch point has several predictions
    shapes: list[torch.Size | None] = []

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        alone = len(given) == 1 and not named  # Bloom's MLP is given the residual too, and adds it
        shapes.append(given[0].shape if alone else None)
        return ((given[0].flatten(0, 1)[chosen],), named) if alone else None

    def after(module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        if (shape := shapes.pop()) is None:
            return None
        full = made.new_zeros(shape[0] * shape[1], made.shape[-1]).index_copy(0, chosen, made)
        return full.view(shape[0], shape[1], -1)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield
