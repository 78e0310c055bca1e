"""When a run ends: patience, hours, the best checkpoint as model/; the same after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftlab.checkpoints.hugging_face import weights_of
from sftlab.common.run_directory import read_summary
from sftlab.parallel.world import World
from sftlab.sweeps.points import read_point
from sftlab.training.ending import Ending
from sftlab.training.settings import TrainerSettings
from tests.runs import Trouble, compose, measured, run_all
from tests.support import make_model_folder, make_squad_file


def told(ending: Ending, *scores: float) -> list[int]:
    """Return the step after which the run has ended, of evaluations at steps 1, 2, ..."""
    for step, score in enumerate(scores, 1):
        ending.note_score(step, score, 0.0)
        if ending.reached(step):
            return [step]
    return []


class Clockless:
    """A world whose ranks agree with this one."""

    def any(self, flag: bool) -> bool:
        return flag


def ending(**settings: Any) -> Ending:
    world: Any = Clockless()
    return Ending(world=world, last_step=100, **settings)


def test_patience_counts_evaluations_in_a_row_and_only_a_lower_loss_is_better() -> None:
    assert told(ending(patience=2), 3.0, 2.0, 2.0, 1.9, 2.5, 1.9, 1.0) == [6]
    assert told(ending(patience=1), 3.0, 3.0) == [2]
    assert told(ending(patience=2), 1.0, float("nan"), float("nan")) == [3]
    assert told(ending(), *[1.0] * 9) == []
    made = ending(patience=1)
    made.note_score(0, 0.5, 0.0)  # before training: nothing that could be left behind
    assert told(made, 3.0, 2.0) == []
    told(made, 9.0)
    assert made.why == "trainer.patience=1: 1 evaluations brought no val/loss below 2.0000 of step 2"


def test_the_state_in_a_checkpoint_ends_a_run_where_it_would_have_ended() -> None:
    scores = [3.0, 2.0, 2.1, 2.2, 1.0]
    straight = ending(patience=2)
    assert told(straight, *scores[:4]) == [4]
    for cut in range(1, 5):
        first, second = ending(patience=2), ending(patience=2)
        told(first, *scores[:cut])
        second.restore(json.loads(json.dumps({"step": cut, "ending": first.state()})))
        ended = [cut] if second.reached(cut) else []
        for step, score in enumerate(scores[cut:4], cut + 1):
            second.note_score(step, score, 0.0)
            ended += [step] if second.reached(step) else []
        assert ended == [4] and (second.best, second.best_step) == (2.0, 2)
    longer = ending(patience=3)
    longer.restore({"step": 4, "ending": straight.state()})
    assert not longer.reached(4)
    ending(patience=1).restore({"step": 3})  # a checkpoint of an earlier version


def test_the_clock_leaves_room_for_a_step_an_evaluation_and_a_save() -> None:
    made = ending(max_hours=1.0)
    made.note_score(0, 1.0, 300.0)
    for step, now_s in enumerate(range(100, 3600, 100), 1):
        made.look_at_clock(step, float(now_s), 200.0)
        if made.reached(step):
            break
    assert now_s == 3100 and made.why == "trainer.max_hours=1 are used up"  # 3100 + 100 + 300 + 200 > 3600
    for hours, over in ((1.0, True), (0.5, True), (2.0, False), (None, False)):
        again = ending(max_hours=hours)
        again.restore({"step": 31, "ending": made.state()})
        assert again.reached(31) is over


def test_every_step_with_a_better_score_is_saved_if_the_best_is_exported() -> None:
    best, last = ending(saves_best=True), ending()
    for step, score in enumerate((3.0, 2.0, 2.0, 1.0), 1):
        best.note_score(step, score, 0.0)
        last.note_score(step, score, 0.0)
        assert best.saves(step) is (step != 3) and not last.saves(step)
    assert not ending(saves_best=True).saves(0)


def test_settings_that_watch_the_validation_loss_need_one() -> None:
    watching: list[dict[str, Any]] = [{"patience": 3}, {"export": "best"}]
    for given in watching:
        with pytest.raises(ValueError, match=r"trainer.eval_every=0.*set trainer.eval_every to a number"):
            TrainerSettings(batch_size=1, **given)
        with pytest.raises(ValueError, match=r"needs validation examples.*data.val_path.*data.val_examples"):
            TrainerSettings(batch_size=1, eval_every=5, **given).require_validation(False)
        TrainerSettings(batch_size=1, eval_every=5, **given).require_validation(True)
    TrainerSettings(batch_size=1).require_validation(False)
    wrong: list[tuple[str, Any]] = [("patience", 0), ("max_hours", 0), ("max_hours", "3"), ("export", "first")]
    for key, value in [*wrong, ("neftune_alpha", 0), ("neftune_alpha", True)]:
        with pytest.raises(ValueError, match=f"trainer.{key}={value}: expected"):
            TrainerSettings(batch_size=1, eval_every=1, **{key: value})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[str]]]]:
    """Run on two ranks, at a learning rate that changes nothing (so that all scores are equal), and once for real."""
    folder = tmp_path_factory.mktemp("ending")
    model = make_model_folder(folder / "model")
    data = (make_squad_file(folder / "train.jsonl"), make_squad_file(folder / "val.jsonl", 3, seed=1))

    def run(name: str, *overrides: str) -> dict[str, Any]:
        settings = ["trainer.eval_every=1", "trainer.max_steps=6", "evaluation.num_answers=0", "optim.lr=1e-30"]
        return compose(folder / name, model, data, *settings, *overrides)

    watched = ["trainer.patience=2", "trainer.export=best", "trainer.keep_checkpoints=1"]
    every = [*watched, "trainer.save_every=1"]
    rising = ["optim.lr=0.3", "schedule=constant", "trainer.export=best", "trainer.keep_checkpoints=1"]
    ends = run_all(
        [
            run("straight", *watched),
            (run("resumed", *every), Trouble(crash_at=3)),
            run("resumed", *every),
            run("straight", *watched),  # has nothing left to do
            run("longer", *watched),
            run("longer", *watched, "trainer.patience=4"),
            run("hours", "trainer.max_hours=1e-6"),
            run("hours", "trainer.max_hours=1e-6"),
            run("hours", "trainer.max_hours=1"),
            run("rising", *rising),
        ],
        ranks=2,
    )
    return folder, {"ends": ends}


def test_a_run_that_has_lost_patience_is_finished_with_its_best_model(made: Any) -> None:
    folder, found = made
    assert all(ranks[0] == ranks[1] for ranks in found["ends"])
    for name in ("straight", "resumed"):
        summary = read_summary(folder / name)
        assert summary["status"] == "finished" and summary["steps"] == 3, name
        assert summary["ended"].startswith("trainer.patience=2: 2 evaluations brought no val/loss below")
        assert summary["model"]["step"] == 1 and summary["model"]["val/loss"] == summary["score"]
        assert {step for step, key in measured(folder / name) if key == "val/loss"} == {0, 1, 2, 3}
        kept = sorted(p.name for p in (folder / name / "checkpoints").glob("step_*"))
        assert kept == ["step_00000001", "step_00000003"]  # the best and the newest
    assert found["ends"][1][0].startswith("Crash") and found["ends"][0] == found["ends"][2] == found["ends"][3]
    log = (folder / "straight" / "train.log").read_text()
    assert "ended after step 3 of 6: trainer.patience=2" in log and "model, of step 1" in log


def test_more_patience_or_more_hours_resume_a_finished_run(made: Any) -> None:
    folder, _ = made
    assert read_summary(folder / "longer")["steps"] == 5
    assert "resumed from" in (folder / "longer" / "train.log").read_text()
    hours = read_summary(folder / "hours")
    assert hours["steps"] == 6 and hours["ended"] is None
    log = (folder / "hours" / "train.log").read_text()
    assert log.count("ended after step 1 of 6: trainer.max_hours=1e-06 are used up") == 1
    assert {step for step, key in measured(folder / "hours") if key == "val/loss"} == set(range(7))


def test_the_best_model_and_its_scores_are_what_a_sweep_ranks(made: Any) -> None:
    folder, found = made
    losses = {s: v for (s, key), v in measured(folder / "rising").items() if key == "val/loss" and s}
    best = min(losses, key=lambda s: losses[s])
    assert best < 6, "the test needs a run whose last step is not its best"
    summary = read_summary(folder / "rising")
    assert summary["model"]["step"] == best and summary["score"] == losses[best] != losses[6]
    assert found["ends"][-1][0] == f"score {losses[best]!r}"
    point = read_point(folder, 0, {"run_dir": "rising"}, {})
    assert point.value("val/loss") == losses[best] and point.ended_early == "" and point.max_steps == 6
    assert read_point(folder, 0, {"run_dir": "straight"}, {}).ended_early.startswith("trainer.patience=2")
    from safetensors.torch import load_file

    exported = load_file(folder / "rising" / "model" / "model.safetensors")
    import torch

    saved = weights_of(folder / "rising" / "checkpoints" / f"step_{best:08d}", torch.float32)
    assert exported and all(torch.equal(value, saved[name]) for name, value in exported.items())


def test_ranks_agree_on_the_clock() -> None:
    asked: list[bool] = []

    class Other(Clockless):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return True  # another rank's clock is ahead

    world: World = Other()  # type: ignore[assignment]
    made = Ending(world=world, last_step=9, max_hours=1.0)
    made.look_at_clock(4, 10.0, 0.0)
    assert asked == [False] and made.reached(4)
