"""A progress bar on a person's terminal, and nothing anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def bar(name: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done; yield what advances it."""
    disabled = not (shown and sys.stderr.isatty())
    with Progress(transient=True, disable=disabled, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda num: progress.advance(task, num)
