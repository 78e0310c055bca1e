"""From the command line to a search, in this process: each key of conf/sweeper/optuna.yaml, and what each does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

optuna = pytest.importorskip("optuna", reason="the extra sftlab[optuna] is not installed: the search is not tested")

from hydra_plugins.sftlab_optuna._search import ends, split  # noqa: E402
from sftlab import train as training  # noqa: E402
from sftlab.config.groups import CONF  # noqa: E402
from sftlab.launchers.local import Local  # noqa: E402
from sftlab.launchers.slurm import Slurm  # noqa: E402
from sftlab.sweeps import search as searching  # noqa: E402
from sftlab.sweeps.record import Sweep  # noqa: E402
from sftlab.sweeps.search import Search, Settings  # noqa: E402
from tests.pretend import Clients, without_slurm_variables  # noqa: E402

LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
Command = Callable[..., Search]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Type a search in this process; return it as it was about to run."""
    made: list[Search] = []

    def run(self: Search) -> float:
        made.append(self)
        return 0.5

    monkeypatch.setattr(Search, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")

    def type_(*arguments: str) -> Search:
        monkeypatch.setattr(sys, "argv", ["sftlab-train", "sweeper=optuna", "hydra.sweep.dir=s", *arguments])
        training.main()
        return made.pop()

    return type_


GIVEN = {
    "num_trials": 7, "parallel_trials": 3, "metric": "val/f1", "seed": 11, "startup_trials": 2, "pruner": None,
    "min_steps": 4, "reduction_factor": 5,
}  # fmt: skip


def test_every_key_of_the_sweeper_reaches_the_search(command: Command) -> None:
    defaults = yaml.safe_load((CONF / "sweeper/optuna.yaml").read_text())["sweeper"]
    assert set(GIVEN) == set(defaults) and all(GIVEN[key] != defaults[key] for key in GIVEN)
    typed = [f"sweeper.{key}={'null' if value is None else value}" for key, value in GIVEN.items()]
    found = command(LR, *typed, "trainer.eval_every=6", "trainer.max_steps=30")
    assert found.settings == Settings(**GIVEN, eval_every=6, max_steps=30)  # type: ignore[arg-type]
    default = command(LR, "trainer.eval_every=6", "hydra.sweep.dir=t").settings
    assert {key: getattr(default, key) for key in defaults} == defaults


def test_a_trial_is_its_proposal_and_what_was_fixed(command: Command, tmp_path: Path) -> None:
    found = command(LR, "trainer.batch_size=4,8", "seed=3", "name=tuned", "trainer.eval_every=1")
    assert set(found.space) == {"optim.lr", "trainer.batch_size"} and found.folder == Path("s")
    found.write_point(2, ["optim.lr=0.001", "trainer.batch_size=8"])
    record = Sweep.read(tmp_path / "s")
    (entry,) = record.entries
    assert entry["num"] == 2
    fixed = ["sweeper=optuna", "seed=3", "name=tuned", "trainer.eval_every=1"]
    assert entry["overrides"] == [*fixed, "optim.lr=0.001", "trainer.batch_size=8"]
    config = record.config(2)
    assert (config["optim"]["lr"], config["trainer"]["batch_size"], config["seed"]) == (0.001, 8, 3)
    assert (config["run_dir"], record.name, record.cwd) == ("s/2", "tuned", str(tmp_path))
    written = (tmp_path / "s" / "sweep.json").read_text()
    command(LR, "trainer.batch_size=4,8", "seed=3", "name=other", "trainer.eval_every=1")
    assert (tmp_path / "s" / "sweep.json").read_text() == written  # the search goes on in its own record


def test_trials_run_here_by_the_local_launcher_as_many_at_once_as_told(command: Command, tmp_path: Path) -> None:
    found = command(LR, "sweeper.parallel_trials=3", "trainer.eval_every=1")
    assert isinstance(found.launcher, Local)
    assert (found.launcher.processes_per_node, found.launcher.parallel_points) == (1, 3)
    assert (found.code, found.folder) == (tmp_path / "s" / "code", Path("s"))
    assert (tmp_path / "s" / "code" / "sftlab" / "train.py").is_file()
    found = command(LR, "launcher=local", "launcher.processes_per_node=2", "trainer.eval_every=1", "hydra.sweep.dir=t")
    assert isinstance(found.launcher, Local)
    assert (found.launcher.processes_per_node, found.launcher.parallel_points) == (2, 1)


def test_trials_are_jobs_by_the_slurm_launchers_options(command: Command, tmp_path: Path) -> None:
    found = command(LR, "launcher=slurm", "launcher.partition=night", "trainer.eval_every=1")
    assert isinstance(found.launcher, Slurm) and found.launcher.partition == "night"
    options = dict(Sweep.read(tmp_path / "s").launcher)
    assert options.pop("_target_") == "sftlab.launchers.slurm.Slurm"
    assert options == {name: getattr(found.launcher, name) for name in options} and options["partition"] == "night"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("launcher=local", "launcher.dry_run=true", LR), "a search chooses its points while it runs"),
        (("optim.lr=1",), "sweeper=optuna has nothing to search"),
        ((LR, "optim.betas=glob(*)"), "sweeper=optuna takes interval(), range(), choice() or values with commas"),
        ((LR, "sweeper.num_trials=0"), "sweeper.num_trials=0: expected a whole number of at least 1"),
        ((LR, "sweeper.parallel_trials=0"), "sweeper.parallel_trials=0: expected a whole number of at least 1"),
        ((LR, "sweeper.startup_trials=0"), "sweeper.startup_trials=0: expected a whole number of at least 1"),
        ((LR, "sweeper.reduction_factor=1"), "sweeper.reduction_factor=1: expected a whole number of at least 2"),
        ((LR, "sweeper.pruner=median"), "sweeper.pruner=median: expected hyperband, or null"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    command: Command, capfd: pytest.CaptureFixture[str], typed: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*typed, "trainer.eval_every=1")
    assert stop.value.code == 1 and says in capfd.readouterr().err


