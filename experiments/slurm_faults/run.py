"""Six points of two processes on a real SLURM of two nodes: which of them survive what, and with which losses.

    python experiments/slurm_faults/run.py

Starts a cluster of its own (slurm/local-cluster) and takes about 10 minutes, most of it time limits.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.support import make_model_folder, make_squad_file, read_jsonl  # noqa: E402

FAULTS = ("none", "late", "kill", "slow_1", "slow_3", "none_0")
STORIES = (
    "undisturbed", "raised on rank 1 after the last collective", "kill -9 of rank 1 at step 3",
    "preempted by a job of the higher partition", "met its time limit", "undisturbed",
)  # fmt: skip
STEPS = 30


def main() -> None:
    """Run it and print what came of every point."""
    cluster, folder = (
        Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp")),
        Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp")),
    )
    local_cluster = [str(REPO / "slurm/local-cluster")]
    subprocess.run([*local_cluster, "start", "--nodes=2", "--gpus=0", f"--dir={cluster}"], check=True)
    env = os.environ | {
        "SLURM_CONF": f"{cluster}/etc/slurm.conf",
        "PATH": f"{cluster}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
    }
    try:
        show(folder, env)
    finally:
        subprocess.run([*local_cluster, "stop", f"--dir={cluster}"], check=True)
        shutil.rmtree(cluster)
        print(f"the sweep stays in {folder}/sweep")


def show(folder: Path, env: dict[str, str]) -> None:
    """Launch the sweep, do harm from outside, retry, compare."""
    make_model_folder(folder / "model")
    make_squad_file(folder / "train.jsonl")
    cause, sweep = folder / "cause", folder / "sweep"
    cause.touch()
    common = [
        "model=hf", f"model.name_or_path={folder}/model", "data=squad", f"data.path={folder}/train.jsonl",
        "data.split=train", "tracker=none", "optim.lr=1e-3", "trainer.batch_size=8", f"trainer.max_steps={STEPS}",
        "schedule=constant", "schedule._target_=tests.slurm.faults.cosine", "~schedule.warmup_steps",
        "+schedule.at=3", f"+schedule.cause={cause}",
    ]  # fmt: skip
    launcher = [
        "launcher=slurm", "launcher.nodes=2", "launcher.timeout_min=2", "launcher.signal_delay_s=45",
        "launcher.array_parallelism=1",
    ]  # fmt: skip
    train = [sys.executable, "-m", "sftlab.train", *common, f"hydra.sweep.dir={sweep}"]
    driver = subprocess.Popen([*train, *launcher, f"+schedule.fault={','.join(FAULTS)}"], cwd=folder, env=env)
    wait_until(lambda: len(read(sweep / "3/metrics.jsonl")) > 4, "point 3 under way")
    high = ["sbatch", "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 3"]
    subprocess.run(high, cwd=folder, env=env, check=True)
    print("exit code of the sweep:", driver.wait())
    array = json.loads((sweep / "sweep.json").read_text())["points"][0]["job_id"].split("_")[0]
    squeue = ["squeue", "--array", "--states=all", "--noheader", "--format=%i %T", f"--jobs={array}"]
    print(subprocess.run(squeue, env=env, capture_output=True, text=True, check=True).stdout)
    report(sweep, "after the sweep")

    cause.unlink()
    command = [sys.executable, "-m", "sftlab.sweep", f"dir={sweep}", "report=false"]
    subprocess.run([*command, "retry=failed", "watch=true"], cwd=folder, env=env, check=True)
    report(sweep, "after retry=failed, the cause being gone")


def report(sweep: Path, title: str) -> None:
    """Print a line a point: status, starts and the steps they began at, losses against point 0's."""
    print(f"{title}\npoint  status    started at steps     losses    story")
    straight = losses(sweep / "0")
    for num, story in enumerate(STORIES):
        status = json.loads((sweep / str(num) / "summary.json").read_text())["status"]
        starts = " ".join(str(a["step"]) for a in read(sweep / str(num) / "attempts.jsonl"))
        same = "bit-equal" if losses(sweep / str(num)) == straight else "differ"
        print(f"{num:5}  {status:8}  {starts:19}  {same:9} {story}")


def losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss of every step."""
    return {line["step"]: line["train/loss"] for line in read(run_dir / "metrics.jsonl") if "train/loss" in line}


def read(file: Path) -> list[dict]:
    """Return the lines of a JSONL file, none where it is missing."""
    return read_jsonl(file) if file.exists() else []


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 600) -> None:
    """Wait. Raises: TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {limit_s:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
