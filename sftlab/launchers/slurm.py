"""The SLURM launcher: points become one job array through Submitit, one task per device.

Submitit writes the script, starts the ranks and requeues. What the ranks run, and what counts as success, is our own
code. We do not use Submitit's result files or its waiting: a killed rank leaves no result, so the wait never ends.
"""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from sftlab.launchers import squeue
from sftlab.launchers.job import Job
from sftlab.launchers.launcher import LaunchError, Points
from sftlab.launchers.squeue import NoSlurm

# How many requeues Submitit allows after a time limit. In jobs of 10 min or less it takes every preemption for one, so
# we do not use this limit: Job counts the attempts that brought no progress.
UNLIMITED = 1_000_000
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


@dataclass(kw_only=True)
class Slurm:
    """What the job of a point asks SLURM for. None leaves an option out of the script."""

    nodes: int
    processes_per_node: int
    timeout_min: int
    signal_delay_s: int
    gpus_per_node: int | None
    cpus_per_task: int | None
    mem_gb: float | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    array_parallelism: int | None
    setup: Sequence[str]
    python: str | None
    sbatch: Mapping[str, Any] | None
    max_stalled: int
    wait: bool
    dry_run: bool
    late_s: float = field(default=10.0, init=False)
    states: dict[str, squeue.Job] = field(default_factory=dict, init=False)  # of the jobs that were asked about
    unknown: dict[str, int] = field(default_factory=dict, init=False)  # how often in a row SLURM did not know a job
    asked_s: float = field(default=-POLL_S, init=False)

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "timeout_min", "max_stalled"):
            if getattr(self, name) < 1:
                raise ValueError(f"launcher.{name}={getattr(self, name)}: expected at least 1")
        if 60 * self.timeout_min <= self.signal_delay_s:
            raise ValueError(
                f"launcher.signal_delay_s={self.signal_delay_s} is no shorter than the time limit of "
                f"launcher.timeout_min={self.timeout_min}: a job would be told to stop as it starts"
            )

    @property
    def at_once(self) -> None:
        """The queue decides how many points run at the same time."""
        return None

    def start(self, points: Points) -> dict[int, str | None]:
        """Queue the points as one array (one job, if it is one point); return their job ids.

        Raises: NoSlurm if there is no sbatch, LaunchError if sbatch refuses.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if shutil.which("sbatch") is None:
            raise NoSlurm(
                "sbatch: no such program here. Submit from a machine with the SLURM clients, try launcher=local, "
                "or start a cluster on this machine (slurm/README.md)"
            )
        executor = self.executor(points)
        jobs = [Job(str(run_dir.absolute()), self.max_stalled) for run_dir in points.run_dirs.values()]
        try:
            with clean_environment():
                queued = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch refused the jobs, nothing is queued: {str(error).strip()}") from None
        self.asked_s = -POLL_S  # so that the next look asks SLURM
        return {num: job.job_id for num, job in zip(points.run_dirs, queued, strict=True)}

    def alive(self, run_dir: Path, job_id: str | None) -> bool:
        """Return whether a job waits or runs; True while SLURM does not answer."""
        if job_id is None:
            return False
        self.states.setdefault(job_id, squeue.Job("PENDING"))
        if time.monotonic() - self.asked_s >= POLL_S:
            self.asked_s = time.monotonic()
            try:
                self.states |= squeue.states(job for job, state in self.states.items() if not state.ended)
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

    def executor(self, points: Points) -> Executor:
        """Return Submitit's executor with these options."""
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
            array_parallelism=self.array_parallelism or UNLIMITED,
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
        path = f"{shlex.quote(str(points.code))}:{shlex.quote(points.cwd)}"
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
