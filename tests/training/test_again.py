"""Whole runs in this process, started again: on changed data, from an older checkpoint, by other options."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from sftlab.checkpoints import manifest
from sftlab.common import progress
from sftlab.training.trainer import Trainer
from sftlab.training.validation import VALIDATION
from tests.runs import Trouble, compose, measured, run_here
from tests.support import make_model_folder, make_squad_file, read_jsonl

Files = tuple[Path, Path]
SETTINGS = ("trainer.max_steps=4", "trainer.save_every=1", "trainer.eval_every=1", "trainer.keep_checkpoints=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own generation config says more than its config does: several tokens that end a text."""
    folder = make_model_folder(tmp_path_factory.mktemp("ends"))
    GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 7, 9], pad_token_id=2, do_sample=True, temperature=0.25, top_p=0.5
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Files]:
    """A finished run whose validation loss rises: the best checkpoint is not the newest; and its data."""
    folder = tmp_path_factory.mktemp("again")
    files = make_squad_file(folder / "train.jsonl"), make_squad_file(folder / "val.jsonl", 4, seed=1)
    end = run_here(compose(folder / "run", model, files, *SETTINGS, "optim.lr=1.0", "optim.weight_decay=0.5"))
    assert end.startswith("score")
    return folder / "run", files


def steps(run_dir: Path) -> list[int]:
    return [int(p.name[5:]) for p in manifest.complete_checkpoints(run_dir / "checkpoints")]


@pytest.fixture
def killed(stopped: tuple[Path, Files], tmp_path: Path) -> tuple[Path, Files]:
    """A copy of that run as a kill after its last checkpoint would have left it."""
    shutil.copytree(stopped[0], tmp_path / "run", symlinks=True)
    (tmp_path / "run/summary.json").unlink()
    return tmp_path / "run", stopped[1]


def config(run_dir: Path, model: Path, files: Files, *more: str) -> dict[str, Any]:
    return compose(run_dir, model, files, *SETTINGS, "optim.lr=1.0", "optim.weight_decay=0.5", *more)


def test_a_run_keeps_its_best_checkpoint_and_the_newest(stopped: tuple[Path, Files]) -> None:
    losses = {s: value for (s, _), value in measured(stopped[0], "val/loss").items() if s > 0}
    best = min(losses, key=lambda s: losses[s])
    assert best < 3, "or the test shows nothing"
    assert steps(stopped[0]) == [best, 3, 4]
    for step in (best, 3, 4):
        path = stopped[0] / f"checkpoints/step_{step:08d}"
        assert manifest.read_manifest(path)["score"] == losses[step]


def test_a_model_keeps_all_that_lay_beside_its_weights(stopped: tuple[Path, Files], model: Path) -> None:
    folder = stopped[0] / "model"
    own = GenerationConfig.from_pretrained(folder)
    assert own.eos_token_id == [1, 7, 9] and own.do_sample and (own.temperature, own.top_p) == (0.25, 0.5)
    text = "The keeper of the lighthouse counts."
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(model)
    assert ours(text).input_ids == theirs(text).input_ids and ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_changed_data_is_refused_unless_it_is_meant(killed: tuple[Path, Files], model: Path, tmp_path: Path) -> None:
    run_dir, files = killed
    (tmp_path / "data").mkdir()
    before = read_jsonl(files[0])
    kept = files[0].read_text()
    try:
        before[3]["question"] += " And who buys it?"
        files[0].write_text("".join(json.dumps(row) + "\n" for row in before))
        end = run_here(config(run_dir, model, files))
        assert (
            end.startswith("ValueError: ")
            and "was made with other data" in end
            and "resume_despite_changes=true" in end
        )
        assert measured(run_dir), "the numbers were not cut off"
        end = run_here(config(run_dir, model, files, "resume_despite_changes=true"))
        assert end.startswith("score")
    finally:
        files[0].write_text(kept)


def test_the_same_data_written_elsewhere_goes_on(killed: tuple[Path, Files], model: Path) -> None:
    run_dir, files = killed
    files[0].touch()
    assert run_here(config(run_dir, model, files)).startswith("score")


