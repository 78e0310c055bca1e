"""Which directory a run may take, what a resume may change, and that a refusal touches nothing."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.common import run_directory
from sftlab.common.run_directory import RunDirError, claim
from tests.runs import compose

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


def leaves(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of a config's values; an empty mapping is a value."""
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [name for k, v in node.items() for name in leaves(v, f"{prefix}.{k}" if prefix else str(k))]


# Written out by hand, apart from the source's own list: what decides the numbers that a run computes. A new key of the
# config is in one of the two, or the next test fails.
MATHEMATICS = (
    "seed", "peft._target_", "peft.rank", "peft.alpha", "peft.dropout", "peft.targets", "peft.modules_to_save",
    "peft.rslora", "peft.dora", "peft.quantize",
    "model._target_", "model.name_or_path", "model.learning_rate", "model.tokenizer", "model.init",
    "model.revision", "model.tokenizer_revision", "model.architecture", "model.add_tokens", "model.add_words",
    "model.new_rows_from", "model.vocabulary_multiple", "data._target_", "data.format", "data.path",
    "data.split", "data.subset", "data.revision", "data.val_path", "data.val_split", "data.val_examples",
    "data.limit", "data.on_error", "data.control_tokens",
    "data.max_length", "data.overlong", "data.group_by_prefix", "data.shuffle", "data.sources", "data.weights",
    "optim", "schedule", "parallel._partial_", "parallel.param_dtype", "trainer._target_", "trainer.batch_size",
    "trainer.epochs", "trainer.max_steps", "trainer.clip_grad_norm", "trainer.neftune_alpha",
)  # fmt: skip
WHERE_AND_HOW = (
    "run_dir", "name", "launcher", "sweeper", "tracker", "resume", "resume_despite_changes", "evaluation",
    "peft.learning_rate", "model.adapter_learning_rate",
    "parallel._target_", "parallel.replicate", "parallel.tensor", "parallel.reshard_after_forward", "parallel.prefetch",
    "parallel.cpu_offload", "model.attention", "model.trust_remote_code",
    "data.layout", "data.row_length", "data.num_workers", "data.unknown",
    "trainer.rows_per_microbatch", "trainer.log_every",
    "trainer.eval_every", "trainer.save_every", "trainer.keep_checkpoints", "trainer.on_failed_save",
    "trainer.skip_nonfinite", "trainer.compile", "trainer.activation_checkpointing", "trainer.deterministic",
    "trainer.patience", "trainer.max_hours", "trainer.export", "trainer.profile",
)  # fmt: skip


