"""Examples per second of sftlab, TRL's SFTTrainer and a plain padded loop, side by side on this machine.

    python experiments/speed_vs_trl/compare.py --data train.jsonl --trl-python TRL_ENVIRONMENT/bin/python

Each round runs the three one after another, so that a change of the machine's mood hits all. The first two steps of
each are warm-up. Batches of 16 examples, float32, fused AdamW, no gradient checkpointing, logging on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BATCH, WARM_UP = 16, 2


def rate(times: list[float]) -> float:
    """Return examples per second from the end times of steps."""
    return BATCH * (len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


def side(python: str, script: str, model: Path, data: str, steps: int) -> float:
    """Run one of the other sides and return its rate."""
    arguments = [python, str(HERE / script), "--model", str(model), "--data", data, "--steps", str(steps)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    return rate([json.loads(line)["time_s"] for line in out.splitlines() if line.startswith('{"step"')])


def ours(model: Path, data: str, layout: str, folder: Path) -> float:
    """Train one epoch with sftlab and return its rate."""
    overrides = [
        f"model.name_or_path={model}",
        f"data.path={data}",
        f"data.layout={layout}",
        f"run_dir={folder}",
        *("data=squad", "trainer.batch_size=16", "optim.lr=1e-4", "trainer.max_steps=40"),
    ]
    subprocess.run([sys.executable, "-m", "sftlab.train", *overrides], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rate([line["time_s"] for line in lines if "train/loss" in line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trl-python", required=True, help="the interpreter of an environment with trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of the slower two")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"sftlab tree": [], "sftlab packed": [], "plain loop": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make = [sys.executable, str(HERE / "model.py"), "--data", arguments.data, "--out", str(model)]
        subprocess.run(make, check=True)
        for i in range(arguments.rounds):
            rates["sftlab tree"].append(ours(model, arguments.data, "tree", Path(folder, f"tree{i}")))
            rates["sftlab packed"].append(ours(model, arguments.data, "packed", Path(folder, f"packed{i}")))
            rates["plain loop"].append(side(sys.executable, "plain_side.py", model, arguments.data, arguments.steps))
            rates["TRL"].append(side(arguments.trl_python, "trl_side.py", model, arguments.data, arguments.steps))
            print(f"round {i + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in rates.items()), flush=True)
    trl = statistics.median(rates["TRL"])
    print("\n| | examples/s, median | all rounds | times TRL |\n|---|---|---|---|")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {', '.join(f'{v:.2f}' for v in values)} | {median / trl:.1f} |")


if __name__ == "__main__":
    main()
