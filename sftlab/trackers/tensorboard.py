"""TensorBoard: event files in `<run>/tensorboard/<name>`, so that TensorBoard shows the run by its name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.common.tracker import About, Answer, Tracker
from sftlab.common.words import markdown_text

# TensorBoard sorts its groups of scalars by name. The custom scalars have the order in which people look.
ORDER = {
    "loss": ["train/loss", "val/loss"],
    "scores": ["val/(?!loss)"],
    "training": ["train/(?!loss)"],
    "memory": ["mem/"],
    "speed": ["perf/"],
}


class TensorBoard(Tracker):
    """Scalars, answers as tables, and the hyperparameters with the scores of the run."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.about = about
        self.last: dict[str, float] = {}
        folder = about.run_dir / "tensorboard" / re.sub(r"[^\w.=-]+", "_", about.name)
        self.writer = SummaryWriter(str(folder))
        layout = {name: {name: ["Multiline", tags]} for name, tags in ORDER.items()}
        self.writer.add_custom_scalars(layout)

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Add each value as a scalar. All in one event: one of its own for each value took 0.3 ms a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.last |= values
        scalars = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self.writer._get_file_writer().add_summary(scalars, step)  # type: ignore[no-untyped-call]

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Add them as a table."""
        if answers:
            self.writer.add_text("val/answers", markdown(answers), step)
        self.writer.flush()

    def cut(self, step: int) -> None:
        """Mark later events as overtaken, those in an earlier file too."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self.writer._get_file_writer().add_event(  # type: ignore[no-untyped-call]
            Event(session_log=start), step=step + 1 if step else 0
        )

    def close(self, status: str) -> None:
        """Add the hyperparameters that were typed beside the last scores, and close the event file."""
        from torch.utils.tensorboard.summary import hparams

        scores = {name: value for name, value in self.last.items() if name.startswith(("val/", "train/loss"))}
        typed = {key: number(text) for key, text in self.about.chosen.items()}
        file = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        for part in hparams(typed, scores):  # type: ignore[no-untyped-call]
            file.add_summary(part)
        self.writer.close()


def markdown(answers: Sequence[Answer]) -> str:
    """Return answers as a Markdown table."""
    rows = [(a["prompt"], a["answer"], " / ".join(a["references"])) for a in answers]
    cells = [[markdown_text(cell) for cell in row] for row in rows]
    header = ["| prompt | answer | expected |", "| --- | --- | --- |"]
    return "\n".join([*header, *(f"| {' | '.join(c)} |" for c in cells)])


def number(text: str) -> Any:
    """Return a value that was typed as a number where it is one: TensorBoard sorts them."""
    try:
        return float(text)
    except ValueError:
        return text


def tensorboard(about: About) -> Tracker:
    """Return a TensorBoard tracker."""
    return TensorBoard(about)
