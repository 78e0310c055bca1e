"""Six points of two processes on a real SLURM of two nodes: which of them survive what, and with which losses.

    python experiments/slurm_faults/run.py [--dir DIR]

Starts a cluster of its own (slurm/local-cluster) and takes about 20 minutes, most of it time limits.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.slurm.cluster import SlurmCluster, local_cluster  # noqa: E402
from tests.support import make_model_folder, make_squad_file, read_jsonl  # noqa: E402

# The names of tests/slurm/faults.py; slow_20 takes 20 s a step: 30 of them are 10 min, and a job has 5 at the most.
POINTS = {
    "none": "undisturbed",
    "late": "raised on rank 1 after the last collective",
    "kill": "rank 1 killed (-9) at step 3",
    "slow_1": "preempted by a job of the higher partition",
    "slow_20": "met its time limit twice or more",
    "none_0": "undisturbed",
}
STEPS = 30


def main() -> None:
    """Run it and print what came of every point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="a new folder for model, data and sweep (default: a temporary one)")
    folder = (parser.parse_args().dir or Path(tempfile.mkdtemp(prefix="slurm_faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with local_cluster(nodes=2) as cluster:
        more = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        cluster.env.update(more)
        print(versions(cluster))
        show(folder, cluster)
    print(f"\nthe sweep stays in {folder}/sweep")


def versions(cluster: SlurmCluster) -> str:
    """Return what it ran on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True)
    named = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "submitit", "hydra-core")]
    return ", ".join([cluster.run("sinfo", "--version"), *named, f"Python {platform.python_version()}",
                      f"{os.cpu_count()} cores", f"commit {git.stdout.strip()}"])  # fmt: skip


def show(folder: Path, cluster: SlurmCluster) -> None:
    """Launch the sweep, do harm from outside, retry, compare."""
    make_model_folder(folder / "model")
    make_squad_file(folder / "train.jsonl")
    cause, sweep = folder / "cause", folder / "sweep"
    cause.touch()
    common = [
        sys.executable, "-m", "sftlab.train", "model=hf", f"model.name_or_path={folder}/model", "data=squad",
        f"data.path={folder}/train.jsonl", "data.split=train", "tracker=none", "optim.lr=1e-3",
        "trainer.batch_size=8", f"trainer.max_steps={STEPS}", "schedule=constant",
        "schedule._target_=tests.slurm.faults.cosine", "~schedule.warmup_steps", "+schedule.at=3",
        f"+schedule.cause={cause}",
    ]  # fmt: skip
    alone = ["launcher=local", "launcher.processes_per_node=2", f"hydra.sweep.dir={folder}/alone"]
    with (folder / "alone.log").open("w") as log:
        subprocess.run([*common, *alone], cwd=folder, env=cluster.env, stdout=log, stderr=log, check=True)
    command = [
        *common, f"hydra.sweep.dir={sweep}", "launcher=slurm", "launcher.nodes=2", "launcher.timeout_min=5",
        "launcher.signal_delay_s=60", "launcher.array_parallelism=1", f"+schedule.fault={','.join(POINTS)}",
    ]  # fmt: skip
    began_s = time.monotonic()
    driver = subprocess.Popen(command, cwd=folder, env=cluster.env)
    slow = list(POINTS).index("slow_1")
    wait_until(
        lambda: len(read(sweep / f"{slow}/metrics.jsonl")) > 4 or driver.poll() is not None, f"step 4 of point {slow}"
    )
    if driver.poll() is not None:
        sys.exit(f"the sweep ended before point {slow} got to step 4: see {sweep}")
    high = cluster.sbatch(folder, "sleep 3", "--partition=high", "--exclusive", "--nodes=2")
    print(f"sbatch --partition=high: job {high} takes both nodes", flush=True)
    print(f"exit code of the sweep: {driver.wait()}, after {time.monotonic() - began_s:.0f} s\n")
    jobs = [point["job_id"] for point in json.loads((sweep / "sweep.json").read_text())["points"]]
    print(cluster.run("sacct", "-o", "JobID,State,NodeList", "-j", jobs[0].split("_")[0]), "\n", sep="")
    for job in jobs[1:3]:
        fields = dict(f.partition("=")[::2] for f in cluster.run("scontrol", "show", "job", job).split())
        print(f"scontrol show job {job}: JobState={fields['JobState']} ExitCode={fields['ExitCode']}")
    for num, rank in ((1, 1), (2, 0)):
        log = sweep / ".submitit" / jobs[num] / f"{jobs[num]}_{rank}_log.err"
        print(f"\n{log.relative_to(sweep)} ends with", *log.read_text().splitlines()[-12:], sep="\n    ")
    report(sweep, "after the sweep")

    cause.unlink()
    again = [sys.executable, "-m", "sftlab.sweep", f"dir={sweep}", "metric=train/loss", "report=false", "retry=failed"]
    print("\nthe cause is gone: sweep retry=failed", flush=True)
    print(f"exit code of the retry: {subprocess.run(again, cwd=folder, env=cluster.env, check=False).returncode}")
    report(sweep, "after retry=failed")


def report(sweep: Path, title: str) -> None:
    """Print a line a point: status, the steps at which it started, its losses against the run without SLURM."""
    print(f"\n{title}\npoint  status    started at steps  steps  losses     story")
    straight = losses(sweep.parent / "alone/0")
    for num, story in enumerate(POINTS.values()):
        status = json.loads((sweep / str(num) / "summary.json").read_text())["status"]
        starts = " ".join(str(a["step"]) for a in read(sweep / str(num) / "attempts.jsonl"))
        mine = losses(sweep / str(num))
        same = "bit-equal" if mine == straight else "equal so far" if mine == straight[: len(mine)] else "DIFFER"
        print(f"{num:5}  {status:8}  {starts:16}  {len(mine):5}  {same:12} {story}")


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Return the training loss of every step, every line that is written counted."""
    return [(line["step"], line["train/loss"]) for line in read(run_dir / "metrics.jsonl") if "train/loss" in line]


def read(file: Path) -> list[dict]:
    """Return the lines of a JSONL file, none where it is missing."""
    return read_jsonl(file) if file.exists() else []


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 1200) -> None:
    """Wait. Raises: TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {limit_s:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
