"""The console: what a person sees of a run. Rich on a terminal, plain lines elsewhere and in train.log.

Only rank 0 prints; the console of another rank is quiet.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from sftlab.common import progress
from sftlab.common.files import open_plain, spared_by_a_full_disk
from sftlab.common.secrets import strike
from sftlab.common.terminal import Terminal
from sftlab.common.words import COMMAND, duration, end_of, one_line, plain

if TYPE_CHECKING:  # it imports torch
    from sftlab.training.validation import Sample

SHOWN_SAMPLES = 3
SHORT_RUN = 200  # steps: outside of a terminal a longer run prints a line every 10 s at most, after an hour every 30 s
BAR_COLUMNS = 16


class Console:
    """Show a run of `max_steps` steps. `log` gets the plain lines too."""

    def __init__(self, max_steps: int, log: Path | None, quiet: bool = False) -> None:
        self.max_steps = max_steps
        self.terminal = Terminal(quiet=quiet, soft_wrap=True)
        self.log = open_plain(log, "a") if log else None
        self.first: tuple[int, float] | None = None
        self.printed_s = -math.inf
        self.before: Mapping[str, float] | None = None
        self.first_samples: dict[str, Sample] = {}
        self.last_samples: Sequence[Sample] = ()
        self.live = Live(console=self.terminal, refresh_per_second=4, transient=True, redirect_stdout=False)
        self.work = ("", 0.0)  # the piece of work whose progress is shown, and when it began
        if self.terminal.is_terminal and not quiet:
            self.live.start()
            progress.listeners.append(self.progress)

    def say(self, text: str) -> None:
        """Print lines, wrapped at words on a terminal and whole elsewhere; a command stays one line, to be copied."""
        for line in text.split("\n"):
            whole = not self.terminal.is_terminal or line.startswith(COMMAND)
            self.terminal.print(line, markup=False, soft_wrap=whole)
        self._write(text)

    def working(self, text: str) -> None:
        """Show on a terminal what is going on, until the next line."""
        if self.live.is_started:
            self.live.update(Text(text, style="cyan", overflow="ellipsis", no_wrap=True))

    def progress(self, name: str, done: int, total: int) -> None:
        """Show on a terminal how far a piece of work is, from its third second on."""
        now_s = time.perf_counter()
        if name != self.work[0]:
            self.work = (name, now_s)
        took_s = now_s - self.work[1]
        if done >= total:
            self.work = ("", 0.0)
            return self.working("")
        if took_s > progress.SHOWN_AFTER_S:
            rate = done / took_s
            left = f"  {duration((total - done) / rate)} left" if rate else ""
            self.working(f"{name}  {filled(done, total)}  {done:,}/{total:,}  {rate:,.1f}/s{left}")
        return None

    def facts(self, title: str, facts: Mapping[str, str]) -> None:
        """Show what will run: a table on a terminal, one line per fact elsewhere."""
        lines = "\n".join([title, *(f"  {name:<14} {value}" for name, value in facts.items())])
        if not self.terminal.is_terminal:
            return self.say(lines)  # a table would be folded at 80 columns
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(name, Text(value))
        plain = "\n".join([title, *(f"  {name:<{max(map(len, facts))}}  {value}" for name, value in facts.items())])
        self.terminal.print(table)
        self._write(plain)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show a logged step: a bar on a terminal, a line elsewhere. A long run's lines are seconds apart."""
        now_s = time.perf_counter()
        self.first = self.first or (step, now_s)
        first_step, first_s = self.first
        left_s = (self.max_steps - step) * (now_s - first_s) / max(1, step - first_step)
        parts = [
            f"step {step}/{self.max_steps}",
            f"loss {values['train/loss']:.4f}",
            f"lr {values['train/lr']:.2e}",
            f"norm {values['train/grad_norm']:.2f}",
            f"{values['perf/examples_per_s']:.1f} examples/s",
            f"{values['perf/tokens_per_s']:,.0f} tokens/s",
            *([f"MFU {values['perf/mfu']:.1%}"] if "perf/mfu" in values else []),
        ]
        line = "  ".join(parts)
        ends = step >= self.max_steps
        if self.live.is_started and not ends:  # the last line stays
            self.working(f"{duration(left_s)} left  {filled(step, self.max_steps)}  {line}")
        apart_s = 0.0 if self.max_steps <= SHORT_RUN else 10.0 if now_s - first_s < 3600 else 30.0
        if not ends and now_s - self.printed_s < apart_s:
            return
        self.printed_s = now_s
        if self.live.is_started and not ends:
            return self._write(f"{line}  {duration(left_s)} left")
        self.working("")
        while self.terminal.is_terminal and len("  ".join(parts)) > self.terminal.width and len(parts) > 1:
            parts.pop()  # the end of what a narrow terminal cannot show in one line
        self.say("  ".join(parts) if ends else f"{line}  {duration(left_s)} left")

    def recall(self, scores: Mapping[str, float], samples: "Sequence[Sample]") -> None:
        """Take what the run scored before training, so that a resumed run shows that as its 'before'."""
        if scores:
            self.before, self.first_samples = dict(scores), {s.id: s for s in samples}

    def evaluation(self, step: int, scores: Mapping[str, float], samples: "Sequence[Sample]") -> None:
        """Show scores, next to those of the first evaluation if it was earlier; remember the samples."""
        if self.before is None:
            self.before, self.first_samples = dict(scores), {s.id: s for s in samples}
        table = Table(title=f"step {step}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("validation", style="bold")
        for heading in ("value",) if self.before == scores else ("before", "now"):
            table.add_column(heading, justify="right")
        for name, value in scores.items():
            values = [value] if self.before == scores else [self.before.get(name, float("nan")), value]
            table.add_row(name, *(f"{v:.4f}" for v in values))
        self.terminal.print(table)
        self._write(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self.last_samples = samples

    def answers(self) -> None:
        """Show three questions with the model's answers before and after."""
        spread = self.last_samples[:: max(1, len(self.last_samples) // SHOWN_SAMPLES)]
        for s in spread[:SHOWN_SAMPLES]:
            before = self.first_samples.get(s.id, s)
            lines = (("before", before.answer), ("after", s.answer), ("expected", s.references[0]))
            self.say("\n".join(["", end_of(s.prompt), *(f"{name:>10}  {one_line(text)}" for name, text in lines)]))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live.is_started:
            self.live.stop()
            progress.listeners.remove(self.progress)
        if self.log:
            with spared_by_a_full_disk():
                self.log.close()
            self.log = None

    def _write(self, text: str) -> None:
        if self.log:
            with spared_by_a_full_disk():
                self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {plain(strike(text))}\n")
                self.log.flush()


def filled(done: int, total: int) -> str:
    """Return a bar."""
    full = BAR_COLUMNS * done // max(1, total)
    return "━" * full + "─" * (BAR_COLUMNS - full)
