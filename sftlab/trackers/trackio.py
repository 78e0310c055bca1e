"""Trackio: a run in a local database (TRACKIO_DIR), which `trackio show` opens; with `space_id` in a Space of the hub.

A resumed run goes on under its name. Trackio keeps what it has: steps that are done again are not recorded twice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.common.tracker import About, Answer, Tracker
from sftlab.trackers.service import COLUMNS, all_tags, check_offline, is_offline, recall, remember, row

HUB = "https://huggingface.co"


class Trackio(Tracker):
    """A run of Trackio. It begins with `cut`, which says whether the run is new."""

    def __init__(
        self, about: About, project: str, space_id: str | None, tags: Sequence[str], offline: bool | str
    ) -> None:
        self.about = about
        self.project = project
        self.space_id = space_id
        self.tags = all_tags(about, tags)
        self.offline = offline
        self.known_step = -1  # the last step that the database has
        self.run: Any = None

    def cut(self, step: int) -> None:
        """Begin, or resume, the Trackio run."""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        known = recall(self.about.run_dir, "trackio", step)
        space = None if self.space_id and is_offline(self.offline, HUB) else self.space_id
        config = {**self.about.config, "tags": self.tags, "run_dir": str(self.about.run_dir)}
        self.run = trackio.init(
            project=self.project,
            name=known.get("name") or self.about.name,
            group=self.about.group,
            space_id=space,
            config=config,
            resume="allow" if known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if known:
            found = SQLiteStorage.get_max_step_for_run(self.project, self.run.name)
            self.known_step = -1 if found is None else found
        remember(self.about.run_dir, "trackio", {"name": self.run.name, "project": self.project})

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Log them."""
        if step > self.known_step:
            self.run.log({**values, "time_s": time_s}, step=step)

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Log them as a table."""
        import trackio

        if answers and step > self.known_step:
            table = trackio.Table(columns=list(COLUMNS), data=[row(a) for a in answers])
            self.run.log({"val/answers": table}, step=step)

    def close(self, status: str) -> None:
        """End the Trackio run."""
        if self.run is not None:
            self.run.finish()


def trackio(
    about: About,
    project: str = "sftlab",
    space_id: str | None = None,
    tags: Sequence[str] = (),
    offline: bool | str = "auto",
) -> Tracker:
    """Return a tracker of Trackio."""
    check_offline("trackio", offline)
    return Trackio(about, project, space_id, tags, offline)
