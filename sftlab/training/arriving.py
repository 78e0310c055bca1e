"""Numbers of a step on their way from the device to the host. Waiting for them would stall the device.

On CUDA the host launches work far ahead of the device. Reading a value makes it wait until everything before is done,
and then the device idles until the host has launched more. So values are copied without blocking and read one step
later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """Named values; `on_host` holds them once `copied` has happened (None: already)."""

    names: tuple[str, ...]
    on_host: Tensor
    copied: "torch.cuda.Event | None"

    def read(self) -> dict[str, float]:
        """Return the values by name; on CUDA wait for them first."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.on_host.tolist(), strict=True))


def send(names: Sequence[str], values: Sequence[Tensor]) -> Arriving:
    """Begin to copy scalars to the host, as float64."""
    stacked = torch.stack([v.detach().double() for v in values])
    if stacked.device.type != "cuda":
        return Arriving(tuple(names), stacked, None)
    on_host = torch.empty(len(names), dtype=torch.float64, pin_memory=True)
    on_host.copy_(stacked, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return Arriving(tuple(names), on_host, copied)
