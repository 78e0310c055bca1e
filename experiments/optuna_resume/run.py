"""A search of 12 trials with pruning whose driver is killed (-9) halfway and continues by the same command.

    python experiments/optuna_resume/run.py [--dir DIR] [--trials 12] [--steps 18]

The demo model, a few steps a trial, one trial after another on this machine. Prints what Optuna knew before and after,
and checks that no trial was lost, none judged twice, none trained a step twice. Takes about 5 minutes on two cores.
"""

import argparse
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.support import read_jsonl  # noqa: E402


def main() -> None:
    """Search, kill, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="a new folder for the search (default: a temporary one)")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=18)
    args = parser.parse_args()
    folder = (args.dir or Path(tempfile.mkdtemp(prefix="optuna_resume-"))).absolute() / "search"
    folder.parent.mkdir(parents=True, exist_ok=True)
    overrides = [
        "sweeper=optuna", "launcher=local", f"sweeper.num_trials={args.trials}", "sweeper.startup_trials=4",
        "optim.lr=tag(log,interval(1e-5,1e-1))", "trainer.batch_size=8,16", f"trainer.max_steps={args.steps}",
        "trainer.eval_every=2", "data.limit=400", "evaluation.num_answers=0", "tracker=none",
        f"hydra.sweep.dir={folder}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "sftlab.train", *overrides]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"optuna {optuna.__version__}, torch {importlib.metadata.version('torch')}, Python "
          f"{platform.python_version()}, commit {git.stdout.strip()}")  # fmt: skip
    print("python -m sftlab.train", *overrides[:-1], "hydra.sweep.dir=DIR\n", flush=True)

    with (folder.parent / "first.log").open("w") as log:
        driver = subprocess.Popen(command, cwd=folder.parent, env=env, stdout=log, stderr=log)
        while not killable(folder, args.trials // 2):
            if driver.poll() is not None:
                sys.exit(f"the first driver ended by itself, see {log.name}")
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    print("the driver was killed (-9) when Optuna knew of")
    before = show(folder)
    with (folder.parent / "second.log").open("w") as log:
        done = subprocess.run(command, cwd=folder.parent, env=env, stdout=log, stderr=log, check=False)
    said = (folder.parent / "second.log").read_text()
    print(f"\nthe same command again: exit code {done.returncode}")
    print(*(line for line in said.splitlines() if line.startswith(("continuing", "trial ", "best:"))), sep="\n")
    print("\nwhich leaves")
    after = show(folder)

    assert done.returncode == 0 and [t.number for t in after] == list(range(args.trials)), "trials lost or repeated"
    assert all(t.state.is_finished() for t in after), "a trial has no verdict"
    assert [t.params for t in after[: len(before)]] == [t.params for t in before], "proposals changed"
    for old, new in zip(before, after, strict=False):
        assert not old.state.is_finished() or (old.state, old.value) == (new.state, new.value), "a verdict changed"
    assert len({tuple(t.params.items()) for t in after}) == args.trials, "a proposal was repeated"
    for trial in after:
        losses = [m["step"] for m in read_jsonl(folder / str(trial.number) / "metrics.jsonl") if "train/loss" in m]
        assert losses == list(range(1, len(losses) + 1)), f"trial {trial.number}: steps {losses}"
        assert trial.state.name != "COMPLETE" or len(losses) == args.steps, f"trial {trial.number}: {len(losses)} steps"
    trained = sum(max(t.intermediate_values, default=0) for t in after)
    print(f"\nall {args.trials} trials are there once, each step of each was trained once, no verdict changed; "
          f"about {trained} of {args.trials * args.steps} steps were trained")  # fmt: skip
    print(f"the search stays in {folder}")


def killable(folder: Path, verdicts: int) -> bool:
    """Return whether so many trials have their verdict, and one more is on its way."""
    known = trials(folder)
    going = [t for t in known if not t.state.is_finished()]
    return len(known) - len(going) >= verdicts and any(t.intermediate_values for t in going)


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return what Optuna's journal holds."""
    if not (folder / "optuna.jsonl").exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.jsonl")))
    studies = storage.get_all_studies()
    return storage.get_all_trials(studies[0]._study_id) if studies else []


def show(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Print the trials as Optuna knows them; return them."""
    known = trials(folder)
    for t in known:
        value = t.value if t.value is not None else t.intermediate_values.get(max(t.intermediate_values, default=0))
        score = "" if value is None else f"{value:.4f}"
        lr, batch = t.params.get("optim.lr", float("nan")), t.params.get("trainer.batch_size")
        step = max(t.intermediate_values, default=0)
        print(f"  trial {t.number:2}  lr {lr:.2e}  batch {batch:>2}  {t.state.name.lower():8}  step {step:2}  {score}")
    counts = Counter(t.state.name.lower() for t in known)
    print(f"  {len(known)} trials:", ", ".join(f"{n} {state}" for state, n in sorted(counts.items())), flush=True)
    return known


if __name__ == "__main__":
    main()
