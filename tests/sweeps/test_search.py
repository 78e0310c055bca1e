"""sweeper=optuna: the space, pruning, failures, and a driver that is killed and comes back."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

optuna = pytest.importorskip("optuna", reason="the extra sftlab[optuna] is not installed: the search is not tested")

from sftlab.sweeps.trials import LocalTrials, birth  # noqa: E402

from hydra_plugins.sftlab_optuna._search import split  # noqa: E402
from sftlab import points  # noqa: E402
from sftlab import sweep as sweeping  # noqa: E402
from sftlab import train as training  # noqa: E402
from sftlab.sweeps import search as searching  # noqa: E402
from sftlab.sweeps.record import Sweep  # noqa: E402
from sftlab.sweeps.search import Search, Settings  # noqa: E402
from tests.support import REPO  # noqa: E402

SPACE = "optim.lr=tag(log,interval(1e-5,1e-1))"
STEPS = 9


class PretendTrials:
    """Trials that are no processes: each look makes two steps. The nearer optim.lr is to 1e-3 the lower the loss."""

    late_s = 0.0

    def __init__(self, folder: Path, failing: Sequence[int] = (), rate: int = 2) -> None:
        self.folder, self.failing, self.rate = folder, failing, rate
        self.started: list[int] = []
        self.stopped: list[int] = []

    def start(self, num: int) -> None:
        self.started.append(num)
        (self.folder / str(num) / "started").touch()

    def stop(self, num: int) -> None:
        self.stopped.append(num)
        self._summary(num, {"status": "stopped"})

    def alive(self, num: int) -> bool:
        run_dir = self.folder / str(num)
        if not (run_dir / "started").exists() or (run_dir / "summary.json").exists():
            return False
        if num in self.failing:
            self._summary(num, {"status": "failed", "error": "ValueError: pretended"})
            return False
        lr = float(dict(o.split("=") for o in yaml.safe_load((run_dir / "overrides.yaml").read_text()))["optim.lr"])
        file = run_dir / "metrics.jsonl"
        done = len(file.read_text().splitlines()) if file.exists() else 0
        with file.open("a") as out:
            for step in range(done + 1, min(done + self.rate, STEPS) + 1):
                loss = abs(math.log10(lr) + 3) + 1 / step
                line = {"step": step, "time_s": step, "val/loss": loss, "val/f1": 1 / (1 + loss)}
                out.write(json.dumps(line) + "\n")
        if done + self.rate >= STEPS:
            last = json.loads(file.read_text().splitlines()[-1])
            self._summary(num, {"status": "finished", "last": last, "best": last, "steps": STEPS})
        return True

    def interrupted(self) -> str:
        return "left"

    def _summary(self, num: int, summary: dict[str, Any]) -> None:
        (self.folder / str(num) / "summary.json").write_text(json.dumps(summary))


def make_search(
    folder: Path, num_trials: int, trials: Any = None, space: str = SPACE, say: Any = lambda text: None, **changed: Any
) -> Search:
    folder.mkdir(exist_ok=True)
    if not (folder / "sweep.json").exists():
        Sweep(folder, str(folder), ["x"], {}).write()

    def make_point(num: int, chosen: Sequence[str]) -> None:
        config = {"optim": {o.split("=")[0]: o.split("=")[1] for o in chosen}}
        Sweep.read(folder).with_points([(num, list(chosen), config)]).write()

    default = {"parallel_trials": 3, "metric": "val/loss", "seed": 0, "startup_trials": 4, "pruner": "hyperband"}
    default |= {"min_steps": None, "reduction_factor": 3, "eval_every": 1, "max_steps": STEPS}
    settings = Settings(num_trials=num_trials, **(default | changed))
    return Search(folder, split([space])[1], settings, trials or PretendTrials(folder), make_point, say=say)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "POLL_S", 0.001)


def test_space_is_hydras_grammar() -> None:
    fixed, space = split(
        ["model=demo", "optim.lr=tag(log,interval(1e-5,1e-3))", "a=int(interval(1,8))", "b=range(0,10,4)", "c=x,'y z'"]
    )
    assert fixed == ["model=demo"]
    made = optuna.distributions
    assert space == {
        "optim.lr": made.FloatDistribution(1e-5, 1e-3, log=True),
        "a": made.IntDistribution(1, 8),
        "b": made.IntDistribution(0, 8, step=4),
        "c": made.CategoricalDistribution(["x", "'y z'"]),
    }
    with pytest.raises(ValueError, match="nothing to search"):
        split(["optim.lr=1"])


def test_search_finds_prunes_and_tells_the_sweep(tmp_path: Path) -> None:
    trials = PretendTrials(tmp_path, rate=1)
    search = make_search(tmp_path, 30, trials)
    best = search.run()
    states = [t.state.name for t in search.study.trials]
    assert len(states) == 30 and states.count("PRUNED") > 3 and states.count("COMPLETE") > 3
    assert abs(float(search.study.best_params["optim.lr"]) - 1e-3) < 1e-3 and best == search.study.best_value
    found = points.read(tmp_path, points.read_record(tmp_path))
    assert [p.state for p in found.points].count("pruned") == states.count("PRUNED") == len(trials.stopped)
    for trial, point in zip(search.study.trials, found.points, strict=True):
        assert float(point.settings["optim.lr"]) == trial.params["optim.lr"]  # in full precision
        if trial.state.name == "COMPLETE":
            assert trial.value == point.last["val/loss"] and point.step == STEPS


def test_hyperband_spends_less_than_full_runs(tmp_path: Path) -> None:
    def spent(name: str, **changed: Any) -> int:
        make_search(tmp_path / name, 20, PretendTrials(tmp_path / name, rate=1), **changed).run()
        return sum(len(f.read_text().splitlines()) for f in (tmp_path / name).glob("*/metrics.jsonl"))

    (tmp_path / "all").mkdir()
    (tmp_path / "some").mkdir()
    assert spent("all", pruner=None) == 20 * STEPS > 1.2 * spent("some")


def test_failed_trials_are_left_behind(tmp_path: Path) -> None:
    search = make_search(tmp_path, 8, PretendTrials(tmp_path, failing=[1, 4]))
    search.run()
    assert [t.number for t in search.study.trials if t.state.name == "FAIL"] == [1, 4]
    with pytest.raises(ValueError, match="last 5 trials all failed; the last: ValueError: pretended"):
        make_search(tmp_path / "b", 8, PretendTrials(tmp_path / "b", failing=range(8))).run()


def test_pruning_needs_evaluations() -> None:
    with pytest.raises(ValueError, match=r"trainer\.eval_every=0"):
        Settings(
            num_trials=1, parallel_trials=1, metric="val/loss", seed=0, startup_trials=1, pruner="hyperband",
            min_steps=None, reduction_factor=3, eval_every=0, max_steps=9,
        )  # fmt: skip


KILLED = """
import sys
from pathlib import Path
from tests.sweeps import test_search
folder = Path(sys.argv[1])
verdicts = 0
def say(text):
    global verdicts
    verdicts += " finished " in text or " pruned " in text
    if verdicts == 6:  # waits to be killed here: within a write, Optuna's lock would keep the next driver for 30 s
        print("six", flush=True)
        sys.stdin.read()
