"""Parallelism: how the scorer is spread over the ranks. Activation checkpointing, then compile, then FSDP2.

The order matters: recomputed code must lie inside compiled code, and FSDP's hooks outside of both.
FSDP2 wraps at every world size, one included, so that there is one code path and the mixed precision policy always
applies. At world size 1 on CPU this costs about 5 %.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # a sweep binds every point's settings to `fsdp2` at submission, and these take 2 s to import
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(param_dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype that forward and backward compute in; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if param_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if param_dtype not in DTYPES:
        raise ValueError(f"parallel.param_dtype={param_dtype}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[param_dtype]


def fsdp2(
    scorer: "Scorer",
    world: "World",
    *,
    param_dtype: str = "auto",
    replicate: int = 1,
    cpu_offload: bool = False,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> "Scorer":
    """Return `scorer`, sharded in place over all ranks. Master weights stay in their own dtype, float32.

    `replicate` groups of ranks each hold a whole copy (HSDP); gradients are reduced in float32.
    Raises: ValueError if `replicate` does not divide the number of ranks.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if replicate < 1 or world.size % replicate:
        raise ValueError(f"parallel.replicate={replicate} must divide the number of processes, {world.size}")
    mesh = init_device_mesh(
        world.device.type,
        (replicate, world.size // replicate),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(param_dtype, world.device),
        reduce_dtype=torch.float32,
        # True casts the root's inputs, even inside a dataclass: a prediction's weight of 1001 became 1000 in bfloat16.
        cast_forward_inputs=False,
    )
    shard = partial(
        fully_shard,
        mesh=mesh if replicate > 1 else mesh["dp_shard"],
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        # A rank that holds all shards has nothing to free: gathering twice per step cost 2.5 % of the step on a CPU.
        reshard_after_forward=world.size > replicate,
    )
    for blocks, name, block in decoder_blocks(scorer.model):
        if activation_checkpointing:
            block = checkpoint_wrapper(block)
            setattr(blocks, name, block)
        if compile:
            block.compile()
        shard(block)
    shard(scorer)
    return scorer


def decoder_blocks(model: nn.Module) -> list[tuple[nn.ModuleList, str, nn.Module]]:
    """Return (list, name in it, block) of the model's repeated decoder blocks.

    They are the longest ModuleList of the base model: `layers` in most, `h` in GPT-2's family.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks to shard")
    blocks = max(lists, key=len)
    return [(blocks, name, block) for name, block in blocks.named_children()]
