"""DDP: every rank holds the whole model."""

from typing import TYPE_CHECKING

from sftlab.parallel.division import divide
from sftlab.parallel.fsdp2 import ParamDtype, spread

if TYPE_CHECKING:
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.world import World


def ddp(
    scorer: "Scorer",
    world: "World",
    *,
    param_dtype: ParamDtype = "auto",
    cpu_offload: bool = False,
    compile: bool = False,
    activation_checkpointing: str = "none",
) -> "Scorer":
    """Return `scorer` with its parameters on every rank; gradients are summed over ranks once per step.

    It is FSDP2's own `replicate`, not DistributedDataParallel: parameters stay DTensors under the same names, so that
    master weights, mixed precision, accumulation, checkpoints and answers take the same path as when sharded.
    """
    return spread(
        scorer,
        divide(world, replicate=world.size),
        world.size,
        param_dtype=param_dtype,
        reshard_after_forward=False,
        prefetch=0,  # nothing is gathered
        cpu_offload=cpu_offload,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
    )
