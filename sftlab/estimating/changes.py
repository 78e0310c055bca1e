"""The smallest change with which a run fits: single ones first, in the order of what they cost, then several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sftlab.estimating.devices import DEVICES
from sftlab.estimating.estimate import Estimate, estimate_run

# What each costs: a little speed, more speed, accuracy of the optimiser's state, a slow bus, another kind of training.
SINGLE = (
    ("trainer.rows_per_microbatch=1",),
    ("trainer.activation_checkpointing=selective",),
    ("trainer.activation_checkpointing=full",),
    ("optim=adamw_8bit",),
    ("trainer.activation_checkpointing=full", "optim=adamw_8bit"),
    ("trainer.activation_checkpointing=full", "optim=adamw_bf16"),
    ("trainer.activation_checkpointing=full", "parallel.cpu_offload=true"),
)
ADAPTERS = (
    ("peft=lora",),
    ("peft=lora", "trainer.activation_checkpointing=full"),
    ("peft=qlora", "trainer.activation_checkpointing=full"),
)
MOST_NODES = 8  # times as many


def smallest_change(
    config: Mapping[str, Any], compose: Callable[[Sequence[str]], dict[str, Any]], working: Callable[[str], None]
) -> tuple[Sequence[str], Estimate] | None:
    """Return the first change that fits, and its estimate; None if none does. `working` is told what is tried."""
    for change in changes(config):
        working(" ".join(change))
        try:
            tried = compose(change)
            own = tried.pop("estimate")
            found = estimate_run(tried, own)
        except (
            Exception
        ):  # an option that this version or this installation does not have, or that does not go together
            continue
        if found.fits:
            return change, found
    return None


def changes(config: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield changes to try, the least first. What the config has already is left out."""
    nodes = int((config["launcher"] or {}).get("nodes") or 1)
    times = [2**i for i in range(1, MOST_NODES.bit_length())]
    more = [(f"launcher.nodes={nodes * n}",) for n in times]
    full = [("trainer.activation_checkpointing=full", *m) for m in more]
    recomputes = config["trainer"]["activation_checkpointing"]
    for change in (*SINGLE, *(m for pair in zip(full, more, strict=True) for m in pair), *ADAPTERS):
        if f"trainer.activation_checkpointing={recomputes}" not in change:
            yield change
        elif len(change) > 1:
            yield [c for c in change if not c.startswith("trainer.activation_checkpointing")]


def larger_devices(found: Estimate) -> list[str]:
    """Return the devices on which a run would fit as it is."""
    return [d.name for d in DEVICES.values() if d.usable_gib is not None and found.peak <= d.usable_gib * 2**30]