def put(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return a config with another value at a dotted name."""
    first, _, rest = name.partition(".")
    inner = config.get(first)
    return {**config, first: put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def test_keys_that_are_newer_than_a_run_are_what_it_did() -> None:
    older = {"data": {"path": "a", "format": {"into": "x"}}}
    newer = {"data": {"path": "a", "control_tokens": "count", "format": {"into": "x", "turns": "auto"}}}
    assert run_directory.differences(older, newer) == {}
    newer["data"]["control_tokens"] = "escape"
    assert run_directory.differences(older, newer) == {"data.control_tokens": ("count", "escape")}


def test_every_key_is_either_mathematics_or_free_to_change(model_folder: Path, squad_files: tuple[Path, Path]) -> None:
    config = compose(Path("here"), model_folder, squad_files)
    wrong = []
    for name in {*leaves(config), *MATHEMATICS, *WHERE_AND_HOW}:
        free = any(name == key or name.startswith(f"{key}.") for key in WHERE_AND_HOW)
        fixed = any(name == key or name.startswith(f"{key}.") for key in MATHEMATICS)
        assert free != fixed, f"{name} is in neither of the two lists, or in both"
        there = put(config, name, "one thing")
        here = put(config, name, "another")
        if run_directory.differences(there, here) != ({} if free else {name: ("one thing", "another")}):
            wrong.append(name)
    assert wrong == []


def test_a_key_that_only_one_config_has_is_a_difference_unless_it_is_null() -> None:
    assert run_directory.differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}) == {
        "a": (1, None),
        "b.d": (None, 3),
    }
    assert run_directory.differences({"a": None, "b": {}}, {"b": {"c": None}}) == {}
    assert run_directory.differences({"a": {"b": 1}}, {"a": None}) == {"a": ({"b": 1}, None)}


def test_the_table_of_differences_is_aligned_and_long_values_are_cut(run_dir: Path) -> None:
    with pytest.raises(RunDirError) as refused:
        claim(run_dir, changed(seed=12, data__path="y" * 41, data__max_length=None, optim__lr=None), [])
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{run_dir} holds a run of another config, so that a resume would change the mathematics:"
    assert lines[1:-1] == [
        "  key        there    here",
        "  seed       0        12",
        f"  data.path  x.jsonl  {'y' * 37}...",
        "  optim.lr   1e-05    null",
    ]
    with pytest.raises(RunDirError, match=f"x.jsonl  {'y' * 40}$".replace("$", r"\n")):
        claim(run_dir, changed(data__path="y" * 40), [])


def test_overrides_and_the_config_of_the_last_start_are_kept(run_dir: Path) -> None:
    claim(run_dir, changed(trainer__log_every=7), ["trainer.log_every=7", "seed=0"])
    assert yaml.safe_load((run_dir / "overrides.yaml").read_text()) == ["trainer.log_every=7", "seed=0"]
    assert (run_dir / "config.yaml").read_text().startswith("name: sft\nseed: 0\nresume: auto"), "in their order"
    assert not [p.name for p in run_dir.iterdir() if p.name.startswith(".")], "nothing half-written is left"


def test_what_a_run_ran_with(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "seed=4"])
    monkeypatch.setattr(run_directory, "PACKAGES", (*run_directory.PACKAGES, "surely-not-installed"))
    claim(run_dir, CONFIG, [])
    found = json.loads((run_dir / "environment.json").read_text())
    assert found["command"] == [sys.executable, "train.py", "seed=4"]
    assert found["python"] == platform.python_version() and found["platform"] == platform.platform()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", found["started"])
    versions = found["packages"]
    assert versions["torch"] == metadata.version("torch") and versions["surely-not-installed"] == "not installed"
    assert set(versions) >= {"sftlab", "transformers", "datasets", "tokenizers", "safetensors", "hydra-core", "numpy"}


COMMIT = "import json; from sftlab.common import run_directory; print(json.dumps(run_directory.commit()))"


def commit_of(folder: Path, elsewhere: Path) -> dict[str, str | None]:
    """Return what a copy of the package in `folder` says of its commit, started from another folder."""
    shutil.copytree(
        Path(run_directory.__file__).parents[1],
        folder / "sftlab",
        ignore=shutil.ignore_patterns("__pycache__"),
        dirs_exist_ok=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMIT], env=environment, cwd=elsewhere, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def test_the_commit_and_the_diff_are_those_of_the_code_that_runs(tmp_path: Path) -> None:
    repo = tmp_path / "checkout"
    repo.mkdir()

    def git(*arguments: str) -> str:
        typed = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(typed, cwd=repo, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for name in ("staged", "edited"):
        (repo / name).write_text("before\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    for name in ("staged", "edited"):
        (repo / name).write_text(f"{name} now\n")
    git("add", "staged")
    found = commit_of(repo, tmp_path)
    assert found["git_commit"] == git("rev-parse", "HEAD")
    assert "+staged now" in (found["git_diff"] or "") and "+edited now" in (found["git_diff"] or "")


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path / "copy", tmp_path) == {"git_commit": None, "git_diff": None}


def test_a_copied_package_is_that_of_the_commit_it_was_copied_from(tmp_path: Path) -> None:
    record = {"git_commit": "c0ffee", "git_diff": "+1", "digest": "d"}
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / run_directory.GIT).write_text(json.dumps(record))
    assert commit_of(tmp_path / "copy", tmp_path) == {"git_commit": "c0ffee", "git_diff": "+1"}


def test_of_several_failures_the_first_is_told_unless_it_only_lost_a_peer(tmp_path: Path) -> None:
    run_directory.write_summary(tmp_path, {"skipped": [3]})
    run_directory.note_failure(tmp_path, 2, RuntimeError("Connection closed by peer"))
    assert run_directory.read_summary(tmp_path)["rank"] == 2
    run_directory.note_failure(tmp_path, 1, ValueError("RankLost: rank 0"))
    assert run_directory.read_summary(tmp_path)["rank"] == 1
    run_directory.note_failure(tmp_path, 3, ValueError("the reason"))
    run_directory.note_failure(tmp_path, 0, ValueError("later"))
    expected = {"skipped": [3], "status": "failed", "rank": 3, "error": "ValueError: the reason"}
    assert run_directory.read_summary(tmp_path) == expected


def test_only_a_run_that_failed_with_nothing_to_lose_is_idle(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    assert not run_directory.idle(tmp_path), "it may be at work"
    for status, idle in (("stopped", False), ("finished", False), ("failed", True)):
        run_directory.write_summary(tmp_path, {"status": status})
        assert run_directory.idle(tmp_path) is idle
    (tmp_path / "checkpoints/step_00000001").mkdir()
    assert not run_directory.idle(tmp_path)


def test_a_claim_that_was_killed_blocks_no_other(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.1234").write_text("half")
    assert claim(tmp_path, CONFIG, []) == run_directory.Claim()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.hidden").touch()
    with pytest.raises(RunDirError, match="not empty and not a run"):
        claim(tmp_path / "other", CONFIG, [])


def test_a_resume_forgets_how_the_run_ended_before(run_dir: Path) -> None:
    for status in ("stopped", "failed"):
        run_directory.write_summary(run_dir, {"status": status, "error": "x"})
        assert claim(run_dir, CONFIG, []) == run_directory.Claim()
        assert run_directory.read_summary(run_dir) == {} and not (run_dir / "summary.json").exists()


def test_a_finished_run_goes_on_where_its_mathematics_is_changed_on_purpose(run_dir: Path) -> None:
    run_directory.write_summary(run_dir, {"status": "finished", "score": 1.0})
    assert claim(run_dir, changed(trainer__log_every=3), []).finished == {"status": "finished", "score": 1.0}
    longer = changed(trainer__max_steps=200, resume_despite_changes=True)
    assert claim(run_dir, longer, []) == run_directory.Claim()


def test_a_rewind_is_to_a_checkpoint_of_this_run_and_of_no_other(tmp_path: Path, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints/step_00000001"
    second = run_dir / "checkpoints/step_00000002"
    shutil.copytree(checkpoint, second)
    assert claim(run_dir, changed(resume=str(checkpoint)), []) == run_directory.Claim(source=checkpoint, rewind=True)
    assert claim(run_dir, changed(resume=str(checkpoint)), []) == run_directory.Claim(source=checkpoint)
    assert claim(run_dir, changed(resume=str(second)), []).rewind, "another one, said for the first time"
    (run_dir / "checkpoints/latest").symlink_to("step_00000001")
    assert claim(run_dir, changed(resume=str(run_dir / "checkpoints/latest")), []).rewind, "a link to it, too"
    other = tmp_path / "other"
    assert claim(other, changed(resume=str(checkpoint)), []) == run_directory.Claim(source=checkpoint)
    (other / "metrics.jsonl").write_text("{}")
    assert not claim(other, changed(resume=str(second)), []).rewind, "of another run"
    assert not claim(run_dir, changed(resume=str(run_dir)), []).rewind, "a run is no checkpoint"


def test_a_checkpoint_that_lies_alone_is_begun_from_without_a_comparison(tmp_path: Path, run_dir: Path) -> None:
    alone = tmp_path / "a/b/step_00000001"
    shutil.copytree(run_dir / "checkpoints/step_00000001", alone)
    assert claim(tmp_path / "new", changed(resume=str(alone), seed=9), []) == run_directory.Claim(source=alone)


def test_a_home_folder_is_understood(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert claim(tmp_path / "new", changed(resume="~/run"), []).source == run_dir


def test_a_config_that_is_none_is_named(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("- a\n- b\n")
    with pytest.raises(RunDirError, match=r"config\.yaml is not the config of a run"):
        claim(run_dir, CONFIG, [])


def killed(self: Path, target: Path) -> None:
    raise KeyboardInterrupt


def test_a_file_that_was_being_written_at_a_kill_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_directory.write_summary(tmp_path, {"status": "finished"})
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run_directory.write_summary(tmp_path, {"status": "failed"})
    assert run_directory.read_summary(tmp_path) == {"status": "finished"}
