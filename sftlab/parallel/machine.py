"""What a run runs on: the processor, the devices, their memory. People read it in the report and in benchmarks."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from sftlab.common.words import size
from sftlab.parallel.world import World


def machine(here: World) -> dict[str, Any]:
    """Return the host, its processor and memory, and the devices of the run, by name."""
    found = {"host": platform.node(), "processor": processor(), "memory": size(memory_bytes())}
    if here.device.type == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        found["devices"] = f"{here.size} x {properties.name}, {size(properties.total_memory)}"
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["processes"] = f"{here.size}, {torch.get_num_threads()} threads each"
    return found


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def memory_bytes() -> int:
    """Return the memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
