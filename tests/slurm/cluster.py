"""A SLURM cluster of one's own for the time of a with block: for the tests in this folder and the experiments."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOCAL_CLUSTER = Path(__file__).parents[2] / "slurm/local-cluster"
APT = "apt-get install -y --no-install-recommends slurm-wlm munge"


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster whose nodes have 8 CPUs each. `env` is what its clients need."""

    dir: Path
    env: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Standard output of a command inside the cluster's environment. Raises: AssertionError if it fails."""
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, cwd: Path, script: str, *options: str) -> str:
        """Job id of a bash script submitted from `cwd`; its output goes to cwd/job.out."""
        (cwd / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
        common = ["--parsable", "--output=job.out", "--open-mode=append"]
        return self.run("sbatch", *common, *options, "job.sh", cwd=cwd)

    def states(self, job: str) -> list[str]:
        """State of the job, or of every element of an array, in order of the element's index."""
        rows = self.run("squeue", "--all", "--array", "--noheader", "--states=all", "--format=%K %T", f"--jobs={job}")
        return [row.split()[1] for row in sorted(rows.splitlines(), key=lambda row: (len(row.split()[0]), row))]

    def wait_for(self, job: str, *states: str, limit_s: float = 120) -> None:
        """Until every element of the job has reached its state. Polls squeue: `sbatch --wait` looks every 10 s only."""
        deadline = time.monotonic() + limit_s
        while self.states(job) != list(states):
            assert time.monotonic() < deadline, (
                f"job {job} is not {states} after {limit_s} s:\n{self.run('squeue', '--states=all')}"
            )
            time.sleep(0.1)


def missing_programs() -> list[str]:
    """The programs of the SLURM packages that are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]


@contextmanager
def local_cluster(nodes: int = 2, gpus: int = 0, memory_kill: bool = False) -> Iterator[SlurmCluster]:
    """Start a cluster of its own, stop it at the end and leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="sftlab-slurm-", dir="/tmp"))  # a socket's path may have 107 characters
    try:
        start = [LOCAL_CLUSTER, "start", f"--nodes={nodes}", f"--gpus={gpus}", f"--dir={folder}"]
        start += ["--memory-kill"] * memory_kill
        done = subprocess.run(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == 0, done.stdout
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_", "SQUEUE_"))}
        env |= {"SLURM_CONF": f"{folder}/etc/slurm.conf", "PATH": f"{folder}/bin:{env['PATH']}"}
        yield SlurmCluster(folder, env)
    finally:
        subprocess.run([LOCAL_CLUSTER, "stop", f"--dir={folder}"], check=True, stdout=subprocess.DEVNULL, timeout=120)
        shutil.rmtree(folder)
