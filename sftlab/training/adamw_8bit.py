"""The option of AdamW whose moments are kept in 8 bits by torchao (training/eight_bit_state.py has the states)."""

from typing import TYPE_CHECKING

from sftlab.common.values import NotNegative, Positive
from sftlab.training.optim import Beta, check_lr, groups

if TYPE_CHECKING:  # a config is checked against this signature before torch is imported
    from torch import nn
    from torch.optim import Optimizer


def adamw_8bit(
    scorer: "nn.Module",
    *,
    lr: Positive,
    weight_decay: NotNegative = 0.01,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NotNegative = 1e-8,
) -> "Optimizer":
    """Return torchao's AdamW8bit. On a CPU its step is not compiled.

    Raises: ValueError without torchao, and for matrices that tensor parallel splits inside a block.
    """
    from sftlab.parallel.world import local_part
    from sftlab.training import eight_bit_state as states
    from sftlab.training.eight_bit_state import BLOCK, quantised

    check_lr(lr)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optim=adamw_8bit needs torchao, which cannot be imported ({error}): pip install 'sftlab[torchao]', or "
            "use optim=adamw"
        ) from None
    found = groups(scorer, weight_decay)
    parameters = [p for group in found for p in group["params"]]
    for p in parameters:
        width = local_part(p).shape[-1] if quantised(p) else BLOCK
        if width % BLOCK:
            raise ValueError(
                f"optim=adamw_8bit: parallel.tensor splits a matrix of {p.shape[1]} columns into {width} on each rank, "
                f"which blocks of {BLOCK} values do not divide. Use a smaller parallel.tensor, parallel=fsdp2, or "
                "optim=adamw_bf16"
            )
    optimizer: Optimizer = AdamW8bit(found, lr=lr, betas=(betas[0], betas[1]), eps=eps)
    optimizer.register_step_pre_hook(states.begin)
    optimizer.register_state_dict_post_hook(states.taken_apart)
    optimizer.register_load_state_dict_pre_hook(states.put_together)
    if all(p.device.type != "cuda" for p in parameters):
        optimizer.register_step_pre_hook(states.eagerly)
        optimizer.register_step_post_hook(states.as_before)
    return optimizer
