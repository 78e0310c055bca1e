"""When a run ends: after its last step, when validation has stopped improving, or when its time is used up.

All three end a run in the same way: the step that is the last is evaluated and saved, and the run is finished. Losses
are the same on every rank, and so is what is decided from them; the clock is not, so the ranks agree on it. What was
decided before a checkpoint lies in that checkpoint: a resumed run ends where the undisturbed one does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sftlab.parallel.world import World


@dataclass(kw_only=True)
class Ending:
    """The last step of a run, and why it is the last.

    A score is a validation loss after step 0; only a lower one is better, so the first of equal ones stays the best.
    `patience` counts evaluations in a row without a better score. `max_hours` counts from the first step, over
    resumes. With `saves_best` every step with a better score is to be saved.
    """

    world: World
    last_step: int
    patience: int | None = None
    max_hours: float | None = None
    saves_best: bool = False
    why: str = field(init=False, default="")  # empty where the run ends after all its steps
    best: float = field(init=False, default=math.inf)
    best_step: int = field(init=False, default=0)
    misses: int = field(init=False, default=0)
    looked_s: float | None = field(init=False, default=None)
    longest_step_s: float = field(init=False, default=0.0)
    evaluation_s: float = field(init=False, default=0.0)

    def reached(self, step: int) -> bool:
        """Return whether nothing comes after this step."""
        return step >= self.last_step

    def saves(self, step: int) -> bool:
        """Return whether this step must be saved because the model that is left behind may be its."""
        return self.saves_best and 0 < step == self.best_step

    def note_score(self, step: int, score: float, took_s: float) -> None:
        """Note an evaluation, which took so long. It may make this step the last one."""
        self.evaluation_s = max(self.evaluation_s, took_s)
        self.looked_s = None  # the time until the next look is not that of a step
        if step == 0:
            return
        if score < self.best:
            self.best, self.best_step, self.misses = score, step, 0
        else:
            self.misses += 1
        self._lose_patience(step)

    def look_at_clock(self, step: int, time_s: float, save_s: float) -> None:
        """Make this step the last if another, an evaluation and a save would end after `max_hours`. Collective then.

        What they take is the longest so far, or `save_s`; what has not happened yet counts as nothing.
        """
        if self.looked_s is not None:
            self.longest_step_s = max(self.longest_step_s, time_s - self.looked_s)
        self.looked_s = time_s
        if self.max_hours is None or self.reached(step):
            return
        if self.world.any(time_s + self.longest_step_s + self.evaluation_s + save_s > 3600 * self.max_hours):
            self._end(step, f"trainer.max_hours={self.max_hours:g} are used up")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "misses": self.misses,
            "max_hours": self.max_hours if "max_hours" in self.why else None,  # those that ended the run here
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go back to where a checkpoint was. A run that had ended there has ended, unless it may go on for longer."""
        found = progress.get("ending") or {}
        best = found.get("best")
        self.best = math.inf if best is None else best
        self.best_step, self.misses = found.get("best_step", 0), found.get("misses", 0)
        self._lose_patience(progress["step"])
        spent = found.get("max_hours")
        if spent is not None and self.max_hours is not None and self.max_hours <= spent:
            self._end(progress["step"], f"trainer.max_hours={self.max_hours:g} are used up")

    def _lose_patience(self, step: int) -> None:
        if self.patience is not None and self.misses >= self.patience and not self.reached(step):
            best = f"{self.best:.4f} of step {self.best_step}" if self.best_step else "infinity"
            self._end(
                step, f"trainer.patience={self.patience}: {self.misses} evaluations brought no val/loss below {best}"
            )

    def _end(self, step: int, why: str) -> None:
        self.last_step, self.why = step, why
