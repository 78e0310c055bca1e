"""A run in this process from its config to what it leaves behind, however it ends."""

import json
import logging
import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from sftlab.checkpoints.hugging_face import weights_of
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common import run_directory
from sftlab.common.metrics import Metrics
from sftlab.common.owner import Hold, this_process
from sftlab.parallel.world import World
from sftlab.training import run as running
from sftlab.training.console import Console
from sftlab.training.draft import Draft, facts
from sftlab.training.faults import RankLost
from sftlab.training.run import (
    claim,
    command_again,
    dated,
    finish,
    leave_model,
    quiet_libraries,
    run,
)
from sftlab.training.settings import TrainerSettings
from sftlab.training.trainer import Trainer
from tests.runs import compose
from tests.support import read_jsonl

Files = tuple[Path, Path]
CPU = torch.device("cpu")
SETTINGS = (
    "name=odd", "trainer.max_steps=3", "trainer.batch_size=12", "trainer.save_every=1", "trainer.keep_checkpoints=2",
    "parallel.param_dtype=bfloat16", "optim.lr=0.05",
)  # fmt: skip
OVERRIDES = ["optim.lr=0.05", "name=with space", "run_dir=elsewhere"]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, squad_files: Files
) -> tuple[Path, dict[str, Any], float]:
    """A run of three steps, saved after each: its directory, its config and its score."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = compose(folder, model_folder, squad_files, *SETTINGS)
    return folder, config, run(config, OVERRIDES)


def test_a_run_leaves_a_summary_of_its_numbers(finished: Any) -> None:
    folder, _, score = finished
    lines = read_jsonl(folder / "metrics.jsonl")
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["skipped"]) == ("finished", 3, [])
    assert summary["score"] == score == losses[-1] == summary["last"]["val/loss"]
    assert summary["best"]["val/loss"] == min(losses)
    assert summary["last"]["train/loss"] == lines[-2]["train/loss"] and lines[-2]["step"] == 3
    assert lines[-1]["time_s"] < summary["wall_s"] < 3600
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == OVERRIDES


def test_the_model_is_that_of_the_last_checkpoint_in_the_dtype_that_was_computed_in(finished: Any) -> None:
    folder = finished[0]
    kept = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert kept[-2:] == ["step_00000002", "step_00000003"]
    model = load_file(folder / "model" / "model.safetensors")
    last, before = (weights_of(folder / "checkpoints" / name, torch.bfloat16) for name in kept[:-3:-1])
    assert {v.dtype for v in model.values()} == {torch.bfloat16}
    assert all(torch.equal(model[name], last[name]) for name in model)
    assert not all(torch.equal(model[name], before[name]) for name in model)


def test_the_log_says_what_runs_and_what_came_of_it(finished: Any, model_folder: Path, squad_files: Files) -> None:
    folder = finished[0]
    log = (folder / "train.log").read_text()
    said = {line[:17].strip(): line[17:] for line in log.splitlines() if line.startswith("  ")}
    assert "sftlab: odd" in log
    assert said["model"] == f"{model_folder} (LlamaForCausalLM, pretrained)"
    size = sum(v.numel() for v in load_file(folder / "model" / "model.safetensors").values())
    assert said["parameters"] == f"{size:,}, compute in bfloat16, attention sdpa_by_blocks"
    assert said["data"] == str(squad_files[0])
    assert (
        said["training"] == "36 rows read, 36 kept, columns not read: title"
        and said["validation"] == "12 rows read, 12 kept, columns not read: title"
    )
    assert said["steps"] == "3 of 12 examples (3 per epoch)" and "(first 3 steps)" in said["layout"]
    assert said["device"] == "cpu" and said["run directory"] == str(folder)
    assert f"; the model is {folder / 'model'}" in log and "finished in " in log
    assert log.count("  expected  ") == 2 and "resumed" not in log
    assert json.loads((folder / "data.json").read_text())["arrangement"]["steps"] == 3


def test_a_run_that_is_finished_is_not_run_again(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config, score = finished
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(config, OVERRIDES) == score
    said = f"run_dir={folder} is finished: 3 steps, score {score:.4f}; nothing to do. The model is {folder / 'model'}\n"
    assert capsys.readouterr().out == said
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """What was closed, in order."""
    found: list[type] = []
    for kind in (Checkpoints, Console, Metrics):
        close: Any = kind.close

        def note(self: Any, *given: Any, kind: type = kind, close: Any = close) -> None:
            found.append(kind)
            close(self, *given)

        monkeypatch.setattr(kind, "close", note)
    return found


Attempt = Callable[..., Path]


@pytest.fixture
def attempt(tmp_path: Path, model_folder: Path, squad_files: Files) -> Attempt:
    """Run a config of few steps that ends in an exception of a kind; return its directory."""

    def go(kind: type[BaseException], match: str, *more: str) -> Path:
        config = compose(tmp_path / "run", model_folder, squad_files, *SETTINGS, "evaluation.num_answers=0", *more)
        with pytest.raises(kind, match=match):
            run(config, OVERRIDES)
        return tmp_path / "run"

    return go


def test_a_run_that_is_told_to_stop_says_with_what_to_go_on(
    attempt: Attempt, closed: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def train_step(self: Trainer, number: int, data: Any) -> Any:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, data)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    folder = attempt(SystemExit, "75")
    assert json.loads((folder / "summary.json").read_text()) == {"status": "stopped"}
    log = (folder / "train.log").read_text()
    assert "Traceback" not in log
    again = f"resume with\n  python -m sftlab.train optim.lr=0.05 'name=with space' run_dir={folder}\n"
    assert again in log
    assert closed == [Checkpoints, Metrics, Console]
    assert signal.getsignal(signal.SIGTERM) is before and not torch.distributed.is_initialized()
    assert not (folder / "model").exists()


def test_a_run_that_loses_a_rank_says_so_and_closes_what_is_open(
    attempt: Attempt, closed: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(self: Trainer) -> float:
        raise RuntimeError("Connection closed by peer, told by hf_abcdefghijklmnopqrstuvwxyz0123456789")

    monkeypatch.setattr(Trainer, "fit", fit)
    folder = attempt(RankLost, "another rank has ended")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rank"]) == ("failed", 0)
    assert summary["error"].startswith("RankLost: another rank has ended")
    log = (folder / "train.log").read_text()
    assert "Traceback" in log and "RankLost: another rank has ended" in log
    assert "told by" in log and "hf_abcdef" not in log, "no secret"
    assert closed == [Checkpoints, Metrics, Console] and not torch.distributed.is_initialized()


def test_a_run_that_cannot_be_built_is_noted_too(attempt: Attempt, closed: list[type]) -> None:
    folder = attempt(Exception, "nowhere", "data.path=/nowhere.jsonl")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert "/nowhere.jsonl" in (folder / "train.log").read_text() and closed == []


def test_a_config_that_does_not_bind_touches_nothing(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    config = compose(tmp_path / "run", model_folder, squad_files)
    config["optim"]["weight_decy"] = 0.1
    with pytest.raises(ValueError, match="did you mean weight_decay"):
        run(config, [])
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_goes_on_names_the_run_directory_once() -> None:
    assert command_again([], Path("a b")) == "python -m sftlab.train 'run_dir=a b'"
    assert command_again(["run_dir=x", "a=1"], Path("y")) == "python -m sftlab.train a=1 run_dir=y"
    typed = command_again(["data.path='in/a.jsonl'", "data.val_path='it\\'s b.jsonl'"], Path("y"))
    assert shlex.split(typed)[3:] == ["data.path=in/a.jsonl", "data.val_path=it's b.jsonl", "run_dir=y"]


def one_of(size: int, rank: int, told: Any = None, heard: list[Any] | None = None) -> Any:
    """Return a world whose first rank tells `told`, if this is not it."""

    def broadcast(value: Any) -> Any:
        if heard is not None:
            heard.append(value)
        return value if rank == 0 else told

    return SimpleNamespace(rank=rank, size=size, is_main=rank == 0, device=CPU, broadcast=broadcast)


def test_a_refusal_is_told_to_every_rank_and_only_the_first_touches_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    heard: list[Any] = []
    config = {"run_dir": str(tmp_path), "resume": "auto"}
    hold = Hold(tmp_path / "new", [this_process()])
    with pytest.raises(run_directory.RunDirError, match="is not empty and not a run"):
        claim(tmp_path, config, [], one_of(3, 0, heard=heard), hold)
    assert [type(v) for v in heard] == [run_directory.RunDirError]
    with pytest.raises(run_directory.RunDirError, match="told"):
        claim(tmp_path / "new", config, [], one_of(3, 2, run_directory.RunDirError("told")), hold)
    with pytest.raises(PermissionError, match="told"):
        claim(tmp_path / "new", config, [], one_of(3, 2, PermissionError("told")), hold)
    granted = run_directory.Claim(rewind=True, source=Path("x"))
    assert claim(tmp_path / "new", config, [], one_of(3, 2, granted), hold) is granted
    assert not (tmp_path / "new").exists()
    assert claim(tmp_path / "new", config, ["a=1"], one_of(3, 0), hold) == run_directory.Claim()
    hold.give_back()
    assert (tmp_path / "new" / "overrides.yaml").read_text() == "- a=1\n"


@pytest.mark.parametrize(
    ("node", "trust", "dtype"), [({}, None, torch.float32), ({"param_dtype": "bfloat16"}, True, torch.bfloat16)]
)
def test_a_model_is_exported_by_the_first_rank_from_the_last_checkpoint(
    node: dict[str, str], trust: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(running, "export", lambda *given, **more: exported.append((*given, more)))
    trainer = SimpleNamespace(
        checkpoints=SimpleNamespace(complete=lambda: ["a", "b", "c"]), settings=TrainerSettings(batch_size=1)
    )
    made: Any = SimpleNamespace(run_dir=Path("run"), trainer=trainer)
    config = {"parallel": node, "model": {"trust_remote_code": trust}}
    assert leave_model(config, made, one_of(3, 1, ("c", 2.5)), 2.5) == ("c", 2.5)
    assert exported == []
    assert leave_model(config, made, one_of(3, 0), 2.5) == ("c", 2.5)
    assert exported == [("c", Path("run/model"), dtype, {"trust_remote_code": bool(trust)})]


def test_an_export_that_fails_on_the_first_rank_fails_on_all() -> None:
    made: Any = SimpleNamespace(
        run_dir=Path("run"), trainer=SimpleNamespace(checkpoints=SimpleNamespace(complete=lambda: []))
    )
    heard: list[Any] = []
    config: dict[str, Any] = {"parallel": {}, "model": {}}
    with pytest.raises(IndexError):
        leave_model(config, made, one_of(3, 0, heard=heard), 1.0)
    assert isinstance(heard[0], IndexError)
    with pytest.raises(OSError, match="told"):
        leave_model(config, made, one_of(3, 2, OSError("told")), 1.0)


def test_the_end_of_a_run_in_numbers(tmp_path: Path) -> None:
    said: list[str] = []
    trainer = SimpleNamespace(
        ending=SimpleNamespace(last_step=7, why="it was told to"),
        skipped=[{"step": 2, "examples": ["e1"]}],
        metrics=SimpleNamespace(last={"val/loss": 2.5}, best={"val/loss": 1.5}),
        console=SimpleNamespace(max_steps=9, answers=lambda: said.append("the answers"), say=said.append),
    )
    example = SimpleNamespace(tokens=[1, 2, 3], num_prompt=2)
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "it's " * len(tokens))
    made: Any = SimpleNamespace(trainer=trainer, run_dir=tmp_path, val=[example], train=[], tokenizer=tokenizer)
    (tmp_path / "checkpoint.json").write_text('{"step": 5, "files": {}}')
    lines = [{"step": 5, "train/loss": 3.5}, {"step": 5, "val/loss": 1.5}, {"step": 7, "val/loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finish(made, tmp_path, 1.5, 3.4 * 3600)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "status": "finished", "score": 1.5, "steps": 7, "ended": "it was told to",
        "model": {"step": 5, "val/loss": 1.5}, "wall_s": 3.4 * 3600,
        "skipped": [{"step": 2, "examples": ["e1"]}], "last": {"val/loss": 2.5}, "best": {"val/loss": 1.5},
    }  # fmt: skip
    assert said[:3] == [
        "the answers",
        "ended after step 7 of 9: it was told to",
        f"finished in 3 h 24 min; the model is {tmp_path / 'model'}, of step 5",
    ]
    typed = [shlex.split(line) for line in said[3].splitlines()[1:]]
    assert [words[2] for words in typed] == ["sftlab.generate", "sftlab.evaluate", "sftlab.serve"]
    assert typed[0][3:] == [f"run={tmp_path}", "prompt=it's it's "] and "baseline=true" in typed[1]


@pytest.mark.parametrize(
    ("rank", "terminal", "level", "bars"),
    [(0, True, logging.WARNING, True), (0, False, logging.WARNING, False), (2, True, logging.ERROR, False)],
)
def test_only_the_first_rank_warns_and_only_a_terminal_shows_bars(
    rank: int, terminal: bool, level: int, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: levels.append(given["level"]))
    monkeypatch.setattr(running.sys.stderr, "isatty", lambda: terminal, raising=False)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    try:
        quiet_libraries(World(rank, 3, rank, CPU))
        assert levels == [level]
        assert datasets.are_progress_bars_disabled() != bars
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        datasets.disable_progress_bars()


def test_several_ranks_and_no_validation_are_said(
    tmp_path: Path, model_folder: Path, squad_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of one step, whose facts are asked for as the first of three ranks on GPUs would."""
    config = compose(tmp_path / "run", model_folder, squad_files, "trainer.max_steps=1", "data.val_path=null")
    asked: list[dict[str, str]] = []

    def ask(config: Any, drafted: Draft, found: Any, run_dir: Path) -> dict[str, str]:
        gpus: Any = SimpleNamespace(size=3, device=torch.device("cuda"), is_main=True)
        asked.append(facts(config, replace(drafted, world=gpus), found, run_dir))
        return facts(config, drafted, found, run_dir)

    monkeypatch.setattr("sftlab.training.run.facts", ask)
    monkeypatch.setattr("sftlab.parallel.device.has_bfloat16", lambda device: True)
    score = run(config, [])
    assert asked[0]["device"] == "3 x cuda" and "compute in bfloat16" in asked[0]["parameters"]
    assert asked[0]["validation"] == "none (data.val_path, data.val_examples)"
    assert math.isfinite(score) and score == read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["train/loss"]


