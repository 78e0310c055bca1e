"""The local launcher: the processes of points on this machine, without SLURM.

The console of rank 0 is this terminal's while one point runs at a time. One process that fails ends the others of its
point, as with srun. If the driver dies, its points save and end (`retry=failed` resumes them); their process ids lie
beside their logs, so that a driver that starts meanwhile sees them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sftlab.common import run_directory
from sftlab.common.files import open_plain, read_json, refuse_links, write_json
from sftlab.common.process import birth
from sftlab.common.values import Count
from sftlab.launchers.job import DRIVER
from sftlab.launchers.launcher import Points

GRACE_S = 10.0  # seconds in which the other ranks of a failed point may end by themselves
PATIENCE_S = 120.0  # seconds in which a point may save after SIGTERM: longer than a step and a checkpoint


@dataclass(kw_only=True)
class Local:
    """How many processes a point has, and how many points run at the same time."""

    processes_per_node: Count
    parallel_points: Count
    dry_run: bool
    fail_fast: bool = False  # sweeps/launch.py
    wait: bool = field(default=True, init=False)
    late_s: float = field(default=0.0, init=False)
    mine: dict[Path, "tuple[int, Processes]"] = field(default_factory=dict, init=False)  # slot and processes
    asked_s: dict[Path, float] = field(default_factory=dict, init=False)  # when a point was asked to stop

    def __post_init__(self) -> None:
        if type(self.fail_fast) is not bool:
            raise ValueError(f"launcher.fail_fast={self.fail_fast}: expected true or false")
        for name in ("processes_per_node", "parallel_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"launcher.{name}={getattr(self, name)}: expected at least 1")

    @property
    def at_once(self) -> int:
        """How many points run at the same time."""
        return self.parallel_points

    def start(self, points: Points) -> dict[int, str | None]:
        """Start the processes of each point in the lowest free slot, and note their ids for a later driver."""
        for num, run_dir in points.run_dirs.items():
            taken = {slot for slot, _ in self.mine.values()}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            points.job_folder()
            started = self._start(points, num, slot)
            self.asked_s.pop(run_dir, None)
            self.mine[run_dir] = (slot, started)
            ids = [[process.pid, birth(process.pid)] for process in started.running]
            write_json(noted_file(run_dir), {"host": os.uname().nodename, "processes": ids})
        return dict.fromkeys(points.run_dirs)

    def alive(self, run_dir: Path, job_id: str | None = None) -> bool:
        """Return whether any process of a point is there; end one that was asked to stop and does not."""
        asked_s = self.asked_s.get(run_dir)
        if asked_s is not None and time.monotonic() - asked_s > PATIENCE_S:
            send(run_dir, signal.SIGKILL)
        if run_dir not in self.mine:
            return bool(living(run_dir))
        processes = self.mine[run_dir][1]
        if not processes.ended():
            return True
        del self.mine[run_dir]
        # A process that was killed could not say itself that it failed. One that was asked to stop has not failed.
        rank, code = processes.first_failed or (0, 0)
        stopped = code == os.EX_TEMPFAIL and run_directory.read_summary(run_dir).get("status") == "stopped"
        if code and not stopped and run_dir not in self.asked_s:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            run_directory.note_failure(run_dir, rank, ProcessEnded(f"rank {rank} ended by {how}"))
        return False

    def stop(self, run_dir: Path, job_id: str | None = None) -> None:
        """Send SIGTERM to the processes of a point: they save and end."""
        self.asked_s[run_dir] = time.monotonic()
        send(run_dir, signal.SIGTERM)

    def interrupted(self) -> str:
        """Let the points save and end: the terminal that ran them is given back."""
        for run_dir in self.mine:
            self.stop(run_dir)
        try:
            while any([self.alive(run_dir) for run_dir in list(self.mine)]):
                time.sleep(0.1)
        except KeyboardInterrupt:  # a second Ctrl-C
            for run_dir in self.mine:
                send(run_dir, signal.SIGKILL)
            raise
        return "the points that ran have saved and stopped"

    def script(self, points: Points) -> str:
        """Return the command of each process of a point."""
        times = f"{self.processes_per_node} processes per point, {self.parallel_points} points at a time"
        return f"# {times}\nPYTHONPATH={points.code} {' '.join(COMMAND)} {points.sweep_dir}/<num>"

    def _start(self, points: Points, num: int, slot: int) -> "Processes":
        run_dir, live = points.run_dirs[num], self.parallel_points == 1
        return self.ranks(run_dir, noted_file(run_dir).parent, str(num), points.imports, points.cwd, slot, live)

    def ranks(
        self, run_dir: Path, logs: Path, name: str, imports: Sequence[str], cwd: str, slot: int = 0, live: bool = True
    ) -> "Processes":
        """Return the processes of one run, started as torchrun would start them; their logs lie in `logs`."""
        env = os.environ | {
            "WORLD_SIZE": str(self.processes_per_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONSAFEPATH": "1",
            DRIVER: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(filter(None, [*imports, os.environ.get("PYTHONPATH")])),
        }
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if self.processes_per_node > 1 or self.parallel_points > 1:  # else each process starts one thread per core
            env.setdefault("OMP_NUM_THREADS", "1")
        devices = self.devices(slot)
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        started = Processes(logs, name)
        for rank in range(self.processes_per_node):
            ranked = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [*COMMAND, str(run_dir.absolute())]
            started.start(command, ranked, cwd, rank, live and rank == 0)
        return started

    def devices(self, slot: int) -> list[str]:
        """Return the GPUs of a slot. Where there are too few for all slots, return none: every point sees them all."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None and shutil.which("nvidia-smi") is None:
            return []
        listed = visible.split(",") if visible else [str(i) for i in range(count_gpus())]
        wanted = self.processes_per_node
        return listed[slot * wanted : (slot + 1) * wanted] if len(listed) >= self.parallel_points * wanted else []


