"""AdamW over weights stored in bfloat16, with what rounding takes from them kept beside them.

A weight is the sum of two bfloat16 numbers: the one that the model computes with, and the rest (Kahan's compensation).
Together they have 16 binary digits, so that updates far below bfloat16's 8 digits add up. The first moment is bfloat16,
the second float32: in bfloat16 it would never fall again, because a decay of 0.999 is less than half a digit.
That is 10 bytes per parameter and 2 for its gradient: 96 GB for 8 billion, where float32 masters need 128.

The update itself is torch's fused AdamW on float32 copies of a part at a time. Stochastic rounding (torchao) takes 2
bytes less, but its random numbers depend on which rank holds which shard: copies of a parameter would drift apart, and
the layout would change the run.
Source: Kahan summation for bfloat16 training, https://arxiv.org/abs/2010.06192.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw as torch_adamw

from sftlab.parallel.world import local_part

PART = 1 << 26  # elements that are in float32 at a time, three values each: 0.8 GB


class TwoPartAdamW(Optimizer):
    """AdamW whose state holds both moments and, as `rest`, what each weight lost to rounding."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. torch casts what it loads to the parameter's dtype, and the second moment has its own."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[p]["exp_avg_sq"] = state_dict["state"][name]["exp_avg_sq"].to(p.device)

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=local_part(p).device)
            state["exp_avg"], state["rest"] = torch.zeros_like(p), torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        assert p.grad is not None
        tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["rest"])
        parts = zip(*(torch.split(local_part(t).detach().view(-1), PART) for t in tensors), strict=True)
        for weight, gradient, first, second, rest in parts:
            whole, moment = weight.float() + rest.float(), first.float()
            torch_adamw(
                [whole],
                [gradient.float()],
                [moment],
                [second],
                [],
                [state["step"].clone()],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            weight.copy_(whole)
            rest.copy_(whole - weight.float())
            first.copy_(moment)
        state["step"] += 1
