"""The look at memory before points are queued: which of them would not fit on the devices of the cluster."""

import json
from collections.abc import Mapping
from typing import Any

from sftlab.estimating.devices import GIB
from sftlab.estimating.estimate import Estimate, estimate_run

OWN = {
    "mfu": 0.35,
    "price_per_hour": None,
    "read_data": "auto",
    "num_examples": None,
    "tokens_per_example": None,
    "shared_tokens_per_example": None,
    "targets_per_example": None,
}
# What takes memory. Points of a sweep over a learning rate or a seed need the same, and are estimated once.
COUNTS = ("model", "data", "parallel", "trainer", "peft", "launcher")


def too_large(points: Mapping[int, Mapping[str, Any]], device: str) -> dict[int, str]:
    """Return, by number, what is to be said of each point: that it does not fit, or why that cannot be told."""
    known: dict[str, str] = {}
    found: dict[int, str] = {}
    for num, config in points.items():
        optim = str((config["optim"] or {}).get("_target_"))
        key = json.dumps([optim, *(config.get(name) for name in COUNTS)], sort_keys=True, default=str)
        if key not in known:
            try:
                known[key] = said(estimate_run(config, OWN | {"device": device}))
            except Exception as error:
                known[key] = f"its memory cannot be estimated ({str(error).splitlines()[0] if str(error) else error!r})"
        if known[key]:
            found[num] = known[key]
    return found


def said(found: Estimate) -> str:
    """Return that a run does not fit, or nothing."""
    if found.fits is not False:
        return ""
    usable = found.device.usable_gib
    return (
        f"it would take {found.peak / GIB:.1f} GiB per rank in the {found.rehearsal.phase}; a run may use {usable:.1f} "
        f"GiB of {found.device.name}"
    )
