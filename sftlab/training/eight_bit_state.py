"""AdamW whose moments are kept in 8 bits, by torchao: 2 bytes per parameter instead of 8.

torchao quantises in blocks of 256 values. By itself it decides from a rank's shard whether a tensor is quantised, so
that the number of ranks would change the run. Here the states are made in advance, by a rule that knows whole matrices
only: those whose rows hold whole blocks. Then the blocks are the same at any number of ranks, and a checkpoint holds
codes and scales as two plain tensors, which any layout reads.
Source: 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861; torchao.optim.AdamW8bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sftlab.parallel.world import local_part

BLOCK = 256
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign
PARTS = ("codes", "scale")


def eagerly(*_: Any) -> None:
    """Turn compilation off: on a CPU it takes longer than a thousand steps, and needs a C++ compiler."""
    torch.compiler.set_stance("force_eager")


def as_before(*_: Any) -> None:
    """Turn compilation on again."""
    torch.compiler.set_stance("default")


def quantised(p: Tensor) -> bool:
    """Return whether the moments of a parameter are kept in 8 bits."""
    return p.ndim == 2 and p.shape[1] % BLOCK == 0


def begin(optimizer: Optimizer, *_: Any) -> None:
    """Make the state of every parameter that has a gradient and none yet."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not optimizer.state[p]:
                optimizer.state[p]["step"] = torch.tensor(0.0)
                for name, signed in MOMENTS.items():
                    optimizer.state[p][name] = zeros(p, signed)


def zeros(p: Tensor, signed: bool) -> Tensor:
    """Return a moment of zeros."""
    from torchao.optim.subclass_8bit import OptimState8bit

    own = local_part(p).detach()
    if not quantised(p) or not own.numel():  # a rank without rows has no block
        return torch.zeros_like(p)
    return like(p, OptimState8bit.zeros(own.shape, signed, BLOCK, own.device, dtype=p.dtype))


def like(p: Tensor, own: Tensor, width: int | None = None) -> Tensor:
    """Return a tensor whose rows lie on the ranks as those of `p` do, from this rank's part; `width` is its columns."""
    if not isinstance(p, DTensor):
        return own
    shape = torch.Size([p.shape[0], width or p.shape[1]])
    made = DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=shape, stride=(shape[1], 1))
    return made.to(own.device)  # from_local moves it to the mesh's device, and shards may be on the host


def taken_apart(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state with each 8-bit moment as its codes and its scales, (rows, columns / 256)."""
    made = {}
    for i, p in named(optimizer, state_dict):
        state = dict(state_dict["state"].get(i, {}))
        for name in MOMENTS if quantised(p) and state else ():
            own: Any = local_part(state.pop(name))
            columns = p.shape[1] // BLOCK
            codes = own.codes if own.numel() else own.to(torch.uint8)
            scale = own.scale.view(len(own), -1) if own.numel() else own.new_empty(0, own.shape[1] // BLOCK)
            state |= {f"{name}_codes": like(p, codes), f"{name}_scale": like(p, scale, columns)}
        if state:
            made[i] = state
    return {**state_dict, "state": made}


def put_together(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state with each 8-bit moment made of its codes and its scales."""
    made = {}
    for i, p in named(optimizer, state_dict):
        state = dict(state_dict["state"].get(i, {}))
        for name, signed in MOMENTS.items() if quantised(p) and state else ():
            codes, scale = (local_part(state.pop(f"{name}_{part}")) for part in PARTS)
            state[name] = zeros(p, signed)
            own: Any = local_part(state[name])
            if codes.numel():
                own.codes.copy_(codes)
                own.scale.copy_(scale.flatten())
        if state:
            made[i] = state
    return {**state_dict, "state": made}


def named(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield every parameter with the name that a state dict has for it: a number, or DCP's name."""
    names = [name for group in state_dict["param_groups"] for name in group["params"]]
    return zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True)
