"""Which directory a run may take, what a resume may change, and that a refusal touches nothing."""

from pathlib import Path
from typing import Any

import pytest

from sftlab.common import run_directory
from sftlab.common.run_directory import RunDirError, claim

CONFIG: dict[str, Any] = {
    "name": "sft",
    "seed": 0,
    "resume": "auto",
    "resume_despite_changes": False,
    "launcher": None,
    "model": {"name_or_path": "a", "attention": "auto"},
    "data": {"path": "x.jsonl", "layout": "tree", "max_length": None},
    "optim": {"lr": 1e-5, "betas": [0.9, 0.95]},
    "parallel": {"param_dtype": "auto", "replicate": 1},
    "trainer": {"batch_size": 32, "max_steps": 100, "log_every": 1, "save_every": 10, "deterministic": False},
}


def changed(**keys: Any) -> dict[str, Any]:
    """Return the config with `group__key=value` set."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
    for key, value in keys.items():
        group, _, leaf = key.partition("__")
        if leaf:
            config[group][leaf] = value
        else:
            config[group] = value
    return config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed after its first checkpoint."""
    folder = tmp_path / "run"
    assert claim(folder, CONFIG, ["seed=0"]) == run_directory.Claim()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint = folder / "checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("key", "value", "row"),
    [
        ("seed", 1, "seed  0      1"),
        ("data__path", "y.jsonl", "data.path  x.jsonl  y.jsonl"),
        ("data__max_length", 64, "data.max_length  null   64"),
        ("model__name_or_path", "b", "model.name_or_path  a      b"),
        ("optim__lr", 2e-5, "optim.lr  1e-05  2e-05"),
        ("optim__betas", [0.9, 0.999], "optim.betas  [0.9, 0.95]  [0.9, 0.999]"),
        ("trainer__batch_size", 16, "trainer.batch_size  32     16"),
        ("trainer__max_steps", 200, "trainer.max_steps  100    200"),
        ("parallel__param_dtype", "float32", "parallel.param_dtype  auto   float32"),
    ],
)
def test_other_mathematics_is_refused_with_a_table_and_nothing_is_touched(
    run_dir: Path, key: str, value: Any, row: str
) -> None:
    before = content(run_dir)
    with pytest.raises(RunDirError) as refused:
        claim(run_dir, changed(**{key: value}), [])
    assert (
        row in str(refused.value)
        and "resume_despite_changes=true" in str(refused.value)
        and "there" in str(refused.value)
    )
    assert content(run_dir) == before
    claim(run_dir, changed(**{key: value}, resume_despite_changes=True), [])
    assert run_directory.read_config(run_dir)[key.split("__")[0]] == changed(**{key: value})[key.split("__")[0]]


def test_hardware_logging_and_cadence_may_change(run_dir: Path) -> None:
    free = {
        "trainer__log_every": 5, "trainer__save_every": 3, "trainer__deterministic": True, "data__layout": "packed",
        "parallel__replicate": 2, "model__attention": "sdpa", "name": "other", "launcher": {"nodes": 2},
    }  # fmt: skip
    assert claim(run_dir, changed(**free), []) == run_directory.Claim()
    assert run_directory.read_config(run_dir)["trainer"]["log_every"] == 5


def test_never_refuses_and_touches_nothing(run_dir: Path) -> None:
    before = content(run_dir)
    with pytest.raises(RunDirError, match="holds a run and resume=never"):
        claim(run_dir, changed(resume="never"), [])
    assert content(run_dir) == before


def test_a_finished_run_is_found_finished(run_dir: Path) -> None:
    run_directory.write_summary(run_dir, {"status": "finished", "score": 1.0, "steps": 100})
    assert claim(run_dir, CONFIG, []).finished == {"status": "finished", "score": 1.0, "steps": 100}
    run_directory.write_summary(run_dir, {"status": "stopped"})
    assert claim(run_dir, CONFIG, []).finished is None


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_is_no_run_is_not_written_to(tmp_path: Path, resume: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirError, match=r"is not empty and not a run \(it has no config\.yaml\)"):
        claim(tmp_path, changed(resume=resume), [])
    with pytest.raises(RunDirError, match="is a file"):
        claim(tmp_path / "thesis.tex", CONFIG, [])
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_run_that_failed_before_its_first_step_blocks_no_second_try(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    claim(folder, changed(data__path="typo.jsonl"), [])
    with pytest.raises(RunDirError):  # it may be at work
        claim(folder, CONFIG, [])
    run_directory.note_failure(folder, 0, FileNotFoundError("data.path=typo.jsonl: no such file or folder"))
    assert claim(folder, changed(resume="never"), []) == run_directory.Claim()
    assert run_directory.read_config(folder)["data"]["path"] == "x.jsonl"
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    run_directory.note_failure(folder, 0, ValueError("later"))
    with pytest.raises(RunDirError):
        claim(folder, changed(seed=5), [])


def test_elsewhere_is_a_run_or_a_checkpoint_of_the_same_mathematics(tmp_path: Path, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints/step_00000001"
    for i, source in enumerate((run_dir, checkpoint)):
        found = claim(tmp_path / f"new{i}", changed(resume=str(source)), [])
        assert found == run_directory.Claim(source=source)
    with pytest.raises(RunDirError, match="expected auto, never, a run's directory or a checkpoint"):
        claim(tmp_path / "new", changed(resume=str(tmp_path / "nowhere")), [])
    with pytest.raises(RunDirError, match=r"seed  0 +1"):
        claim(tmp_path / "new", changed(resume=str(checkpoint), seed=1), [])
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_its_own_is_gone_back_to_once(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints/step_00000001"
    assert claim(run_dir, changed(resume=str(checkpoint)), []).rewind
    assert not claim(run_dir, changed(resume=str(checkpoint)), []).rewind, "the same command again goes on"
