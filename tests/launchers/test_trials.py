"""Trials of a search as processes and as jobs: slots, ends, and what another driver finds of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sftlab.sweeps.trials import LocalTrials, SlurmTrials, birth

from sftlab.config.groups import CONF
from sftlab.launchers.local import Local
from sftlab.sweeps import trials
from sftlab.sweeps.record import Sweep
from tests.pretend import Clients, make_code, said, wait_for, without_slurm_variables

READY = "(run_dir / 'ready').touch()\n"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: (run_dir.joinpath('saved').touch(), sys.exit(0)))\n" + READY
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY


def make_trials(folder: Path, *does: str, parallel: int = 2, processes: int = 1) -> LocalTrials:
    """Write points that do these things, and return the trials of a search that runs `parallel` of them at once."""
    for num, text in enumerate(does):
        (folder / "s" / str(num)).mkdir(parents=True)
        (folder / "s" / str(num) / "do.py").write_text(text)
    made = [{"num": n, "overrides": [], "job_id": None, "run_dir": str(n)} for n in range(len(does))]
    Sweep(folder / "s", str(folder), [], {}, points=made).write()
    here = Local(processes_per_node=processes, parallel_points=parallel, dry_run=False)
    return LocalTrials(folder / "s", here, make_code(folder / "code"))


def until_dead(made: LocalTrials, *nums: int) -> None:
    for num in nums:
        for process in made.mine[num][1].running if num in made.mine else []:
            process.wait(30)
        assert not made.alive(num)


def test_a_trial_takes_the_lowest_free_slot_and_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6")
    wait = f"wait_for('{tmp_path}/go')"
    made = make_trials(tmp_path, "", wait, wait, wait, processes=2)
    made.start(0)
    made.start(1)
    until_dead(made, 0)
    made.start(2)  # while 1 still runs: the slot that 0 left
    for rank in (0, 1):
        wait_for(tmp_path / "s" / "2" / f"said_{rank}.json")
    (tmp_path / "go").touch()
    until_dead(made, 1, 2)
    made.start(3)
    until_dead(made, 3)
    seen = [said(tmp_path / "s" / str(n), 1)["env"]["CUDA_VISIBLE_DEVICES"] for n in range(4)]
    assert seen == ["3,4", "5,6", "3,4", "3,4"]


def test_a_trial_of_another_driver_is_found_by_its_processes_ids(tmp_path: Path) -> None:
    made = make_trials(tmp_path, f"wait_for('{tmp_path}/go')", processes=2)
    made.start(0)
    file = tmp_path / "s" / ".submitit" / "local_0" / "processes.json"
    noted = json.loads(file.read_text())
    pids = [process.pid for process in made.mine[0][1].running]
    assert noted == {"host": os.uname().nodename, "processes": [[pid, birth(pid)] for pid in pids]}
    other = LocalTrials(tmp_path / "s", made.local, made.code)
    assert other.alive(0) and not other.alive(1)
    file.write_text(json.dumps({**noted, "host": "elsewhere"}))
    assert not other.alive(0)  # ids of another machine say nothing here
    file.write_text(json.dumps({**noted, "processes": [[pids[0], "1"], [pids[1], birth(pids[1])]]}))
    assert other.alive(0)  # one of its processes is enough
    file.write_text(json.dumps({**noted, "processes": [[1, ""]]}))
    assert not other.alive(0)
    file.write_text("{")
    assert not other.alive(0)
    (tmp_path / "go").touch()
    until_dead(made, 0)


def test_the_birth_of_a_process_is_nothing_once_it_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried: a zombie
    assert birth(process.pid) == ""
    process.wait()
    assert birth(process.pid) == "" and birth(os.getpid()) == birth(os.getpid()) != ""
    fields = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()
    assert birth(os.getpid()) == fields[19]  # starttime, the 22nd field of proc(5)


def test_a_trial_that_is_stopped_saves_first(tmp_path: Path) -> None:
    made = make_trials(tmp_path, *[SAVES + "wait_for('/never', 60)"] * 2)
    for num in (0, 1):
        made.start(num)
        wait_for(tmp_path / "s" / str(num) / "ready")
    made.stop(1)
    until_dead(made, 1)
    assert (tmp_path / "s" / "1" / "saved").exists() and made.alive(0)
    assert made.interrupted() == "the trials that ran have saved and stopped"
    assert (tmp_path / "s" / "0" / "saved").exists() and not made.mine


def test_a_trial_that_does_not_stop_is_ended_when_patience_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trials(tmp_path, DEAF + "wait_for('/never', 60)")
    made.start(0)
    wait_for(tmp_path / "s" / "0" / "ready")
    made.stop(0)
    assert made.alive(0) and made.alive(0)  # asked, and still given time
    (process,) = made.mine[0][1].running
    assert process.poll() is None
    monkeypatch.setattr(trials, "PATIENCE_S", -1.0)
    made.alive(0)
    assert process.wait(30) == -signal.SIGKILL


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    for name in without_slurm_variables():
        monkeypatch.delenv(name)
    clients = Clients(tmp_path / "bin")
    clients.answer("sacct", error="no accounts", code=1)
    clients.answer("scancel")
    clients.answer("srun")
    clients.answer("sbatch", "Submitted batch job 50\n", "Submitted batch job 51\n")
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    monkeypatch.setattr(trials, "POLL_S", 0.0)
    return clients


def make_slurm_trials(folder: Path, **changes: Any) -> SlurmTrials:
    folder.mkdir()
    record = Sweep(folder, str(folder), [], {})
    record.with_points([(n, [f"optim.lr={n}"], {"optim": {"lr": n}}) for n in range(3)]).write()
    options = yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"]
    return SlurmTrials(folder, {**options, **changes})


def test_a_trial_is_a_job_by_the_launchers_options(tmp_path: Path, slurm: Clients) -> None:
    made = make_slurm_trials(tmp_path / "s", partition="night")
    assert not made.alive(0)  # it has not been started
    made.start(2)
    made.start(0)
    assert [p["job_id"] for p in Sweep.read(tmp_path / "s").points] == ["51", None, "50"]
    assert "#SBATCH --partition=night" in slurm.script(2)
    slurm.answer("squeue", "50|COMPLETED|1:00|None\n51|RUNNING|1:00|None\n")
    assert [made.alive(num) for num in range(3)] == [True, False, False]
    made.stop(0)
    assert slurm.calls("scancel") == [["51"]]
    assert made.interrupted() == "the jobs carry on" and slurm.num_calls("scancel") == 1


def test_slurm_is_asked_once_for_all_trials_and_not_at_every_look(
    tmp_path: Path, slurm: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_slurm_trials(tmp_path / "s")
    made.start(0)
    made.start(1)
    slurm.answer("squeue", "50|RUNNING|1:00|None\n51|FAILED|1:00|None\n")
    monkeypatch.setattr(trials, "POLL_S", 3600.0)
    made.asked_s = -3600.0  # as if it had been asked long ago
    assert [made.alive(n) for n in (0, 1, 0, 1)] == [True, False, True, False] and slurm.num_calls("squeue") == 1
    made.start(2)  # a new job makes the last answer old
    made.alive(0)
    assert slurm.num_calls("squeue") == 2


def test_a_controller_that_is_away_leaves_trials_alive(tmp_path: Path, slurm: Clients) -> None:
    made = make_slurm_trials(tmp_path / "s")
    made.start(0)
    slurm.answer("squeue", error="cannot contact the controller", code=1)
    assert all(made.alive(0) for _ in range(8))


def test_a_job_out_of_sight_five_times_in_a_row_is_gone(tmp_path: Path, slurm: Clients) -> None:
    made = make_slurm_trials(tmp_path / "s")
    made.start(0)
    there = "50|RUNNING|1:00|None\n"
    slurm.answer("squeue", "", "", "", "", there, "", "", "", "", "")
    assert [made.alive(0) for _ in range(10)] == [True] * 9 + [False]
