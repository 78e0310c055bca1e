"""How the ranks of a world are divided: into copies of the model, shards of a copy, and tensor groups.

The ranks of a tensor group are neighbours, so that they lie on one node: they exchange activations in every layer.
"""

from dataclasses import replace as replaced
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sftlab.parallel.world import World

COPIES, SHARDS, TENSOR = "dp_replicate", "dp_shard", "tp"  # names of the mesh's dimensions, outermost first


def divide(world: "World", *, replicate: int = 1, tensor: int = 1) -> "World":
    """Return the world in which groups of `tensor` ranks see the same rows, and `replicate` groups hold a copy each.

    Raises: ValueError if the sizes do not divide the number of ranks (names those that do).
    """
    if type(tensor) is not int or tensor < 1 or world.size % tensor:
        raise ValueError(indivisible("tensor", tensor, world.size))
    ranks = world.size // tensor
    if type(replicate) is not int or replicate < 1 or ranks % replicate:
        why = f" ({world.size} / {tensor} of parallel.tensor)" if tensor > 1 else ""
        raise ValueError(indivisible("replicate", replicate, ranks, why))
    return replaced(world, tensor=tensor)


def indivisible(key: str, value: object, ranks: int, why: str = "") -> str:
    """Return the refusal of a size, with those that work."""
    sizes = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    return f"parallel.{key}={value} must divide the number of processes, {ranks}{why}: use {sizes}"


def mesh_of(world: "World", replicate: int = 1) -> "DeviceMesh":
    """Return the mesh of a divided world: copies, shards of each, ranks of a tensor group. Collective.

    A dimension of one rank is left out, because each would need as many process groups as there are ranks. That of the
    shards stays where there would be no other for data.
    """
    from torch.distributed.device_mesh import init_device_mesh

    sizes = {COPIES: replicate, SHARDS: world.data_size // replicate, TENSOR: world.tensor}
    kept = [name for name, size in sizes.items() if size > 1 or (name == SHARDS and replicate == 1)]
    return init_device_mesh(world.device.type, tuple(sizes[name] for name in kept), mesh_dim_names=tuple(kept))


def require_rows(batch_size: int, world: "World") -> None:
    """Raise ValueError if a step has fewer examples than there are ranks with rows of their own: some would idle."""
    if batch_size < world.data_size:
        groups = f" (groups of parallel.tensor={world.tensor} ranks see the same rows)" if world.tensor > 1 else ""
        raise ValueError(
            f"trainer.batch_size={batch_size} gives {world.data_size} ranks fewer examples than one each{groups}: some "
            f"would never train. Use trainer.batch_size={world.data_size} or more, or at most "
            f"{batch_size * world.tensor} processes"
        )
