"""What goes wrong in the SLURM tests: a schedule, which every rank calls at every step, that can do harm.

The harm is done while the file `cause` exists, so that a retry after its removal runs through. So long a slow run is
slow, too.
"""

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from sftlab.training import schedule


def cosine(
    step: int, total_steps: int, *, fault: str = "none", at: int = 0, cause: str = "", slow_s: float = 0
) -> float:
    """sftlab's cosine, with a fault of rank 1 at step `at`: raise, kill, or late (after the last collective).

    Any other name is a slow run's: a fault named `slow_2` takes 2 s a step.
    """
    time.sleep(float(fault.partition("_")[2] or (slow_s if Path(cause).exists() else 0)))
    if fault in ("raise", "kill", "late") and dist.get_rank() == 1 and step == at and Path(cause).exists():
        if fault == "raise":
            raise ValueError(f"a fault on rank 1 at step {step}")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "late":
            leave = dist.destroy_process_group

            def late() -> None:
                leave()
                raise ValueError("a fault on rank 1 after the last collective")

            dist.destroy_process_group = late
    return schedule.cosine(step, total_steps)
