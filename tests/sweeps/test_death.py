"""Why a point died: its own error, SLURM's word, or the last lines of its logs, and the file that says it."""

from pathlib import Path
from typing import Any

import pytest

from sftlab.common import owner as owners
from sftlab.common.squeue import Job
from sftlab.sweeps.death import death
from sftlab.sweeps.points import Point, read_point
from sftlab.sweeps.record import Sweep
from sftlab.sweeps.tables import failures

LOST = "RankLost: another rank has ended (killed, out of memory, or an error of its own: its output says which)"
TRACEBACK = "Traceback (most recent call last):\n  File 'a.py', line 1, in <module>\n    raise\nValueError: bad\n"
MEMORY = "slurmstepd-node1: error: StepId=10.0 exceeded memory limit (509489152 > 429916160), being killed\n"
OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n"
TIMED_OUT = "slurmstepd: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-01-31T12:00:00 DUE TO TIME LIMIT ***\n"
CANCELLED = "slurmstepd: error: *** JOB 4 ON node1 CANCELLED AT 2026-01-31T12:00:00 ***\n"
STEP = "slurmstepd: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-01-31T12:00:00 ***\n"
NODE = "slurmstepd: error: *** JOB 4 ON node1 CANCELLED AT 2026-01-31T12:00:00 DUE TO NODE FAILURE, SEE LOG ***\n"
PREEMPTED = "slurmstepd: error: *** JOB 4 ON node1 CANCELLED AT 2026-01-31T12:00:00 DUE TO PREEMPTION ***\n"
KILLED = "srun: error: node2: task 1: Killed\n"
NATIVE = "srun: error: node2: tasks 0-1: Segmentation fault (core dumped)\n"

# The state of the job, the summary's error, the logs of the ranks; then a word of the reason, and the log that says it.
CASES: list[tuple[str | None, str, list[str], str, int | None]] = [
    ("OUT_OF_MEMORY", "", [""], "killed for its memory", 0),
    ("OUT_OF_MEMORY", LOST, ["", OOM], "killed for its memory", 1),
    ("FAILED", "", [MEMORY], "killed for its memory", 0),
    ("FAILED", LOST, [KILLED + STEP, OOM], "killed for its memory", 1),
    ("FAILED", LOST, [STEP + KILLED, ""], "rank 1: Killed", 0),
    ("FAILED", "", [STEP, NATIVE], "rank 0-1: Segmentation fault", 1),
    ("TIMEOUT", "", [TIMED_OUT], "time limit", 0),
    ("FAILED", "", [TIMED_OUT + KILLED], "time limit", 0),
    ("NODE_FAIL", "", [""], "its node failed", 0),
    ("CANCELLED", "", [NODE], "node failed", 0),
    ("CANCELLED", "", [CANCELLED], "cancelled", 0),
    ("CANCELLED", "", [], "never started (SLURM: CANCELLED)", None),
    ("PREEMPTED", "", [PREEMPTED], "preempted", 0),
    ("FAILED", LOST, ["Traceback (most recent call last):\n" + LOST + "\n", TRACEBACK], "ValueError: bad", 1),
    ("FAILED", "ValueError: bad", [STEP + KILLED, TRACEBACK], "ValueError: bad", 1),
    ("FAILED", "", [], "never started (SLURM: FAILED, BadConstraints)", None),
    ("FAILED", "", ["launched, and nothing more\n"], "SLURM: FAILED", 0),
    (None, "ProcessEnded: rank 1 ended by SIGKILL", ["", ""], "perhaps for its memory", 0),
    (None, "ProcessEnded: rank 1 ended by exit code 1", ["", TRACEBACK], "ValueError: bad", 1),
    ("FAILED", "", [CANCELLED + "submitit INFO Starting with JobEnvironment(...)\n" + TRACEBACK], "ValueError: bad", 0),
]  # fmt: skip


@pytest.mark.parametrize(("state", "told", "texts", "said", "at"), CASES)
def test_gauntlet_44_the_cause_of_death_is_slurms_and_the_logs(
    tmp_path: Path, state: str | None, told: str, texts: list[str], said: str, at: int | None
) -> None:
    logs = [tmp_path / f"7_{rank}_log.err" for rank in range(len(texts))]
    for log, text in zip(logs, texts, strict=True):
        log.write_text(text)
    summary = {"status": "failed", "error": told} if told else {}
    job = Job(state, reason="BadConstraints" if state == "FAILED" else "None") if state else None
    found = death(summary, job, None, tmp_path, logs)
    assert said in found.reason and found.log == (None if at is None else logs[at])


def test_a_process_that_is_gone_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point without a job that was killed: before, it counted as running for five minutes."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0/train.log").write_text("step 3/60\n")
    hold = owners.Hold(tmp_path / "0", [(owners.machine(), 999_999, "1")])
    with owners.locked(tmp_path / "0" / owners.FILE) as file:
        owners.put(file, hold.owner)
    point = read_point(tmp_path, 0, {}, {})
    assert point.state == "failed" and "process 999999 on" in point.error and "is gone" in point.error
    assert point.log == tmp_path / "0/train.log"
    monkeypatch.setattr(owners, "birth", lambda _: "1")
    assert read_point(tmp_path, 0, {}, {}).state == "running"


def test_the_failures_of_a_sweep_show_reason_and_log(tmp_path: Path) -> None:
    point: dict[str, Any] = {"overrides": ("a=1",), "folder": tmp_path / "0", "state": "failed", "error": "because"}
    found = Sweep(tmp_path, points=[Point(0, **point, log=tmp_path / "x.err")])
    assert [line.strip() for line in failures(found)][1:4] == ["point 0  failed  a=1", "because", f"{tmp_path}/x.err"]
