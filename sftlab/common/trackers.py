"""Trackers: where the numbers of a run go beside metrics.jsonl. One function per option of the `tracker` group."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path


class Tracker(ABC):
    """Where numbers go beside metrics.jsonl."""

    @abstractmethod
    def write_numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step."""

    @abstractmethod
    def write_text(self, step: int, name: str, text: str) -> None:
        """Record a text (Markdown) of a step."""

    @abstractmethod
    def cut(self, step: int) -> None:
        """Forget what was recorded after `step`, because the run resumes there."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end."""


class TensorBoard(Tracker):
    """TensorBoard event files in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write_numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Add the text."""
        self.writer.add_text(name, text, step)

    def cut(self, step: int) -> None:
        """Mark later events as overtaken, those in an earlier file too."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self.writer._get_file_writer().add_event(  # type: ignore[no-untyped-call]
            Event(session_log=start), step=step + 1 if step else 0
        )

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def no_trackers(run_dir: Path) -> list[Tracker]:
    """Return no tracker: metrics.jsonl alone."""
    return []


def tensorboard(run_dir: Path) -> list[Tracker]:
    """Return a TensorBoard tracker."""
    return [TensorBoard(run_dir)]
