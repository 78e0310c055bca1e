"""trainer.profile: a trace of steps 5 to 8 and a table of what took longest; on CUDA also what lay in memory.

The profile looks at the run from around its steps, as the laps do, so the loop knows nothing of it. In `<run>/profile`
`trace.json.gz` opens in ui.perfetto.dev or chrome://tracing, `memory.pickle` in pytorch.org/memory_viz.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from sftlab.common.files import make_folder, write_whole

Item = TypeVar("Item")
FIRST, LAST = 5, 8  # steps of this process; those before them compile, allocate and warm caches
SHOWN_ROWS = 40


@dataclass(frozen=True)
class Profile:
    """Profile the steps FIRST to LAST that this process trains, on rank 0."""

    run_dir: Path
    device: torch.device
    say: Callable[[str], None]

    def watched(self, steps: Iterator[Item]) -> Iterator[Item]:
        """Yield the steps; those that are profiled run between the start and the end of the profile."""
        for number, step in enumerate(steps, 1):
            if number == FIRST:
                yield from self.profiled(step, steps)
            else:
                yield step

    def profiled(self, first: Item, steps: Iterator[Item]) -> Iterator[Item]:
        """Yield the first step and the following ones up to LAST, under the profiler; write what it found."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        count = 1
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            yield first
            while count <= LAST - FIRST and (step := next(steps, None)) is not None:
                count += 1
                yield step
            if cuda:
                torch.cuda.synchronize(self.device)
        self.write(found, count)

    def write(self, found: profile, count: int) -> None:
        """Write the trace, the table and the memory snapshot, and say where."""
        cuda = self.device.type == "cuda"
        folder = make_folder(self.run_dir, "profile")
        found.export_chrome_trace(str(folder / "trace.json.gz"))
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=SHOWN_ROWS, max_name_column_width=60)
        write_whole(folder / "table.txt", f"{count} steps\n{table}\n")
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        self.say(f"profiled {count} steps: {folder}")
