"""Progress on a person's terminal, and nothing anywhere else: a bar of its own, or a part of the run's console."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Listener = Callable[[str, int, int], None]  # what is done, how many, of how many

SHOWN_AFTER_S = 2.0  # what is done sooner needs no bar


@contextmanager
def bar(name: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done, how many per second and what is left; yield what advances it."""
    console = Console(stderr=True)
    began_s, num = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    progress = Progress(*columns, TimeRemainingColumn(), transient=True, console=console)
    task = progress.add_task(name, total=total, completed=done, rate="")
    wanted = shown and sys.stderr.isatty()

    def advance(more: int) -> None:
        nonlocal num
        num += more
        took_s = time.monotonic() - began_s
        progress.update(task, advance=more, rate=f"{done + num:,}/{total:,}  {num / max(took_s, 1e-9):,.1f}/s")
        if wanted and took_s >= SHOWN_AFTER_S and not progress.live.is_started:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:  # rich prints an empty line even where nothing was shown
            progress.stop()


listeners: list[Listener] = []  # the console of a run adds itself; work deep inside need not know of it


def note(name: str, done: int, total: int) -> None:
    """Tell whoever shows progress how far a piece of work is."""
    for listener in listeners:
        listener(name, done, total)


def counted(name: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items of a piece of work, and tell whoever shows progress how many are done."""
    for done, item in enumerate(items):
        note(name, done, total)
        yield item
    note(name, total, total)