def test_gauntlet_38_a_run_keeps_the_date_of_its_first_start(tmp_path: Path) -> None:
    def config(run_dir: Path, resume: str = "auto", typed: str | None = None) -> dict[str, Any]:
        chat = {"_target_": "Chat", "template_path": None, "date": typed}
        data = {"format": chat, "sources": {"one": {"format": dict(chat)}, "two": {"format": {"date": None}}}}
        return {"run_dir": str(run_dir), "resume": resume, "data": data}

    first = dated(config(tmp_path / "first"))
    today = first["data"]["format"]["date"]
    assert len(today) == 10 and first["data"]["sources"]["one"]["format"]["date"] == today
    assert first["data"]["sources"]["two"]["format"]["date"] is None, "another format's own key"
    (tmp_path / "first" / "checkpoints" / "step_00000001").mkdir(parents=True)
    yesterday = config(tmp_path / "first", typed="2001-02-03")
    (tmp_path / "first" / run_directory.CONFIG).write_text(yaml.safe_dump(yesterday))
    assert dated(config(tmp_path / "first"))["data"] == dated(yesterday)["data"] != first["data"]
    for resume in (tmp_path / "first", tmp_path / "first" / "checkpoints" / "step_00000001"):
        again = dated(config(tmp_path / "second", str(resume)))
        assert again["data"]["format"]["date"] == "2001-02-03"
    assert dated(config(tmp_path / "first", typed="2002-02-03"))["data"]["format"]["date"] == "2002-02-03"
