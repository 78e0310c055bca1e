"""One run directory has one live run: who may take it, who is refused, and how a dead owner is told from a live one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sftlab.common import owner, run_directory, squeue
from sftlab.common.owner import FILE, Held, Hold, Owner, age_s, living, read_owner, this_process
from sftlab.common.process import birth, machine
from sftlab.common.squeue import Job
from sftlab.launchers import job
from tests.support import REPO, warmed
from tests.warm import Warm

NOBODY = {"host": "a", "machine": "m", "processes": [[1, "1"]], "job": None, "restart": 0, "since": ""}
CONFIG: dict[str, Any] = {"resume": "auto", "run_dir": "x", "seed": 0}


@pytest.fixture(autouse=True)
def no_job_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another live process."""
    process = subprocess.Popen([sys.executable, "-SEc", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def held_by(folder: Path, *processes: list[object], **changes: Any) -> Owner:
    """Write an owner into a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "host": "node7", "machine": machine(), "processes": list(processes), "job": None, "restart": 0,
        "since": "2026-01-31 12:00:00", "token": "theirs", "ended": False, **changes,
    }  # fmt: skip
    (folder / FILE).write_text(json.dumps(record))
    found = read_owner(folder)
    assert found is not None
    return found


def says(**states: str) -> Any:
    """SLURM as it would answer for these jobs (job_12="RUNNING")."""
    return lambda ids: {i: Job(states.get(f"job_{i}", squeue.UNKNOWN)) for i in ids}


def test_a_live_run_is_named_by_host_process_and_job(tmp_path: Path, sleeper: Any) -> None:
    held_by(tmp_path / "run", [sleeper.pid, birth(sleeper.pid)], job="12_3")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    hold = Hold(tmp_path / "run", [this_process()])
    with pytest.raises(Held, match=rf"held by a live run: process {sleeper.pid} on node7, job 12_3, since 2026"):
        run_directory.claim(tmp_path / "run", CONFIG, [], hold)
    hold.give_back()  # what was never taken
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before, "nothing was touched"


def test_a_dead_owner_here_is_followed_at_once(tmp_path: Path, sleeper: Any) -> None:
    held_by(tmp_path, [sleeper.pid, birth(sleeper.pid)], job="12")
    sleeper.kill()
    sleeper.wait()
    hold = Hold(tmp_path, [this_process()])
    hold.take()
    found = read_owner(tmp_path)
    assert found is not None and found.processes[0][0] == os.getpid() and not found.ended
    hold.give_back()
    assert living(tmp_path) is None and read_owner(tmp_path).ended  # type: ignore[union-attr]


def test_a_process_that_got_a_dead_ones_number_is_not_the_owner(tmp_path: Path, sleeper: Any) -> None:
    held_by(tmp_path, [sleeper.pid, "1"])
    assert living(tmp_path) is None


def test_a_run_whose_first_rank_is_dead_lives_as_long_as_another_rank_here(tmp_path: Path, sleeper: Any) -> None:
    held_by(tmp_path, [sleeper.pid, "1"], [sleeper.pid, birth(sleeper.pid)])
    assert living(tmp_path) is not None


@pytest.mark.parametrize(
    ("state", "age", "lives"),
    [
        ("RUNNING", 9_999, True), ("COMPLETING", 9_999, True), ("SUSPENDED", 9_999, True),
        ("FAILED", 0, False), ("NODE_FAIL", 0, False), ("CANCELLED", 0, False), ("TIMEOUT", 0, False),
        ("UNKNOWN", 301, False), ("UNKNOWN", 0, True), ("PENDING", 0, True), ("PENDING", 301, False),
    ],
)  # fmt: skip
def test_elsewhere_slurm_knows_or_the_last_touch_tells(tmp_path: Path, state: str, age: float, lives: bool) -> None:
    found = held_by(tmp_path, [1, "1"], machine="another", job="12")
    os.utime(tmp_path / FILE, (time.time() - age,) * 2)
    assert found.lives(tmp_path, says(job_12=state)) == lives


@pytest.mark.parametrize(("age", "lives"), [(0, True), (299, True), (301, False)])
def test_elsewhere_without_slurm_the_last_touch_tells(tmp_path: Path, age: float, lives: bool) -> None:
    def no_answer(ids: Any) -> Any:
        raise squeue.NoSlurm

    found, unasked = (held_by(tmp_path, [1, "1"], machine="another", job=job_id) for job_id in ("12", None))
    os.utime(tmp_path / FILE, (time.time() - age,) * 2)
    assert found.lives(tmp_path, no_answer) == unasked.lives(tmp_path, no_answer) == lives
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE], "looking leaves nothing behind"


def test_a_requeued_job_follows_its_own_earlier_start_and_no_other_task_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for restart, lives in ((1, False), (2, True)):
        found = held_by(tmp_path, [1, "1"], machine="another", job="12", restart=restart)
        assert found.lives(tmp_path, says(job_12="RUNNING")) == lives


def test_the_age_goes_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_by(tmp_path, [1, "1"])
    monkeypatch.setattr(owner.time, "time", lambda: 0.0)  # this machine's is wrong by decades
    assert 0 <= age_s(tmp_path) < 60
    (tmp_path / FILE).unlink()
    assert age_s(tmp_path) == float("inf")


@pytest.mark.parametrize(
    "record",
    [
        "{", "[]", '"x"', "[" * 5000, "{}", '{"host": "a"}',
        json.dumps({**NOBODY, "processes": []}), json.dumps({**NOBODY, "host": "\033[2J"}),
        json.dumps({**NOBODY, "processes": [[-1, "1"]]}), json.dumps({**NOBODY, "job": "--me"}),
    ],
)  # fmt: skip
def test_a_file_that_names_no_owner_holds_nobody_up(tmp_path: Path, record: str) -> None:
    (tmp_path / FILE).write_text(record)
    assert read_owner(tmp_path) is None and living(tmp_path) is None
    hold = Hold(tmp_path, [this_process()])
    hold.take()
    hold.give_back()


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to(victim)
    with pytest.raises(OSError):
        Hold(tmp_path / "run", [this_process()]).take()
    assert victim.read_text() == "precious"


def test_the_hold_is_kept_fresh_and_a_run_that_was_taken_for_dead_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.02)
    ended: list[int] = []

    class Ended(BaseException):
        pass

    def leave(code: int) -> None:
        ended.append(code)
        hold.given_back.set()

    monkeypatch.setattr(owner.os, "_exit", leave)
    hold = Hold(tmp_path, [this_process()])
    hold.take()
    os.utime(tmp_path / FILE, (1, 1))
    deadline_s = time.monotonic() + 10
    while age_s(tmp_path) > 100 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert age_s(tmp_path) < 100 and not ended
    held_by(tmp_path, [1, "1"], machine="another")
    assert hold.given_back.wait(10) and ended == [os.EX_TEMPFAIL]
    hold.give_back()
    assert read_owner(tmp_path).token == "theirs"  # type: ignore[union-attr]


def test_a_point_that_is_refused_notes_nothing_in_the_live_runs_directory(tmp_path: Path, sleeper: Any) -> None:
    """A requeued job beside its twin: before, it deleted the summary, counted an attempt and noted a failure."""
    run_directory.reserve(tmp_path / "0", CONFIG, [])
    (tmp_path / "0/summary.json").write_text('{"status": "stopped"}')
    held_by(tmp_path / "0", [sleeper.pid, birth(sleeper.pid)])
    before = {p.name: p.read_bytes() for p in (tmp_path / "0").iterdir()}
    with pytest.raises(Held):
        job.run(tmp_path / "0", "12", 0, 5)
    with pytest.raises(Held):
        run_directory.reserve(tmp_path / "0", CONFIG, ["again=1"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "0").iterdir()} == before


def test_taking_a_directory_costs_less_than_5_ms(tmp_path: Path) -> None:
    took_s = []
    for i in range(20):
        (tmp_path / str(i)).mkdir()
        began_s = time.perf_counter()
        hold = Hold(tmp_path / str(i), [this_process()])
        hold.take()
        took_s.append(time.perf_counter() - began_s)
        hold.give_back()
    assert sorted(took_s)[10] < 0.005


@pytest.fixture(scope="module")
def python() -> Warm:
    """Commands as processes of their own that need not import torch first."""
    return warmed()


def test_gauntlet_39_a_second_process_in_one_run_directory_is_refused_and_the_first_unharmed(
    tmp_path: Path, python: Warm, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    settings = [
        "model=hf", f"model.name_or_path={model_folder}", "data=squad", f"data.path={squad_files[0]}",
        "evaluation.num_answers=0", "tracker=none", "trainer.batch_size=6", "trainer.max_steps=30",
        "trainer.save_every=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outputs = [tmp_path / f"{i}.txt" for i in range(2)]
    both = [python.start("-m", "sftlab.train", *settings, cwd=tmp_path, env=env, output=out) for out in outputs]
    codes = [process.wait(120) for process in both]
    said = [out.read_text() for out in outputs]
    assert sorted(codes) == [0, 1], said
    refused, other = (said[codes.index(1)], both[codes.index(0)])
    assert f"is held by a live run: process {other.pid} on" in refused
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 31))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "run/checkpoints").glob("aside_*"))

    # A third, killed at work, is followed at once.
    third = [*settings[:-1], f"run_dir={tmp_path / 'third'}", "trainer.max_steps=100000"]
    process = python.start("-m", "sftlab.train", *third, cwd=tmp_path, env=env, output=tmp_path / "third.txt")
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "third/checkpoints/step_00000002").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    again = [*third[:-1], "trainer.max_steps=4", "resume_despite_changes=true"]
    process = python.start("-m", "sftlab.train", *again, cwd=tmp_path, env=env, output=tmp_path / "again.txt")
    assert process.wait(120) == 0, (tmp_path / "again.txt").read_text()
