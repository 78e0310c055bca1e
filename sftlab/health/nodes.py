"""The doctor on the nodes of a cluster: one process per node in one job, as the launcher's options ask for it."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.health.finding import Finding, read

MINUTES = 10
MARK = "sftlab-doctor "  # before what a node found, on its one line


def command(options: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Return the srun that runs `python -m sftlab.doctor json=true` on every node of a launcher's options."""
    asked = {
        "nodes": options["nodes"],
        "ntasks-per-node": 1,
        "time": MINUTES,
        "partition": options.get("partition"),
        "account": options.get("account"),
        "qos": options.get("qos"),
        "constraint": options.get("constraint"),
        "gpus-per-node": options.get("gpus_per_node"),
        "cpus-per-task": options.get("cpus_per_task"),
        "mem": None if options.get("mem_gb") is None else f"{options['mem_gb']}G",
    }
    extra = options.get("sbatch") or {}
    asked |= {key: None if value is False else "" if value is True else value for key, value in extra.items()}
    flags = [f"--{key}" + (f"={value}" if value != "" else "") for key, value in asked.items() if value is not None]
    python = options.get("python") or shlex.quote(sys.executable)
    there = f"{python} -m sftlab.doctor json=true {shlex.join(words)}"
    lines = [*(options.get("setup") or ()), there]
    return ["srun", *flags, "bash", "-c", "\n".join(lines)]


def examine_nodes(options: Mapping[str, Any], words: Sequence[str]) -> dict[str, list[Finding]]:
    """Return what every node found, by its name. Raises: ValueError if SLURM does not run the job."""
    try:
        done = subprocess.run(command(options, words), capture_output=True, text=True, timeout=60 * MINUTES)
    except FileNotFoundError:
        raise ValueError("launcher=slurm: there is no srun here; type this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"launcher=slurm: no answer in {MINUTES} min; the queue may be long (squeue --me)") from None
    found = {}
    for row in done.stdout.splitlines():
        if MARK in row:
            told = json.loads(row.partition(MARK)[2])
            found[str(told["node"])] = [read(value) for value in told["findings"]]
    if not found:
        raise ValueError(f"launcher=slurm: the job told nothing: {(done.stderr or done.stdout).strip()[-500:]}")
    return dict(sorted(found.items()))
