"""An optimiser whose parameter groups have learning rates of their own keeps their ratio over the schedule."""

from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW, Optimizer

from tests.runs import Trouble, compose, measured, run_here
from tests.support import read_jsonl

STEPS = 4


def two_rates(scorer: Any, *, lr: float, ratio: float) -> Optimizer:
    """Return AdamW that trains vectors at `ratio` times the rate of matrices."""
    matrices = [p for p in scorer.parameters() if p.ndim >= 2]
    vectors = [p for p in scorer.parameters() if p.ndim < 2]
    return AdamW([{"params": matrices}, {"params": vectors, "lr": lr * ratio}], lr=lr)


@pytest.mark.parametrize("crash_at", [None, 3])
def test_each_group_keeps_its_own_rate(
    crash_at: int | None, tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    """Over a warm-up and a decay, and again after a resume, whose optimiser holds the rates of the step before."""
    schedule = ("schedule=linear", "schedule.warmup_steps=1", f"trainer.max_steps={STEPS}", "trainer.save_every=1")
    config = compose(tmp_path / "run", model_folder, squad_files, *schedule)
    config["optim"] = {"_target_": f"{__name__}.two_rates", "_partial_": True, "lr": 0.01, "ratio": 0.25}
    witness = tmp_path / "witness"
    if crash_at:
        assert run_here(config, Trouble(crash_at=crash_at, witness=witness)) == "Crash: "
    assert run_here(config, Trouble(witness=witness)).startswith("score ")
    factors = [1.0, 1.0, 2 / 3, 1 / 3]
    seen = {line["step"]: [group["lr"] for group in line["options"]] for line in read_jsonl(tmp_path / "witness.0")}
    assert sorted(seen) == [1, 2, 3, 4]
    for step, factor in enumerate(factors, 1):
        assert seen[step] == pytest.approx([0.01 * factor, 0.0025 * factor], rel=1e-9)
        assert measured(tmp_path / "run")[step, "train/lr"] == pytest.approx(0.01 * factor, rel=1e-9)
