"""A run that is crashed and resumed is the run that was never crashed: bit for bit on the same ranks."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import compose, measured, run_all, run_here
from tests.support import read_jsonl

# 36 examples in steps of 12: epoch 1 is steps 1 to 3, epoch 2 steps 4 to 6. The checkpoint of step 4 is in epoch 2.
CADENCE = ("trainer.max_steps=9", "trainer.save_every=2", "trainer.eval_every=3")


LATE_S = 5000.0  # what `resumed` is told that it has taken already
SKIPPED = [{"step": 2, "examples": ["p0q0"]}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, squad_files: tuple[Path, Path]) -> Path:
    """On two ranks: `straight`; `crashed` in step 6, with a torn line; `resumed`, which went on from a copy of it.

    The checkpoint that `resumed` begins from says that a step was skipped and that LATE_S have gone by.
    """
    folder = tmp_path_factory.mktemp("runs")
    config = {
        name: {
            **compose(folder / name, model_folder, squad_files, *CADENCE),
            "witness": str(folder / f"{name}.witness"),
        }
        for name in ("straight", "crashed", "resumed")
    }
    ends = run_all(
        [
            {**config["straight"], "indices": str(folder / "straight.indices")},
            {**config["crashed"], "crash_at": 6, "indices": str(folder / "crashed.indices")},
        ],
        ranks=2,
    )
    assert ends[0][0].startswith("score") and ends[1] == ["Crash: ", "Crash: "]
    with (folder / "crashed/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time_s": 1.0, "tr')
    shutil.copytree(folder / "crashed", folder / "resumed", symlinks=True)
    for copy in ("elastic", "truncated", "corrupted", "missing", "ruined"):
        shutil.copytree(folder / "crashed", folder / copy, symlinks=True)
    progress = folder / "resumed/checkpoints/step_00000004/checkpoint.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"time_s": LATE_S, "skipped": SKIPPED}))
    assert run_all([config["resumed"]], ranks=2)[0][0] == ends[0][0], "the same score"
    return folder


def test_gauntlet_22_a_resumed_run_is_bit_equal_to_the_straight_one(runs: Path) -> None:
    assert "step_00000004" in (runs / "resumed/train.log").read_text(), "from the middle of epoch 2"
    straight, resumed = measured(runs / "straight"), measured(runs / "resumed")
    assert {step for step, name in straight if name == "train/loss"} == set(range(1, 10))
    assert resumed == straight
    answers = read_jsonl(runs / "straight/samples.jsonl")
    assert len(answers) == 4 * 2 and read_jsonl(runs / "resumed/samples.jsonl") == answers


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_has_the_generators_options_and_counts_of_the_straight_one(runs: Path, rank: int) -> None:
    straight, resumed = (read_jsonl(runs / f"{name}.witness.{rank}") for name in ("straight", "resumed"))
    assert [line["step"] for line in straight] == list(range(1, 10))
    assert [line["step"] for line in resumed] == list(range(5, 10))
    for ours, theirs in zip(resumed, straight[4:], strict=True):
        for name in ("draws", "options", "updates"):
            assert ours[name] == theirs[name], f"step {ours['step']}: {name}"
    assert straight[8]["updates"] == [9.0]
    assert straight[0]["draws"] != read_jsonl(runs / f"straight.witness.{1 - rank}")[0]["draws"]


def test_the_clock_and_the_skipped_steps_go_on_over_a_resume(runs: Path) -> None:
    summaries = {name: json.loads((runs / name / "summary.json").read_text()) for name in ("straight", "resumed")}
    times = {line["step"]: line["time_s"] for line in read_jsonl(runs / "resumed/metrics.jsonl")}
    before, after = [times[s] for s in range(5)], [times[s] for s in range(5, 10)]
    assert before == sorted(before) and before[0] == 0.0 and before[-1] < LATE_S, "as they were written"
    assert after == sorted(after) and LATE_S < after[0] < after[-1] < LATE_S + summaries["resumed"]["wall_s"]
    assert summaries["resumed"]["skipped"] == SKIPPED and summaries["straight"]["skipped"] == []
    newest = json.loads((runs / "resumed/checkpoints/latest/checkpoint.json").read_text())
    assert newest["skipped"] == SKIPPED and after[-1] <= newest["time_s"] < LATE_S + summaries["resumed"]["wall_s"]
    assert newest["next"] == {"epoch": 3, "step_in_epoch": 0} and newest["num_ranks"] == 2
    for kind in ("last", "best"):
        ours, theirs = (
            {k: v for k, v in summaries[name][kind].items() if k.startswith(("train/", "val/"))}
            for name in ("resumed", "straight")
        )
        assert ours == theirs, kind


def test_a_finished_run_says_so_and_runs_no_step(
    runs: Path, model_folder: Path, squad_files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    before = (runs / "straight/metrics.jsonl").read_bytes()
    again = compose(runs / "straight", model_folder, squad_files, *CADENCE)
    other = compose(runs / "straight", model_folder, squad_files, *CADENCE, "seed=1", "optim.lr=0.02")
    never = compose(runs / "straight", model_folder, squad_files, *CADENCE, "resume=never")
    ends = [run_here(config) for config in (again, other, never)]
    score = measured(runs / "straight")[9, "val/loss"]
    assert ends[0] == f"score {score!r}"
    said = f"is finished: 9 steps, score {score:.4f}; nothing to do. The model is {runs / 'straight/model'}"
    assert said in capfd.readouterr().out
    assert "optim.lr  0.01   0.02" in ends[1] and "seed      0      1" in ends[1]
    assert "resume_despite_changes=true" in ends[1] and "resume=never" in ends[2]
    assert (runs / "straight/metrics.jsonl").read_bytes() == before


def test_gauntlet_23_two_ranks_then_one_then_four(
    runs: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    config = compose(runs / "elastic", model_folder, squad_files, *CADENCE)
    indices = runs / "elastic.indices"
    assert run_here({**config, "crash_at": 8, "indices": str(indices)}) == "Crash: "
    assert run_all([{**config, "indices": str(indices)}], ranks=4)[0][0].startswith("score")
    log = (runs / "elastic/train.log").read_text()
    assert "step_00000004, step 4" in log and "step_00000006, step 6" in log
    straight, elastic = measured(runs / "straight"), measured(runs / "elastic")
    assert straight.keys() == elastic.keys()
    for key, value in straight.items():
        assert elastic[key] == pytest.approx(value, rel=2e-5, abs=1e-9), key
    seen = {line["step"]: line["indices"] for line in read_jsonl(indices)}
    assert sorted(seen) == [5, 6, 7, 8, 9]
    assert seen == {k["step"]: k["indices"] for k in read_jsonl(runs / "straight.indices") if k["step"] > 4}


def test_the_newest_checkpoints_are_kept_and_say_their_score_where_they_were_evaluated(runs: Path) -> None:
    folder = runs / "straight/checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000008", "step_00000009"]
    assert (folder / "latest").resolve().name == "step_00000009"
    scores = [
        json.loads((folder / name / "checkpoint.json").read_text())["score"] for name in ("step_00000008", "latest")
    ]
    assert scores == [None, measured(runs / "straight")[9, "val/loss"]]


def harm(checkpoint: Path, how: str) -> Path:
    """Damage the shard of the last rank; return it."""
    shard = checkpoint / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    return shard


def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_used(
    runs: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    kinds = ("truncated", "corrupted", "missing")
    shards = {how: harm(runs / how / "checkpoints/step_00000004", how) for how in kinds}
    for step in (2, 4):
        harm(runs / f"ruined/checkpoints/step_{step:08d}", "corrupted")
    before = (runs / "ruined/metrics.jsonl").read_bytes()
    ends = run_all(
        [compose(runs / name, model_folder, squad_files, *CADENCE) for name in (*kinds, "ruined")],
        ranks=2,
    )
    straight = measured(runs / "straight")
    for how, (end, _) in zip(kinds, ends[:3], strict=True):
        log = (runs / how / "train.log").read_text()
        assert f"step_00000004 is damaged and not used:\n{shards[how]} is {how}" in log
        assert "step_00000002, step 2" in log and end.startswith("score")
        assert measured(runs / how) == straight, "from step 2 on the same two ranks, to the last bit"
    for end in ends[3]:
        assert "Damaged: no checkpoint in" in end and "__1_0.distcp is corrupted" in end
    assert (runs / "ruined/metrics.jsonl").read_bytes() == before, "nothing was trained from half of it"
