"""The local launcher on ranks that only say what they were given: slots, devices, environments, ends, other drivers."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sftlab.common.process import birth
from sftlab.launchers import local
from sftlab.launchers.launcher import make_launcher
from sftlab.launchers.local import Local, Processes
from sftlab.sweeps import launch as launching
from sftlab.sweeps.record import Sweep
from tests.pretend import Clients, make_code, said, wait_for


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


READY = "(run_dir / 'ready').touch()\n"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: (run_dir.joinpath('saved').touch(), sys.exit(0)))\n" + READY
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code that stands in for the copy that a launch makes."""
    made = make_code(tmp_path / "code")
    monkeypatch.setattr(launching, "snapshot", lambda *_: made)
    return made


def make_sweep(folder: Path, *does: str) -> Sweep:
    """Write a sweep whose points do these things (Python, `wait_for` and `rank` are known)."""
    made = Sweep(folder / "s", str(folder), ["train"]).with_points(
        [(n, [], {"resume": "auto"}) for n in range(len(does))]
    )
    for num, text in enumerate(does):
        (made.run_dir(num) / "do.py").write_text(text)
    return made


def options(processes: int = 1, points: int = 1, **more: Any) -> dict[str, Any]:
    made = {"processes_per_node": processes, "parallel_points": points, "dry_run": False, **more}
    return {"_target_": f"{Local.__module__}.{Local.__name__}", **made}


def make_local(processes: int = 1, points: int = 1) -> Local:
    return Local(processes_per_node=processes, parallel_points=points, dry_run=False)


