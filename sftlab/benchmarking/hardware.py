"""The machine that is measured: what it is, what runs on it, and how fast it multiplies matrices."""

import statistics
import time
from importlib import metadata
from typing import Any

import torch

from sftlab.benchmarking.windows import synchronise
from sftlab.common.run_directory import environment
from sftlab.parallel.machine import processor
from sftlab.parallel.world import World
from sftlab.training.throughput import PEAK_FLOPS

MEASURED_S = 0.4  # how long matrices are multiplied
AT_ONCE = 4  # products between two looks at the clock


def hardware(here: World) -> dict[str, Any]:
    """Return the device's name and number, and the host's."""
    cuda = here.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(here.device) if cuda else processor(),
        "devices": here.size,
        "memory_gib": round(torch.cuda.get_device_properties(here.device).total_memory / 2**30, 1) if cuda else None,
        "threads": torch.get_num_threads(),
        "host": processor(),
    }


def software() -> dict[str, Any]:
    """Return versions, commit and date. `changed` says that the code differs from the commit."""
    found = environment()
    versions = {"python": found["python"], **found["packages"], "cuda": torch.version.cuda}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "not installed"
    return {
        "date": found["started"],
        "commit": found["git_commit"],
        "changed": bool(found["git_diff"]),
        "versions": versions,
    }


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 FLOP/s of the device's data sheet; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def matrix_flops(device: torch.device, dtype: torch.dtype, rows: int, width: int, out: int) -> float:
    """Return the FLOP/s of (rows, width) @ (width, out), the median over about MEASURED_S seconds."""
    a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, width), (width, out)))
    for _ in range(AT_ONCE):
        a @ b
    synchronise(device)
    found: list[float] = []
    end_s = time.perf_counter() + MEASURED_S
    while len(found) < 3 or time.perf_counter() < end_s:
        began_s = time.perf_counter()
        for _ in range(AT_ONCE):
            a @ b
        synchronise(device)
        found.append(AT_ONCE * 2.0 * rows * width * out / (time.perf_counter() - began_s))
    return statistics.median(found)
