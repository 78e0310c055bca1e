"""Waiting for a sweep of SLURM jobs, with SLURM's clients pretended."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sftlab.sweeps import watch
from sftlab.sweeps.points import Point
from sftlab.sweeps.record import Sweep
from tests.asymmetric import write_point
from tests.pretend import Clients


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    clients = Clients(tmp_path / "bin")
    clients.answer("sacct", error="no accounts", code=1)
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    monkeypatch.setattr(watch, "POLL_S", 0.001)
    monkeypatch.setattr(watch, "LATE_S", 0.0)
    return clients


def make_jobs(folder: Path, *statuses: str) -> Path:
    for num, status in enumerate(statuses):
        write_point(folder, num, [f"optim.lr={num}"], [{"step": 10, "time_s": 1.0, "val/loss": 1.0}], status)
    made = [{"num": n, "overrides": [f"optim.lr={n}"], "job_id": f"7_{n}", "run_dir": str(n)} for n in range(num + 1)]
    Sweep(folder, "/", entries=made).write()
    return folder


def queue(*states: str) -> str:
    return "".join(f"7_{n}|{state}|1:00|None\n" for n, state in enumerate(states) if state)


def test_only_the_points_asked_for_are_looked_at(tmp_path: Path, slurm: Clients) -> None:
    folder = make_jobs(tmp_path / "s", "finished", "running", "running")
    slurm.answer("squeue", queue("COMPLETED", "RUNNING", "PENDING"))
    found = watch.look(folder, [1, 2])
    assert [(p.num, p.state) for p in found.points] == [(1, "running"), (2, "pending")]
    assert slurm.calls("squeue")[0][-1] == "-j7"
    record = json.loads((folder / "sweep.json").read_text())
    record["points"][2]["job_id"] = None
    (folder / "sweep.json").write_text(json.dumps(record))
    watch.look(folder, [2])
    assert slurm.num_calls("squeue") == 1  # a point without a job is not asked about


def test_waiting_ends_when_every_point_has_and_says_each_change_once(
    tmp_path: Path, slurm: Clients, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_jobs(tmp_path / "s", "finished", "stopped")
    slurm.answer(
        "squeue",
        queue("RUNNING", "PENDING"),
        queue("RUNNING", "PENDING"),
        queue("COMPLETED", "RUNNING"),
        queue("COMPLETED", "TIMEOUT"),
        queue("never", "asked"),
    )
    found = watch.watch(folder, Console(width=200), nums=[0, 1])
    assert [p.state for p in found.points] == ["finished", "stopped"] and slurm.num_calls("squeue") == 4
    out = capsys.readouterr().out.splitlines()
    said = ["point 0  running", "point 1  pending", "point 0  finished", "point 1  running", "point 1  stopped"]
    assert [line for line in out if line.startswith("point ")] == said


def test_a_controller_that_is_away_for_a_while_changes_nothing(tmp_path: Path, slurm: Clients) -> None:
    folder = make_jobs(tmp_path / "s", "finished")
    away = slurm.dir / "away"
    away.touch()
    squeue = f"#!/bin/sh\nif [ -f {away} ]; then rm {away}; echo gone >&2; exit 1; fi\necho '7_0|COMPLETED|1:00|None'\n"
    (slurm.dir / "squeue").write_text(squeue)
    (slurm.dir / "squeue").chmod(0o755)
    assert [p.state for p in watch.watch(folder, Console(quiet=True), nums=[0]).points] == [
        "finished"
    ] and not away.exists()


def test_a_job_is_given_up_after_five_looks_in_a_row_without_a_sign(tmp_path: Path, slurm: Clients) -> None:
    folder = make_jobs(tmp_path / "s", "running", "finished")
    gone, there = queue("UNKNOWN", "COMPLETED"), queue("RUNNING", "COMPLETED")
    slurm.answer("squeue", gone, gone, gone, gone, there, gone)
    found = watch.watch(folder, Console(quiet=True), nums=[0, 1])
    assert [p.state for p in found.points] == ["silent", "finished"] and slurm.num_calls("squeue") == 5 + 5


def test_a_summary_that_shows_late_is_waited_for(
    tmp_path: Path, slurm: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM says completed, the file system shows the summary only later: at the second look from then on."""
    folder = make_jobs(tmp_path / "s", "running")
    monkeypatch.setattr(watch, "LATE_S", 30.0)
    summary = json.dumps({"status": "finished", "steps": 10, "last": {"step": 10}, "best": {}})
    squeue = f"#!/bin/sh\n[ -f {slurm.dir}/second ] && echo '{summary}' > {folder}/0/summary.json\n"
    squeue += f"touch {slurm.dir}/second\necho '7_0|COMPLETED|1:00|None'\n"
    (slurm.dir / "squeue").write_text(squeue)
    (slurm.dir / "squeue").chmod(0o755)
    assert [p.state for p in watch.watch(folder, Console(quiet=True), nums=[0]).points] == ["finished"]


def test_changes_are_said_point_by_point() -> None:
    console = Console(file=io.StringIO(), width=80)
    made = [Point(0, (), Path("x"), state="running"), Point(1, (), Path("x"), state="failed")]
    with watch.Shown(console) as shown:
        shown.states = {0: "running"}
        shown.show(Sweep(Path("s"), points=made))
        shown.show(Sweep(Path("s"), points=made))
    assert console.file.getvalue() == "point 1  failed\n"  # type: ignore[attr-defined]


def test_with_fail_fast_the_jobs_of_the_others_are_cancelled_once(tmp_path: Path, slurm: Clients) -> None:
    folder = make_jobs(tmp_path / "s", "failed", "running", "running")
    slurm.answer("scancel", "")
    slurm.answer("squeue", queue("FAILED", "RUNNING", "PENDING"), *[queue("FAILED", "CANCELLED", "CANCELLED")] * 9)
    watch.watch(folder, Console(quiet=True), fail_fast=True)
    assert [call[-2:] for call in slurm.calls("scancel")] == [["7_1", "7_2"]]
    slurm.answer("squeue", *[queue("FAILED", "CANCELLED", "CANCELLED")] * 9)
    watch.watch(folder, Console(quiet=True))
    assert slurm.num_calls("scancel") == 1


def test_what_failed_is_counted_and_named(tmp_path: Path, slurm: Clients) -> None:
    folder = make_jobs(tmp_path / "s", "finished", "failed", "stopped")
    slurm.answer("squeue", queue("COMPLETED", "FAILED", "TIMEOUT"))
    text = watch.failures(watch.look(folder, [0, 1, 2])).splitlines()
    assert text[0] == "2 of 3 points did not finish" and "point 1  failed  optim.lr=1" in text
    assert watch.come_back(folder) == f"python -m sftlab.sweep dir={folder}"
