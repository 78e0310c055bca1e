"""The launcher's Hydra side, in this process, with SLURM's clients pretended: what is queued, awaited and returned."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.sftlab_launcher._compose import PointsFailed, outcome
from sftlab import train as training
from sftlab.sweeps import watch
from sftlab.sweeps.points import Point
from sftlab.sweeps.record import Sweep
from tests.pretend import Clients, without_slurm_variables

Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)

    def type_(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sftlab-train", "hydra.sweep.dir=s", *arguments])
        training.main()
        return capfd.readouterr().out

    return type_


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    for name in without_slurm_variables():
        monkeypatch.delenv(name)
    clients = Clients(tmp_path / "bin")
    for name in ("srun", "scancel", "sacct", "squeue"):
        clients.answer(name)
    clients.answer("sbatch", "Submitted batch job 50\n")
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    monkeypatch.setattr(watch, "POLL_S", 0.001)
    monkeypatch.setattr(watch, "LATE_S", 0.0)
    return clients


def finish(folder: Path, num: int, **summary: Any) -> str:
    """Return shell lines that write a point's summary, as its job would."""
    made = {"status": "finished", "steps": 1, "last": {"step": 1, "val/loss": 1.0}, "best": {}, **summary}
    return f"echo '{json.dumps(made)}' > {folder}/{num}/summary.json\n"


def squeue(slurm: Clients, before: str, states: str) -> None:
    """Make a squeue that runs shell lines, then prints a row for each job in `states`."""
    rows = "".join(f"echo '{row}|1:00|None'\n" for row in states.split())
    (slurm.dir / "squeue").write_text(f"#!/bin/sh\necho x >> {slurm.dir}/.squeue.calls\n{before}{rows}")
    (slurm.dir / "squeue").chmod(0o755)


def test_points_are_queued_with_the_options_of_the_command_line_and_not_waited_for(
    command: Command, slurm: Clients, tmp_path: Path
) -> None:
    typed = ["launcher=slurm", "launcher.wait=false", "launcher.partition=night", "launcher.max_stalled=2"]
    out = command(*typed, "optim.lr=1e-4,2e-4,3e-4", "name=tuned")
    assert "3 points queued as job 50; the sweep is s" in out and "see it with\n  python -m sftlab.sweep dir=s\n" in out
    assert "#SBATCH --partition=night" in slurm.script() and "#SBATCH --job-name=tuned" in slurm.script()
    assert "#SBATCH --array=0-2%3" in slurm.script() and slurm.num_calls("squeue") == 0
    fixed = ["launcher=slurm", "launcher.wait=False", *typed[2:]]  # as Hydra writes them
    record = Sweep.read(tmp_path / "s")
    assert [(e["num"], e["job_id"], e["run_dir"]) for e in record.entries] == [(n, f"50_{n}", str(n)) for n in range(3)]
    assert [e["overrides"] for e in record.entries] == [[*fixed, f"optim.lr=0.000{n}", "name=tuned"] for n in (1, 2, 3)]
    assert (record.name, record.cwd, record.observed({}).swept) == ("tuned", str(tmp_path), ["optim.lr"])
    assert record.launcher["partition"] == "night" and record.launcher["max_stalled"] == 2
    assert record.command == sys.orig_argv
    configs = [record.config(n) for n in range(3)]
    assert [c["optim"]["lr"] for c in configs] == [1e-4, 2e-4, 3e-4]
    assert [c["run_dir"] for c in configs] == ["s/0", "s/1", "s/2"] and "hydra" not in configs[0]


def test_one_point_is_said_in_the_singular(command: Command, slurm: Clients) -> None:
    assert "1 point queued as job 50;" in command("launcher=slurm", "launcher.wait=false")