def noted_file(run_dir: Path) -> Path:
    """Return the file that notes the process ids of a point."""
    return run_dir.parent / ".submitit" / f"local_{run_dir.name}" / "processes.json"


def living(run_dir: Path) -> list[int]:
    """Return the process ids of a point that still belong to the processes that were started, on this host."""
    noted = read_json(noted_file(run_dir))
    if noted.get("host") != os.uname().nodename:
        return []
    found = [pair for pair in noted.get("processes", ()) if isinstance(pair, list) and len(pair) == 2]
    return [pid for pid, born in found if isinstance(pid, int) and pid > 1 and born and birth(pid) == born]


def send(run_dir: Path, number: signal.Signals) -> None:
    """Send a signal to the processes of a point that still run."""
    for pid in living(run_dir):
        os.kill(pid, number)


class ProcessEnded(RuntimeError):
    """The process of a rank ended and left no message."""


COMMAND = (sys.executable, "-u", "-m", "sftlab.launchers.job")


@dataclass
class Processes:
    """The processes of one point, and their logs: <folder>/<num>_<rank>_log.out and .err, as Submitit names them."""

    folder: Path
    name: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    first_failed: tuple[int, int] | None = None  # rank, and its exit code (the negative number of a signal)

    def start(self, command: Sequence[str], env: dict[str, str], cwd: str, rank: int, live: bool) -> None:
        """Start a rank. With `live` its output goes to this terminal, and its errors both there and to its log."""
        refuse_links(self.folder.parent, self.folder.name).mkdir(parents=True, exist_ok=True)
        out, err = (self.folder / f"{self.name}_{rank}_log.{kind}" for kind in ("out", "err"))
        with open_plain(out, "ab") as out_file, open_plain(err, "ab") as err_file:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdout=None if live else out_file,
                stderr=subprocess.PIPE if live else err_file,
            )
        if live:
            tee = threading.Thread(target=copy, args=(process.stderr, err), daemon=True)
            tee.start()
            self.threads.append(tee)
        self.running.append(process)

    def ended(self) -> bool:
        """Return whether all processes have ended. Once one has failed, end the others."""
        codes = [process.poll() for process in self.running]
        if any(codes) and self.first_failed is None:
            self.first_failed = next((rank, code) for rank, code in enumerate(codes) if code)
        if any(codes) and None in codes:
            self.end()
            codes = [process.poll() for process in self.running]
        if None not in codes:
            for thread in self.threads:
                thread.join()
        return None not in codes

    def end(self) -> None:
        """End what still runs: SIGTERM first, so that ranks in a collective can report their error, then SIGKILL."""
        for sig in (signal.SIGTERM, signal.SIGKILL):
            deadline_s = time.monotonic() + GRACE_S
            alive = [process for process in self.running if process.poll() is None]
            for process in alive:
                process.send_signal(sig)
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline_s:
                time.sleep(0.05)


def copy(source: IO[bytes], file: Path) -> None:
    """Copy the standard error of a process to ours and to a file while it runs."""
    with open_plain(file, "ab") as out:
        while chunk := os.read(source.fileno(), 65536):
            out.write(chunk)
            out.flush()
            with suppress(OSError):  # a terminal that is gone: the log still gets everything
                os.write(2, chunk)
    source.close()


def count_gpus() -> int:
    """Return how many GPUs this machine has."""
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len([line for line in done.stdout.splitlines() if line.startswith("GPU ")]) if done.returncode == 0 else 0


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: Any = s.getsockname()[1]
        return int(port)
