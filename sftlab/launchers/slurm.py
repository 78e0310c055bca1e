"""The SLURM launcher: points become one job array through Submitit, one task per device.

Submitit writes the script, starts the ranks and requeues. What the ranks run, and what counts as success, is our own
code. We do not use Submitit's result files or its waiting: a killed rank leaves no result, so the wait never ends.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from submitit import SlurmExecutor

from sftlab.common import run_directory, squeue
from sftlab.common.secrets import kinds
from sftlab.common.squeue import NoSlurm
from sftlab.common.values import Count, NotNegative, Whole
from sftlab.estimating.devices import device_named
from sftlab.launchers.job import Job
from sftlab.launchers.launcher import LaunchError, Points

# How many requeues Submitit allows after a time limit. In jobs of 10 min or less it takes every preemption for one, so
# we do not use this limit: Job counts the attempts that brought no progress.
UNLIMITED = 1_000_000
CHECKS = ("warn", "error", "off")
POLL_S = 2.0  # seconds between two questions to SLURM
# Unset these: sbatch would leak the submitter's rank variables into the job.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")


class Executor(SlurmExecutor):  # type: ignore[misc]
    """Submitit's executor, which can also be made where srun is missing: a dry run needs no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Return the number by which Submitit knows that a cluster is there."""
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Return the sbatch script. Raises: LaunchError if it holds a secret: scripts stay, and SLURM shows them."""
        text: str = super()._make_submission_file_text(command, uid)
        for kind in kinds(text):
            raise LaunchError(f"the sbatch script would hold {kind}: put it into a file that launcher.setup reads")
        return text

    @property
    def _submitit_command_str(self) -> str:
        """The command of a rank: ours, which looks at the pickled job's folder before Submitit loads it."""
        return f"{self.python} -u -m sftlab.launchers.submitted {shlex.quote(str(self.folder))}"


