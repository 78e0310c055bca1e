"""The local launcher: a point's processes on this machine, no SLURM; one point after another unless told otherwise.

Rank 0's console is this terminal's while one point runs at a time. One process that fails ends the others, as with
srun.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sftlab.common import run_directory
from sftlab.sweeps.record import Sweep

GRACE_S = 10.0  # from asking a process to end to ending it


@dataclass(frozen=True, kw_only=True)
class Local:
    """How many processes a point has, and how many points run at the same time."""

    processes_per_node: int
    parallel_points: int
    dry_run: bool

    def __post_init__(self) -> None:
        for name in ("processes_per_node", "parallel_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"launcher.{name}={getattr(self, name)}: expected at least 1")

    def submit(self, sweep: Sweep, nums: Sequence[int], code: Path) -> dict[int, str | None]:
        """Run the points; return once all have ended. A point that fails does not keep the others from running."""
        waiting, running = list(nums), dict[int, Processes]()
        # By default SIGTERM would end this process at once, and leave the points behind, training.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            while waiting or running:
                while waiting and len(running) < self.parallel_points:
                    slot = min(set(range(self.parallel_points)) - set(running))
                    running[slot] = self.start(sweep, waiting.pop(0), slot, code)
                time.sleep(0.05)
                running = {slot: point for slot, point in running.items() if not self.ended(sweep, point)}
        finally:
            for point in running.values():
                point.end()
            signal.signal(signal.SIGTERM, before)
        return dict.fromkeys(nums)

    def start(self, sweep: Sweep, num: int, slot: int, code: Path) -> "Processes":
        """Start one point's processes."""
        run_dir = sweep.run_dir(num).absolute()
        env = os.environ | {
            "WORLD_SIZE": str(self.processes_per_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(code), sweep.cwd, os.environ.get("PYTHONPATH")])),
        }
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if self.processes_per_node > 1 or self.parallel_points > 1:  # or each starts a thread for every core
            env.setdefault("OMP_NUM_THREADS", "1")
        devices = self.devices(slot)
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        live = self.parallel_points == 1
        point = Processes(sweep.dir / ".submitit" / f"local_{num}", str(num))
        for rank in range(self.processes_per_node):
            ranked = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            point.start([*COMMAND, str(run_dir)], ranked, sweep.cwd, rank, live and rank == 0)
        return point

    def ended(self, sweep: Sweep, point: "Processes") -> bool:
        """Return whether a point has ended. A process that could not say itself that it failed is spoken for."""
        if not point.ended():
            return False
        if point.first_failed is not None:
            rank, code = point.first_failed
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            run_directory.note_failure(
                sweep.run_dir(int(point.name)), rank, ProcessEnded(f"rank {rank} ended by {how}")
            )
        return True

    def devices(self, slot: int) -> list[str]:
        """Return the GPUs of a slot where there are enough for all slots, else none: every point then sees them all."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None and shutil.which("nvidia-smi") is None:
            return []
        listed = visible.split(",") if visible else [str(i) for i in range(count_gpus())]
        wanted = self.processes_per_node
        return listed[slot * wanted : (slot + 1) * wanted] if len(listed) >= self.parallel_points * wanted else []

    def script(self, sweep: Sweep, nums: Sequence[int], code: Path) -> str:
        """Return the command of each process of a point."""
        times = f"{self.processes_per_node} processes a point, {self.parallel_points} points at a time"
        return f"# {times}\nPYTHONPATH={code} {' '.join(COMMAND)} {sweep.dir}/<num>"


class ProcessEnded(RuntimeError):
    """A rank's process ended without a word."""


COMMAND = (sys.executable, "-u", "-m", "sftlab.launchers.job")


@dataclass
class Processes:
    """The processes of one point, and their logs: <folder>/<num>_<rank>_log.out and .err, as Submitit names them."""

    folder: Path
    name: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    first_failed: tuple[int, int] | None = None  # rank, and exit code or the negative number of a signal

    def start(self, command: Sequence[str], env: dict[str, str], cwd: str, rank: int, live: bool) -> None:
        """Start a rank. `live`: its output is this terminal's; its errors go there and to its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        out, err = (self.folder / f"{self.name}_{rank}_log.{kind}" for kind in ("out", "err"))
        with out.open("ab") as out_file, err.open("ab") as err_file:
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
        """Return whether all have ended; ends the rest once one has failed."""
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
        """End what still runs: asked first, so that ranks in a collective can say what they met."""
        for sig in (signal.SIGTERM, signal.SIGKILL):
            deadline_s = time.monotonic() + GRACE_S
            alive = [process for process in self.running if process.poll() is None]
            for process in alive:
                process.send_signal(sig)
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline_s:
                time.sleep(0.05)


def copy(source: IO[bytes], file: Path) -> None:
    """Copy a process's standard error to this one's and to a file, as it comes."""
    with file.open("ab") as out:
        while chunk := os.read(source.fileno(), 65536):
            out.write(chunk)
            out.flush()
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
