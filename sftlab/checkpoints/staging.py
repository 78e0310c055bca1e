"""How a save takes the state of a run, so that the next step need not wait until it is on the host.

On a GPU with room for it the state is copied on the device, which takes milliseconds, and the thread that writes the
checkpoint fetches that copy on a stream of its own. Copied to the host first, 15 GB of a 1.2B model held up an H100 for
7 s, most of them to allocate host memory that the copy could use at full speed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.utils._pytree import tree_map_only

from sftlab.parallel.world import local_part

SPARE_BYTES = 1 << 30  # left free beside the copy


class Staging:
    """Take states, one at a time: the copy of the one before must have been fetched and dropped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # What torch's DefaultStager copies with. In torch 2.11 that one fails at its second state.
        self.stager = StateDictStager(pin_memory=False, share_memory=False)
        self.peak_bytes: int | None = None  # of the steps, without a copy beside them

    def take(self, state: dict[str, Any]) -> Callable[[], Any]:
        """Return a function that returns the state, as it is now, on the host; to be called once, on any thread."""
        if self.device.type != "cuda" or not self.has_room(local_bytes(state)):
            host = self.stager.stage(state)
            return lambda: host
        copies = [tree_map_only(Tensor, torch.clone, state)]
        copied = torch.cuda.current_stream(self.device).record_event()

        def fetch() -> Any:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                stream.wait_event(copied)
                host = self.stager.stage(copies.pop())
                stream.synchronize()
            return host

        return fetch

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a copy of the state fits beside the largest step, which the warm-up or an earlier one was."""
        if self.peak_bytes is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        ours = torch.cuda.memory_reserved(self.device)
        return free + ours - self.peak_bytes >= num_bytes + SPARE_BYTES


def local_bytes(state: Any) -> int:
    """Return how many bytes of a nested state's tensors this rank holds."""
    if isinstance(state, Mapping):
        return sum(local_bytes(v) for v in state.values())
    return local_part(state).nbytes if isinstance(state, Tensor) else 0
