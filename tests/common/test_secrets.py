"""Secrets are refused in a config and struck out of texts; the run's files hold none."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.common import run_directory, secrets
from sftlab.config import errors
from sftlab.training.console import Console
from sftlab.training.run import run
from tests.runs import compose

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"--token {TOKEN}", "a Hugging Face token"),
        ("hf_" + "a1" * 15, "a Hugging Face token"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("ghs_" + "a1" * 18, "a GitHub token"),
        ("github_pat_" + "a_" * 11, "a GitHub token"),
        ("sk-ant-" + "x" * 32, "an OpenAI or Anthropic key"),
        ("sk-" + "x" * 32, "an OpenAI or Anthropic key"),
        ("ASIA" + "7" * 16, "an AWS key"),
        ("apikey: " + "0f" * 16, "a Weights & Biases or other API key"),
        ("API_KEY='" + "0f" * 16, "a Weights & Biases or other API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("-----BEGIN PRIVATE KEY-----", "a private key"),
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


@pytest.mark.parametrize(
    "text",
    [
        *("hf_" + "a" * 29, "xhf_" + "a" * 40, "ghp_" + "a" * 35, "github_pat_" + "a" * 21, "sk-" + "x" * 31),
        *("AKIA" + "A" * 15, "AKIA" + "A" * 17, "apikey=" + "0f" * 15, "https://host:80/a@b", "a key of ours"),
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_what_is_too_short_or_only_looks_alike_passes(text: str) -> None:
    secrets.refuse({"a": text})
    assert secrets.strike(text) == text


@pytest.mark.parametrize("name", ["TOKEN", "HF_TOKEN", "A_SECRET", "X_PASSWORD", "MY_PASSWD", "api_key", "KEY"])
def test_the_value_of_every_variable_named_as_a_secret_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "eight888")
    with pytest.raises(ValueError, match=rf"^a holds the value of {name}, and"):
        secrets.refuse({"a": "xeight888x"})
    assert secrets.strike("eight888, eight888") == f"{secrets.STRUCK}, {secrets.STRUCK}"
    monkeypatch.setenv(name, "seven77")
    secrets.refuse({"a": "seven77"})


@pytest.mark.parametrize("name", ["MONKEY", "KEYS", "TOKEN_FILE", "TOKENS"])
def test_other_variables_hold_no_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ordinary words")
    secrets.refuse({"a": "ordinary words"})


def test_secrets_are_found_wherever_they_stand_in_a_config() -> None:
    for config, path in (
        ({"a": 1, "b": {"c": [{"d": TOKEN}]}}, "b.c.d"),
        ({"a": ("x", TOKEN)}, "a"),
        ({"b": {"a": None, 3: TOKEN}}, "b.3"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(path)} holds a Hugging Face token"):
            secrets.refuse(config)
    assert secrets.strike(f"{TOKEN} and AKIA{'A' * 16}, {TOKEN}") == "[secret] and [secret], [secret]"


def test_a_run_refuses_a_secret_before_it_writes_anything(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    config = compose(tmp_path / "run", model_folder, squad_files)
    config["data"]["subset"] = TOKEN
    with pytest.raises(ValueError, match=r"^data\.subset holds a Hugging Face token") as refused:
        run(config, [])
    assert TOKEN not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_a_run_strikes_a_secret_out_of_the_overrides_it_keeps(tmp_path: Path) -> None:
    run_directory.claim(tmp_path / "run", {"resume": "auto", "note": "a"}, ["seed=0", f"data.path={TOKEN}"])
    assert yaml.safe_load((tmp_path / "run/overrides.yaml").read_text()) == ["seed=0", f"data.path={secrets.STRUCK}"]


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
