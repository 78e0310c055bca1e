"""Parallelism: how the scorer is spread over the ranks.

FSDP2 wraps at every world size, one included, so that there is one code path and the mixed precision policy always
applies. At world size 1 on CPU this costs about 5 %. The other options (hsdp, ddp, fsdp2_tp) are in their own files.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sftlab.common.values import Count, Whole
from sftlab.parallel.division import COPIES, SHARDS, TENSOR, divide, mesh_of

if TYPE_CHECKING:  # every config is checked against the signature of `fsdp2`, and these take seconds to import
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from sftlab.models.scorer import Scorer
    from sftlab.parallel.world import World

DTYPES = ("float32", "bfloat16")
ParamDtype = Literal["auto", "float32", "bfloat16"]
Reshard = bool | Literal["auto"]


def dtype_named(name: str) -> "torch.dtype":
    """Return a dtype by its name in a config."""
    import torch

    assert name in DTYPES
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def compute_dtype(param_dtype: str, device: "torch.device") -> "torch.dtype":
    """Return the dtype that forward and backward compute in; `auto` is bfloat16 on a GPU that has it, else float32.

    Raises: ValueError for another word, and for bfloat16 on a GPU that only emulates it.
    """
    import torch

    from sftlab.parallel.device import has_bfloat16

    narrow = device.type == "cuda" and has_bfloat16(device)
    if param_dtype == "auto":
        return torch.bfloat16 if narrow else torch.float32
    if param_dtype not in DTYPES:
        raise ValueError(f"parallel.param_dtype={param_dtype}: expected auto, {' or '.join(DTYPES)}")
    if param_dtype == "bfloat16" and device.type == "cuda" and not narrow:
        raise ValueError(
            f"parallel.param_dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16. Use auto or float32"
        )
    return dtype_named(param_dtype)


def fsdp2(
    scorer: "Scorer",
    world: "World",
    *,
    param_dtype: ParamDtype = "auto",
    replicate: Count = 1,
    reshard_after_forward: Reshard = "auto",
    prefetch: Whole = 0,
    cpu_offload: bool = False,
    compile: bool = False,
    activation_checkpointing: str = "none",
) -> "Scorer":
    """Return `scorer`, sharded in place over all ranks. Master weights stay in their own dtype, float32.

    `replicate` groups of ranks each hold a whole copy (as parallel=hsdp); gradients are reduced in float32.
    Raises: ValueError if `replicate` does not divide the number of ranks.
    """
    return spread(
        scorer,
        divide(world, replicate=replicate),
        replicate,
        param_dtype=param_dtype,
        reshard_after_forward=reshard_after_forward,
        prefetch=prefetch,
        cpu_offload=cpu_offload,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
    )


def spread(
    scorer: "Scorer",
    world: "World",
    replicate: int,
    *,
    param_dtype: str,
    reshard_after_forward: bool | str,
    prefetch: int,
    cpu_offload: bool,
    compile: bool,
    activation_checkpointing: str,
) -> "Scorer":
    """Return `scorer` spread in place over a divided world, in `replicate` copies.

    The order is tensor parallel, activation checkpointing, compile, FSDP. Tensor parallel comes first because it
    replaces parameters and hooks modules inside the blocks, whose names checkpointing changes. Recomputed code must lie
    inside compiled code, or each block would be two graphs. FSDP's hooks gather and free what a block needs: they must
    lie outside of what is recomputed and compiled, and they shard what tensor parallel left on each rank.
    """
    if reshard_after_forward not in (True, False, "auto"):
        raise ValueError(f"parallel.reshard_after_forward={reshard_after_forward}: expected auto, true or false")
    if type(prefetch) is not int or prefetch < 0:
        raise ValueError(f"parallel.prefetch={prefetch}: expected a number of blocks, 0 or more")
    from sftlab.models.compiled import compile_block
    from sftlab.models.decoder import decoder_blocks
    from sftlab.parallel.tensor import split

    mesh = mesh_of(world, replicate)
    if world.tensor > 1:
        split(scorer, mesh[TENSOR])
    # A rank that holds all shards has nothing to free: gathering twice per step cost 2.5 % of the step on a CPU.
    several = world.data_size > replicate
    scorer.reshards = several and (reshard_after_forward == "auto" or bool(reshard_after_forward))
    scorer.on_host = cpu_offload
    shard = sharding(mesh, compute_dtype(param_dtype, world.device), scorer.reshards, cpu_offload)
    if compile or activation_checkpointing != "none" or world.device.type != "cpu":
        scorer.scored_only = ()
    sharded = []
    for blocks, name, block in decoder_blocks(scorer.model):
        if activation_checkpointing != "none":
            block = recomputed(block, activation_checkpointing)
            setattr(blocks, name, block)
        if compile:
            compile_block(block)
        sharded.append(shard(block))
    if compile:
        scorer.loss.compile(dynamic=True)  # the number of predictions differs in every microbatch
    shard(scorer)
    for i, block in enumerate(sharded if prefetch else ()):
        block.set_modules_to_forward_prefetch(sharded[i + 1 : i + 1 + prefetch])
        block.set_modules_to_backward_prefetch(sharded[max(0, i - prefetch) : i][::-1])
    return scorer


def sharding(
    mesh: "DeviceMesh", dtype: "torch.dtype", reshard_after_forward: bool, cpu_offload: bool
) -> Callable[["nn.Module"], Any]:
    """Return the function that shards a module over a mesh, or replicates it where a copy has one shard.

    torch's `replicate` makes the same modules as `fully_shard`, but it gathers nothing: there is still one code path.
    """
    import torch
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        # True casts the root's inputs, even inside a dataclass: a prediction's weight of 1001 became 1000 in bfloat16.
        cast_forward_inputs=False,
    )
    pinned = mesh.device_type == "cuda"  # pinning needs CUDA
    policies: Any = {
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy(),
    }
    data = tuple(name for name in (COPIES, SHARDS) if name in (mesh.mesh_dim_names or ()))
    if SHARDS not in data:
        return partial(replicate, mesh=mesh[data], **policies)
    return partial(fully_shard, mesh=mesh[data], reshard_after_forward=reshard_after_forward, **policies)


def recomputed(block: "nn.Module", how: str) -> "nn.Module":
    """Return a block whose activations backward makes again: all of them (`full`), or the cheap half (`selective`).

    `selective` keeps what attention and every second matrix product return, and makes the rest again.
    Source: the choice of every second product is torchtitan's.
    """
    import torch
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    if how == "full":
        return checkpoint_wrapper(block)
    aten = torch.ops.aten
    products = (aten.mm.default, aten.addmm.default)
    attention = [getattr(aten, name).default for name in dir(aten) if name.startswith("_scaled_dot_product_")]
    kept = {op for op in (*attention, torch.ops.higher_order.flex_attention) if "backward" not in str(op)}

    def contexts() -> Any:
        seen = {True: 0, False: 0}  # products, in the forward and in the recomputation

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op in products:
                seen[context.is_recompute] += 1
            keep = op in kept or (op in products and seen[context.is_recompute] % 2 == 1)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]

    return checkpoint_wrapper(block, context_fn=contexts)


def run_eagerly(scorer: "Scorer") -> None:
    """Take back what `compile=True` did."""
    from sftlab.models.compiled import uncompile_block
    from sftlab.models.decoder import decoder_blocks

    scorer.loss._compiled_call_impl = None
    for _, _, block in decoder_blocks(scorer.model):
        uncompile_block(block)
