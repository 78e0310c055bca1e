"""Optimisers over a sharded scorer's parameters, with weight decay only where it belongs."""

from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(
    scorer: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Return fused AdamW. Weight decay is off for norms, biases and embeddings (a tied head is an embedding)."""
    if not lr > 0:
        raise ValueError(f"optim.lr={lr}: expected a number above 0")
    embeddings = {id(m.weight) for m in scorer.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in scorer.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
