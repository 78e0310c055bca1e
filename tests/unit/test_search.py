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
from sftlab.sweeps.record import Sweep  # noqa: E402
from sftlab.sweeps.search import Search, Settings  # noqa: E402
from tests.support import REPO, command  # noqa: E402

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
                out.write(json.dumps({"step": step, "time_s": step, "val/loss": loss}) + "\n")
        if done + self.rate >= STEPS:
            last = json.loads(file.read_text().splitlines()[-1])
            self._summary(num, {"status": "finished", "last": last, "best": last, "steps": STEPS})
        return True

    def interrupted(self) -> str:
        return "left"

    def _summary(self, num: int, summary: dict[str, Any]) -> None:
        (self.folder / str(num) / "summary.json").write_text(json.dumps(summary))


def make_search(folder: Path, num_trials: int, trials: Any = None, space: str = SPACE, **changed: Any) -> Search:
    folder.mkdir(exist_ok=True)
    if not (folder / "sweep.json").exists():
        Sweep(folder, str(folder), ["x"], {}).write()

    def make_point(num: int, chosen: Sequence[str]) -> None:
        config = {"optim": {o.split("=")[0]: o.split("=")[1] for o in chosen}}
        Sweep.read(folder).with_points([(num, list(chosen), config)]).write()

    default = {"parallel_trials": 3, "metric": "val/loss", "seed": 0, "startup_trials": 4, "pruner": "hyperband"}
    default |= {"min_steps": None, "reduction_factor": 3, "eval_every": 1, "max_steps": STEPS}
    settings = Settings(num_trials=num_trials, **(default | changed))
    return Search(
        folder, split([space])[1], settings, trials or PretendTrials(folder), make_point, say=lambda text: None
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftlab.sweeps.search.POLL_S", 0.001)


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
from tests.unit import test_search
folder = Path(sys.argv[1])
search = test_search.make_search(folder, 12, test_search.PretendTrials(folder, rate=1))
search.say = lambda text: print(text, flush=True)
search.run()
"""


def test_a_killed_driver_is_followed_by_another(tmp_path: Path) -> None:
    """kill -9 at six verdicts of 12; the next driver keeps them all and judges every trial exactly once."""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    driver = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
    assert driver.stdout
    verdicts = 0
    while verdicts < 6:
        line = driver.stdout.readline()
        assert line, "the driver ended before it could be killed"
        verdicts += " finished " in line or " pruned " in line
    driver.kill()
    driver.wait()
    driver.stdout.close()
    before = {t.number: (t.params, t.state, t.value) for t in optuna.load_study(
        study_name="sftlab",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.jsonl"))
        ),
    ).trials}  # fmt: skip
    judged = {num for num, (_, state, _) in before.items() if state.is_finished()}
    assert 6 <= len(judged) < 12
    search = make_search(tmp_path, 12)
    search.run()
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


def test_search_over_local_processes(tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]) -> None:
    """The command: two trials at once, each a process; `sftlab.sweep` ranks what came of it."""
    train, val = squad_files
    arguments = [f"model.name_or_path={model_folder}", "data=squad", f"data.path={train}", f"data.val_path={val}"]
    arguments += ["trainer.max_steps=4", "trainer.eval_every=2", "evaluation.num_answers=0", "tracker=none"]
    arguments += ["sweeper=optuna", "sweeper.num_trials=2", "sweeper.parallel_trials=2", "hydra.sweep.dir=sweeps/s"]
    made = command("train", *arguments, SPACE, "trainer.batch_size=4,8", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "trial 1  started" in made.stdout and "best: trial" in made.stdout
    shown = command("sweep", "dir=sweeps/s", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "ranked by last val/loss" in shown.stdout and (tmp_path / "sweeps/s/report.html").exists()
