"""How long from the command until 200 points are queued on SLURM as one array, and how long the sweep's status takes.

    python experiments/sweep_speed/measure.py [--points 200] [--repeats 3]

Starts a SLURM of its own (slurm/local-cluster). The points are the demo's, held, so that none runs meanwhile; then the
directories of the same points are given 300 steps of metrics, as after their run, and looked at again. Times are
those of the whole command, Python's start included; beside them the CPU seconds, which other work disturbs less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.slurm.cluster import SlurmCluster, local_cluster  # noqa: E402

STEPS = 300
Took = tuple[float, float]  # wall seconds, CPU seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with local_cluster(nodes=2) as cluster, tempfile.TemporaryDirectory() as folder:
        cluster.env.update(PYTHONPATH=str(REPO), HF_HUB_OFFLINE="1", COLUMNS="160")
        queued_s = [queue(cluster, Path(folder), f"sweep{i}", args.points) for i in range(args.repeats)]
        say(f"command to {args.points} points queued", queued_s, 3 + 0.05 * args.points)
        one_s = [queue(cluster, Path(folder), f"one{i}", 1) for i in range(args.repeats)]
        say("command to 1 point queued", one_s, 3.05)
        sweep = Path(folder) / "sweep0"
        report(cluster, sweep, args, "waiting")
        pretend_run(sweep, args.points)
        report(cluster, sweep, args, f"of {STEPS} steps each")
        cluster.run("scancel", "--user", str(os.getuid()))


def report(cluster: SlurmCluster, sweep: Path, args: argparse.Namespace, what: str) -> None:
    """Time the status of a sweep, without and with its report.html."""
    command = [sys.executable, "-m", "sftlab.sweep", f"dir={sweep}"]
    shown_s = [timed(cluster, [*command, "report=false"]) for _ in range(args.repeats)]
    say(f"status of {args.points} points, {what}", shown_s, 1.0)
    say(f"status and report.html of {args.points} points, {what}", [timed(cluster, command)], None)


def queue(cluster: SlurmCluster, folder: Path, name: str, num_points: int) -> Took:
    """Queue a sweep's points, held; return how long it took. Checks that they are one array."""
    command = [sys.executable, "-m", "sftlab.train", "launcher=slurm", "launcher.sbatch={hold: true}",
               "launcher.wait=false", f"hydra.sweep.dir={folder}/{name}", f"seed=range({num_points})"]  # fmt: skip
    took = timed(cluster, command, cwd=folder)
    jobs = [point["job_id"] for point in json.loads((folder / name / "sweep.json").read_text())["points"]]
    assert len(set(jobs)) == num_points and len({job.split("_")[0] for job in jobs}) == 1, jobs
    assert cluster.states(jobs[0].split("_")[0]) == ["PENDING"] * num_points
    return took


def pretend_run(sweep: Path, num_points: int) -> None:
    """Give every point the files of a run that has ended."""
    for num in range(num_points):
        losses = [{"step": s, "time_s": s / 10, "train/loss": 3 - s / 200, "train/lr": 1e-3,
                   "perf/tokens_per_s": 1e4} for s in range(1, STEPS + 1)]  # fmt: skip
        scored = {"step": STEPS, "time_s": STEPS / 10, "val/loss": 1 + (num * 37 % 101) / 1000}
        lines = "".join(json.dumps(line) + "\n" for line in [*losses, scored])
        (sweep / str(num) / "metrics.jsonl").write_text(lines)
        last = losses[-1] | scored
        summary = {"status": "finished", "score": scored["val/loss"], "steps": STEPS, "last": last, "best": last}
        (sweep / str(num) / "summary.json").write_text(json.dumps(summary))


def timed(cluster: SlurmCluster, command: list[str], cwd: Path | None = None) -> Took:
    """Run a command; return how long it took."""
    began_s, used_s = time.perf_counter(), cpu_s()
    done = subprocess.run(command, env=cluster.env, cwd=cwd, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began_s, cpu_s() - used_s
    assert done.returncode == 0, done.stdout + done.stderr
    return took


def cpu_s() -> float:
    """Return the CPU seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def say(what: str, took: list[Took], limit_s: float | None) -> None:
    """Print the median, all values and the limit."""
    limit = "" if limit_s is None else f"   limit {limit_s:.2f} s"
    each = " ".join(f"{wall_s:.2f}" for wall_s, _ in took)
    wall_s, used_s = (statistics.median(column) for column in zip(*took, strict=True))
    print(f"{what:58} {wall_s:6.2f} s, CPU {used_s:5.2f} s   ({each}){limit}", flush=True)


if __name__ == "__main__":
    main()
