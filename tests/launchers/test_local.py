"""The local launcher on ranks that only say what they were given: slots, devices, environments, ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sftlab.launchers import launcher, local
from sftlab.launchers.local import Local, Processes
from sftlab.sweeps.record import Sweep
from tests.pretend import Clients, make_code, said, wait_for


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def make_sweep(folder: Path, *does: str) -> tuple[Sweep, Path]:
    """Write a sweep whose points do these things (Python, `wait_for` and `rank` are known), and the code they run."""
    for num, text in enumerate(does):
        (folder / "s" / str(num)).mkdir(parents=True)
        (folder / "s" / str(num) / "do.py").write_text(text)
    made = [{"num": n, "overrides": [], "job_id": None, "run_dir": str(n)} for n in range(len(does))]
    return Sweep(folder / "s", str(folder), [], {}, points=made), make_code(folder / "code")


def make_local(processes: int = 1, points: int = 1) -> Local:
    return Local(processes_per_node=processes, parallel_points=points, dry_run=False)


def summary(sweep: Sweep, num: int) -> dict[str, Any]:
    file = sweep.dir / str(num) / "summary.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_points_that_run_together_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots of two GPUs each, three points. The first ends first, so the third gets the first's GPUs while the
    second still has its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    folder = tmp_path / "s"
    sweep, code = make_sweep(
        tmp_path,
        f"wait_for('{folder}/1/said_0.json')",
        f"wait_for('{folder}/2/said_1.json')",
        f"wait_for('{folder}/1/said_0.json')",
    )
    assert make_local(2, 2).submit(sweep, [0, 1, 2], code) == {0: None, 1: None, 2: None}
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


def test_every_rank_is_told_its_place_and_runs_the_copied_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    sweep, code = make_sweep(tmp_path, "", "")
    (tmp_path / "s" / "sftlab").mkdir()  # would be taken for the package, if the working directory came first
    made = make_local(3)
    assert made.submit(sweep, [1], code) == {1: None}
    seen = [said(sweep.dir / "1", rank) for rank in range(3)]
    for rank, one in enumerate(seen):
        env = one["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "3")
        assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"], env["OMP_NUM_THREADS"]) == ("127.0.0.1", "lo", "1")
        assert env["PYTHONPATH"] == f"{code}:{tmp_path}:/mine" and env["PYTHONSAFEPATH"] == "1"
        assert one["cwd"] == str(tmp_path) and one["path"][:2] == [str(code), str(tmp_path)]
        assert "CUDA_VISIBLE_DEVICES" not in env
    assert len({one["env"]["MASTER_PORT"] for one in seen}) == 1 and not (sweep.dir / "0" / "said_0.json").exists()


@pytest.mark.parametrize(("processes", "points", "threads"), [(1, 1, None), (1, 2, "1"), (2, 1, "1")])
def test_threads_are_limited_where_several_processes_share_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, points: int, threads: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep, code = make_sweep(tmp_path, "")
    make_local(processes, points).submit(sweep, [0], code)
    assert said(sweep.dir / "0")["env"].get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    make_local(processes, points).submit(sweep, [0], code)
    env = said(sweep.dir / "0")["env"]
    assert (env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("5", "eth7")  # the user's own words stand


def test_one_point_at_a_time_is_live_on_this_terminal_and_several_are_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    speak = "print(f'out {rank}', flush=True); print(f'err {rank}', file=sys.stderr, flush=True)"
    sweep, code = make_sweep(tmp_path, speak)
    logs = sweep.dir / ".submitit" / "local_0"
    make_local(2, 1).submit(sweep, [0], code)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("out 0\n", "err 0\n")
    assert [(logs / f"0_{r}_log.{k}").read_text() for r in (0, 1) for k in ("out", "err")] == [
        "", "err 0\n", "out 1\n", "err 1\n",
    ]  # fmt: skip
    make_local(2, 2).submit(sweep, [0], code)
    assert capfd.readouterr() == ("", "")
    assert (logs / "0_0_log.out").read_text() == "out 0\n" and (logs / "0_0_log.err").read_text() == "err 0\n" * 2


def test_a_rank_that_fails_ends_its_point_and_no_other(tmp_path: Path) -> None:
    """Point 0: rank 1 exits with 3, and rank 0, which would wait for ever, is told to end. Point 1: killed."""
    folder = tmp_path / "s"
    wait = "signal.signal(signal.SIGTERM, lambda *_: (run_dir.joinpath(f'told_{rank}').touch(), sys.exit(0)))\n"
    wait += "(run_dir / f'ready_{rank}').touch()\n"
    failing = wait + "wait_for(run_dir / 'ready_0')\nsys.exit(3) if rank == 1 else wait_for('/never', 60)"
    killed = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None"
    sweep, code = make_sweep(tmp_path, failing, killed, "")
    make_local(2).submit(sweep, [0, 1, 2], code)
    assert summary(sweep, 0) == {"status": "failed", "rank": 1, "error": "ProcessEnded: rank 1 ended by exit code 3"}
    assert summary(sweep, 1) == {"status": "failed", "rank": 1, "error": "ProcessEnded: rank 1 ended by SIGKILL"}
    assert (folder / "0" / "told_0").exists() and not (folder / "0" / "told_1").exists()
    assert summary(sweep, 2) == {} and (folder / "2" / "said_1.json").exists()


def test_what_a_rank_said_of_its_failure_is_kept(tmp_path: Path) -> None:
    own = "(run_dir / 'summary.json').write_text(json.dumps({'status': 'failed', 'error': 'why'})); sys.exit(1)"
    sweep, code = make_sweep(tmp_path, own)
    make_local().submit(sweep, [0], code)
    assert summary(sweep, 0) == {"status": "failed", "error": "why"}


def test_a_rank_that_does_not_end_when_asked_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(run_dir / 'deaf').touch()\nwait_for('/never', 60)"
    sweep, code = make_sweep(tmp_path, deaf)
    point = make_local().start(sweep, 0, 0, code)
    wait_for(sweep.dir / "0" / "deaf")
    assert not point.ended()
    point.end()
    assert point.ended() and [p.returncode for p in point.running] == [-signal.SIGKILL]


def test_a_driver_that_is_told_to_end_asks_its_points_first(tmp_path: Path) -> None:
    save = "signal.signal(signal.SIGTERM, lambda *_: (run_dir.joinpath('saved').touch(), sys.exit(0)))\n"
    save += "(run_dir / 'ready').touch()\nwait_for('/never', 60)"
    sweep, code = make_sweep(tmp_path, save, save)
    before = signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        for num in (0, 1):
            wait_for(sweep.dir / str(num) / "ready")
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(SystemExit) as stop:
        make_local(1, 2).submit(sweep, [0, 1], code)
    teller.join()
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert all((sweep.dir / str(num) / "saved").exists() for num in (0, 1))


def test_no_more_points_run_than_there_are_slots(tmp_path: Path) -> None:
    """Each point counts those that have begun and not ended; the first waits until another has begun."""
    folder = tmp_path / "s"
    count = f"begun = len(list(pathlib.Path('{folder}').glob('*/said_0.json')))\n"
    count += f"ended = len(list(pathlib.Path('{folder}').glob('*/ended')))\n"
    count += "(run_dir / 'together').write_text(str(begun - ended))\n(run_dir / 'ended').touch()"
    sweep, code = make_sweep(tmp_path, f"wait_for('{folder}/1/said_0.json')\n" + count, *[count] * 3)
    make_local(1, 2).submit(sweep, [0, 1, 2, 3], code)
    seen = [int((folder / str(num) / "together").read_text()) for num in range(4)]
    assert max(seen) == 2


def test_the_command_of_a_dry_run_is_the_one_that_would_run(tmp_path: Path) -> None:
    sweep, code = make_sweep(tmp_path, "")
    assert make_local(3, 2).script(sweep, [0], code) == (
        "# 3 processes a point, 2 points at a time\n"
        f"PYTHONPATH={code} {sys.executable} -u -m sftlab.launchers.job {sweep.dir}/<num>"
    )


@pytest.mark.parametrize("name", ["processes_per_node", "parallel_points"])
def test_numbers_below_one_are_refused(name: str) -> None:
    options = {"_target_": "sftlab.launchers.local.Local", "processes_per_node": 1, "parallel_points": 1}
    made = launcher({**options, "dry_run": True})
    assert isinstance(made, Local) and made.dry_run
    with pytest.raises(ValueError, match=f"launcher.{name}=0: expected at least 1"):
        launcher({**options, "dry_run": False, name: 0})


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
