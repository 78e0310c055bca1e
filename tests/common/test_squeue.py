"""What SLURM's clients print, and what is made of it."""

from pathlib import Path

import pytest

from sftlab.common import squeue
from sftlab.common.squeue import Job, NoSlurm
from tests.pretend import Clients


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    clients = Clients(tmp_path / "bin")
    clients.answer("squeue")
    clients.answer("sacct", error="no accounts", code=1)
    clients.answer("scancel")
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    return clients


def test_one_call_tells_the_states_of_all(slurm: Clients) -> None:
    slurm.answer(
        "squeue",
        "12_0|RUNNING|1:02:03|None\n12_1|PENDING|30:00|Resources|of|a kind|script=/a b/x.sh\n15|FAILED|INVALID|x\n",
    )
    found = squeue.states(iter(["12_1", "15", "12_0", "12_1"]))
    assert found == {
        "12_1": Job("PENDING", 1800, "Resources|of|a kind", "/a b/x.sh"),
        "15": Job("FAILED", None, "x"),
        "12_0": Job("RUNNING", 3723, "None"),
    }
    assert list(found) == ["12_1", "15", "12_0"]
    expected = ["--all", "--array", "--noheader", "--states=all", "--format=%i|%T|%L|%r|script=%o", "-j12,15"]
    assert slurm.calls("squeue") == [expected] and slurm.num_calls("sacct") == 0


def test_nothing_is_asked_about_no_jobs(slurm: Clients) -> None:
    assert squeue.states([]) == {}
    squeue.cancel([])
    assert slurm.num_calls("squeue") == slurm.num_calls("scancel") == 0


def test_accounts_are_asked_about_forgotten_jobs_and_the_queue_goes_first(slurm: Clients) -> None:
    slurm.answer("squeue", "12_0|RUNNING|1:00|None\n")
    accounts = "12_0|COMPLETED\n12_1|CANCELLED by 1000\n12_1.batch|FAILED\n12_[3-5]|PENDING\n15|TIMEOUT\n16|\nx\n"
    slurm.answer("sacct", accounts)
    assert squeue.states(["12_0", "12_1", "15", "16", "12_7"]) == {
        "12_0": Job("RUNNING", 60, "None"),
        "12_1": Job("CANCELLED"),
        "15": Job("TIMEOUT"),
        "16": Job("UNKNOWN"),
        "12_7": Job("CANCELLED"),  # gone while its siblings are known: cancelled before it ran
    }
    assert slurm.calls("sacct") == [["--noheader", "--parsable2", "--format=JobID,State", "-j12,15,16"]]


def test_without_accounts_a_forgotten_job_is_unknown(slurm: Clients) -> None:
    slurm.answer("squeue", error="slurm_load_jobs error: Invalid job id specified", code=1)
    assert squeue.states(["12", "13_1"]) == {"12": Job("UNKNOWN"), "13_1": Job("UNKNOWN")}


def test_elements_that_accounts_name_together_are_not_cancelled(slurm: Clients) -> None:
    slurm.answer("sacct", "12_[0-9]|PENDING\n13.batch|RUNNING\n")
    assert squeue.states(["12_1", "13_1"]) == {"12_1": Job("UNKNOWN"), "13_1": Job("UNKNOWN")}


def test_a_controller_that_does_not_answer_is_no_answer(slurm: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.answer("squeue", error="Unable to contact slurm controller", code=1)
    with pytest.raises(NoSlurm, match=r"squeue --all --array \.\.\. failed: Unable to contact slurm controller"):
        squeue.states(["12"])
    slurm.answer("scancel", "said on stdout", code=1)
    with pytest.raises(NoSlurm, match=r"scancel 12 13_1 ... failed: said on stdout"):
        squeue.cancel(iter(["12", "13_1"]))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoSlurm, match="squeue: no such program here"):
        squeue.states(["12"])


def test_jobs_are_cancelled_by_their_ids(slurm: Clients) -> None:
    squeue.cancel(iter(["12_1", "15"]))
    assert slurm.calls("scancel") == [["12_1", "15"]]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7), ("1:02", 62), ("59:59", 3599), ("1:02:03", 3723), ("2-00:00:00", 172800), ("1-02:03:04", 93784),
        (" 30:00 ", 1800), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None), ("", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_time_left_in_seconds(text: str, seconds: int | None) -> None:
    assert squeue.seconds(text) == seconds


def test_a_job_has_ended_in_eight_states_only() -> None:
    ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "NODE_FAIL"]
    alive = ["PENDING", "RUNNING", "REQUEUED", "COMPLETING", "SUSPENDED", "PREEMPTED", "CONFIGURING", squeue.UNKNOWN]
    assert [Job(s).ended for s in ended + alive] == [True] * 8 + [False] * 8
