"""The option of Muon for the matrices of the decoder blocks (training/muon_and_adamw.py has the update)."""

from typing import TYPE_CHECKING, Any

from sftlab.common.values import NotNegative, Positive
from sftlab.training.optim import Beta, check_lr, groups

if TYPE_CHECKING:  # a config is checked against this signature before torch is imported
    from torch.optim import Optimizer


def muon(
    scorer: Any,
    *,
    lr: Positive,
    weight_decay: NotNegative = 0.1,
    momentum: float = 0.95,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NotNegative = 1e-8,
) -> "Optimizer":
    """Return Muon over the blocks' matrices; embeddings, head, norms and biases have AdamW with `betas` and `eps`."""
    import torch
    from torch.optim import AdamW, Muon

    from sftlab.models.decoder import decoder_blocks
    from sftlab.training.muon_and_adamw import MATRIX, MuonAndAdamW

    check_lr(lr)
    blocks = [block for _, _, block in decoder_blocks(scorer.model)]
    matrices = [p for block in blocks for p in block.parameters() if p.requires_grad and p.ndim == 2]
    if not matrices:
        raise ValueError("optim=muon: no matrix of the decoder blocks is trained. Use optim=adamw")
    rest = groups(scorer, weight_decay, left_out=frozenset(map(id, matrices)))
    adamw = AdamW(rest, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True) if rest else None
    settings = Muon([torch.zeros(1, 1)], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw").defaults
    return MuonAndAdamW([{**settings, "params": matrices, MATRIX: True}], adamw)
