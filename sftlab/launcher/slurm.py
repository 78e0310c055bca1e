"""The SLURM launcher: points become one job array through Submitit, one task a device.

Submitit writes the script, starts the ranks and requeues; what the ranks run and what counts as success is ours.
Neither its result files nor its waiting are used: a rank that is killed leaves no result, and the wait never ends.
"""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from sftlab.jobs import NoSlurm
from sftlab.launcher.job import Job
from sftlab.launcher.record import Sweep

# Submitit allows so many requeues at a time limit, and in jobs of 10 min or less it takes every preemption for one:
# Job counts those that brought nothing instead.
UNLIMITED = 1_000_000
# Of a job or a torchrun that submits: they would reach the new job with sbatch's copy of the environment.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")


class Executor(SlurmExecutor):  # type: ignore[misc]
    """Submitit's, made also where srun is missing: a dry run needs no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Return Submitit's number for a cluster that is there."""
        return 2


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """How a point's job looks. None leaves an option out of the script."""

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

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "timeout_min", "max_stalled"):
            if getattr(self, name) < 1:
                raise ValueError(f"launcher.{name}={getattr(self, name)}: expected at least 1")
        if 60 * self.timeout_min <= self.signal_delay_s:
            raise ValueError(
                f"launcher.signal_delay_s={self.signal_delay_s} is no shorter than the time limit of "
                f"launcher.timeout_min={self.timeout_min}: a job would be told to stop as it starts"
            )

    def submit(self, sweep: Sweep, nums: Sequence[int], code: Path) -> dict[int, str | None]:
        """Queue the points as one array (one job, if it is one point); return their job ids."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        from sftlab.launcher import LaunchError

        if shutil.which("sbatch") is None:
            raise NoSlurm(
                "sbatch: no such program here. Submit from a machine with the SLURM clients, try launcher=local, "
                "or start a cluster on this machine (slurm/README.md)"
            )
        executor = self.executor(sweep, code)
        points = [Job(str(sweep.run_dir(num).absolute()), self.max_stalled) for num in nums]
        try:
            with clean_environment():
                jobs = executor.submit_array(points)
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch refused the jobs, nothing is queued: {str(error).strip()}") from None
        return {num: job.job_id for num, job in zip(nums, jobs, strict=True)}

    def script(self, sweep: Sweep, nums: Sequence[int], code: Path) -> str:
        """Return the sbatch script."""
        executor = self.executor(sweep, code)
        if len(nums) > 1:
            executor.parameters["map_count"] = len(nums)
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text

    def executor(self, sweep: Sweep, code: Path) -> Executor:
        """Return Submitit's executor with these options."""
        executor = Executor(sweep.dir.absolute() / ".submitit/%j", max_num_timeout=UNLIMITED, python=self.python)
        options = {
            "job_name": sweep.name,
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
            setup=self.shell_lines(sweep, code),
            srun_args=["--kill-on-bad-exit=1"],  # one rank gone, the others would wait in a collective for ever
            additional_parameters=({} if sweep.cwd == os.getcwd() else {"chdir": sweep.cwd}) | self.extra(),
        )
        return executor

    def extra(self) -> dict[str, Any]:
        """Return `launcher.sbatch` as sbatch spells it."""
        given = self.sbatch or {}
        return {
            key.replace("_", "-"): value for key, value in given.items() if value is not None and value is not False
        }

    def shell_lines(self, sweep: Sweep, code: Path) -> list[str]:
        """Return the lines before srun: what the user wants, then what makes the ranks run the copied code."""
        path = f"{shlex.quote(str(code))}:{shlex.quote(sweep.cwd)}"
        lines = [f"unset {' '.join(FOREIGN)}", *self.setup]
        # -m puts the working directory first, where an edited checkout may lie; safe path leaves it to PYTHONPATH
        lines += [f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"]
        if self.cpus_per_task:
            lines += [f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}"]  # srun since 22.05 does not inherit it
        if self.cpus_per_task or self.processes_per_node > 1:  # or each rank starts a thread for every core of the node
            lines += [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{self.cpus_per_task or 1}}}"]
        return lines


@contextmanager
def clean_environment() -> Iterator[None]:
    """Take the variables of a surrounding SLURM job away from sbatch, which would obey some and pass on all."""
    prefixes = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    inside = "SLURM_JOB_ID" in os.environ
    taken = {k: v for k, v in os.environ.items() if inside and k.startswith(prefixes) and k not in KEPT}
    for key in taken:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(taken)
