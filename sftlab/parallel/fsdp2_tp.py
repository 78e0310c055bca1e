"""FSDP2 over tensor groups: the matrices of a layer are split over the ranks of a group, then sharded over groups."""

from typing import TYPE_CHECKING

from sftlab.common.values import Count, Whole
from sftlab.parallel.division import divide
from sftlab.parallel.fsdp2 import ParamDtype, Reshard, spread

if TYPE_CHECKING:
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.world import World


def fsdp2_tp(
    scorer: "Scorer",
    world: "World",
    *,
    tensor: Count,
    replicate: Count = 1,
    param_dtype: ParamDtype = "auto",
    reshard_after_forward: Reshard = "auto",
    prefetch: Whole = 0,
    cpu_offload: bool = False,
    compile: bool = False,
    activation_checkpointing: str = "none",
) -> "Scorer":
    """Return `scorer` split over groups of `tensor` ranks by transformers' plan, and sharded over the groups.

    Raises: ValueError if the sizes do not divide the ranks, or if the model cannot be split so (tensor.py).
    """
    return spread(
        scorer,
        divide(world, replicate=replicate, tensor=tensor),
        replicate,
        param_dtype=param_dtype,
        reshard_after_forward=reshard_after_forward,
        prefetch=prefetch,
        cpu_offload=cpu_offload,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
    )
