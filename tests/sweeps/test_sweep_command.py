"""The sweep command, in this process: each key of conf/sweep.yaml, with SLURM's clients pretended."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab import sweep as sweeping
from sftlab import train
from sftlab.config.grid import compose_point, planned
from sftlab.config.groups import CONF
from sftlab.sweeps import best_yaml, ranking, watch
from sftlab.sweeps.answer import choices
from sftlab.sweeps.best_yaml import Choice
from sftlab.sweeps.record import Sweep
from sftlab.training import run as runs
from tests.asymmetric import unequal_sweep, write_point
from tests.pretend import Clients, without_slurm_variables

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Show:
    """Run the sweep command in an empty folder, in this process; return what it printed."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sftlab-sweep", *arguments])
        sweeping.main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """SLURM's clients, which know of no job yet."""
    for name in without_slurm_variables():
        monkeypatch.delenv(name)
    clients = Clients(tmp_path / "bin")
    for name in ("squeue", "scancel", "sacct", "srun"):
        clients.answer(name)
    clients.answer("sbatch", "Submitted batch job 50\n")
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    return clients


def queue(**states: str) -> str:
    """Return squeue's answer for jobs 7_0, 7_1, ...: `j0="RUNNING"`."""
    return "".join(f"7_{name[1:]}|{state}|10:00|None\n" for name, state in states.items())


def slurm_options(**changes: Any) -> dict[str, Any]:
    defaults = yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"]
    return {**defaults, **changes}


