"""Muon for the matrices of the decoder blocks, AdamW for everything else, as one optimiser.

Muon's update is the momentum made nearly orthogonal, which takes the whole matrix. Each rank gathers a matrix's
momentum in bfloat16, which Muon computes in anyway, orthogonalises it, and keeps its own part: one gather per matrix,
and the same update for any sharding. (torch's Muon on DTensors would gather in each of its 15 products.)
Source: torch.optim.Muon, whose orthogonalisation and scale of the learning rate these are; Muon is Scalable for LLM
Training, https://arxiv.org/abs/2502.16982, for the scale that makes AdamW's learning rates fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from sftlab.parallel.world import local_part, own_slices

MATRIX = "matrix"  # marks the group that Muon updates


class MuonAndAdamW(Optimizer):
    """The groups and the state of both; AdamW updates its share of them in place."""

    def __init__(self, matrices: Sequence[dict[str, Any]], adamw: AdamW | None) -> None:
        self.adamw = adamw
        rest = [{**group, MATRIX: False} for group in adamw.param_groups] if adamw else []
        super().__init__([*matrices, *rest], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective where parameters are sharded."""
        for group in self.param_groups:
            if group[MATRIX]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, group)
        if self.adamw is not None:
            self.adamw.param_groups = [group for group in self.param_groups if not group[MATRIX]]
            self.adamw.state = self.state
            self.adamw.step()

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        assert p.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        gradient, buffer, weight = local_part(p.grad), local_part(state["momentum_buffer"]), local_part(p)
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        whole = gathered(update.bfloat16(), p)
        orthogonal = _zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        scaled = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
        weight.add_(orthogonal[own_slices(p)], alpha=-scaled)


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole of a tensor of which each rank has a part, as it has of `like`."""
    if not isinstance(like, DTensor):
        return part
    shared = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shared.full_tensor()
