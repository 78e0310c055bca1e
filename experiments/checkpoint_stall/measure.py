"""What a save every 20 steps costs the training loop on a CPU, and what a resume costs over a fresh start.

    python experiments/checkpoint_stall/measure.py [--layers 20] [--steps 61] [--batch 16] [--repeats 3] [--folder DIR]

The model is a Llama of SmolLM2's width, untrained; 20 layers are 99 million parameters, so that a checkpoint with
AdamW's state takes 1.2 GB. Everything is measured on `python -m sftlab.train` as a person runs it, in turn with and
without saves, fresh and resumed, since the speed of a machine drifts. Needs twice a checkpoint's size on the disk.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from experiments.kill_test.run import kill, read, wait  # noqa: E402

WARM = 5  # steps at the start that are not counted


class Measure:
    def __init__(self, folder: Path, layers: int, steps: int, batch: int) -> None:
        self.folder, self.steps = folder, steps
        self.env = os.environ | {
            "PYTHONPATH": str(REPO),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        self.arguments = [
            "model=smollm2_135m", "model.init=random", "model.tokenizer=asset://demo/model", "data.val_path=null",
            f"model.architecture.num_hidden_layers={layers}", f"trainer.batch_size={batch}", "tracker=none",
            "optim.lr=1e-4", "trainer.keep_checkpoints=1",
        ]  # fmt: skip

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sftlab.train", *self.arguments, f"run_dir={self.folder / name}", *more]
        with (self.folder / f"{name}.out").open("ab") as out:
            return subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    def metrics(self, name: str) -> Path:
        return self.folder / name / "metrics.jsonl"

    def seconds_a_step(self, name: str, save_every: int) -> tuple[float, list[float]]:
        """Run to the last step; return the mean seconds of a step, and of each that follows a save."""
        process = self.start(name, f"trainer.max_steps={self.steps}", f"trainer.save_every={save_every}")
        last = self.steps
        wait(process, lambda: bool(read(self.metrics(name))) and read(self.metrics(name))[-1]["step"] >= last)
        kill(process)  # what comes after is the last save, with which there is nothing to run beside
        times = {line["step"]: line["time_s"] for line in read(self.metrics(name)) if "train/loss" in line}
        if last not in times:
            raise RuntimeError((self.folder / f"{name}.out").read_text()[-3000:])
        shutil.rmtree(self.folder / name)
        after = [times[s + 1] - times[s] for s in range(1, last) if save_every and s % save_every == 0]
        return (times[last] - times[WARM]) / (last - WARM), after

    def start_up(self, name: str, step: int) -> float:
        """Return the seconds from the command to the first step made, which is `step`; then kill it."""
        before = self.metrics(name).stat().st_ino if self.metrics(name).exists() else None
        began_s = time.monotonic()
        process = self.start(name, "trainer.max_steps=1000", "trainer.save_every=2")

        def stepped() -> bool:
            lines = read(self.metrics(name))
            return bool(lines) and self.metrics(name).stat().st_ino != before and lines[-1]["step"] >= step

        wait(process, stepped)
        took_s = time.monotonic() - began_s
        if process.poll() is not None:
            raise RuntimeError((self.folder / f"{name}.out").read_text()[-3000:])
        if before is None:  # the fresh start: leave a checkpoint behind
            wait(process, lambda: (self.folder / name / "checkpoints/latest").exists())
        kill(process)
        return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the temporary one")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stall-", dir=given.folder))
    measure = Measure(folder, given.layers, given.steps, given.batch)
    try:
        without, with_saves, after = [], [], []
        print("seconds a step   without saves   with   lost")
        for i in range(given.repeats):
            without.append(measure.seconds_a_step(f"without{i}", 0)[0])
            mean_s, stalled_s = measure.seconds_a_step(f"with{i}", given.save_every)
            with_saves.append(mean_s)
            after += stalled_s
            print(f"{i + 1:14}   {without[-1]:13.3f}  {mean_s:5.3f}  {mean_s / without[-1] - 1:5.1%}", flush=True)
        lost = statistics.median(b / a - 1 for a, b in zip(without, with_saves, strict=True))
        stall_s = statistics.median(after) - statistics.median(without)
        print(f"median lost: {lost:.1%} (asked for: under 5 %); the step after a save takes {stall_s:.2f} s longer\n")

        fresh, resumed = [], []
        print("seconds to the first step   fresh   resumed   more")
        for i in range(given.repeats):
            fresh.append(measure.start_up(f"start{i}", 1))
            saved = int((folder / f"start{i}/checkpoints/latest").resolve().name.removeprefix("step_"))
            resumed.append(measure.start_up(f"start{i}", saved + 1))
            print(
                f"{i + 1:25}   {fresh[-1]:5.1f}   {resumed[-1]:7.1f}   {resumed[-1] / fresh[-1] - 1:4.0%}", flush=True
            )
            shutil.rmtree(folder / f"start{i}")
        more = statistics.median(b / a - 1 for a, b in zip(fresh, resumed, strict=True))
        print(f"median more: {more:.0%} (asked for: under 20 %)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("PASS" if lost < 0.05 and more < 0.2 else "FAIL")
    sys.exit(not (lost < 0.05 and more < 0.2))


if __name__ == "__main__":
    main()