def test_a_rewind_makes_the_steps_again_and_the_next_resume_follows_it(killed: tuple[Path, Files], model: Path) -> None:
    run_dir, files = killed
    straight = measured(run_dir)
    best = steps(run_dir)[0]
    again = config(run_dir, model, files, f"resume={run_dir}/checkpoints/step_{best:08d}")
    crashed = run_here(again, Trouble(crash_at=4))
    assert crashed.startswith("Crash") and steps(run_dir)[-1] == 3
    assert f"resumed from {run_dir}/checkpoints/step_{best:08d}, step {best}" in (run_dir / "train.log").read_text()
    assert max(step for step, _ in measured(run_dir)) == 3, "what was written of later steps is cut off"
    assert run_here(again).startswith("score")
    assert f"resumed from {run_dir / 'checkpoints/step_00000003'}, step 3" in (run_dir / "train.log").read_text()
    assert measured(run_dir) == straight


def test_other_options_of_the_optimiser_apply_from_the_resume_on(
    killed: tuple[Path, Files], model: Path, tmp_path: Path
) -> None:
    run_dir, files = killed
    witness = tmp_path / "witness"
    changed = (
        "trainer.max_steps=5",
        "optim.weight_decay=0.25",
        "optim.betas=[0.7,0.9]",
        "optim.eps=1e-5",
        "optim.lr=0.5",
        "schedule=constant",
        "resume_despite_changes=true",
    )
    end = run_here(config(run_dir, model, files, *changed), Trouble(witness=witness))
    assert end.startswith("score")
    (line,) = read_jsonl(Path(f"{witness}.0"))
    found = [(o["lr"], o["weight_decay"], o["betas"], o["eps"]) for o in line["options"]]
    assert line["step"] == 5 and line["updates"] == [5.0]
    assert found == [(0.5, 0.25, [0.7, 0.9], 1e-5), (0.5, 0.0, [0.7, 0.9], 1e-5)]


def test_a_run_that_begins_from_another_ones_checkpoint(
    killed: tuple[Path, Files], model: Path, tmp_path: Path
) -> None:
    run_dir, files = killed
    straight = measured(run_dir)
    new = tmp_path / "new"
    assert run_here(config(new, model, files, f"resume={run_dir}/checkpoints/step_00000003")).startswith("score")
    assert measured(new) == {k: v for k, v in straight.items() if k[0] == 4}
    assert steps(new) == [4] and steps(run_dir)[-2:] == [3, 4]


@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_that_a_signal_cut_short_is_made_when_the_run_is_resumed(
    at: int, tmp_path: Path, model: Path, stopped: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between two batches. All numbers are those of the run that nobody stopped, the last step's too."""
    told: list[int] = []

    def look(name: str, done: int, total: int) -> None:
        if name == VALIDATION and done == 0:
            told.append(done)
            if len(told) == 1 + at:  # step 0 is evaluated too
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress, "listeners", [look])
    monkeypatch.setattr("sftlab.training.trainer.listeners", progress.listeners)
    with pytest.raises(SystemExit) as left:
        run_here(config(tmp_path / "run", model, stopped[1]))
    assert left.value.code == 0 and len(told) == 1 + at, "and no other evaluation began"
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/loss" in line] == list(range(at)) and lines[-1]["step"] == at
    assert steps(tmp_path / "run")[-1] == at
    assert run_here(config(tmp_path / "run", model, stopped[1])).startswith("score")
    assert measured(tmp_path / "run") == measured(stopped[0])


def test_a_ctrl_c_while_the_last_checkpoint_is_written_loses_nothing(
    tmp_path: Path, model: Path, stopped: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Trainer.wait_for_save

    def interrupted(self: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        wait(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Trainer, "wait_for_save", interrupted)
        run_here(config(tmp_path / "run", model, stopped[1]))
    assert left.value.code == 0 and steps(tmp_path / "run")[-1] == 4 and not (tmp_path / "run" / "model").exists()
    assert run_here(config(tmp_path / "run", model, stopped[1])).startswith("score")
    assert (tmp_path / "run" / "model").is_dir() and measured(tmp_path / "run") == measured(stopped[0])