def make_jobs(folder: Path, *statuses: str, **options: Any) -> Path:
    """Write a sweep of SLURM jobs 7_0, 7_1, ... whose points have these statuses."""
    for num, status in enumerate(statuses):
        lines = [{"step": 4, "time_s": 2.0, "train/loss": 1.0, "val/loss": 3.0 - num}]
        run_dir = write_point(folder, num, [f"optim.lr={num}"], lines, status)
        (run_dir / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": num}, "resume": "auto"}))
    made = [{"num": n, "overrides": [f"optim.lr={n}"], "job_id": f"7_{n}", "run_dir": str(n)} for n in range(num + 1)]
    Sweep(folder, str(folder), ["python"], slurm_options(**options), entries=made).write()
    return folder


def best(folder: Path) -> Any:
    return yaml.safe_load((folder / "best.yaml").read_text())


@pytest.mark.parametrize(
    ("typed", "title", "first", "chosen", "about"),
    [
        ((), "ranked by last val/loss", "0.1", {"optim": {"lr": 0.1}, "seed": 0}, "point 2, last val/loss 1.0."),
        (
            ("metric=val/f1",), "ranked by last val/f1", "0.01", {"optim": {"lr": 0.01}, "seed": 1},
            "point 3, last val/f1 0.9.",
        ),
        (
            ("score=best",), "ranked by best val/loss", "0.01", {"optim": {"lr": 0.01}, "seed": 0},
            "point 0, best val/loss 0.5.",
        ),
    ],
)  # fmt: skip
def test_metric_and_score_reach_the_table_the_report_and_best_yaml(
    show: Show, tmp_path: Path, typed: tuple[str, ...], title: str, first: str, chosen: dict[str, Any], about: str
) -> None:
    folder = unequal_sweep(tmp_path / "s")
    out = show(f"dir={folder}", *typed)
    metric, score = title.split()[3], title.split()[2]
    table = out[out.index(title) :].splitlines()
    assert table[2].split()[:2] == ["1", first]
    assert f"best {metric}" in out.splitlines()[1] and "1 failed, 6 finished, 1 running" in out
    groups = ranking.ranked(Sweep.read(folder).observed({}), metric, score)
    assert f"\n{ranking.verdict(groups)}\n" in out
    assert (
        "share of the variance of 6 scores" in out and "point 1  failed  lr=1 seed=1".replace("lr", "optim.lr") in out
    )
    assert best(folder) == chosen
    text = (folder / "best.yaml").read_text()
    assert about in text
    assert f'"metric":"{metric}","score":"{score}"' in (folder / "report.html").read_text()
    assert f"--config-dir {folder} experiment=best" in out and f"report: {folder}/report.html" in out


def test_best_yaml_says_the_mean_and_deviation_over_the_winners_seeds(show: Show, tmp_path: Path) -> None:
    folder = unequal_sweep(tmp_path / "s")
    show(f"dir={folder}")
    assert (
        "# The best of its seeds; over 3 of them the mean is 1.5, standard deviation 0.5."
        in (folder / "best.yaml").read_text()
    )
    alone = tmp_path / "alone"
    write_point(alone, 0, ["optim.lr=1"], [{"step": 10, "time_s": 1.0, "val/loss": 1.0}])
    show(f"dir={alone}")
    assert "seeds" not in (alone / "best.yaml").read_text()
    write_point(alone, 1, ["optim.lr=1", "seed=2"], [], "failed")
    show(f"dir={alone}")
    assert "over 1 of them the mean is 1.\n" in (alone / "best.yaml").read_text()


def test_without_report_nothing_is_written(show: Show, tmp_path: Path) -> None:
    folder = unequal_sweep(tmp_path / "s")
    before = sorted(folder.rglob("*"))
    assert "ranked by" in show(f"dir={folder}", "report=false")
    assert sorted(folder.rglob("*")) == before and list(Path().iterdir()) == []  # nor where it was typed


def test_before_any_point_has_finished_there_is_a_report_and_no_winner(show: Show, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_point(folder, 0, ["a=1"], [{"step": 1, "time_s": 1.0, "val/loss": 1.0}], "running")
    out = show(f"dir={folder}")
    assert "no point has finished yet: no ranking" in out and "ranked by" not in out
    assert (folder / "report.html").exists() and not (folder / "best.yaml").exists()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("metric=val/los", "metric=val/los: no point has it; did you mean val/loss?"),
        ("retry=all", "retry=all: expected failed, stopped or fresh, or nothing"),
        ("score=mean", "score=mean: expected last or best"),
        ("dir=nowhere", "dir=nowhere: no such folder"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    show: Show, capfd: pytest.CaptureFixture[str], tmp_path: Path, typed: str, says: str
) -> None:
    folder = unequal_sweep(tmp_path / "s")
    with pytest.raises(SystemExit) as stop:
        show(*([typed] if typed.startswith("dir=") else [f"dir={folder}", typed]))
    assert stop.value.code == 1 and says in capfd.readouterr().err


def test_the_plan_of_a_sweep_without_a_record_gives_every_points_overrides(tmp_path: Path) -> None:
    assert planned(tmp_path) == []
    task = {"hydra": {"overrides": {"task": ["a=1,2", "b=choice(x,y)", "name=z"]}}}
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump(task))
    assert planned(tmp_path) == [
        ["a=1", "b=x", "name=z"],
        ["a=1", "b=y", "name=z"],
        ["a=2", "b=x", "name=z"],
        ["a=2", "b=y", "name=z"],
    ]
    write_point(tmp_path, 0, ["c=9"], [])
    assert [p.overrides[0] for p in watch.look(tmp_path, planned=planned(tmp_path)).points] == [
        "a=1",
        "a=1",
        "a=2",
        "a=2",
    ]
    Sweep(tmp_path, "/", entries=[{"num": 0, "overrides": ["c=1"], "run_dir": "0"}]).write()
    assert [p.overrides for p in watch.look(tmp_path, planned=planned(tmp_path)).points] == [
        ("c=1",)
    ]  # the record goes before the plan


def test_retry_submits_the_unfinished_points_and_no_others(show: Show, slurm: Clients, tmp_path: Path) -> None:
    folder = make_jobs(
        tmp_path / "s", "finished", "failed", "running", "stopped", "finished", wait=False, partition="night"
    )
    before = queue(j0="COMPLETED", j1="FAILED", j2="RUNNING", j3="TIMEOUT", j4="COMPLETED")
    slurm.answer("squeue", before, before + "50_0|PENDING|1:00|None\n50_1|PENDING|1:00|None\n")
    out = show(f"dir={folder}", "retry=failed", "report=false")
    assert "2 of 5 points did not finish: again" in out and "2 finished, 2 pending, 1 running" in out
    record = json.loads((folder / "sweep.json").read_text())
    assert [p["job_id"] for p in record["points"]] == ["7_0", "50_0", "7_2", "50_1", "7_4"]
    assert slurm.num_calls("sbatch") == 1
    assert "#SBATCH --array=0-1%2" in slurm.script() and "#SBATCH --partition=night" in slurm.script()
    assert (
        record["launcher"]["partition"] == "night" and (folder / "code" / "sftlab" / "launchers" / "job.py").is_file()
    )
    assert slurm.num_calls("squeue") == 2  # before, and once after: the jobs are not waited for
    assert slurm.calls("squeue")[1][-1] == "-j50,7"


def test_nothing_to_retry_submits_nothing(show: Show, slurm: Clients, tmp_path: Path) -> None:
    folder = make_jobs(tmp_path / "s", "finished", "running")
    slurm.answer("squeue", queue(j0="COMPLETED", j1="RUNNING"))
    out = show(f"dir={folder}", "retry=failed", "report=false")
    assert "0 of 2 points did not finish\n" in out and slurm.num_calls("sbatch") == 0 and slurm.num_calls("squeue") == 1


def test_a_retry_waits_where_its_launcher_waits_and_exits_with_1_if_one_fails_again(
    show: Show, slurm: Clients, tmp_path: Path
) -> None:
    folder = make_jobs(tmp_path / "s", "failed", "stopped")  # launcher.wait is true by default
    ended = queue(j0="FAILED", j1="TIMEOUT")

    def again(first: str, second: str) -> str:
        return f"50_0|{first}|1:00|None\n50_1|{second}|1:00|None\n"

    slurm.answer("squeue", ended, again("PENDING", "PENDING"), again("RUNNING", "RUNNING"), again("FAILED", "FAILED"))
    with pytest.raises(SystemExit) as stop:
        show(f"dir={folder}", "retry=failed", "report=false")
    assert stop.value.code == 1 and slurm.num_calls("squeue") == 4

    done = {"status": "finished", "steps": 4, "last": {"step": 4, "val/loss": 1.0}, "best": {"val/loss": 1.0}}
    slurm.answer("squeue", again("FAILED", "FAILED"), again("COMPLETED", "COMPLETED"))
    slurm.answer("sbatch", "Submitted batch job 50\n")
    for num in (0, 1):  # as the jobs would write, once they have been started again
        (folder / str(num) / "summary.json").write_text(json.dumps(done))
    assert "2 finished" in show(f"dir={folder}", "retry=failed", "report=false")


def test_watch_shows_the_table_until_every_point_has_ended(show: Show, slurm: Clients, tmp_path: Path) -> None:
    folder = make_jobs(tmp_path / "s", "running", "stopped")
    slurm.answer(
        "squeue",
        queue(j0="RUNNING", j1="PENDING"),
        queue(j0="RUNNING", j1="PENDING"),
        queue(j0="TIMEOUT", j1="RUNNING"),
        queue(j0="TIMEOUT", j1="TIMEOUT"),
    )
    out = show(f"dir={folder}", "watch=true", "report=false")
    assert slurm.num_calls("squeue") == 4 and "1 stopped, 1 timeout" in out
    assert slurm.num_calls("sbatch") == slurm.num_calls("scancel") == 0
    show(f"dir={folder}", "report=false")
    assert slurm.num_calls("squeue") == 5  # without watch= it looks once


def test_ctrl_c_ends_the_watching_only(show: Show, slurm: Clients, tmp_path: Path) -> None:
    folder = make_jobs(tmp_path / "s", "running")
    # Ctrl-C at the third look: the first is the command's, the second the table's first
    third = (
        f"cd {tmp_path}; [ -f second ] && rm first second && kill -INT $PPID; [ -f first ] && touch second; touch first"
    )
    (slurm.dir / "squeue").write_text(f"#!/bin/sh\n{third}\necho '7_0|RUNNING|1:00|None'\n")
    out = show(f"dir={folder}", "watch=true", "report=false")
    assert f"running points carry on; come back with\n  python -m sftlab.sweep dir={folder} watch=true" in out
    assert "1 running" in out and slurm.num_calls("scancel") == 0


def test_cancel_ends_the_jobs_that_live_and_names_what_it_cannot_end(
    show: Show, slurm: Clients, tmp_path: Path
) -> None:
    folder = make_jobs(tmp_path / "s", "finished", "running", "running", "stopped")
    write_point(folder, 4, ["optim.lr=4"], [], "running")  # in a process without a job
    slurm.answer("squeue", queue(j0="COMPLETED", j1="RUNNING", j2="PENDING", j3="TIMEOUT"))
    out = show(f"dir={folder}", "cancel=true", "report=false")
    assert slurm.calls("scancel") == [["7_1", "7_2"]]
    assert "2 jobs cancelled" in out and "1 points run in a process without a job" in out
    assert slurm.num_calls("squeue") == 3  # whose jobs they are, and what became of them
    slurm.answer("squeue", queue(j0="COMPLETED", j1="CANCELLED", j2="CANCELLED", j3="TIMEOUT"))
    (folder / "4" / "summary.json").write_text('{"status": "stopped"}')
    assert "0 jobs cancelled" in show(f"dir={folder}", "cancel=true", "report=false")
    assert slurm.num_calls("scancel") == 1


def test_points_without_a_launcher_run_again_here_and_one_that_fails_does_not_keep_the_next_from_running(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ran = tmp_path / "s", []
    for num, status in enumerate(("failed", "finished", "stopped")):
        write_point(folder, num, [f"optim.lr=0.{num + 1}"], [], status)
    (folder / "0" / "config.yaml").write_text(yaml.safe_dump({"mine": 1}))  # as it was; point 2 left none

    def run(config: dict[str, Any], overrides: list[str]) -> float:
        ran.append((config, list(overrides)))
        if config.get("mine"):
            raise ValueError("no such luck")
        write_point(tmp_path / "made", 2, [], [{"step": 10, "time_s": 1.0, "val/loss": 1.0}])
        (tmp_path / "made" / "2" / "summary.json").replace(folder / "2" / "summary.json")
        return 0.0

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(SystemExit) as stop:
        show(f"dir={folder}", "retry=failed", "report=false")
    assert stop.value.code == 1  # point 0 failed again
    assert ran[0] == ({"mine": 1, "run_dir": str(folder / "0")}, ["optim.lr=0.1"])
    assert (ran[1][0]["optim"]["lr"], ran[1][0]["run_dir"], ran[1][1]) == (0.3, str(folder / "2"), ["optim.lr=0.3"])
    assert len(ran) == 2
    shown = capfd.readouterr()
    assert "point 0: no such luck" in shown.err and "point 2: optim.lr=0.3" in shown.out
    assert "1 failed, 2 finished" in shown.out


def test_a_search_is_not_retried(show: Show, slurm: Clients, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_jobs(tmp_path / "s", "failed")
    (folder / "optuna.jsonl").touch()
    slurm.answer("squeue", queue(j0="FAILED"))
    with pytest.raises(SystemExit):
        show(f"dir={folder}", "retry=failed")
    assert f"repeat its command with hydra.sweep.dir={folder}" in capfd.readouterr().err
    assert slurm.num_calls("sbatch") == 0


def test_jobs_of_the_local_launcher_are_not_asked_of_slurm(show: Show, slurm: Clients, tmp_path: Path) -> None:
    folder = unequal_sweep(tmp_path / "s")
    Sweep(folder, "/", entries=[{"num": 0, "overrides": [], "job_id": "local_0", "run_dir": "0"}]).write()
    show(f"dir={folder}", "report=false")
    assert slurm.num_calls("squeue") == 0


def test_best_yaml_leaves_out_where_and_how_a_point_ran(tmp_path: Path) -> None:
    given = ["run_dir=x", "resume=/old/run", "launcher=slurm", "launcher.nodes=2", "sweeper=optuna", "sweeper.seed=1"]
    write_point(tmp_path, 0, [*given, "resume_despite_changes=true", "optim.lr=1", "~optim.betas"], [])
    point = Sweep.read(tmp_path).observed({}).points[0]
    text = best_yaml.experiment_text(tmp_path, choices(point), ["why"])
    assert yaml.safe_load(text) == {"resume_despite_changes": True, "optim": {"lr": 1}}
    assert text.splitlines()[1:3] == [
        "# why",
        f"#   python -m sftlab.train --config-dir {tmp_path} experiment=best '~optim.betas'",
    ]


def test_an_option_of_the_users_own_group_is_a_choice_of_best_yaml(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["mine=big", "name=x", "mine.size=3", "optim=adamw", "seed=4"], [])
    (tmp_path / "0" / "config.yaml").write_text(yaml.safe_dump({"mine": {"size": 3}, "name": "x"}))
    made = choices(Sweep.read(tmp_path).observed({}).points[0])
    assert made == [
        Choice("mine", "big", True),
        Choice("name", "x", False),
        Choice("mine.size", 3, False),
        Choice("optim", "adamw", True),
        Choice("seed", 4, False),
    ]
    first = best_yaml.write_best(tmp_path, made, [])
    again = best_yaml.write_best(tmp_path, made[:1], [])  # a second ranking replaces the first, and keeps the link
    assert first == again == tmp_path / "best.yaml"
    assert yaml.safe_load(again.read_text()) == {"defaults": [{"override /mine": "big"}]}
    assert (tmp_path / "experiment" / "best.yaml").read_text() == again.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "best.yaml", "experiment"]


def test_a_point_without_a_config_is_composed_from_its_overrides(tmp_path: Path) -> None:
    write_point(tmp_path, 3, ["optim.lr=0.25", "trainer.max_steps=7"], [], "failed")
    (point,) = Sweep.read(tmp_path).observed({}).points
    found = compose_point(point.overrides, point.folder)
    assert (found["optim"]["lr"], found["trainer"]["max_steps"]) == (0.25, 7)
    assert found["run_dir"] == str(tmp_path / "3")


def test_a_ctrl_c_shows_where_the_points_are_and_what_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hydra_plugins.sftlab_launcher._compose.start_points", interrupted)
    words = ["launcher=local", "name=demo", "optim.lr=1e-3,2e-3", "hydra.sweep.dir=sweeps/a b"]
    monkeypatch.setattr(sys, "argv", ["sftlab-train", *words])
    with pytest.raises(SystemExit) as left:
        train.main()
    out, error = capfd.readouterr()
    assert left.value.code == 130 and error == "" and "2 missing" in out
    assert out.endswith("go on with\n  python -m sftlab.sweep dir='sweeps/a b' retry=failed\n")
