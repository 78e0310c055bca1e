"""One layout's run, built as train builds it and measured: seconds to its first step, windows, parts, memory."""

import gc
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from sftlab.benchmarking.hardware import matrix_flops, peak_flops
from sftlab.benchmarking.parts import part_shares, profiled
from sftlab.benchmarking.windows import Steps, rates
from sftlab.checkpoints.hugging_face import parameter_count
from sftlab.common.run_directory import Claim
from sftlab.models.architecture import in_layers
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.parallel.world import World
from sftlab.training.build import build
from sftlab.training.garbage import collected_between_steps
from sftlab.training.preempt import StopSignal
from sftlab.training.trainer import Trainer
from sftlab.training.warm_up import num_graphs

PART_STEPS = 2  # steps whose parts are timed, after the windows
EXTRA_STEPS = PART_STEPS + 1  # one more is profiled


def measure(config: Mapping[str, Any], own: Mapping[str, Any], here: World, folder: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of parameters and what one layout's run measured. Collective."""
    folder.mkdir()
    torch.compiler.reset()
    counters.clear()
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here.device)
    began_s = time.perf_counter()
    trainer = build(config, here, folder, Claim(), StopSignal(here, "")).trainer
    try:
        found, table = measure_trainer(trainer, config, own, began_s)
    finally:
        trainer.checkpoints.close()
        trainer.console.close()
        trainer.metrics.close()
    if own["profile"] and here.is_main:
        layout = config["data"]["layout"]
        with Path(own["profile"]).open("w" if layout == own["layouts"][0] else "a", encoding="utf-8") as file:
            file.write(f"{layout}\n{table}\n")
    parameters = parameter_count(trainer.scorer.model)
    del trainer
    gc.collect()  # the next layout's run needs the memory of this one
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
    return parameters, found


def measure_trainer(
    trainer: Trainer, config: Mapping[str, Any], own: Mapping[str, Any], began_s: float
) -> tuple[dict[str, Any], str]:
    """Return what a trainer's steps measured, and the profile of one of them."""
    here = trainer.world
    steps = Steps(trainer)
    trainer.warm_up()
    steps.window(1)
    first_step_s = time.perf_counter() - began_s
    steps.window(own["warm_up"] - 1)
    graphs = num_graphs()
    matrix = matrix_rate(trainer, compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device))
    with collected_between_steps() as garbage:
        windows = []
        for _ in range(own["windows"]):
            windows.append(steps.window(own["steps_per_window"]))
            garbage.between_steps(steps.done)
    late = num_graphs() - graphs
    found = rates(windows, trainer.throughput.flops)
    peak = peak_flops(here.device)
    found |= {
        "losses": list(steps.losses),
        "rows_per_microbatch": trainer.loader.row_layout.rows_per_microbatch,
        "row_length": trainer.loader.row_layout.row_length,
        "first_step_s": first_step_s,
        "peak_gib": peak_gib(here),
        "matrix_flops_per_s": matrix,
        "of_matrix_rate": found["flops_per_s"] / here.size / matrix,
        "mfu": found["flops_per_s"] / here.size / peak if peak else None,
        "graphs": graphs + late,
        "graphs_after_warm_up": late,
    }
    shares = part_shares(steps, PART_STEPS, found.pop("data_share"))
    communication, table = profiled(steps)
    return found | {"shares": shares | {"communication": communication}}, table


def matrix_rate(trainer: Trainer, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the model's own matrix product: a microbatch's tokens through the first MLP matrix."""
    config = trainer.scorer.model.config.get_text_config()
    layout = trainer.loader.row_layout
    out = in_layers(config, "intermediate_size")[0] or 4 * config.hidden_size
    rows = layout.rows_per_microbatch * layout.row_length
    return matrix_flops(trainer.world.device, dtype, rows, config.hidden_size, out)


def peak_gib(here: World) -> float:
    """Return the most memory that any rank held: on CUDA what was allocated, else what was resident in the process.

    The latter grows over the layouts of one command, because a process gives little back.
    """
    if here.device.type == "cuda":
        return here.max(torch.cuda.max_memory_allocated(here.device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return here.max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 2**30