def test_the_spaces_of_hydras_grammar_keep_their_kind() -> None:
    _, space = split(
        [
            "a=interval(0.5,2)",
            "b=tag(log,int(interval(1,64)))",
            "c=range(10,0,-3)",
            "d=range(0,1,0.25)",
            "e=choice(x,1)",
        ]
    )
    made = optuna.distributions
    assert space == {
        "a": made.FloatDistribution(0.5, 2.0),
        "b": made.IntDistribution(1, 64, log=True),
        "c": made.IntDistribution(1, 10, step=3),
        "d": made.CategoricalDistribution(["0.0", "0.25", "0.5", "0.75"]),
        "e": made.CategoricalDistribution(["x", "1"]),
    }
    assert [ends(s)[0] for s in space.values()] == [0.5, 1, 1, "0.0", "x"]


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "num_trials": 1, "parallel_trials": 1, "metric": "val/loss", "seed": 0, "startup_trials": 1,
        "pruner": "hyperband", "min_steps": None, "reduction_factor": 3, "eval_every": 7, "max_steps": 90,
    }  # fmt: skip
    return Settings(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (7, 90, 3)),
        ({"min_steps": 20, "reduction_factor": 4}, (20, 90, 4)),
        ({"max_steps": None}, (7, "auto", 3)),
        ({"metric": "train/loss", "eval_every": 0}, (1, 90, 3)),
    ],
)
def test_the_pruner_is_given_the_first_rung_the_last_and_the_factor(
    changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert vars(settings(**changes).make_pruner()) == vars(optuna.pruners.HyperbandPruner(*expected))
    assert isinstance(settings(**changes, pruner=None).make_pruner(), optuna.pruners.NopPruner)


def test_pruning_by_a_training_metric_needs_no_evaluations() -> None:
    settings(eval_every=0, metric="train/loss")
    settings(eval_every=0, pruner=None)
    with pytest.raises(ValueError, match=r"trainer\.eval_every=0"):
        settings(eval_every=0)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """A SLURM whose jobs have ended at once: f1 is the better the nearer optim.lr is to 1e-2, the loss to 1e-4."""
    for name in without_slurm_variables():
        monkeypatch.delenv(name)
    clients = Clients(tmp_path / "bin")
    for name in ("srun", "scancel", "sacct"):
        clients.answer(name)
    job = f"""#!{sys.executable} -S
import json, math, pathlib
folder = pathlib.Path("{tmp_path}/s")
points = json.loads((folder / "sweep.json").read_text())["points"]
queue = pathlib.Path("{tmp_path}/queue")
done = queue.read_text().count("|COMPLETED|") if queue.exists() else 0
(num,) = [p["num"] for p in points if p["job_id"] is None]
lr = math.log10(float(dict(o.split("=") for o in points[num]["overrides"])["optim.lr"]))
last = {{"step": 2, "time_s": 1.0, "val/f1": 1 / (1 + abs(lr + 2)), "val/loss": abs(lr + 4)}}
(folder / str(num) / "metrics.jsonl").write_text(json.dumps(last) + "\\n")
summary = {{"status": "finished", "steps": 2, "last": last, "best": last}}
(folder / str(num) / "summary.json").write_text(json.dumps(summary))
with queue.open("a") as out:
    out.write(f"{{80 + done}}|COMPLETED|1:00|None\\n")
print(f"Submitted batch job {{80 + done}}")
"""
    (clients.dir / "sbatch").write_text(job)
    (clients.dir / "sbatch").chmod(0o755)
    (clients.dir / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (clients.dir / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    monkeypatch.chdir(tmp_path)
    return clients


@pytest.mark.parametrize(("metric", "best_of"), [("val/f1", max), ("val/loss", min)])
def test_a_search_typed_at_the_command_line_ends_with_the_best_of_its_metric(
    tmp_path: Path,
    slurm: Clients,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    metric: str,
    best_of: Callable[..., float],
) -> None:
    monkeypatch.setattr(searching, "POLL_S", 0.001)
    typed = ["sweeper=optuna", "launcher=slurm", "hydra.sweep.dir=s", LR, "trainer.max_steps=2", "sweeper.num_trials=4"]
    typed += [f"sweeper.metric={metric}", "trainer.eval_every=2", "sweeper.parallel_trials=2"]
    monkeypatch.setattr(sys, "argv", ["sftlab-train", *typed])
    training.main()
    out = capfd.readouterr().out
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    scores = [json.loads((tmp_path / "s" / str(n) / "summary.json").read_text())["last"][metric] for n in range(4)]
    assert len(record["points"]) == 4 and len(set(scores)) == 4 and "4 complete" in out
    winner = scores.index(best_of(scores))
    chosen = record["points"][winner]["overrides"][-1]
    assert f"best: trial {winner}, {metric} {scores[winner]:.5g}  {chosen}" in out
    assert f"python -m sftlab.sweep dir=s metric={metric}" in out
    assert sum(f"trial {n}  started  optim.lr=" in out for n in range(4)) == 4
