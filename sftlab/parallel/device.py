"""What a GPU needs before it is used, and what is wrong with one that cannot be used, in words that say what to set."""

import os
import sys
from pathlib import Path

import torch

NVIDIA = Path("/dev/nvidia0")


def settle() -> None:
    """Set what CUDA and torch.compile read from the environment once, unless the user has set it."""
    # Lengths differ, so blocks of fixed size would leave holes: torch's allocator grows its blocks instead.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # By default compiled code lies in /tmp, which a cluster empties after each job: the next start would compile again.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "sftlab" / "inductor"))


def require_visible() -> None:
    """Raise ValueError if there is a GPU here that torch cannot use, because training on the CPU would take days.

    CUDA_VISIBLE_DEVICES set to nothing means that the CPU is wanted.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not NVIDIA.exists():
        return
    if torch.version.cuda is None:
        found = f"this torch ({torch.__version__}) was built without CUDA. Install one from https://pytorch.org"
    else:
        found = (
            f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda} and finds none that works "
            "(nvidia-smi shows the driver). Update the driver, or install a torch built for an older CUDA"
        )
    raise ValueError(
        f"{NVIDIA} is here, but {found}. To train on the CPU, set CUDA_VISIBLE_DEVICES= (to nothing) before the command"
    )


def require_one_process_per_gpu(places: list[tuple[str, str]]) -> None:
    """Raise ValueError if two ranks use one GPU, which NCCL refuses; `places` are each rank's (host, GPU)."""
    for rank, place in enumerate(places):
        if (first := places.index(place)) != rank:
            host, gpu = place
            num = len({p for p in places if p[0] == host})
            raise ValueError(
                f"ranks {first} and {rank} would share GPU {gpu} of {host}: one process per GPU. Start {num} there "
                f"(launcher.processes_per_node={num}, or torchrun --nproc-per-node {num})"
            )


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16; before Ampere (2020) they only emulate it, slowly."""
    return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device is free, with what torch keeps for later; on a CPU, of the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return sys.maxsize  # no Linux: nothing is known
    return int(lines["MemAvailable"].split()[0]) * 1024
