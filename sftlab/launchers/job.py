"""The job: what every rank of a point runs, under SLURM through Submitit or started by the local launcher.

It reads the config that was written at submission and calls sftlab.training.run. It catches no exception: the traceback
goes to the log of the rank, the exit code says that it failed, and the launcher ends the other ranks.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from sftlab.common import owner, run_directory
from sftlab.common.files import open_plain, read_json, read_jsonl, read_yaml
from sftlab.common.process import end_with_parent, tie_forks
from sftlab.common.secrets import strike_output

ATTEMPTS = "attempts.jsonl"
DRIVER = "SFTLAB_DRIVER"  # the process of the local launcher, with which its ranks end


class Stalled(RuntimeError):
    """A point that was started several times and never got past the same step."""


class Job:
    """A point as Submitit pickles it: two values and a reference to this module, so a requeue brings back no state."""

    def __init__(self, run_dir: str, max_stalled: int) -> None:
        self.run_dir = run_dir
        self.max_stalled = max_stalled

    def __call__(self) -> float:
        """Run the point on this rank; return its score."""
        import submitit

        env = submitit.JobEnvironment()
        env.paths.result_pickle.unlink(missing_ok=True)  # the result of an attempt before the requeue
        return run(Path(self.run_dir), env.job_id, env.global_rank, self.max_stalled)

    def checkpoint(self) -> object:
        """Return what Submitit runs after a requeue: the same job. Its state lies in the run directory."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run(run_dir: Path, job_id: str, rank: int, max_stalled: int) -> float:
    """Run the point of a directory on this rank. Raises: Stalled, and whatever the run raises."""
    tie_forks()
    if rank == 0:
        owner.refuse_held(run_dir, owner.living(run_dir))
        note_attempt(run_dir, job_id, max_stalled)
    config = run_directory.read_config(run_dir)
    if config["resume"] == "never":  # the directory was new at submission, so what lies in it now belongs to this point
        config["resume"] = "auto"
    if Path(config["run_dir"]).resolve() != run_dir.resolve():  # the sweep was moved since
        config["run_dir"] = str(run_dir)
    overrides = read_yaml(run_dir / run_directory.OVERRIDES) or []
    from sftlab.training.run import run as run_config

    try:
        return run_config(config, overrides)
    except owner.Held:  # the directory is another run's: nothing is noted in it
        raise
    except Exception as error:
        run_directory.note_failure(run_dir, rank, error)
        raise


def note_attempt(run_dir: Path, job_id: str, max_stalled: int) -> None:
    """Record that the job starts, and at which step; delete the summary of the last attempt.

    Raises: Stalled if the job has started from this step `max_stalled` times already. Whatever ended it then (a time
    limit too short for the next checkpoint, preemption without a warning) would end it again.
    """
    if read_json(run_dir / "summary.json").get("status") != "finished":
        (run_dir / "summary.json").unlink(missing_ok=True)
    done = sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))
    step = int(done[-1].removeprefix("step_")) if done else 0
    file = run_dir / ATTEMPTS
    lines = read_jsonl(file)
    stalled = sum(a["step"] == step for a in lines if a["job_id"] == job_id)
    if stalled >= max_stalled:
        message = (
            f"started {stalled} times from step {step} and got no further: the job is ended each time before the "
            "next checkpoint. Raise launcher.timeout_min or lower trainer.save_every (launcher.max_stalled: more tries)"
        )
        run_directory.write_summary(run_dir, {"status": "failed", "error": message})
        raise Stalled(message)
    attempt = {"job_id": job_id, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with open_plain(file, "a") as out:
        out.write(json.dumps(attempt) + "\n")


if __name__ == "__main__":
    strike_output()
    end_with_parent(signal.SIGTERM, int(os.environ[DRIVER]))
    run(Path(sys.argv[1]), "local", int(os.environ["RANK"]), sys.maxsize)
