"""What a sweep's report advises, against sweeps of which the answer is known."""

from pathlib import Path

import pytest

from sftlab.sweeps.advice import advice, next_value
from sftlab.sweeps.costs import cost
from sftlab.sweeps.death import cause
from sftlab.sweeps.ranking import ranked
from sftlab.sweeps.record import Sweep
from sftlab.sweeps.report import shown_curve
from tests.asymmetric import write_point


def advised(folder: Path, points: list[tuple[list[str], float]], every: int = 1) -> list[tuple[str, str]]:
    for num, (overrides, loss) in enumerate(points):
        steps = [s for s in range(0, 21) if s % every == 0]
        write_point(folder, num, overrides, [{"step": s, "time_s": s * 1.0, "val/loss": loss + 20 - s} for s in steps])
    found = Sweep.read(folder).observed({})
    return [(a.text, a.command) for a in advice(found, ranked(found, "val/loss"), "val/loss")]


def test_a_winner_at_the_edge_of_its_grid(tmp_path: Path) -> None:
    told = advised(tmp_path, [([f"optim.lr={lr}", f"seed={s}"], 1 / lr + s / 1e6) for lr in (1, 2, 4) for s in (0, 1)])
    assert told == [
        ("The winner has the greatest optim.lr that was tried, 4: the best may lie beyond it. Try more.", "optim.lr=8")
    ]


@pytest.mark.parametrize("best", ["2", "4"])
def test_a_winner_inside_its_grid_or_of_two_values_is_at_no_edge(best: str, tmp_path: Path) -> None:
    values = ("1", "2", "4") if best == "2" else ("1", "4")
    points = [([f"optim.lr={v}", f"seed={s}"], float(v != best) + s / 1e6) for v in values for s in (0, 1)]
    assert advised(tmp_path, points) == []


def test_zero_where_nothing_is_below_and_what_did_not_matter_are_no_edges(tmp_path: Path) -> None:
    zero = [([f"wd={wd}", f"seed={s}"], wd + s / 1e6) for wd in (0, 1, 2) for s in (0, 1)]
    assert advised(tmp_path / "zero", zero) == []
    grid = [(lr, wd, s) for lr in (1, 2, 3) for wd in (1, 2, 3) for s in (0, 1)]
    idle = [([f"lr={lr}", f"wd={wd}", f"seed={s}"], abs(lr - 2) + wd / 1e9 + s / 1e6) for lr, wd, s in grid]
    assert not [text for text, _ in advised(tmp_path / "idle", idle) if "the best may lie beyond" in text]


def test_values_follow_by_their_ratio_or_distance() -> None:
    assert next_value([1e-5, 3e-5]) == 9e-5 and next_value([0.1, 0.05]) == 0.025 and next_value([1.0, 0.0]) == -1.0


def test_one_seed_makes_no_claim_and_few_make_a_weak_one(tmp_path: Path) -> None:
    once = advised(tmp_path / "once", [(["a=x"], 1.0), (["a=y"], 2.0)])
    assert once == [
        ("Each setting ran once, so a lead may be noise. Run the first few with three seeds or more.", "seed=0,1,2")
    ]
    # Deviations of sqrt(0.5), a gap of 1: 2 * (3 * 0.7071 / 1)^2 = 9 seeds.
    close = [([f"a={a}", f"seed={s}"], mean + d) for a, mean in (("x", 1), ("y", 2)) for s, d in ((0, -0.5), (1, 0.5))]
    ((text, command),) = advised(tmp_path / "close", close)
    assert "would take 9 seeds of each of the first two, and there are 2" in text
    assert command == "seed=0,1,2,3,4,5,6,7,8"


def test_equals_are_called_so(tmp_path: Path) -> None:
    same = [([f"a={a}", f"seed={s}"], mean + s) for a, mean in (("x", 1.0), ("y", 1.01)) for s in (0, 1, 2)]
    told = advised(tmp_path, same)
    assert "Take the cheaper one" in told[0][0]


def test_a_hyperparameter_that_did_not_matter(tmp_path: Path) -> None:
    points = [
        ([f"lr={lr}", f"wd={wd}", f"seed={s}"], abs(lr - 2) + s / 100)
        for lr in (1, 2, 3)
        for wd in (0, 1)
        for s in (0, 1)
    ]
    told = advised(tmp_path, points)
    (text,) = [t for t, _ in told if "did not matter" in t]
    assert text.startswith("wd did not matter here: its levels explain 0%")


def test_two_evaluations_make_no_curve(tmp_path: Path) -> None:
    told = advised(tmp_path, [([f"a={a}", f"seed={s}"], a + s / 1e6) for a in (1, 2) for s in (0, 1)], every=20)
    text = "val/loss was measured before and after training only, so the training loss is shown instead."
    assert told == [(text, "trainer.eval_every=2")]
    curves = [{"curves": {"val/loss": [1, 2], "train/loss": [1, 2, 3]}}]
    assert shown_curve(curves, "val/loss") == "train/loss"
    assert shown_curve([{"curves": {"val/loss": [1, 2, 3], "train/loss": [1, 2, 3]}}], "val/loss") == "val/loss"


CAUSES = {
    "killed for its memory: raise launcher.mem_gb (SLURM: OUT_OF_MEMORY)": "oom",
    "OutOfMemory: CUDA out of memory": "oom",
    "rank 0 ended by SIGKILL, perhaps for its memory": "oom",
    "ended at its time limit: raise launcher.timeout_min (SLURM: TIMEOUT)": "timeout",
    "its node failed (SLURM: NODE_FAIL)": "node",
    "preempted, and not started again": "preempted",
    "cancelled (SLURM: CANCELLED)": "stopped",
    "ValueError: it broke": "code",
    "": "unknown",
}


@pytest.mark.parametrize("reason", CAUSES)
def test_a_death_in_a_word(reason: str) -> None:
    assert cause("failed", reason) == CAUSES[reason]
    assert cause("stopped", reason) == "stopped"


def test_deaths_are_counted_and_say_what_to_do(tmp_path: Path) -> None:
    for num, error in enumerate(["OutOfMemory: x", "OutOfMemory: y", "ValueError: z"]):
        run = write_point(tmp_path, num, [f"a={num}"], [], "failed")
        (run / "summary.json").write_text(f'{{"status": "failed", "error": "{error}"}}')
    found = Sweep.read(tmp_path).observed({})
    told = [(a.text, a.command) for a in advice(found, ranked(found, "val/loss"), "val/loss")]
    ((text, command),) = told
    assert command == f"python -m sftlab.sweep dir={tmp_path} retry=failed"
    assert text.startswith("3 of 3 points did not finish: 2 because of memory (") and "; 1 because of an error" in text


def test_hours_are_those_of_all_devices(tmp_path: Path) -> None:
    run = write_point(tmp_path, 0, ["a=1"], [{"step": 2, "time_s": 7200.0, "val/loss": 1.0}])
    (run / "facts.json").write_text('{"ranks": 4, "device": "cuda"}')
    (run / "environment.json").write_text('{"started": "2026-01-31T12:00:00+0000"}')
    import os

    for name in ("summary.json", "metrics.jsonl"):
        os.utime(run / name, (1769860800 + 3600,) * 2)
    found = cost(Sweep.read(tmp_path).observed({}).points[0])
    assert (found.hours, found.gpu, found.began_s, found.ended_s) == (8.0, True, 1769860800.0, 1769864400.0)
    os.utime(run / "summary.json", (1769860800 + 3 * 3600,) * 2)
    assert cost(Sweep.read(tmp_path).observed({}).points[0]).hours == 12.0, "it was busy for longer than it trained"