@dataclass(kw_only=True)
class Slurm:
    """What the job of a point asks SLURM for. None leaves an option out of the script."""

    nodes: Count
    processes_per_node: Count
    timeout_min: Count
    signal_delay_s: Whole
    gpus_per_node: Whole | None
    cpus_per_task: Count | None
    mem_gb: NotNegative | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    array_parallelism: Count | None
    setup: Sequence[str]
    python: str | None
    sbatch: Mapping[str, Any] | None
    max_stalled: Count
    wait: bool
    dry_run: bool
    device: str | None = None
    check_memory: Literal["warn", "error", "off"] = "warn"
    fail_fast: bool = False  # sweeps/watch.py
    late_s: float = field(default=10.0, init=False)
    states: dict[str, squeue.Job] = field(default_factory=dict, init=False)  # of the jobs that were asked about
    unknown: dict[str, int] = field(default_factory=dict, init=False)  # how often in a row SLURM did not know a job
    asked_s: float = field(default=-POLL_S, init=False)

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "timeout_min", "max_stalled"):
            if getattr(self, name) < 1:
                raise ValueError(f"launcher.{name}={getattr(self, name)}: expected at least 1")
        if self.check_memory not in CHECKS:
            raise ValueError(f"launcher.check_memory={self.check_memory}: expected {', '.join(CHECKS)}")
        if self.device is not None:
            device_named(self.device, "launcher.device")
        for name, value in vars(self).items():  # a line break would begin a line of its own in the script
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"launcher.{name}={value!r}: expected one line of text")
        for key, value in (self.sbatch or {}).items():
            if not f"{key}{value}".isprintable() or " " in str(key):
                raise ValueError(f"launcher.sbatch.{key}={value!r}: expected one line of text")
        if 60 * self.timeout_min <= self.signal_delay_s:
            raise ValueError(
                f"launcher.signal_delay_s={self.signal_delay_s} is no shorter than the time limit of "
                f"launcher.timeout_min={self.timeout_min}: a job would be told to stop as it starts, "
                "so set a longer time or a shorter delay"
            )

    @property
    def at_once(self) -> None:
        """The queue decides how many points run at the same time."""
        return None

    def start(self, points: Points) -> dict[int, str | None]:
        """Queue the points as one array (one job for one point), or several within MaxArraySize; return their ids.

        Raises: NoSlurm if there is no sbatch, LaunchError if sbatch refuses; nothing stays queued then.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if shutil.which("sbatch") is None:
            raise NoSlurm(
                "sbatch: no such program here. Submit from a machine with the SLURM clients, try launcher=local, "
                "or start a cluster on this machine (slurm/README.md)"
            )
        self.look_at_memory(points)
        points.job_folder()
        found: dict[int, str | None] = {}
        arrays = self.arrays(points)
        for part in arrays:
            jobs = [Job(str(run_dir.absolute()), self.max_stalled) for run_dir in part.run_dirs.values()]
            try:
                with clean_environment():
                    queued = self.executor(part, len(arrays)).submit_array(jobs)
            except (FailedJobError, FailedSubmissionError) as error:
                squeue.cancel({str(job).partition("_")[0] for job in found.values()})
                raise LaunchError(f"sbatch refused the jobs, nothing is queued: {str(error).strip()}") from None
            found |= {num: job.job_id for num, job in zip(part.run_dirs, queued, strict=True)}
        self.states |= {str(job): squeue.Job("PENDING") for job in found.values()}
        self.asked_s = -POLL_S  # so that the next look asks SLURM
        return found

    def look_at_memory(self, points: Points) -> None:
        """Say which points would not fit on `device`, before they are queued; nothing where no device is named.

        Raises: LaunchError for these if `check_memory` is error.
        """
        if self.device is None or self.check_memory == "off":
            return
        from sftlab.estimating.submission import too_large  # it imports torch: 3 s that only this check needs

        configs = {num: run_directory.read_config(run_dir) for num, run_dir in points.run_dirs.items()}
        lines = [f"point {num}: {said}" for num, said in too_large(configs, self.device).items()]
        if not lines:
            return
        text = "\n".join(
            [
                *lines,
                "python -m sftlab.estimate with the same overrides shows what takes the memory, and what to change",
            ]
        )
        if self.check_memory == "error":
            raise LaunchError(f"nothing is queued (launcher.check_memory=error):\n{text}")
        print(f"warning (launcher.check_memory):\n{text}", file=sys.stderr)

    def arrays(self, points: Points) -> list[Points]:
        """Return the points in parts that SLURM takes as one array each. Raises: LaunchError, see `executor`."""
        nums = list(points.run_dirs)
        most = (squeue.max_array_size() if len(nums) > 1 else None) or len(nums)
        parts = [points.only(nums[at : at + most]) for at in range(0, len(nums), most)]
        if self.array_parallelism is not None and self.array_parallelism < len(parts):
            raise LaunchError(
                f"{len(nums)} points are {len(parts)} arrays here (MaxArraySize={most}), which cannot share "
                f"launcher.array_parallelism={self.array_parallelism}: raise it to {len(parts)}, or sweep fewer points"
            )
        return parts

    def alive(self, run_dir: Path, job_id: str | None) -> bool:
        """Return whether a job waits or runs; True while SLURM does not answer."""
        if job_id is None:
            return False
        if job_id not in self.states:  # a job of an earlier driver: ask at once
            self.states[job_id] = squeue.Job("PENDING")
            self.asked_s = -POLL_S
        if time.monotonic() - self.asked_s >= POLL_S:
            self.asked_s = time.monotonic()
            try:  # a job whose node failed may be requeued
                asked = [job for job, s in self.states.items() if not s.ended or s.state == "NODE_FAIL"]
                self.states |= squeue.states(asked)
            except NoSlurm:  # a controller that restarts is away for minutes; the jobs carry on
                return True
            for job, state in self.states.items():
                self.unknown[job] = self.unknown.get(job, 0) + 1 if state.state == squeue.UNKNOWN else 0
        return not self.states[job_id].ended and self.unknown.get(job_id, 0) < squeue.FORGOTTEN_POLLS

    def stop(self, run_dir: Path, job_id: str | None) -> None:
        """Cancel a job: SLURM sends SIGTERM first."""
        squeue.cancel([job_id] if job_id else [])

    def interrupted(self) -> str:
        """Leave the jobs alone."""
        return "the jobs carry on"

    def script(self, points: Points) -> str:
        """Return the sbatch script."""
        executor = self.executor(points)
        if len(points.run_dirs) > 1:
            executor.parameters["map_count"] = len(points.run_dirs)
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text

    def executor(self, points: Points, num_arrays: int = 1) -> Executor:
        """Return Submitit's executor with these options; several arrays share `array_parallelism`."""
        executor = Executor(points.sweep_dir.absolute() / ".submitit/%j", max_num_timeout=UNLIMITED, python=self.python)
        options = {
            "job_name": points.name,
            "nodes": self.nodes,
            "ntasks_per_node": self.processes_per_node,
            "time": self.timeout_min,
            "signal_delay_s": self.signal_delay_s,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}M",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "wckey": None,
        }
        executor.update_parameters(
            **options,
            array_parallelism=(self.array_parallelism or UNLIMITED) // num_arrays,
            setup=self.shell_lines(points),
            srun_args=["--kill-on-bad-exit=1"],  # or the other ranks would wait in a collective forever
            additional_parameters=({} if points.cwd == os.getcwd() else {"chdir": points.cwd}) | self.extra(),
        )
        return executor

    def extra(self) -> dict[str, Any]:
        """Return the options of `launcher.sbatch` in sbatch's spelling."""
        given = self.sbatch or {}
        return {
            key.replace("_", "-"): value for key, value in given.items() if value is not None and value is not False
        }

    def shell_lines(self, points: Points) -> list[str]:
        """Return the shell lines before srun: the user's own, then those that make the ranks run the copied code."""
        path = ":".join(map(shlex.quote, points.imports))
        lines = [f"unset {' '.join(FOREIGN)}", *self.setup]
        # Without PYTHONSAFEPATH, -m would import an edited checkout from the working directory before the copy.
        lines += [f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"]
        if self.cpus_per_task:
            # srun has not inherited --cpus-per-task since SLURM 22.05
            lines += [f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}"]
        if self.cpus_per_task or self.processes_per_node > 1:  # else each rank starts one thread per core
            lines += [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{self.cpus_per_task or 1}}}"]
        return lines


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the variables of a surrounding SLURM job from sbatch, which would obey some and pass on all."""
    prefixes = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    inside = "SLURM_JOB_ID" in os.environ
    taken = {k: v for k, v in os.environ.items() if inside and k.startswith(prefixes) and k not in KEPT}
    for key in taken:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(taken)
