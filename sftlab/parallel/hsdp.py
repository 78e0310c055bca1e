"""HSDP: whole copies of the model, each sharded over the ranks of a group."""

from typing import TYPE_CHECKING

from sftlab.common.values import Count, Whole
from sftlab.parallel.division import divide
from sftlab.parallel.fsdp2 import ParamDtype, Reshard, spread

if TYPE_CHECKING:
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.world import World


def hsdp(
    scorer: "Scorer",
    world: "World",
    *,
    replicate: Count,
    param_dtype: ParamDtype = "auto",
    reshard_after_forward: Reshard = "auto",
    prefetch: Whole = 0,
    cpu_offload: bool = False,
    compile: bool = False,
    activation_checkpointing: str = "none",
) -> "Scorer":
    """Return `scorer` in `replicate` copies, each sharded in place over neighbouring ranks.

    Parameters are gathered inside a copy only, and gradients are summed over copies once per step. With one copy per
    node, gathering stays inside the node.
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
