"""What `python -m sftlab.estimate` shows: a table, and whether the run fits."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sftlab.common.hub import quiet_transformers
from sftlab.common.terminal import Terminal
from sftlab.common.words import duration
from sftlab.estimating.changes import larger_devices, smallest_change
from sftlab.estimating.devices import GIB
from sftlab.estimating.estimate import Estimate, estimate_run

NAMES = {
    "parameters": "parameters",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "gathered": "gathered",
    "activations": "activations",
    "logits": "head, logits",
}


def show_estimate(config: dict[str, Any], compose: Callable[[Sequence[str]], dict[str, Any]]) -> None:
    """Show the estimate of a config; `compose` returns it with more overrides. Exits with 1 if the run does not fit."""
    import logging

    quiet_transformers(logging.ERROR)
    own = config.pop("estimate")
    console = Terminal()
    found = estimate_run(config, own)
    console.print(table(config, found))
    console.print(verdict(found), markup=False)
    change = None
    if found.fits is False and own["changes"]:
        with console.status("looking for a change that fits") as status:
            change = smallest_change(config, compose, lambda text: status.update(f"trying {text}"))
        for line in advice(found, change):
            console.print(line, markup=False, soft_wrap=True)
    if own["output"]:
        numbers = found.numbers() | {"change": list(change[0]) if change else None}
        Path(own["output"]).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if found.fits is False:
        sys.exit(1)


def table(config: dict[str, Any], found: Estimate) -> Table:
    """Return the estimate as a table."""
    model = config["model"]["name_or_path"]
    made = Table(title=f"{model} on {found.num_ranks} x {found.device.name}", title_justify="left", show_header=False)
    made.box, made.padding = None, (0, 2, 0, 0)
    made.add_column(style="bold")
    made.add_column(justify="right", no_wrap=True)
    made.add_column(overflow="fold", style="dim")
    for name, value, note in rows(found):
        made.add_row(name, Text(value), Text(note))
    return made


def rows(found: Estimate) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, note)."""
    a, r = found.amounts, found.rehearsal
    num, length = a.batch.tokens.shape
    yield "parameters", f"{r.num_parameters:,}", f"trained {r.num_trained:,} ({r.num_trained / r.num_parameters:.2%})"
    yield "data", "" if a.num_examples is None else f"{a.num_examples:,}", a.known_from
    idle = max(0, found.num_ranks - found.batch_size)
    note = f"{a.num_microbatches} per rank and step, {len(a.batch.at):,} predictions"
    yield (
        "microbatch",
        f"{num} x {length:,}",
        note + (f"; at least {idle} ranks have no example in a step" if idle else ""),
    )
    yield "memory per rank", gib(found.peak), f"at its peak, in the {r.phase}"
    for part, num_bytes in found.parts.items():
        if num_bytes:
            yield f"  {NAMES[part]}", gib(num_bytes), ""
    yield "memory per node", gib(found.host_bytes), "of the host, with the checkpoint that is saved"
    if found.steps is not None:
        yield "steps", f"{found.steps:,}", f"of {found.batch_size:,} examples"
    if a.tokens is not None and a.effective_tokens is not None:
        note = f"{a.effective_tokens:,.0f} without sharing prefixes"
        yield "tokens per step", f"{a.tokens:,.0f}", note
    if found.step_flops is not None:
        yield (
            "FLOPs per step",
            f"{found.step_flops:.3g}",
            "" if found.steps is None else f"in all {found.steps * found.step_flops:.3g}",
        )
    if found.hours is not None:
        yield "time", duration(found.hours * 3600), f"at an MFU of {found.mfu:g}, without evaluation and saving"
        yield "device hours", f"{found.hours * found.num_ranks:,.1f}", ""
    if found.price is not None:
        yield "price", f"{found.price:,.2f}", f"at {found.price_per_hour:g} per device and hour"
    yield (
        "checkpoint",
        gib(found.checkpoint_bytes),
        f"disk for all that are kept and the model: {gib(found.disk_bytes)}",
    )


def verdict(found: Estimate) -> str:
    """Return in a line whether the run fits."""
    if found.device.usable_gib is None:
        return "a CPU's memory is the host's: compare with what is free there"
    room = f"{found.device.usable_gib:.1f} of {found.device.memory_gib:.1f} GiB of {found.device.name} may be used"
    return f"{'fits' if found.fits else 'does not fit'}: {gib(found.peak)} per rank; {room}"


def advice(found: Estimate, change: tuple[Sequence[str], Estimate] | None) -> list[str]:
    """Return what to change so that a run fits."""
    larger = larger_devices(found)
    lines = [f"as it is it fits on: {', '.join(larger)}"] if larger else []
    if change is None:
        return [*lines, "no change that was tried makes it fit: more nodes, or a smaller model"]
    return [*lines, f"the smallest change that fits: {' '.join(change[0])}  ({gib(change[1].peak)} per rank)"]


def gib(num_bytes: float) -> str:
    """Return bytes in GiB, or in MiB if they are few."""
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"
