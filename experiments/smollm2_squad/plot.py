"""Draw the curve of a run: training loss per step, validation loss and scores at each evaluation.

python experiments/smollm2_squad/plot.py RUN curve.svg
"""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
GREY = "#888888"  # readable on white and on black


def main() -> None:
    run, out = map(Path, sys.argv[1:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def points(name: str) -> tuple[list[int], list[float]]:
        found = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in found], [value for _, value in found]

    plt.rcParams |= {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY}
    plt.rcParams |= {"ytick.color": GREY, "svg.hashsalt": "sftlab", "font.size": 9}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    left.plot(*points("train/loss"), label="training", color="#4c8bf5")
    left.plot(*points("val/loss"), "o-", label="validation", color="#e8710a")
    left.set(xlabel="step", ylabel="loss (nats per target)")
    right.plot(*points("val/exact_match"), "o-", label="exact match", color="#4c8bf5")
    right.plot(*points("val/f1"), "o-", label="F1", color="#e8710a")
    right.set(xlabel="step", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
