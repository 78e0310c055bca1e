"""What surrounds a run: the disk that it writes to, the hub, SLURM, the trackers."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path

from sftlab.health.finding import Answer

BLOCK = b"\x5a" * (1 << 20)
NUM_BLOCKS = 128
SLOW_MB_S = 100.0
CHECKPOINT_GB = 14.4  # of a model of 1.2 billion parameters: weights and two moments in float32
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def disk(folder: Path) -> Answer:
    """Return how fast a file reaches the disk, and how much room there is."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".sftlab_doctor_{os.getpid()}"
    began_s = time.perf_counter()
    try:
        with file.open("wb") as out:
            for _ in range(NUM_BLOCKS):
                out.write(BLOCK)
            out.flush()
            os.fsync(out.fileno())
        took_s = time.perf_counter() - began_s
    finally:
        file.unlink(missing_ok=True)
    rate = len(BLOCK) * NUM_BLOCKS / 1e6 / took_s
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{rate:,.0f} MB/s to {folder.absolute()}, {free:,.0f} GB free"
    if free < CHECKPOINT_GB:
        return "note", f"{text}: a checkpoint of 1.2 billion parameters takes {CHECKPOINT_GB} GB; name another run_dir"
    if rate < SLOW_MB_S:
        return "note", f"{text}: saving 1.2 billion parameters takes {CHECKPOINT_GB * 1000 / rate / 60:.0f} min there"
    return "ok", text


def hub() -> Answer:
    """Return whether the hub answers, and whose token is set; the token itself is never shown."""
    from huggingface_hub import constants, get_session, get_token, whoami

    token = get_token()
    if constants.HF_HUB_OFFLINE:
        return "note", "HF_HUB_OFFLINE is set: models and data must be local or in the cache"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        return "note", (
            f"{constants.ENDPOINT} does not answer ({type(error).__name__}): models and data must be local or cached"
        )
    if token is None:
        return "note", f"{constants.ENDPOINT} answers; no token: gated models need HF_TOKEN, or `hf auth login`"
    try:
        name = whoami(token=token)["name"]
    except Exception:
        return "fail", f"the hub does not accept the token: make another at {constants.ENDPOINT}/settings/tokens"
    return "ok", f"{constants.ENDPOINT} answers; the token is {name}'s"


def slurm() -> Answer:
    """Return whether SLURM runs a job for this user; a note on a machine without SLURM."""
    if shutil.which("sbatch") is None:
        return "note", "no SLURM here (launcher=local runs on this machine)"
    asked = subprocess.run(["sinfo", "--noheader", "--format=%P %a %D"], capture_output=True, text=True, timeout=60)
    if asked.returncode:
        return "fail", f"sinfo: {asked.stderr.strip()}: is SLURM_CONF right, and the controller up (scontrol ping)?"
    partitions = ", ".join(row.split()[0] for row in asked.stdout.splitlines() if row.strip())
    job = ["srun", "--nodes=1", "--ntasks=1", "--time=1", "--immediate=30", "--quiet", "hostname"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_JOB", "SLURM_STEP"))}
    done = subprocess.run(job, capture_output=True, text=True, timeout=120, env=env)
    if done.returncode:
        said = " ".join(done.stderr.split())[-200:]
        return "note", f"partitions {partitions}; a test job did not start within 30 s ({said}): the queue may be long"
    return "ok", f"partitions {partitions}; a test job ran on {done.stdout.strip()}"


def tracker(package: str) -> Answer:
    """Return whether a tracker's package is there."""
    if util.find_spec(package) is None:
        return "note", f"not installed: pip install {package}, for tracker={package}"
    text = metadata.version(package)
    if package == "wandb":
        netrc = Path("~/.netrc").expanduser()
        known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
        text += "" if known else "; not logged in (wandb login), so its runs stay on this machine"
    return "ok", text


def checks(folder: Path) -> dict[str, Callable[[], Answer]]:
    """Return the checks, of which the disk is that of a folder."""
    every: dict[str, Callable[[], Answer]] = {"disk": partial(disk, folder), "hub": hub, "slurm": slurm}
    return every | {name: partial(tracker, package) for name, package in TRACKERS.items()}
