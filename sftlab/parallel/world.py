"""The distributed world: which rank this process is, and the few collectives that the rest needs.

A process finds its rank from torchrun, Submitit or nothing (a world of one); everything after that is the same on a
laptop and on 64 nodes. On CUDA the world has both backends: nccl for device tensors, gloo for host ones.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sftlab.common.ports import LOOPBACK, job_port, keep_store, visit_store
from sftlab.parallel.device import require_one_process_per_gpu, require_visible, settle

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank among all, and its device. `tensor` neighbouring ranks see the same rows (division.py)."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    tensor: int = 1

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank has."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many shares there are."""
        return self.size // self.tensor

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and messages."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over ranks."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return on every rank whether any rank's flag is set."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """Return the greatest of all ranks' values, on every rank; sent over the host's network."""
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest.item())

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's picklable value on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.any(False)


def find_rank() -> tuple[int, int, int]:
    """Return (rank, size, local rank); under Submitit also set MASTER_ADDR, which only it knows, and MASTER_PORT."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    if "SUBMITIT_EXECUTOR" in os.environ:
        import submitit

        env = submitit.helpers.TorchDistributedEnvironment()
        port = job_port(os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else env.master_port
        os.environ.update(MASTER_ADDR=env.master_addr, MASTER_PORT=str(port))
        return env.rank, env.world_size, env.local_rank
    return 0, 1, 0


def device_of(local_rank: int) -> torch.device:
    """Return the device of a process: its own GPU on the node, or the CPU if there is none.

    Raises: ValueError if there is a GPU that torch cannot use.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    require_visible()
    return torch.device("cpu")


def gpu_id(device: torch.device) -> str:
    """Return what names a GPU on its host."""
    return str(torch.cuda.get_device_properties(device).uuid)


def local_part(value: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def own_slices(value: Tensor) -> tuple[slice, ...]:
    """Return where the part of a tensor that this rank holds lies in the whole."""
    if not isinstance(value, DTensor):
        return tuple(slice(0, size) for size in value.shape)
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


@contextmanager
def world(timeout_min: float = 30.0) -> Iterator[World]:
    """Join the process group, yield this process's World, and leave the group in good order.

    A rank that raised leaves without a barrier, because the others may be inside a different collective.
    """
    rank, size, local_rank = find_rank()
    settle()
    device = device_of(local_rank)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    # gloo connects by host name. If that does not resolve (containers, bare laptops), loopback always does.
    if size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        rank=rank,
        world_size=size,
        store=meeting(rank, size, timeout_min),
        timeout=timedelta(minutes=timeout_min),
    )
    here = World(rank, size, local_rank, device)
    try:
        if cuda and size > 1:
            require_one_process_per_gpu(here.gather((socket.gethostname(), gpu_id(device))))
        yield here
        here.barrier()  # without it a finished gloo job aborted in 4 of 10 runs
    finally:
        dist.destroy_process_group()


def meeting(rank: int, size: int, timeout_min: float) -> Any:
    """Return the store at which ranks meet; None for torch's own, which torchrun's agent keeps, or several nodes use.

    The ranks of one node meet on loopback, where nobody else in the network can write into the store.
    """
    if size == 1:
        return HashStore()
    host = os.environ.get("MASTER_ADDR", "")
    if host not in LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    enter = keep_store if rank == 0 else visit_store
    return enter(host, int(os.environ["MASTER_PORT"]), timeout_min)


def loopback() -> str:
    """Return the name of the loopback interface (lo on Linux, lo0 on macOS)."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
