"""Devices by name: their memory and their speed, from the vendors' data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A kind of device. `memory_gib` is what `nvidia-smi` shows as the total; `flops` are dense, in bfloat16.

    `reserved_gib` is what a run cannot use: the CUDA context, NCCL's buffers, and holes between blocks of memory.
    `flops` is None for the CPU, whose speed no data sheet tells.
    """

    name: str
    memory_gib: float | None
    flops: float | None
    reserved_gib: float = 3.0

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.name != "cpu"

    @property
    def usable_gib(self) -> float | None:
        """What a run may use of its memory; None for a CPU, whose memory is the host's."""
        return None if self.memory_gib is None else self.memory_gib - self.reserved_gib


DEVICES = {
    d.name: d
    for d in (
        Device("b200", 178.4, 2250e12),
        Device("h200", 139.8, 989e12),
        Device("h100", 79.1, 989e12),
        Device("a100_80", 79.2, 312e12),
        Device("a100_40", 39.4, 312e12),
        Device("l40s", 44.5, 362e12),
        Device("l4", 22.0, 121e12, 1.5),
        Device("a10", 22.0, 125e12, 1.5),
        Device("rtx4090", 23.5, 165e12, 1.5),
        Device("rtx5090", 31.4, 209e12, 1.5),
        Device("cpu", None, None),
    )
}


def device_named(name: str, key: str = "estimate.device") -> Device:
    """Return the device of this name; `key` is its setting. Raises: ValueError with the names there are."""
    if name not in DEVICES:
        raise ValueError(f"{key}={name}: expected one of {', '.join(DEVICES)}")
    return DEVICES[name]