def test_by_default_the_command_waits_and_its_exit_says_what_became_of_the_points(
    command: Command, slurm: Clients, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    squeue(slurm, finish(folder, 0) + finish(folder, 1), "50_0|COMPLETED 50_1|COMPLETED")
    out = command("launcher=slurm", "seed=1,2")
    assert "2 points queued as job 50" in out and "s: 2 finished" in out and slurm.num_calls("squeue") > 0
    (folder / "1" / "summary.json").unlink()
    squeue(slurm, finish(folder, 1, status="failed", error="ValueError: broke"), "50_0|COMPLETED 50_1|FAILED")
    with pytest.raises(SystemExit) as stop:
        command("launcher=slurm", "seed=1,2")
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert "1 of 2 points did not finish" in error and "point 1  failed  seed=2" in error
    assert "ValueError: broke" in error and "retry=failed" in error


def test_with_fail_fast_one_failed_point_cancels_the_others(command: Command, slurm: Clients, tmp_path: Path) -> None:
    failed = finish(tmp_path / "s", 0, status="failed", error="ValueError: broke")
    squeue(slurm, failed, "50_0|FAILED 50_1|RUNNING")
    (slurm.dir / "scancel").write_text(f"""#!/bin/sh
echo "$@" >> {slurm.dir}/.scancel.calls
sed -i s/RUNNING/CANCELLED/ {slurm.dir}/squeue
""")
    with pytest.raises(SystemExit):
        command("launcher=slurm", "launcher.fail_fast=true", "seed=1,2")
    assert [call[-1] for call in slurm.calls("scancel")] == ["50_1"]


def test_a_points_value_for_hydra_is_its_score_and_raises_where_it_failed(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "finished", "score": 0.25, "best": {}}')
    done = outcome(Point(0, ("a=1",), tmp_path, state="finished"), PointsFailed("of the others"))
    assert (done.return_value, list(done.overrides or []), done.working_dir) == (0.25, ["a=1"], str(tmp_path))
    with pytest.raises(PointsFailed, match="why"):
        _ = outcome(Point(0, (), tmp_path, state="timeout"), PointsFailed("why")).return_value


def test_ctrl_c_leaves_the_jobs_and_says_how_to_come_back(
    command: Command, slurm: Clients, capfd: pytest.CaptureFixture[str]
) -> None:
    squeue(slurm, "kill -INT $PPID\n", "50|RUNNING")
    with pytest.raises(SystemExit) as stop:
        command("launcher=slurm")
    assert stop.value.code == 130 and slurm.num_calls("scancel") == 0
    out = capfd.readouterr().out
    assert "the jobs carry on; come back with\n  python -m sftlab.sweep dir=s watch=true" in out
    assert "end them with\n  python -m sftlab.sweep dir=s cancel=true" in out


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("launcher.timeout_min=60,90",), "launcher.* cannot be swept"),
        (
            ("optim.lr=1,2", "seed=1", "trainer.batch_size=0"),
            "point 0 (launcher=slurm optim.lr=1 seed=1 trainer.batch_size=0)",
        ),
        (("run_dir=x",), "run_dir= cannot be set in a sweep"),
        (("name=a,b",), "name= cannot be set in a sweep"),
    ],
)
def test_points_that_cannot_run_are_refused_with_nothing_written_or_queued(
    command: Command, slurm: Clients, tmp_path: Path, capfd: pytest.CaptureFixture[str], typed: tuple[str, ...],
    says: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        command("launcher=slurm", *typed)
    assert stop.value.code == 1 and says in capfd.readouterr().err
    assert slurm.num_calls("sbatch") == 0 and not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_a_dry_run_shows_the_script_and_every_point_and_leaves_nothing(
    command: Command, slurm: Clients, tmp_path: Path, launcher: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = command(f"launcher={launcher}", "launcher.processes_per_node=3", "launcher.dry_run=true", "seed=4,5")
    expected = "#SBATCH --ntasks-per-node=3" if launcher == "slurm" else "# 3 processes per point, 1 points at a time"
    assert expected in out and "# point 0: " in out and "seed=4" in out and "# point 1: " in out and "seed=5" in out
    assert f"{tmp_path}/s/code" in out
    assert sorted(tmp_path.rglob("*")) == before and slurm.num_calls("sbatch") == 0


def test_a_sites_example_changes_what_it_names_and_leaves_the_rest(command: Command, slurm: Clients) -> None:
    lines = command("launcher=slurm_a100", "launcher.dry_run=true").splitlines()
    for line in (
        "nodes=1", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=16", "mem=0M", "constraint=a100", "time=1440",
        "signal=USR2@300",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert "export NCCL_DEBUG=WARN" in lines and not [s for s in lines if "partition" in s]


def test_a_dry_run_leaves_what_was_there(command: Command, slurm: Clients, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()
    command("launcher=slurm", "launcher.dry_run=true", "seed=4,5")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["mine"]
    nested = "hydra.sweep.dir=sweeps/tuned/now"
    command("launcher=slurm", "launcher.dry_run=true", "seed=4,5", nested)
    assert not (tmp_path / "sweeps").exists()
    (tmp_path / "sweeps" / "tuned" / "before").mkdir(parents=True)
    command("launcher=slurm", "launcher.dry_run=true", "seed=4,5", nested)
    assert [p.name for p in (tmp_path / "sweeps" / "tuned").iterdir()] == ["before"]


def test_a_second_command_adds_to_the_sweep_in_its_directory(command: Command, slurm: Clients, tmp_path: Path) -> None:
    command("launcher=slurm", "launcher.wait=false", "seed=1,2")
    slurm.answer("sbatch", "Submitted batch job 60\n")
    command("launcher=slurm", "launcher.wait=false", "seed=1,2", "launcher.timeout_min=90")
    record = Sweep.read(tmp_path / "s")
    assert [e["job_id"] for e in record.entries] == ["60_0", "60_1"] and record.launcher["timeout_min"] == 90


def test_the_local_launcher_runs_points_as_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its options reach its processes: a rank that is no Python says so, and the point has failed."""
    from sftlab.launchers import local

    told = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])"
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-S", "-c", told))
    with pytest.raises(SystemExit):
        command("launcher=local", "launcher.processes_per_node=2", "launcher.parallel_points=3", "seed=1,2")
    assert "2 of 2 points did not finish" in capfd.readouterr().err
    seen = {str(p.relative_to(tmp_path / "s")): p.read_text() for p in (tmp_path / "s").glob("[01]/[01]")}
    assert seen == {"0/0": "2", "0/1": "2", "1/0": "2", "1/1": "2"}
    assert Sweep.read(tmp_path / "s").launcher["parallel_points"] == 3