search = test_search.make_search(folder, 12, test_search.PretendTrials(folder, rate=1))
search.say = say
search.run()
"""


def test_a_killed_driver_is_followed_by_another(tmp_path: Path) -> None:
    """kill -9 at six verdicts of 12; the next driver keeps them all and judges every trial exactly once."""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], **pipes) as driver:
        assert driver.stdout
        assert driver.stdout.readline() == "six\n", "the driver ended before it could be killed"
        driver.kill()
    before = {t.number: (t.params, t.state, t.value) for t in optuna.load_study(
        study_name="sftlab",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.jsonl"))
        ),
    ).trials}  # fmt: skip
    judged = {num for num, (_, state, _) in before.items() if state.is_finished()}
    assert len(judged) == 6
    said: list[str] = []
    search = make_search(tmp_path, 12, say=said.append)
    search.run()
    assert said[0] == f"continuing with {len(before)} trials, {len(before) - 6} of them without a verdict"
    after = {t.number: (t.params, t.state, t.value) for t in search.study.trials}
    assert len(after) == 12 and all(state.is_finished() for _, state, _ in after.values())
    assert all(after[num] == before[num] for num in judged)
    assert all(after[num][0] == before[num][0] for num in before)  # what was proposed was run
    drawn = [params["optim.lr"] for params, _, _ in after.values()]
    assert len(set(drawn)) == 12  # a sampler that began again would propose the same once more


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    class Nested(PretendTrials):
        def start(self, num: int) -> None:
            with pytest.raises(ValueError, match="another process drives"):
                make_search(self.folder, 4).run()
            super().start(num)

    make_search(tmp_path, 2, Nested(tmp_path)).run()


@pytest.mark.parametrize(("metric", "best_of"), [("val/f1", max), ("val/loss", min)])
def test_a_search_goes_in_its_metrics_direction(tmp_path: Path, metric: str, best_of: Any) -> None:
    said: list[str] = []
    search = make_search(tmp_path, 12, metric=metric, say=said.append)
    best = search.run()
    complete = [t for t in search.study.trials if t.state.name == "COMPLETE"]
    values = [t.value for t in complete]
    assert best == best_of(values) and len(set(values)) > 2
    winner = next(t for t in complete if t.value == best)
    assert f"best: trial {winner.number}, {metric} {best:.5g}  optim.lr={winner.params['optim.lr']!r}" in said
    # Those that were stopped on their way were behind the best at that step.
    at = {t.number: t.intermediate_values for t in search.study.trials}
    pruned = [t.number for t in search.study.trials if t.state.name == "PRUNED"]
    assert pruned
    for num in pruned:
        step = max(at[num])
        rivals = [at[t.number][step] for t in complete if step in at[t.number]]
        assert best_of(at[num][step], *rivals) != at[num][step]


def test_perplexity_is_minimised(tmp_path: Path) -> None:
    directions = {
        m: make_search(tmp_path / m[4:], 1, metric=m).study.direction.name for m in ("val/perplexity", "val/em")
    }
    assert directions == {"val/perplexity": "MINIMIZE", "val/em": "MAXIMIZE"}


def proposals(folder: Path, num: int = 6, **changed: Any) -> list[float]:
    search = make_search(folder, num, pruner=None, parallel_trials=1, **changed)
    search.run()
    return [t.params["optim.lr"] for t in search.study.trials]


def test_proposals_follow_the_seed_and_learn_after_the_first_few(tmp_path: Path) -> None:
    random = proposals(tmp_path / "a", seed=1, startup_trials=100)
    assert proposals(tmp_path / "b", seed=1, startup_trials=100) == random
    assert proposals(tmp_path / "c", seed=2, startup_trials=100)[0] != random[0]
    learning = proposals(tmp_path / "d", seed=1, startup_trials=3)
    assert learning[:3] == random[:3] and learning[3] != random[3]


class Counted(PretendTrials):
    """Counts how many trials are under way at once."""

    most = 0

    def start(self, num: int) -> None:
        super().start(num)
        begun = [n for n in self.started if not (self.folder / str(n) / "summary.json").exists()]
        self.most = max(self.most, len(begun))


@pytest.mark.parametrize("parallel", [1, 4])
def test_as_many_trials_run_at_once_as_told(tmp_path: Path, parallel: int) -> None:
    trials = Counted(tmp_path)
    make_search(tmp_path, 9, trials, parallel_trials=parallel, pruner=None).run()
    assert trials.most == parallel and trials.started == list(range(9))


def test_a_trial_is_not_stopped_before_its_first_rung_nor_at_its_end(tmp_path: Path) -> None:
    def stopped_at(name: str, **changed: Any) -> list[int]:
        search = make_search(tmp_path / name, 30, PretendTrials(tmp_path / name, rate=1), **changed)
        search.run()
        return sorted(t.last_step or 0 for t in search.study.trials if t.state.name == "PRUNED")

    for name in ("early", "late", "none"):
        (tmp_path / name).mkdir()
    early, late = stopped_at("early"), stopped_at("late", min_steps=4)
    assert early[0] < 4 <= late[0] and late[-1] < STEPS
    assert stopped_at("none", pruner=None) == []


def leave(folder: Path, params: Any, *, pruned: bool = False, files: bool = True, status: str = "") -> Any:
    """Leave a trial without a verdict, as a killed driver does: proposed, with or without its directory."""
    search = make_search(folder, 20)
    trial = search.study.ask(search.space if params else {})
    if pruned:
        trial.set_user_attr("pruned", True)
    if files:
        search.make_point(trial.number, search.overrides(trial.params))
    if status:
        (folder / str(trial.number) / "summary.json").write_text(json.dumps(finished(2.5) | {"status": status}))
    return trial.number


def finished(value: float) -> dict[str, Any]:
    return {"status": "finished", "last": {"step": STEPS, "val/loss": value}}


def test_the_next_driver_starts_again_only_what_died(tmp_path: Path) -> None:
    torn = leave(tmp_path, None, files=False)
    lost = leave(tmp_path, SPACE, files=False)
    died = leave(tmp_path, SPACE)
    failed = leave(tmp_path, SPACE, status="failed")
    done = leave(tmp_path, SPACE, status="finished")
    pruned = leave(tmp_path, SPACE, pruned=True)
    runs = leave(tmp_path, SPACE)
    (tmp_path / str(runs) / "started").touch()
    (tmp_path / str(pruned) / "metrics.jsonl").write_text(json.dumps({"step": 1, "val/loss": 9.0}) + "\n")
    (tmp_path / str(pruned) / "summary.json").write_text('{"status": "stopped"}')
    trials = PretendTrials(tmp_path)
    said: list[str] = []
    search = make_search(tmp_path, 7, trials, say=said.append, pruner=None)
    search.run()
    assert trials.started == [lost, died]
    assert said[:3] == [
        "continuing with 7 trials, 7 of them without a verdict",
        f"trial {lost}  started again",
        f"trial {died}  started again",
    ]
    states = {t.number: t.state.name for t in search.study.trials}
    assert states == {
        torn: "FAIL", lost: "COMPLETE", died: "COMPLETE", failed: "FAIL", done: "COMPLETE", pruned: "PRUNED",
        runs: "COMPLETE",
    }  # fmt: skip
    assert search.study.trials[done].value == 2.5
    record = {p["num"]: p for p in Sweep.read(tmp_path).points}
    assert {num for num, p in record.items() if p.get("pruned")} == {pruned}
    assert record[lost]["overrides"] == [f"optim.lr={search.study.trials[lost].params['optim.lr']!r}"]
    assert said[-3].startswith("4 complete, 2 fail, 1 pruned")


def test_no_more_trials_are_proposed_than_asked_for_those_of_before_included(tmp_path: Path) -> None:
    make_search(tmp_path, 3).run()
    trials = PretendTrials(tmp_path)
    search = make_search(tmp_path, 5, trials)
    search.run()
    assert trials.started == [3, 4] and len(search.study.trials) == 5


def test_a_trial_that_cannot_be_made_or_started_ends_the_search_and_is_marked(tmp_path: Path) -> None:
    class Broken(PretendTrials):
        def start(self, num: int) -> None:
            raise OSError("no process for you")

    search = make_search(tmp_path, 3, Broken(tmp_path))
    with pytest.raises(OSError, match="no process"):
        search.run()
    assert [t.state.name for t in search.study.trials] == ["FAIL"]


def test_failures_in_a_row_are_counted_from_the_last_success(tmp_path: Path) -> None:
    said: list[str] = []
    failing = [0, 1, 2, 3, 5, 6, 7, 8]
    trials = PretendTrials(tmp_path, failing=failing)
    search = make_search(tmp_path, 10, trials, parallel_trials=1, pruner=None, say=said.append)
    search.run()
    assert [t.number for t in search.study.trials if t.state.name == "COMPLETE"] == [4, 9]
    assert "trial 0  failed  ValueError: pretended" in said
    assert [s for s in said if s.startswith("trial 4  finished")] == [
        f"trial 4  finished  val/loss {search.study.trials[4].value:.5g}"
    ]


def test_a_trial_without_the_metric_has_failed_and_a_search_without_any_score_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=f"no trial finished; see\n  python -m sftlab.sweep dir={tmp_path}"):
        make_search(tmp_path, 2, metric="val/em", pruner=None, say=said.append).run()
    assert f"trial 0  failed  it left no val/em; see {tmp_path / '0'}" in said


def test_a_summary_that_shows_late_is_waited_for(tmp_path: Path) -> None:
    class Late(PretendTrials):
        late_s = 60.0
        looks = 0

        def alive(self, num: int) -> bool:
            self.looks += 1
            if self.looks == 4:
                self._summary(num, finished(1.5))
            return False

    search = make_search(tmp_path, 1, Late(tmp_path), pruner=None)
    assert search.run() == 1.5


def test_a_trial_is_stopped_once_and_keeps_its_verdict(tmp_path: Path) -> None:
    """A trial that takes some looks to stop is asked once; and at its last step none is stopped any more."""

    class Slow(PretendTrials):
        def stop(self, num: int) -> None:
            self.stopped.append(num)  # and it goes on for a while

    trials = Slow(tmp_path, rate=1)
    search = make_search(tmp_path, 20, trials)
    search.run()
    assert trials.stopped and len(set(trials.stopped)) == len(trials.stopped)
    # it finished before it heard of it, so its score counts
    assert {t.state.name for t in search.study.trials if t.number in trials.stopped} == {"COMPLETE"}
    assert all(t.user_attrs.get("pruned", False) == (t.number in trials.stopped) for t in search.study.trials)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    class Interrupted(PretendTrials):
        def alive(self, num: int) -> bool:
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        make_search(tmp_path, 2, Interrupted(tmp_path), say=said.append).run()
    assert said[-1] == f"left; continue with the same command and\n  hydra.sweep.dir={tmp_path}"


def test_local_trials_are_found_again_and_stopped(tmp_path: Path) -> None:
    """Processes that a killed driver left behind are known by id and birth, so that none is started twice."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file = tmp_path / ".submitit" / "local_3" / "processes.json"
        file.parent.mkdir(parents=True)
        note = {"host": os.uname().nodename, "processes": [[sleeper.pid, birth(sleeper.pid)]]}
        file.write_text(json.dumps(note))
        trials = LocalTrials(tmp_path, None, tmp_path)  # type: ignore[arg-type]
        assert trials.alive(3) and not trials.alive(4)
        file.write_text(json.dumps({**note, "processes": [[sleeper.pid, "1"]]}))  # another process of the same id
        assert not trials.alive(3)
        file.write_text(json.dumps(note))
        trials.stop(3)
        assert sleeper.wait(10) == -signal.SIGTERM
        deadline_s = time.monotonic() + 10
        while trials.alive(3) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not trials.alive(3)
    finally:
        sleeper.kill()


def test_search_over_local_processes(
    tmp_path: Path,
    model_folder: Path,
    squad_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command: two trials at once, each a process; `sftlab.sweep` ranks what came of it."""

    def typed(main: Any, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sftlab", *arguments])
        main()
        return capfd.readouterr().out

    monkeypatch.chdir(tmp_path)
    train, val = squad_files
    arguments = [f"model.name_or_path={model_folder}", "data=squad", f"data.path={train}", f"data.val_path={val}"]
    arguments += ["trainer.max_steps=4", "trainer.eval_every=2", "evaluation.num_answers=0", "tracker=none"]
    arguments += ["sweeper=optuna", "sweeper.num_trials=2", "sweeper.parallel_trials=2", "hydra.sweep.dir=sweeps/s"]
    out = typed(training.main, *arguments, SPACE, "trainer.batch_size=4,8")
    assert "trial 1  started" in out and "best: trial" in out
    assert "ranked by last val/loss" in typed(sweeping.main, "dir=sweeps/s")
    assert (tmp_path / "sweeps/s/report.html").exists()
