"""The demo model fine-tuned for a few steps on GSM8K, read as three formats."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sftlab import train
from tests.support import SHARED_DATA, read_jsonl

REAL = SHARED_DATA / "gsm8k" / "train.jsonl"
FORMATS = {
    "gsm8k": [],
    "prompt_completion": [],
    "chat": ["data.format.template_path=asset://chat.jinja"],
}


def stand_in(num: int = 60) -> list[dict[str, str]]:
    """Return made-up questions of GSM8K's form: worked lines with calculator notes, and the number after ####."""
    rng = np.random.default_rng(0)
    rows = []
    for name, thing in zip(
        rng.choice(["Ada", "Bo", "Cleo"], num), rng.choice(["clips", "loaves", "boats"], num), strict=True
    ):
        a, b = (int(x) for x in rng.integers(2, 30, 2))
        question = f"{name} sold {a} {thing} in April and {b} in May. How many {thing} did {name} sell altogether?"
        rows.append(
            {"question": question, "answer": f"{name} sold {a}+{b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"}
        )
    return rows


def write_as(format: str, rows: list[dict[str, str]], path: Path) -> Path:
    with path.open("w") as file:
        for r in rows:
            said = [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
            made = {
                "gsm8k": r,
                "prompt_completion": {"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"},
                "chat": {"messages": said},
            }[format]
            file.write(json.dumps(made) + "\n")
    return path


@pytest.mark.parametrize("source", ["generated", "real"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_demo_model_learns_gsm8k_in_every_format(
    format: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "real" and not REAL.is_file():
        pytest.skip("no GSM8K beside the checkout")
    rows = read_jsonl(REAL)[:60] if source == "real" else stand_in()
    path = write_as(format, rows, tmp_path / "rows.jsonl")
    held = write_as(format, rows[:2], tmp_path / "held.jsonl")
    typed = [
        f"data={format}", f"data.path={path}", f"data.val_path={held}", *FORMATS[format], "run_dir=out",
        "trainer.batch_size=8",
        "trainer.max_steps=10", "optim.lr=0.003", "tracker=none", "evaluation.num_answers=2", "evaluation.max_new_tokens=4",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sftlab-train", *typed])
    train.main()
    lines = read_jsonl(Path("out/metrics.jsonl"))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 10 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:2]), losses
    val = [line["val/loss"] for line in lines if "val/loss" in line]
    assert val[-1] < val[0] and all(0 <= line["val/exact_match"] <= 1 for line in lines if "val/exact_match" in line)
    report = json.loads(Path("out/data.json").read_text())
    assert report["accounts"]["training"][""]["kept"] == 60
