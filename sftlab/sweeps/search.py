"""A search by Optuna's ask and tell: TPE proposes trials, Hyperband stops those that fall behind.

Everything it knows lies in the sweep's directory: Optuna's journal (optuna.jsonl) and the metrics.jsonl of the points.
So a driver may be killed at any moment: the next one adopts the trials that are left, finished or running.
Sources: TPE, https://papers.nips.cc/paper/4443; Hyperband, https://arxiv.org/abs/1603.06560; both as in Optuna 5.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from sftlab.common.files import open_plain, read_json
from sftlab.common.metrics import lower_is_better
from sftlab.common.values import Bounds, Count
from sftlab.common.words import plain
from sftlab.launchers.launcher import Launcher
from sftlab.sweeps.points import series
from sftlab.sweeps.record import Sweep

JOURNAL = "optuna.jsonl"
POLL_S = 0.5
MakePoint = Callable[[int, Sequence[str]], tuple[int, Sequence[str], Mapping[str, Any]]]
FAILED_IN_A_ROW = 5  # failed trials; after so many the fault is not theirs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `sweeper.` takes, and the two of `trainer.` that pruning depends on."""

    num_trials: Count
    parallel_trials: Count
    metric: str
    seed: int
    startup_trials: Count
    pruner: Literal["hyperband"] | None
    min_steps: Count | None
    reduction_factor: Annotated[int, Bounds(least=2)]
    eval_every: int
    max_steps: int | None

    def __post_init__(self) -> None:
        least = {"num_trials": 1, "parallel_trials": 1, "startup_trials": 1, "reduction_factor": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"sweeper.{name}={getattr(self, name)}: expected at least {low}")
        if self.pruner not in (None, "hyperband"):
            raise ValueError(f"sweeper.pruner={self.pruner}: expected hyperband or null")
        if self.pruner and not self.eval_every and self.metric.startswith("val/"):
            raise ValueError(
                f"sweeper.pruner=hyperband judges trials by {self.metric} while they run, but trainer.eval_every=0 "
                "measures it at the end only: set trainer.eval_every, or sweeper.pruner=null"
            )

    def make_pruner(self) -> optuna.pruners.BasePruner:
        """Return Optuna's pruner."""
        if not self.pruner:
            return optuna.pruners.NopPruner()
        first = self.min_steps or self.eval_every or 1
        return optuna.pruners.HyperbandPruner(first, self.max_steps or "auto", self.reduction_factor)


@dataclass
class Running:
    """A trial that waits or runs: the steps whose scores Optuna was told, and when we saw that it had ended."""

    trial: Trial
    reported: set[int] = field(default_factory=set)
    pruned: bool = False
    ended_s: float | None = None


