"""Weights & Biases: a run of a project, in the group of its sweep. Without network or login it is written to files.

Its files lie in `<run>/wandb`; `wandb sync` uploads what was written offline. A resumed run goes on in the
same W&B run. W&B keeps what it has: steps that are done again after a resume are not recorded twice.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from sftlab.common.files import make_folder
from sftlab.common.tracker import About, Answer, Tracker
from sftlab.trackers.service import COLUMNS, all_tags, check_offline, is_offline, recall, remember, row


class WandB(Tracker):
    """A run of Weights & Biases. It begins with `cut`, which says whether the run is new."""

    def __init__(
        self, about: About, project: str, entity: str | None, tags: Sequence[str], offline: bool | str
    ) -> None:
        self.about = about
        self.project = project
        self.entity = entity
        self.tags = all_tags(about, tags)
        self.offline = offline
        self.first = 0  # steps before this one are recorded
        self.run: Any = None

    def cut(self, step: int) -> None:
        """Begin, or resume, the W&B run."""
        import wandb

        settings = wandb.setup().settings
        offline = is_offline("auto" if self.offline is True else self.offline, settings.base_url)
        offline = self.offline is True or offline or not logged_in()
        known = recall(self.about.run_dir, "wandb", step)
        mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
        make_folder(self.about.run_dir, "wandb")
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            id=known.get("id") or uuid4().hex[:8],
            name=self.about.name,
            group=self.about.group,
            tags=self.tags,
            config=dict(self.about.config),
            dir=str(self.about.run_dir),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self.first = self.run.starting_step if known and mode == "online" else 0
        remember(self.about.run_dir, "wandb", {"id": self.run.id, "project": self.project})
        where = self.run.url if mode == "online" else f"offline; upload it with wandb sync {self.run.settings.sync_dir}"
        self.about.say(f"tracker wandb: {where}")

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Log them."""
        if step >= self.first:
            self.run.log({**values, "time_s": time_s}, step=step)

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Log them as a table."""
        import wandb

        if answers and step >= self.first:
            table = wandb.Table(columns=list(COLUMNS), data=[row(a) for a in answers])
            self.run.log({"val/answers": table}, step=step)

    def close(self, status: str) -> None:
        """End the W&B run; it counts as failed where this one failed."""
        if self.run is None:  # the run ended before it began
            return
        self.run.summary["status"] = status
        self.run.finish(exit_code=1 if status == "failed" else 0)


def logged_in() -> bool:
    """Return whether this machine has an API key of Weights & Biases."""
    import wandb

    return bool(wandb.api.api_key)


def weights_and_biases(
    about: About,
    project: str = "sftlab",
    entity: str | None = None,
    tags: Sequence[str] = (),
    offline: bool | str = "auto",
) -> Tracker:
    """Return a tracker of Weights & Biases."""
    check_offline("wandb", offline)
    return WandB(about, project, entity, tags, offline)
