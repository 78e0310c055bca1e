"""Where a model keeps its repeated decoder blocks."""

from torch import nn


def decoder_blocks(model: nn.Module) -> list[tuple[nn.ModuleList, str, nn.Module]]:
    """Return (list, name in it, block) of the model's repeated decoder blocks.

    They are the longest ModuleList that lies in no other: `layers` in most, `h` in GPT-2's family. A list inside
    another holds parts of a block, such as experts.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks to shard")
    blocks = max(outer, key=len)
    return [(blocks, name, block) for name, block in blocks.named_children()]