class Search:
    """Propose, start, watch, prune and judge trials up to `num_trials`. `make_point` returns a trial as
    Sweep.with_points takes it, and `code` is the copy of the code that all trials run."""

    def __init__(
        self,
        sweep: Sweep,
        space: Mapping[str, BaseDistribution],
        settings: Settings,
        launcher: Launcher,
        code: Path,
        make_point: MakePoint,
        say: Callable[[str], None] = lambda text: print(plain(text), flush=True),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep = sweep
        self.folder = sweep.folder
        self.space = dict(space)
        self.settings = settings
        self.launcher = launcher
        self.code = code
        self.make_point = make_point
        self.say = say
        self.running: dict[int, Running] = {}
        self.failed_in_a_row = 0
        self.study = self.open()

    def open(self) -> optuna.Study:
        """Return the study in the sweep's directory, made if there is none.

        The state of the sampler is not stored, so the seed depends on the number of trials; else a restarted driver
        would draw the same proposals again.
        """
        open_plain(self.folder / JOURNAL, "a").close()  # Optuna would append through a link
        storage = JournalStorage(JournalFileBackend(str(self.folder / JOURNAL)))
        lower = lower_is_better(self.settings.metric)
        made = optuna.create_study(
            storage=storage,
            study_name="sftlab",
            direction=StudyDirection.MINIMIZE if lower else StudyDirection.MAXIMIZE,
            load_if_exists=True,
            pruner=self.settings.make_pruner(),
        )
        made.sampler = optuna.samplers.TPESampler(
            seed=self.settings.seed + len(made.trials), n_startup_trials=self.settings.startup_trials
        )
        return made

    def run(self) -> float:
        """Search to the end; return the best score. Raises: ValueError if no trial has one."""
        with only_driver(self.folder):
            try:
                self.adopt()
                while True:
                    while len(self.running) < self.settings.parallel_trials and self.num_left() > 0:
                        self.begin()
                    if not self.running:
                        break
                    time.sleep(POLL_S)
                    for num in list(self.running):
                        self.observe(num)
            except KeyboardInterrupt:
                self.say(
                    f"{self.launcher.interrupted()}; continue with the same command and\n"
                    f"  hydra.sweep.dir={self.folder}"
                )
                raise
        return self.result()

    def num_left(self) -> int:
        """Return how many trials are still to be proposed."""
        return self.settings.num_trials - len(self.study.get_trials(deepcopy=False))

    def adopt(self) -> None:
        """Adopt the trials that an earlier driver left without a verdict; start those again that died."""
        left = self.study.get_trials(states=(TrialState.RUNNING,))
        if self.study.trials:
            self.say(f"continuing with {len(self.study.trials)} trials, {len(left)} of them without a verdict")
        for frozen in left:
            trial = Trial(self.study, frozen._trial_id)
            if set(frozen.params) != set(self.space):  # the driver was killed between proposing and recording it
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            num, pruned = frozen.number, bool(frozen.user_attrs.get("pruned"))
            self.running[num] = Running(trial, set(frozen.intermediate_values), pruned)
            status = read_json(self.folder / str(num) / "summary.json").get("status")
            if not self.alive(num) and status not in ("finished", "failed") and not pruned:
                self.write_point(num, self.overrides(frozen.params))  # what runs is composed here, not what lay there
                self.say(f"trial {num}  started again")
                self.start(num)

    def write_point(self, num: int, chosen: Sequence[str]) -> None:
        """Write the directory of a trial and its entry in sweep.json."""
        self.sweep = self.sweep.with_points([self.make_point(num, chosen)])
        self.sweep.write()

    def start(self, num: int) -> None:
        """Start a trial whose directory is written, and record its job."""
        job_ids = self.launcher.start(self.sweep.to_run([num], self.code))
        self.sweep = self.sweep.with_jobs(self.sweep.launcher, job_ids)
        self.sweep.write()

    def alive(self, num: int) -> bool:
        """Return whether a trial waits or runs."""
        return self.launcher.alive(self.sweep.run_dir(num), self.sweep.job_id(num))

    def begin(self) -> None:
        """Propose a trial and start it."""
        trial = self.study.ask(self.space)
        chosen = self.overrides(trial.params)
        try:
            self.write_point(trial.number, chosen)
            self.start(trial.number)
        except Exception:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.running[trial.number] = Running(trial)
        self.say(f"trial {trial.number}  started  {' '.join(chosen)}")

    def observe(self, num: int) -> None:
        """Tell Optuna the new scores of a trial; stop the trial if it falls behind, judge it if it has ended."""
        live = self.running[num]
        alive = self.alive(num)  # ask before reading its files, or the last lines could be missed
        scores = [(s, v) for s, v in series(self.folder / str(num), self.settings.metric) if s > 0]
        for step, value in scores:
            if step not in live.reported:
                live.reported.add(step)
                live.trial.report(value, step)
        done = self.settings.max_steps is not None and scores and scores[-1][0] >= self.settings.max_steps
        if alive and scores and not done and not live.pruned and live.trial.should_prune():
            live.trial.set_user_attr("pruned", True)
            live.pruned = True
            self.launcher.stop(self.sweep.run_dir(num), self.sweep.job_id(num))
        if not alive:
            self.judge(num, live, scores)

    def judge(self, num: int, live: Running, scores: Sequence[tuple[int, float]]) -> None:
        """Tell Optuna how a trial ended, once its summary is there or can no longer come."""
        summary = read_json(self.folder / str(num) / "summary.json")
        live.ended_s = live.ended_s or time.monotonic()
        if not summary and time.monotonic() - live.ended_s < self.launcher.late_s:
            return
        del self.running[num]
        value = {**summary.get("last", {}), **summary.get("model", {})}.get(self.settings.metric)
        if summary.get("status") == "finished" and value is not None:
            self.study.tell(live.trial, value)
            self.failed_in_a_row = 0
            self.say(f"trial {num}  finished  {self.settings.metric} {value:.5g}")
        elif live.pruned:
            self.study.tell(live.trial, state=TrialState.PRUNED)
            self.sweep = self.sweep.with_pruned(num)
            self.sweep.write()
            self.say(f"trial {num}  pruned at step {scores[-1][0]}, {self.settings.metric} {scores[-1][1]:.5g}")
        else:
            self.study.tell(live.trial, state=TrialState.FAIL)
            self.failed_in_a_row += 1
            why = summary.get("error") or f"it left no {self.settings.metric}; see {self.folder / str(num)}"
            self.say(f"trial {num}  failed  {why}")
            if self.failed_in_a_row >= FAILED_IN_A_ROW:
                raise ValueError(f"the last {FAILED_IN_A_ROW} trials all failed; the last: {why}")

    def result(self) -> float:
        """Print the result, and return the best score."""
        done = self.study.get_trials(states=(TrialState.COMPLETE,))
        states = [t.state.name.lower() for t in self.study.trials]
        self.say(", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states))))
        if not done:
            raise ValueError(f"no trial finished; see\n  python -m sftlab.sweep dir={self.folder}")
        best = self.study.best_trial
        chosen = " ".join(self.overrides(best.params))
        self.say(f"best: trial {best.number}, {self.settings.metric} {best.value:.5g}  {chosen}")
        self.say(f"see\n  python -m sftlab.sweep dir={self.folder} metric={self.settings.metric}")
        return float(self.study.best_value)

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return a trial's values as Hydra's overrides, floats in full precision."""
        return [
            f"{name}={params[name]!r}" if isinstance(params[name], float) else f"{name}={params[name]}"
            for name in self.space
        ]


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Lock the search for this process. Raises: ValueError if another process on this machine drives it."""
    with open_plain(folder / ".search.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process drives the search in {folder}; see python -m sftlab.sweep dir={folder}"
            ) from None
        yield
