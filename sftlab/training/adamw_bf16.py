"""The option of AdamW over weights stored in bfloat16 (training/two_part_adamw.py has the arithmetic)."""

from typing import TYPE_CHECKING

from sftlab.common.values import NotNegative, Positive
from sftlab.training.optim import Beta, check_lr, groups

if TYPE_CHECKING:  # a config is checked against this signature before torch is imported
    from torch import nn
    from torch.optim import Optimizer


def adamw_bf16(
    scorer: "nn.Module",
    *,
    lr: Positive,
    weight_decay: NotNegative = 0.01,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NotNegative = 1e-8,
    master_dtype: str = "bfloat16",
) -> "Optimizer":
    """Return AdamW over the scorer's bfloat16 weights. The run stores its weights in `master_dtype`.

    Raises: ValueError if a weight has another dtype.
    """
    from sftlab.training.two_part_adamw import TwoPartAdamW

    check_lr(lr)
    if master_dtype != "bfloat16":
        raise ValueError(f"optim.master_dtype={master_dtype}: expected bfloat16. For float32 masters use optim=adamw")
    found = groups(scorer, weight_decay)
    if wrong := {str(p.dtype) for g in found for p in g["params"]} - {"torch.bfloat16"}:
        raise ValueError(f"optim=adamw_bf16 got weights in {', '.join(sorted(wrong))}: for those use optim=adamw")
    return TwoPartAdamW(found, lr=lr, betas=(betas[0], betas[1]), eps=eps)
