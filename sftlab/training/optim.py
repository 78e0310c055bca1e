"""Optimisers over a sharded scorer's parameters, with weight decay only where it belongs.

Each option of `optim` is a function of the scorer. Updates are elementwise, or computed from whole matrices, so that a
step does not depend on how the parameters are sharded.
"""

from typing import TYPE_CHECKING, Annotated, Any

from sftlab.common.values import Bounds, NotNegative, Positive

if TYPE_CHECKING:  # a config is checked against these signatures before torch is imported
    from torch import nn
    from torch.optim import Optimizer

Beta = Annotated[float, Bounds(least=0, below=1)]


def adamw(
    scorer: "nn.Module",
    *,
    lr: Positive,
    weight_decay: NotNegative = 0.01,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NotNegative = 1e-8,
) -> "Optimizer":
    """Return fused AdamW. Weight decay is off for norms, biases and embeddings (a tied head is an embedding)."""
    from torch.optim import AdamW

    check_lr(lr)
    return AdamW(groups(scorer, weight_decay), lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def check_lr(lr: float) -> None:
    """Raise ValueError for a learning rate that is not above 0."""
    if not lr > 0:
        raise ValueError(f"optim.lr={lr}: expected a number above 0")


def groups(scorer: "nn.Module", weight_decay: float, left_out: frozenset[int] = frozenset()) -> list[dict[str, Any]]:
    """Return the trained parameters as groups with and without weight decay; those with an id in `left_out` are not."""
    from torch import nn

    embeddings = {id(m.weight) for m in scorer.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in scorer.parameters() if p.requires_grad and id(p) not in left_out]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    found = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in found if g["params"]]


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a group's learning rate; one that is a tensor keeps its place, because compiled steps read it there."""
    from torch import Tensor

    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