def summary(sweep: Sweep, num: int) -> dict[str, Any]:
    file = sweep.run_dir(num) / "summary.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_points_that_run_together_have_gpus_of_their_own(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots of two GPUs each, three points. The first ends first, so the third gets the first's GPUs while the
    second still has its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    folder = tmp_path / "s"
    sweep = make_sweep(
        tmp_path,
        f"wait_for('{folder}/1/said_0.json')",
        f"wait_for('{folder}/2/said_1.json')",
        f"wait_for('{folder}/1/said_0.json')",
    )
    done = launching.launch(sweep, [0, 1, 2], options(2, 2))
    assert [e["job_id"] for e in done.entries] == [None] * 3 and done.launcher == options(2, 2)
    assert Sweep.read(folder) == done
    devices = [[said(folder / str(num), rank)["env"]["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] for num in range(3)]
    assert devices == [["4,5"] * 2, ["6,7"] * 2, ["4,5"] * 2]
    assert [summary(sweep, num) for num in range(3)] == [{}] * 3


@pytest.mark.parametrize(
    ("visible", "listed", "processes", "points", "expected"),
    [
        ("0,1,2,3", None, 1, 4, ["0", "1", "2", "3"]),
        ("3,1,2", None, 1, 3, ["3", "1", "2"]),
        ("0,1,2", None, 2, 2, ["", ""]),  # too few for all: each sees them all
        (None, 4, 2, 2, ["0,1", "2,3"]),
        (None, 4, 3, 1, ["0,1,2"]),
        (None, 0, 1, 1, [""]),
        (None, None, 1, 1, [""]),
        ("", 4, 2, 1, ["0,1"]),
    ],
)
def test_the_gpus_of_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, listed: int | None, processes: int,
    points: int, expected: list[str],
) -> None:  # fmt: skip
    clients = Clients(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{clients.dir}:/usr/bin:/bin" if listed is not None else "/nowhere")
    if listed is not None:
        clients.answer("nvidia-smi", "".join(f"GPU {i}: one\n" for i in range(listed)) + "no GPU line\n")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = make_local(processes, points)
    assert [",".join(made.devices(slot)) for slot in range(points)] == expected
    if listed:
        clients.answer("nvidia-smi", "GPU 0: one\n", code=9)  # a driver that is broken
        assert local.count_gpus() == 0


def test_every_rank_is_told_its_place_and_runs_the_copied_code(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(tmp_path, "", "")
    (tmp_path / "s" / "sftlab").mkdir()  # would be taken for the package, if the working directory came first
    assert launching.launch(sweep, [1], options(3)).job_id(1) is None
    seen = [said(sweep.folder / "1", rank) for rank in range(3)]
    for rank, one in enumerate(seen):
        env = one["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "3")
        assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"], env["OMP_NUM_THREADS"]) == ("127.0.0.1", "lo", "1")
        assert env["PYTHONPATH"] == f"{code}:{tmp_path}:/mine" and env["PYTHONSAFEPATH"] == "1"
        assert one["cwd"] == str(tmp_path) and one["path"][:2] == [str(code), str(tmp_path)]
        assert "CUDA_VISIBLE_DEVICES" not in env
    assert len({one["env"]["MASTER_PORT"] for one in seen}) == 1 and not (sweep.folder / "0" / "said_0.json").exists()


@pytest.mark.parametrize(("processes", "points", "threads"), [(1, 1, None), (1, 2, "1"), (2, 1, "1")])
def test_threads_are_limited_where_several_processes_share_a_machine(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch, processes: int, points: int, threads: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep = make_sweep(tmp_path, "")
    launching.launch(sweep, [0], options(processes, points))
    assert said(sweep.folder / "0")["env"].get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    launching.launch(sweep, [0], options(processes, points))
    env = said(sweep.folder / "0")["env"]
    assert (env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("5", "eth7")  # the user's own words stand


def test_one_point_at_a_time_is_live_on_this_terminal_and_several_are_not(
    tmp_path: Path, code: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    speak = "print(f'out {rank}', flush=True); print(f'err {rank}', file=sys.stderr, flush=True)"
    sweep = make_sweep(tmp_path, speak)
    logs = sweep.folder / ".submitit" / "local_0"
    launching.launch(sweep, [0], options(2, 1))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("out 0\n", "err 0\n")
    assert [(logs / f"0_{r}_log.{k}").read_text() for r in (0, 1) for k in ("out", "err")] == [
        "", "err 0\n", "out 1\n", "err 1\n",
    ]  # fmt: skip
    launching.launch(sweep, [0], options(2, 2))
    assert capfd.readouterr() == ("", "")
    assert (logs / "0_0_log.out").read_text() == "out 0\n" and (logs / "0_0_log.err").read_text() == "err 0\n" * 2


def test_a_rank_that_fails_ends_its_point_and_no_other(tmp_path: Path, code: Path) -> None:
    """Point 0: rank 1 exits with 3, and rank 0, which would wait for ever, is told to end. Point 1: killed."""
    folder = tmp_path / "s"
    wait = "signal.signal(signal.SIGTERM, lambda *_: (run_dir.joinpath(f'told_{rank}').touch(), sys.exit(0)))\n"
    wait += "(run_dir / f'ready_{rank}').touch()\n"
    failing = wait + "wait_for(run_dir / 'ready_0')\nsys.exit(3) if rank == 1 else wait_for('/never', 60)"
    killed = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None"
    sweep = make_sweep(tmp_path, failing, killed, "")
    launching.launch(sweep, [0, 1, 2], options(2))
    assert summary(sweep, 0) == {"status": "failed", "rank": 1, "error": "ProcessEnded: rank 1 ended by exit code 3"}
    assert summary(sweep, 1) == {"status": "failed", "rank": 1, "error": "ProcessEnded: rank 1 ended by SIGKILL"}
    assert (folder / "0" / "told_0").exists() and not (folder / "0" / "told_1").exists()
    assert summary(sweep, 2) == {} and (folder / "2" / "said_1.json").exists()


def test_what_a_rank_said_of_its_failure_is_kept(tmp_path: Path, code: Path) -> None:
    own = "(run_dir / 'summary.json').write_text(json.dumps({'status': 'failed', 'error': 'why'})); sys.exit(1)"
    sweep = make_sweep(tmp_path, own)
    launching.launch(sweep, [0], options())
    assert summary(sweep, 0) == {"status": "failed", "error": "why"}


def test_a_rank_that_does_not_end_when_asked_is_ended(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(run_dir / 'deaf').touch()\nwait_for('/never', 60)"
    sweep = make_sweep(tmp_path, deaf)
    launcher = make_local()
    assert launcher.start(sweep.to_run([0], code)) == {0: None}
    _, point = launcher.mine[sweep.run_dir(0)]
    wait_for(sweep.folder / "0" / "deaf")
    assert not point.ended()
    point.end()
    assert point.ended() and [p.returncode for p in point.running] == [-signal.SIGKILL]


def test_a_driver_that_is_told_to_end_asks_its_points_first(tmp_path: Path, code: Path) -> None:
    save = SAVES + "wait_for('/never', 60)"
    sweep = make_sweep(tmp_path, save, save)
    before = signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        for num in (0, 1):
            wait_for(sweep.folder / str(num) / "ready")
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(SystemExit) as stop:
        launching.launch(sweep, [0, 1], options(1, 2))
    teller.join()
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert all((sweep.folder / str(num) / "saved").exists() for num in (0, 1))


def test_no_more_points_run_than_there_are_slots(tmp_path: Path, code: Path) -> None:
    """Each point counts those that have begun and not ended; the first two wait until both have begun."""
    folder = tmp_path / "s"
    count = f"begun = len(list(pathlib.Path('{folder}').glob('*/said_0.json')))\n"
    count += f"ended = len(list(pathlib.Path('{folder}').glob('*/ended')))\n"
    count += "(run_dir / 'together').write_text(str(begun - ended))\n(run_dir / 'ended').touch()"
    two = [f"wait_for('{folder}/{other}/said_0.json')\n" + count for other in (1, 0)]
    sweep = make_sweep(tmp_path, *two, count, count)
    launching.launch(sweep, [0, 1, 2, 3], options(1, 2))
    seen = [int((folder / str(num) / "together").read_text()) for num in range(4)]
    assert max(seen) == 2


def test_with_fail_fast_a_failed_point_ends_the_others(tmp_path: Path, code: Path) -> None:
    """The second fails while the first runs, which saves and stops; the third never starts."""
    folder = tmp_path / "s"
    sweep = make_sweep(
        tmp_path, SAVES + "import time; time.sleep(60)", f"wait_for('{folder}/0/ready'); sys.exit(3)", ""
    )
    looks: list[int] = []
    launching.launch(sweep, [0, 1, 2], options(1, 2, fail_fast=True), lambda: looks.append(1))
    assert (folder / "0" / "saved").exists() and summary(sweep, 1)["status"] == "failed" and looks
    assert not (folder / "2" / "said_0.json").exists() and summary(sweep, 2) == {}


def test_the_command_of_a_dry_run_is_the_one_that_would_run(tmp_path: Path, code: Path) -> None:
    sweep = make_sweep(tmp_path, "")
    assert make_local(3, 2).script(sweep.to_run([0], code)) == (
        "# 3 processes per point, 2 points at a time\n"
        f"PYTHONPATH={code} {sys.executable} -u -m sftlab.launchers.job {sweep.folder}/<num>"
    )


@pytest.mark.parametrize("name", ["processes_per_node", "parallel_points"])
def test_numbers_below_one_are_refused(name: str) -> None:
    made = make_launcher({**options(), "dry_run": True})
    assert isinstance(made, Local) and made.dry_run
    with pytest.raises(ValueError, match=f"launcher.{name}=0: expected at least 1"):
        make_launcher({**options(), name: 0})


def test_the_first_rank_that_failed_is_remembered_with_its_own_code(tmp_path: Path) -> None:
    def process(code: str) -> subprocess.Popen[bytes]:
        made = subprocess.Popen([sys.executable, "-S", "-c", code])
        made.wait()
        return made

    fine, broken, killed = process(""), process("raise SystemExit(4)"), process("import os; os.kill(os.getpid(), 9)")
    point = Processes(tmp_path, "0", running=[fine, killed, broken])
    assert point.ended() and point.first_failed == (1, -9)
    point = Processes(tmp_path, "0", running=[fine, fine])
    assert point.ended() and point.first_failed is None


def test_a_free_port_is_one_that_can_be_bound() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", local.free_port()))


def until_dead(launcher: Local, *run_dirs: Path) -> None:
    for run_dir in run_dirs:
        for process in launcher.mine[run_dir][1].running if run_dir in launcher.mine else []:
            process.wait(30)
        assert not launcher.alive(run_dir)


def test_a_point_takes_the_lowest_free_slot_and_its_gpus(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6")
    wait = f"wait_for('{tmp_path}/go')"
    sweep, launcher = make_sweep(tmp_path, "", wait, wait, wait), make_local(2, 2)
    dirs = [sweep.run_dir(num) for num in range(4)]
    launcher.start(sweep.to_run([0, 1], code))
    until_dead(launcher, dirs[0])
    launcher.start(sweep.to_run([2], code))  # while 1 still runs: the slot that 0 left
    for rank in (0, 1):
        wait_for(dirs[2] / f"said_{rank}.json")
    (tmp_path / "go").touch()
    until_dead(launcher, dirs[1], dirs[2])
    launcher.start(sweep.to_run([3], code))
    until_dead(launcher, dirs[3])
    seen = [said(run_dir, 1)["env"]["CUDA_VISIBLE_DEVICES"] for run_dir in dirs]
    assert seen == ["3,4", "5,6", "3,4", "3,4"]


def test_a_point_of_another_driver_is_found_by_its_processes_ids(tmp_path: Path, code: Path) -> None:
    sweep, launcher = make_sweep(tmp_path, f"wait_for('{tmp_path}/go')", ""), make_local(2)
    launcher.start(sweep.to_run([0], code))
    file = tmp_path / "s" / ".submitit" / "local_0" / "processes.json"
    noted = json.loads(file.read_text())
    pids = [process.pid for process in launcher.mine[sweep.run_dir(0)][1].running]
    assert noted == {"host": os.uname().nodename, "processes": [[pid, birth(pid)] for pid in pids]}
    other = make_local(2)
    assert other.alive(sweep.run_dir(0)) and not other.alive(sweep.run_dir(1))
    file.write_text(json.dumps({**noted, "host": "elsewhere"}))
    assert not other.alive(sweep.run_dir(0))  # ids of another machine say nothing here
    file.write_text(json.dumps({**noted, "processes": [[pids[0], "1"], [pids[1], birth(pids[1])]]}))
    assert other.alive(sweep.run_dir(0))  # one of its processes is enough
    file.write_text(json.dumps({**noted, "processes": [[1, ""]]}))
    assert not other.alive(sweep.run_dir(0))
    file.write_text("{")
    assert not other.alive(sweep.run_dir(0))
    (tmp_path / "go").touch()
    until_dead(launcher, sweep.run_dir(0))


def test_the_birth_of_a_process_is_nothing_once_it_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried: a zombie
    assert birth(process.pid) == ""
    process.wait()
    assert birth(process.pid) == "" and birth(os.getpid()) == birth(os.getpid()) != ""
    fields = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()
    assert birth(os.getpid()) == fields[19]  # starttime, the 22nd field of proc(5)


def test_a_point_that_is_stopped_saves_first(tmp_path: Path, code: Path) -> None:
    sweep, launcher = make_sweep(tmp_path, *[SAVES + "wait_for('/never', 60)"] * 2), make_local(1, 2)
    launcher.start(sweep.to_run([0, 1], code))
    for num in (0, 1):
        wait_for(sweep.run_dir(num) / "ready")
    launcher.stop(sweep.run_dir(1))
    until_dead(launcher, sweep.run_dir(1))
    assert (sweep.run_dir(1) / "saved").exists() and launcher.alive(sweep.run_dir(0))
    assert launcher.interrupted() == "the points that ran have saved and stopped"
    assert (sweep.run_dir(0) / "saved").exists() and not launcher.mine


def test_a_point_that_was_asked_to_stop_has_stopped_and_not_failed(tmp_path: Path, code: Path) -> None:
    """A run that is stopped exits with 75; were it noted as failed, a search would not take it up again."""
    stopped = "run_dir.joinpath('summary.json').write_text(json.dumps({'status': 'stopped'}))"
    stops = f"signal.signal(signal.SIGTERM, lambda *_: ({stopped}, sys.exit(75)))\n" + READY + "wait_for('/never', 60)"
    sweep, launcher = make_sweep(tmp_path, stops), make_local()
    for ends in (lambda: launcher.stop(sweep.run_dir(0)), launcher.interrupted):
        launcher.start(sweep.to_run([0], code))
        wait_for(sweep.run_dir(0) / "ready")
        (sweep.run_dir(0) / "ready").unlink()
        ends()
        until_dead(launcher, sweep.run_dir(0))
        assert summary(sweep, 0) == {"status": "stopped"}
    (sweep.run_dir(0) / "do.py").write_text(
        "sys.exit(75)"
    )  # by itself, later: told by somebody else, a closed terminal
    launcher.start(sweep.to_run([0], code))
    until_dead(launcher, sweep.run_dir(0))
    assert summary(sweep, 0) == {"status": "stopped"}
    (sweep.run_dir(0) / "summary.json").unlink()  # and this one says nothing
    launcher.start(sweep.to_run([0], code))
    until_dead(launcher, sweep.run_dir(0))
    assert summary(sweep, 0)["error"] == "ProcessEnded: rank 0 ended by exit code 75"


def test_a_point_that_does_not_stop_is_ended_when_patience_is_over(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, launcher = make_sweep(tmp_path, DEAF + "wait_for('/never', 60)"), make_local()
    run_dir = sweep.run_dir(0)
    launcher.start(sweep.to_run([0], code))
    wait_for(run_dir / "ready")
    launcher.stop(run_dir)
    assert launcher.alive(run_dir) and launcher.alive(run_dir)  # asked, and still given time
    (process,) = launcher.mine[run_dir][1].running
    assert process.poll() is None
    monkeypatch.setattr(local, "PATIENCE_S", -1.0)
    launcher.alive(run_dir)
    assert process.wait(30) == -signal.SIGKILL
