"""Secrets are refused in a config and struck out of texts; the run's files hold none."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftlab.common import run_directory, secrets
from sftlab.config import errors
from sftlab.training.console import Console

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"--token {TOKEN}", "a Hugging Face token"),
        ("https://me:hunter22@host/data.jsonl", "a password in a URL"),
        ("sk-proj-" + "x" * 40, "an OpenAI or Anthropic key"),
        ("AKIA" + "A" * 16, "an AWS key"),
        ("export WANDB_API_KEY=" + "0f" * 20, "a Weights & Biases or other API key"),
        ("say opensesame99", "the value of MY_PASSWORD"),
    ],
)
def test_a_secret_is_refused_by_key_and_not_repeated(text: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "opensesame99")
    with pytest.raises(ValueError, match=rf"^data\.extra\.path holds {kind}") as refused:
        secrets.refuse({"seed": 1, "data": {"extra": {"path": ["a", text]}}})
    assert text not in str(refused.value) and TOKEN not in str(refused.value)
    assert secrets.STRUCK in secrets.strike(f"before {text} after") and text not in secrets.strike(
        f"before {text} after"
    )


def test_ordinary_settings_and_short_values_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "squad")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    config = {"data": "squad", "path": "/data/hf_cache/x.jsonl", "hub": "https://huggingface.co/x", "p": "disabled"}
    secrets.refuse(config)
    assert secrets.strike(json.dumps(config)) == json.dumps(config)


def test_what_a_run_writes_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-even-shaped-like-one")
    monkeypatch.setattr(run_directory, "git", lambda *arguments: f"+token = {TOKEN}")
    monkeypatch.setattr("sys.argv", ["train", "x=not-even-shaped-like-one"])
    config: dict[str, Any] = {"seed": 0, "resume": "auto"}
    run_directory.claim(tmp_path / "run", config, [])
    run_directory.note_failure(tmp_path / "run", 0, ValueError(f"HTTP 401 with {TOKEN}"))
    console = Console(1, tmp_path / "run" / "train.log", quiet=True)
    console.say(f"401 with {TOKEN} and not-even-shaped-like-one")
    console.close()
    errors.complain(f"401 with {TOKEN}")
    written = "".join(p.read_text() for p in (tmp_path / "run").iterdir()) + capsys.readouterr().err
    assert TOKEN not in written and "not-even-shaped-like-one" not in written
    assert written.count(secrets.STRUCK) >= 6
    json.loads((tmp_path / "run/environment.json").read_text())
    assert "command" in json.loads((tmp_path / "run/environment.json").read_text())
