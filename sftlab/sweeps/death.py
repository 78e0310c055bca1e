"""Why a point ended without finishing: what its own summary, SLURM and the logs of its ranks say, and which log.

A rank's own error goes first. But a rank that only lost another one, or was killed, does not know why: then SLURM's
word counts, then the last lines of the logs, where srun and slurmstepd write.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.common.files import open_plain
from sftlab.common.owner import Owner
from sftlab.common.squeue import UNKNOWN, Job

TAIL_BYTES = 1 << 16
# Words in a summary that tell of a consequence and not of a cause.
CONSEQUENCES = ("RankLost", "ProcessEnded", "by peer", "Broken pipe")
STATES = {
    "OUT_OF_MEMORY": "killed for its memory: raise launcher.mem_gb",
    "TIMEOUT": "ended at its time limit: raise launcher.timeout_min",
    "DEADLINE": "ended at its deadline",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "PREEMPTED": "preempted, and not started again",
    "CANCELLED": "cancelled",
}
# What slurmstepd, srun and the kernel write, the most telling first. STEP ... CANCELLED only says that srun ended it.
SIGNS = (
    (r"oom[-_]kill|Out[ _]Of[ _]Memory|[Ee]xceeded (?:job |step )?memory limit", STATES["OUT_OF_MEMORY"]),
    (r"CANCELLED AT \S+ DUE TO TIME LIMIT", STATES["TIMEOUT"]),
    (r"DUE TO NODE FAILURE|[Nn]ode failure", STATES["NODE_FAIL"]),
    (r"CANCELLED AT \S+ DUE TO PREEMPTION", STATES["PREEMPTED"]),
    (r"JOB \d+ ON \S+ CANCELLED AT", STATES["CANCELLED"]),
    (
        r"error: \S+: tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted|Illegal instruction)",
        r"rank \1: \2",
    ),
)
RAISED = re.compile(r"^(?:\d+: )?([A-Za-z_][\w.]*(?:Error|Exception|Stalled|Held|NonFinite|OutOfMemory)\b.*)$", re.M)


@dataclass(frozen=True)
class Death:
    """A reason in words, and the file that says so (None: SLURM alone, or nobody)."""

    reason: str
    log: Path | None = None


def death(
    summary: Mapping[str, Any], job: Job | None, owner: Owner | None, run_dir: Path, logs: Sequence[Path]
) -> Death:
    """Return why a point ended. `owner` is who held its directory and is gone; `logs` are its ranks' errors."""
    told = str(summary.get("error") or "")
    train_log = run_dir / "train.log"
    own_log = train_log if train_log.exists() else next(iter(logs), None)
    if told and not any(word in told for word in CONSEQUENCES):
        said = [log for log in logs if told.partition("\n")[0][:200] in tail(log)]
        return Death(told, own_log if own_log == train_log else next(iter(said), own_log))
    found = read_signs(logs)
    vague = job is not None and job.state == "CANCELLED" and (found is not None or not logs)  # by whom, and why?
    if job and job.state in STATES and not vague:
        return Death(f"{STATES[job.state]} (SLURM: {job.state})", found.log if found else next(iter(logs), None))
    found = found or last_error(logs)
    if found:
        return found
    if job and job.state == "COMPLETED" and not told:  # a shared file system may show the summary a little later
        return Death("", own_log)
    if not logs and job and job.ended:
        why = f", {job.reason}" if job.reason not in ("", "None") else ""
        return Death(f"never started (SLURM: {job.state}{why})")
    if told:
        killed = ", perhaps for its memory (the kernel's log knows: dmesg)" if "SIGKILL" in told else ""
        return Death(told + killed, own_log)
    if job and job.state != UNKNOWN and job.ended:
        return Death(f"SLURM: {job.state}", own_log)
    if owner is not None:
        return Death(f"{owner} is gone and left no word: it was killed, perhaps for its memory", own_log)
    return Death("", own_log)


CAUSES = (
    ("oom", r"killed for its memory|OutOfMemory|out of memory|SIGKILL"),
    ("timeout", r"time limit|deadline|TIMEOUT|DEADLINE"),
    ("node", r"its node|NODE_FAIL|BOOT_FAIL|NCCL error|unhandled system error"),
    ("preempted", r"preempted|PREEMPTED"),
    ("stopped", r"cancelled|CANCELLED"),
)


def cause(state: str, reason: str) -> str:
    """Return why a point that did not finish ended, in a word: oom, timeout, node, preempted, stopped or code."""
    if state == "stopped":
        return "stopped"
    known = next((name for name, pattern in CAUSES if re.search(pattern, reason)), "")
    return known or ("code" if reason else "unknown")


def read_signs(logs: Sequence[Path]) -> Death | None:
    """Return what SLURM's programs wrote at the end of the logs, the most telling of all."""
    texts = [(log, tail(log)) for log in logs]
    for pattern, reason in SIGNS:
        for log, text in texts:
            found = re.search(pattern, text)
            if found:
                line = text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0].strip()
                return Death(f"{found.expand(reason)} ({line[:200]})", log)
    return None


def last_error(logs: Sequence[Path]) -> Death | None:
    """Return the last error that a rank raised by itself, else one that only lost another rank."""
    lost = None
    for log in logs:
        text = tail(log)
        at = text.rfind("Traceback (most recent call last)")
        raised = list(RAISED.finditer(text, at)) if at >= 0 else []
        if raised:
            found = Death(raised[-1][1], log)
            if not any(word in found.reason for word in CONSEQUENCES):
                return found
            lost = lost or found
    return lost


def tail(log: Path) -> str:
    """Return the end of a log of the last attempt; nothing if it is not there."""
    try:
        with open_plain(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = str(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return text[max(0, text.rfind("Starting with JobEnvironment")) :]  # a requeued job appends to its logs
