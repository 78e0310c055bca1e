"""Kill a run (-9) again and again, resume it by the same command each time, compare it with a run left alone.

    python experiments/kill_test/run.py [--kills 20] [--steps 120] [--ranks 1] [--seed 0] [--folder DIR]

The moments are random and of three kinds: while the process starts up, in or between steps, and in the middle of a
save (a partial checkpoint folder has appeared, and is still there when the process is dead). PASS and exit code 0
mean: as many kills as asked for, one of them at least in a save; every train/ and val/ value of every step in
metrics.jsonl bit-equal to the uninterrupted run's, none missing, none twice; the same weights in the model's folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.support import free_port, make_model_folder, make_squad_file  # noqa: E402

LIMIT_S = 600.0
POLL_S = 0.002
KINDS = ("save", "step", "start-up")


@dataclass(frozen=True)
class Kill:
    """One kill: its kind, the last step in metrics.jsonl then, and whether it cut a save in two."""

    kind: str
    step: int
    in_save: bool


@dataclass(frozen=True)
class Outcome:
    """What came of it: the kills, and what is wrong with the run that they left behind."""

    kills: list[Kill]
    wrong: list[str]
    num_values: int


class Run:
    """A run directory, and the command that starts and resumes it. Each has a cache of tokenised examples of its own,
    so that kills meet its making too."""

    def __init__(self, folder: Path, name: str, ranks: int, arguments: Sequence[str]) -> None:
        self.dir, self.output, self.ranks = folder / name, folder / f"{name}.out", ranks
        self.metrics = self.dir / "metrics.jsonl"
        self.arguments = [*arguments, f"run_dir={self.dir}"]
        self.env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env["HF_DATASETS_CACHE"] = str(folder / f"cache_{name}")

    def start(self) -> subprocess.Popen[bytes]:
        launch = [sys.executable, "-m"]
        if self.ranks > 1:
            port = str(free_port())
            launch += ["torch.distributed.run", "--nproc-per-node", str(self.ranks), "--master-port", port, "-m"]
        with self.output.open("ab") as out:
            return subprocess.Popen(
                [*launch, "sftlab.train", *self.arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def finish(self) -> float:
        """Run to the end; return the seconds until the first step. Raises: RuntimeError with the end of the output."""
        before, began_s, process = self.stamp(), time.monotonic(), self.start()
        try:
            wait(process, lambda: self.stamp() != before and self.step() > 0)
            startup_s = time.monotonic() - began_s
            code = process.wait(LIMIT_S)
        finally:
            kill(process)
        if code:
            raise RuntimeError(f"{self.dir} ended with {code}:\n{self.output.read_text()[-3000:]}")
        return startup_s

    def kill_once(self, kind: str, chance: random.Random, startup_s: float) -> Kill | None:
        """Start, kill at a random moment of that kind, return what was hit; None if the run had come to its end."""
        stamp, partials = self.stamp(), self.partials()
        target, saves, seen = self.saved() + chance.randint(1, 4), chance.randint(1, 3), set(partials)
        process = self.start()

        def saving() -> bool:
            fresh = self.partials() - partials
            seen.update(fresh)
            return bool(fresh) and len(seen - partials) >= saves

        try:
            if kind == "start-up":
                until_s = time.monotonic() + chance.uniform(0.0, startup_s)
                wait(process, lambda: time.monotonic() > until_s or self.stamp() != stamp)
            elif kind == "step":
                wait(process, lambda: self.stamp() != stamp and self.step() >= target)
                time.sleep(chance.uniform(0.0, 0.1))
            else:
                wait(process, saving)
                time.sleep(chance.uniform(0.0, 0.04))
            ended = process.poll() is not None
        finally:
            kill(process)
        return None if ended else Kill(kind, self.step(), bool(self.partials() - partials))

    def step(self) -> int:
        """Return the last whole line's step, -1 where there is none."""
        lines = read(self.metrics)
        return int(lines[-1]["step"]) if lines else -1

    def saved(self) -> int:
        """Return the step of the newest complete checkpoint, 0 where there is none."""
        return max((int(p.parent.name[5:]) for p in self.dir.glob("checkpoints/step_*/checkpoint.json")), default=0)

    def stamp(self) -> int | None:
        """Return what changes as a run cuts its metrics back to the checkpoint that it resumes from."""
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    def partials(self) -> set[tuple[str, int]]:
        """Return the checkpoint folders that are being written, or were when their process was killed."""
        found = set()
        for path in self.dir.glob("checkpoints/.step_*.partial"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found


def kill_test(
    folder: Path, kills: int, steps: int, ranks: int, seed: int, say: Callable[[str], None] = print
) -> Outcome:
    """Do it, in an empty folder. Raises: RuntimeError if a run that is not killed fails."""
    make_model_folder(folder / "model")
    make_squad_file(folder / "train.jsonl")
    make_squad_file(folder / "val.jsonl", 4, seed=1)
    arguments = [
        "model=hf", f"model.name_or_path={folder / 'model'}", "data=squad", f"data.path={folder / 'train.jsonl'}",
        f"data.val_path={folder / 'val.jsonl'}", "optim.lr=0.003", "trainer.batch_size=12",
        f"trainer.max_steps={steps}",
        "trainer.save_every=3", "trainer.eval_every=7", "evaluation.num_answers=2", "evaluation.max_new_tokens=4",
    ]  # fmt: skip
    straight, killed = (Run(folder, name, ranks, arguments) for name in ("straight", "killed"))
    startup_s = straight.finish()
    say(f"the run left alone: {steps} steps on {ranks} rank(s), {startup_s:.1f} s to its first step\n")
    say("kill  aimed at  last step  in the middle of a save")
    chance, done = random.Random(seed), list[Kill]()
    while len(done) < kills:
        again = done and done[-1].kind == "save" and not done[-1].in_save  # it was too late: try once more
        kind = "save" if again else KINDS[len(done) % len(KINDS)]
        hit = killed.kill_once(kind, chance, startup_s)
        if hit is None:
            break
        done.append(hit)
        say(f"{len(done):4}  {hit.kind:8}  {hit.step:9}  {'yes' if hit.in_save else ''}".rstrip())
    killed.finish()
    wrong = compare(straight, killed)
    if len(done) < kills:
        wrong.append(f"the run ended after {len(done)} of {kills} kills: give it more --steps")
    if not any(hit.in_save for hit in done):
        wrong.append("no kill came in the middle of a save")
    return Outcome(done, wrong, len(values(straight.metrics)[0]))


def compare(straight: Run, killed: Run) -> list[str]:
    """Return what differs in the values and the weights that two runs left."""
    (ours, twice), (expected, own) = values(killed.metrics), values(straight.metrics)
    assert not own, "the uninterrupted run itself has a step twice"
    wrong = [f"step {step}: {name} is there twice" for step, name in twice]
    wrong += [f"step {step}: {name} is missing" for step, name in expected.keys() - ours.keys()]
    wrong += [f"step {step}: {name} is there, and not in the other run" for step, name in ours.keys() - expected.keys()]
    for (step, name), value in expected.items():
        if (step, name) in ours and ours[step, name] != value:
            wrong.append(f"step {step}: {name} is {ours[step, name]!r}, expected {value!r}")
    weights = [run.dir / "model" / "model.safetensors" for run in (straight, killed)]
    if weights[0].read_bytes() != weights[1].read_bytes():
        wrong.append("model/model.safetensors differs")
    return wrong


def values(path: Path) -> tuple[dict[tuple[int, str], float], list[tuple[int, str]]]:
    """Return {(step, metric): value} of all train/ and val/ metrics, and the keys that are there more than once."""
    found: dict[tuple[int, str], float] = {}
    twice = []
    for line in read(path):
        for name, value in line.items():
            if name.startswith(("train/", "val/")):
                twice += [(line["step"], name)] if (line["step"], name) in found else []
                found[line["step"], name] = value
    return found, twice


def read(path: Path) -> list[dict]:
    """Return the whole lines of a JSONL file, none where there is none."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait for a condition, or the end of the process. Raises: TimeoutError."""
    deadline_s = time.monotonic() + LIMIT_S
    while process.poll() is None and not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"nothing happened within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, and wait until they are gone."""
    if process.poll() is None:
        family = [process.pid]
        for pid in family:  # grows as it goes; under torchrun ranks have sessions of their own
            with suppress(FileNotFoundError, ProcessLookupError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    family += [int(child) for child in (task / "children").read_text().split()]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            time.sleep(POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder to keep; by default one that is removed")
    given = parser.parse_args()
    began_s = time.monotonic()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill_test-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = kill_test(folder.resolve(), given.kills, given.steps, given.ranks, given.seed)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    in_save = sum(hit.in_save for hit in outcome.kills)
    print(
        f"\n{len(outcome.kills)} kills, {in_save} of them in the middle of a save; {time.monotonic() - began_s:.0f} s"
    )
    print("\n".join(outcome.wrong[:40]) or f"all {outcome.num_values} train/ and val/ values are bit-equal, none twice")
    print("FAIL" if outcome.wrong else "PASS")
    sys.exit(bool(outcome.wrong))


if __name__ == "__main__":
    main()
