"""What a tracker is: a place where the numbers and answers of a run go beside metrics.jsonl.

The options of the `tracker` group are in sftlab/trackers/. Each tracker works in a thread of its own, so that a slow
server costs a run nothing, and one that fails is given up while the run goes on.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_WAITING = 100_000  # calls that a tracker may be behind, about 100 MB; more are dropped
FAILURES = 5  # in a row; then a tracker is given up
CLOSE_S = 30.0  # in which a tracker may send what is left
Answer = Mapping[str, Any]  # id, prompt, answer, references


@dataclass(frozen=True)
class About:
    """What a tracker is told about a run: where it lies, its names, its config without secrets.

    `group` is the sweep that the run is a point of. `chosen` are the overrides that were typed, by key.
    `say` shows a line to the user.
    """

    run_dir: Path
    name: str
    group: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    max_steps: int = 0
    say: Callable[[str], None] = lambda text: None


class Tracker(ABC):
    """Where numbers and answers go beside metrics.jsonl."""

    @abstractmethod
    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Record numbers of a step, `time_s` wall seconds after the first step began."""

    @abstractmethod
    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Record the answers that an evaluation generated; there may be none."""

    @abstractmethod
    def cut(self, step: int) -> None:
        """Forget what was recorded after `step`, as far as possible, because the run resumes there."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Flush and end. `status` is finished, stopped or failed."""


class Background(Tracker):
    """A tracker in a thread of its own. What it raises is said once, and never reaches the run."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name = name
        self.say = say
        self.given_up = False
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, args=(make,), name=f"tracker {name}", daemon=True)
        self.thread.start()

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Hand them over."""
        self._hand_over("write_numbers", step, time_s, dict(values))

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Hand them over."""
        self._hand_over("write_answers", step, answers)

    def cut(self, step: int) -> None:
        """Hand it over."""
        self._hand_over("cut", step)

    def close(self, status: str) -> None:
        """Wait until all is recorded, for at most CLOSE_S seconds."""
        self._hand_over("close", status)
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            self.say(f"tracker {self.name} has not sent everything after {CLOSE_S:.0f} s: the run ends without it")

    def _hand_over(self, method: str, *arguments: Any) -> None:
        if self.given_up:
            return
        try:
            self.calls.put_nowait((method, arguments))
        except queue.Full:
            self._give_up(RuntimeError(f"it is {MOST_WAITING:,} calls behind"))

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except Exception as error:
            return self._give_up(error)
        failures, method = 0, ""
        while method != "close":
            method, arguments = self.calls.get()
            try:
                getattr(tracker, method)(*arguments)
                failures = 0
            except Exception as error:
                failures += 1
                if failures == 1 and method != "close":
                    self.say(f"tracker {self.name} failed, the run goes on: {shown(error)}")
                if failures == FAILURES or method == "close":
                    return self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.given_up = True
        self.say(f"tracker {self.name} is given up, the run goes on without it: {shown(error)}")


def shown(error: Exception) -> str:
    """Return an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
