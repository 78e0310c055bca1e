"""Python's garbage collector, between steps only. In a step it would stall the device, by 0.1 s in a full pass.

Reference counting frees nearly everything at once. The collector is only for cycles, which a step makes few of.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50  # steps between collections


class Garbage:
    """Collects when it is told to."""

    def between_steps(self, step: int) -> None:
        """Collect young objects every EVERY steps."""
        if step % EVERY == 0:
            gc.collect(1)


@contextmanager
def collected_between_steps() -> Iterator[Garbage]:
    """Turn the automatic collector off inside. What exists already is not looked at again."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield Garbage()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
