"""What SLURM says about jobs: one call of squeue for all, and one of sacct for those that squeue has forgotten.

No result files are read here. The run directory says whether a point finished; SLURM says whether its job is alive.
"""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

SCRIPT = "|script="
FIELDS = f"%i|%T|%L|%r{SCRIPT}%o"
UNKNOWN = "UNKNOWN"
FORGOTTEN_POLLS = 5  # after so many unknown answers in a row SLURM will not remember the job
# Terminal states. The others (PENDING, RUNNING, REQUEUED, COMPLETING, SUSPENDED, ...) may still change. PREEMPTED and
# NODE_FAIL may too: if the job is requeued, squeue says PENDING soon after.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "NODE_FAIL")


@dataclass(frozen=True)
class Job:
    """The state of a job in SLURM's words, the seconds until its time limit, why it waits, and the script it runs."""

    state: str
    left_s: int | None = None
    reason: str = ""
    script: str = ""

    @property
    def ended(self) -> bool:
        """True once the job can only be resubmitted; False while it waits, runs, or nobody knows."""
        return self.state in ENDED


class NoSlurm(OSError):
    """The SLURM clients are missing or cannot reach the controller."""


def states(job_ids: Iterable[str]) -> dict[str, Job]:
    """Return the state of every job by its id (`12`, or `12_3` for an element of an array).

    A job that SLURM has forgotten is UNKNOWN (squeue keeps ended ones for MinJobAge, 5 min by default). An element that
    is gone while its siblings are known was cancelled before it ran: SLURM keeps no record of such an element.
    Raises: NoSlurm if squeue is missing or the controller does not answer.
    """
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    bases = sorted({job.split("_")[0] for job in wanted})
    found = in_queue(bases)
    if any(job not in found for job in wanted):
        found = in_accounting(bases) | found
    known = {job.split("_")[0] for job in found}
    gone = {job: Job("CANCELLED" if "_" in job and job.split("_")[0] in known else UNKNOWN) for job in wanted}
    return {job: found.get(job, gone[job]) for job in wanted}


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs. Raises: NoSlurm if scancel is missing or refuses."""
    wanted = list(job_ids)
    if wanted:
        ask("scancel", *wanted)


def max_array_size() -> int | None:
    """Return how many jobs one array may have; None if SLURM does not say."""
    try:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.M)
    except NoSlurm:
        return None
    return int(found[1]) if found else None


def in_queue(bases: list[str]) -> dict[str, Job]:
    """Return what squeue knows about jobs and arrays, one entry per element."""
    try:
        text = ask(
            "squeue", "--all", "--array", "--noheader", "--states=all", f"--format={FIELDS}", f"-j{','.join(bases)}"
        )
    except NoSlurm as error:
        if "Invalid job id" in str(error):  # squeue says this if it knows none of the jobs
            return {}
        raise
    rows = [line.partition(SCRIPT) for line in text.splitlines()]
    fields = [(*row.split("|", 3), script) for row, _, script in rows if row.count("|") >= 3]
    return {job: Job(state, seconds(left), reason, script) for job, state, left, reason, script in fields}


def in_accounting(bases: list[str]) -> dict[str, Job]:
    """Return what sacct knows; nothing if the site keeps no accounts."""
    try:
        text = ask("sacct", "--noheader", "--parsable2", "--format=JobID,State", f"-j{','.join(bases)}")
    except NoSlurm:
        return {}
    rows = [line.split("|", 1) for line in text.splitlines() if "|" in line]
    # "CANCELLED by 1000" is CANCELLED; 12.batch and 12_[3-5] are not jobs
    return {job: Job(state.split()[0]) for job, state in rows if re.fullmatch(r"\d+(_\d+)?", job) and state.strip()}


def ask(*command: str) -> str:
    """Return what a SLURM client prints. Raises: NoSlurm if it cannot be run, fails, or says nothing within 60 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        raise NoSlurm(
            f"{command[0]}: no such program here; run this on a machine with the SLURM clients, "
            'or first eval "$(slurm/local-cluster env)"'
        ) from None
    except subprocess.TimeoutExpired:
        raise NoSlurm(f"{command[0]} did not answer within 60 s: is the SLURM controller up (scontrol ping)?") from None
    if done.returncode:
        raise NoSlurm(f"{' '.join(command[:3])} ... failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def seconds(time_left: str) -> int | None:
    """Return the seconds in SLURM's [days-][[hours:]minutes:]seconds; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", time_left.strip())
    if not match:
        return None
    days, first, second, last = match.groups()
    hours, minutes = (first, second) if second is not None else (None, first)
    return ((int(days or 0) * 24 + int(hours or 0)) * 60 + int(minutes or 0)) * 60 + int(last)
