"""The owner of a run directory: one directory has one live run, on this machine or on any that sees the folder.

A run writes down its processes and its SLURM job before it writes anything else, and touches that file every BEAT_S.
Whether an owner lives is exact on its own machine (process and birth); elsewhere SLURM knows, or the last touch tells.
"""

import fcntl
import json
import os
import platform
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sftlab.common import squeue
from sftlab.common.files import LinkRefused, open_plain
from sftlab.common.process import birth, machine

FILE = ".owner.json"
MOST_BYTES = 1 << 20  # of an owner's file; a longer one is not ours
BEAT_S = 20.0
STALE_S = 300.0  # an owner elsewhere that SLURM does not know and that has not touched its file for so long is dead
States = Callable[[Iterable[str]], Mapping[str, squeue.Job]]


class Held(ValueError):
    """A live run holds the directory."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory. `processes` are [pid, birth] of the ranks on the first rank's machine, it first."""

    host: str
    machine: str
    processes: Sequence[Sequence[object]]
    job: str | None
    restart: int
    since: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    ended: bool = False

    @classmethod
    def of(cls, processes: Sequence[Sequence[object]]) -> "Owner":
        """Return the owner that these processes of this machine are."""
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(platform.node(), machine(), processes, job_id(), restart, since)

    def lives(self, folder: Path, states: States = squeue.states) -> bool:
        """Return whether the owner of a directory is alive, for all that can be known here."""
        if self.ended:
            return False
        if self.machine == machine():
            return any(born and birth(int(str(pid))) == born for pid, born in self.processes)
        if self.job and self.job == job_id():
            if self.restart < int(os.environ.get("SLURM_RESTART_COUNT") or 0):
                return False  # SLURM starts a job again after it has ended
        elif self.job:
            with suppress(squeue.NoSlurm):
                found = states([self.job])[self.job]
                if found.ended:
                    return False
                if found.state not in ("PENDING", squeue.UNKNOWN):
                    return True
        return age_s(folder) < STALE_S

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.processes[0][0]} on {self.host}{job}, since {self.since}"


def job_id() -> str | None:
    """Return the SLURM job that this process belongs to, as squeue names it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def this_process() -> tuple[str, int, str]:
    """Return (machine, pid, birth) of this process, for `Hold`."""
    return machine(), os.getpid(), birth(os.getpid())


def read_owner(folder: Path) -> Owner | None:
    """Return who holds a directory or held it last; None if nobody is written down."""
    try:
        with open_plain(folder / FILE, "rb") as file:
            return parse(file.read(MOST_BYTES).decode(errors="replace"))
    except OSError:
        return None


def parse(text: str) -> Owner | None:
    """Return the owner that a file names, None if it names none: torn, or written by somebody else."""
    try:
        found = Owner(**json.loads(text))
        sound = bool(found.processes) and isinstance(found.restart, int)
        sound = sound and all(int(str(pid)) > 0 and isinstance(born, str) for pid, born in found.processes)
        sound = sound and (found.job is None or re.fullmatch(r"\d+(_\d+)?", found.job) is not None)
        return found if sound and f"{found.host}{found.since}".isprintable() else None
    except (ValueError, TypeError, RecursionError):
        return None


def age_s(folder: Path) -> float:
    """Return the seconds since an owner touched its file, by the clock of the file system that holds it."""
    probe = folder / f"{FILE}.{uuid.uuid4().hex}"
    try:
        touched_s = (folder / FILE).stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    try:
        probe.touch(exist_ok=False)
        now_s = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # a folder that may only be read
        now_s = time.time()
    return now_s - touched_s


def living(folder: Path, states: States = squeue.states) -> Owner | None:
    """Return the live run that holds a directory, None if there is none or it is this process."""
    found = read_owner(folder)
    if found is None or (found.machine, *found.processes[0]) == this_process():
        return None
    return found if found.lives(folder, states) else None


def refuse_held(folder: Path, found: Owner | None) -> None:
    """Raise Held if there is a live run."""
    if found is not None:
        raise Held(
            f"run_dir={folder} is held by a live run: {found}. Wait until it has ended, end it, or name another "
            f"run_dir. If that process is certainly gone, delete {folder / FILE}"
        )


class Hold:
    """This run's hold on a directory: taken once, kept fresh by a thread, given back at the end.

    `members` are `this_process` of every rank; the caller is the first of them.
    """

    def __init__(self, folder: Path, members: Sequence[tuple[str, int, str]]) -> None:
        self.folder = folder
        self.owner = Owner.of([[pid, born] for place, pid, born in members if place == machine()])
        self.given_back = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the directory. Raises: Held if a live run has it; OSError if it cannot be written to."""
        with locked(self.folder / FILE) as file:
            found = parse(os.pread(file, MOST_BYTES, 0).decode(errors="replace"))
            mine = found is not None and (found.machine, *found.processes[0]) == this_process()
            if found is not None and not mine and found.lives(self.folder):
                refuse_held(self.folder, found)
            put(file, self.owner)
        self.thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self.thread.start()

    def give_back(self) -> None:
        """Let others have the directory. Does nothing where it was not taken."""
        if self.thread is None:
            return
        self.given_back.set()
        self.thread.join()
        self.thread = None
        with suppress(OSError), locked(self.folder / FILE) as file:
            found = parse(os.pread(file, MOST_BYTES, 0).decode(errors="replace"))
            if found is not None and found.token == self.owner.token:
                put(file, Owner(**{**asdict(found), "ended": True}))

    def _beat(self) -> None:
        """Touch the file; end this process at once if another run has taken the directory.

        That happens only if this process was taken for dead (suspended for long, cut off from the file system).
        """
        while not self.given_back.wait(BEAT_S):
            try:
                found = read_owner(self.folder)
                if found is not None and found.token != self.owner.token:
                    with suppress(OSError):
                        os.write(2, f"\nrun_dir={self.folder} was taken over by {found}: this run ends\n".encode())
                    os._exit(os.EX_TEMPFAIL)
                os.utime(self.folder / FILE)
            except OSError:  # a file system that is away for a while, or a deleted folder: the run itself will notice
                continue


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Open a file that stays where it is, never through a link, and lock it; yield its descriptor."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # what it is a second name of would be overwritten
            raise LinkRefused(f"{path} is no plain file, or has another name elsewhere (a hard link)")
        with suppress(OSError):  # a file system without locks: two that start in the same instant meet at the next beat
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def put(file: int, owner: Owner) -> None:
    """Write an owner over what the file holds."""
    text = json.dumps(asdict(owner)).encode()
    os.ftruncate(file, 0)
    os.pwrite(file, text, 0)
