"""Secrets by established rules: found wherever they stand, few false alarms, nothing made unreadable by striking."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.common import run_directory, secrets
from sftlab.common.secrets import STRUCK, Striking, kinds, refuse, strike, strike_values
from sftlab.launchers.launcher import LaunchError, Points, make_launcher
from sftlab.publishing.refuse import refuse as refuse_folder
from sftlab.scoring.scores_json import write_report
from sftlab.sweeps import report
from sftlab.sweeps.ranking import ranked
from sftlab.sweeps.record import Sweep
from tests.asymmetric import write_point
from tests.commands import Typed

TOKEN = "hf_" + "aB3" * 12
# Made up, in the form that each service documents.
SECRETS = {
    "query token": "https://h/x?token=9f8e7d6c5b4a39281706f5e4d3c2b1a0",
    "query access_token": "https://h/x?a=1&access_token=9f8e7d6c5b4a39281706",
    "AWS signature": "https://h/x?X-Amz-Signature=" + "ab" * 32,
    "Google signature": "https://h/x?X-Goog-Signature=" + "ab" * 32,
    "SAS": "https://a.blob.core.windows.net/c?sv=2021-06-08&sig=AbCd%2BEfGhIjKlMnOpQrStUvWx0123456789%3D",
    "Azure account": "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=" + "aB3+" * 21 + "==",
    "AWS id": "AKIA" + "A7" * 8,
    "AWS secret": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "Google": "AIzaSyA" + "b" * 32,
    "Google OAuth": "ya29.a0AfH6SMBx-abc_DEF0123456789",
    "Slack": "xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx",
    "Slack hook": "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "GitLab": "glpat-AbCdEfGhIjKlMnOpQrSt",
    "npm": "npm_" + "a" * 36,
    "PyPI": "pypi-AgEIcHlwaS5vcmcCJ" + "a" * 60,
    "Bearer": "Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123",
    "Basic": "authorization: basic dXNlcjpwYXNzd29yZDEyMzQ1",
    "a URL's user": "https://0123456789abcdef0123@github.com/o/r",
    "a password": "postgres://ada:hunter2@db.example/x",
    "a password without a user": "redis://:hunter22222@host",
    "W&B, old": "WANDB_API_KEY=" + "0f" * 20,
    "W&B, new": "wandb_v1_" + "aB3" * 25,
    "Stripe": "sk_live_" + "aB3" * 8,
    "SendGrid": "SG." + "a1" * 11 + "." + "b2" * 21 + "c",
    "Replicate": "r8_" + "a1" * 18 + "b",
    "a key of PuTTY's kind": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n-----END OPENSSH PRIVATE KEY-----",
    "token behind a #": "https://h/x#access_token=9f8e7d6c5b4a39281706",
    "NVIDIA": "nvapi-" + "aB3-" * 16,
    "Perplexity": "pplx-" + "aB3d" * 12,
    "LangSmith": "lsv2_pt_" + "0f" * 16 + "_0123456789",
    "Langfuse": "sk-lf-01234567-89ab-cdef-0123-456789abcdef",
    "Pinecone": "pcsk_4abcd_" + "aB3d" * 12,
    "Together": "tgp_v1_" + "aB3d" * 11,
    "RunPod": "rpa_" + "AB3D" * 10,
    "Kaggle": "KGAT_" + "0f" * 16,
    "Docker": "dckr_pat_" + "aB3" * 9,
    "Vault": "hvs." + "aB3d" * 7,
    "Terraform": "aB3dE5fG7hI9jK.atlasv1." + "aB3d" * 16,
    "Grafana": "glsa_" + "aB3d" * 8 + "_0123abcd",
    "Sentry": "sntrys_" + "aB3d" * 16,
    "age": "AGE-SECRET-KEY-1" + "AB3" * 19 + "A",
    "Atlassian": "ATATT3xFfGF0" + "aB3" * 9,
    "Notion": "ntn_" + "aB3d" * 12,
    "Linear": "lin_api_" + "aB3d" * 10,
    "Airtable": "patAbCdEfGhIjKlMn." + "0f" * 32,
    "Postman": "PMAK-" + "0f" * 12 + "-" + "0f" * 17,
    "Shopify": "shpat_" + "0f" * 16,
    "Telegram": "123456789:AA" + "aB3" * 11,
    "client secret": 'client_secret: "Ab1' + "Cd2" * 8 + '"',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_refused_and_struck(kind: str) -> None:
    text = SECRETS[kind]
    assert list(kinds(text)) and STRUCK in strike(f"see {text} there")
    struck = strike(f"see {text} there")
    assert struck.startswith("see ") and struck.endswith(" there")
    with pytest.raises(ValueError, match=r"^data\.x holds ") as error:
        refuse({"data": {"x": [text]}})
    assert text not in str(error.value)
    assert json.loads(json.dumps(strike_values({"a": text})))["a"] == strike(text)


ORDINARY = [
    "a://b:c@", "a://b:c@d", "c://x:y@z", "http://localhost:8000/a@b", "https://host:80/a@b", "git@github.com:o/r.git",
    "ssh://git@host/x", "a-word-with-many-hyphens-in-it-and-so-on-and-on", "sk-learn-is-a-library-of-many-words-here",
    "risk-sk-" + "aaa-" * 9, "the key=value pair of optim", "?key=learning_rate", "token=true",
    "max_tokens=1234567890123456",
    "tokenizer_key: something else entirely", "password: see the manual", "basic training of the model",
    "bearer of news",
    "meta-llama/Llama-3.2-1B-Instruct@main", "s3://bucket/key=2024/part=1/x.parquet", "hf_transfer",
    "wandb_project_name",
    "https://h/x?split=train&config=default&key=validation", "eyJ", "npm_config_registry", "glpat", "xoxb",
    "api_key = os.environ['OPENAI_API_KEY']", "secret_key = get_secret(vault, name_of_secret_1)", "AccountKey=",
    "patterns_of_a_text", "sk-lf-is-no-key", "glc_config", "hvs.png", "12345678:AAaa", "https://h/page#section=3",
    "KGAT_dataset", "shpat_x", "nvapi-reference", "rpa_bot", "lin_api_docs",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text: str) -> None:
    refuse({"a": text})
    assert strike(text) == text


VARIABLES = [
    "SLURM_JWT", "MY_PASS", "DB_PWD", "GITHUB_PAT", "OPENAI_APIKEY", "GOOGLE_CREDENTIALS", "HF_TOKEN", "AWS_SECRET",
    "BINDPW", "LDAP_PW", "BASIC_AUTH",
    "AZURE_CLIENT_SECRET", "API_KEY", "SSH_PASSPHRASE", "SESSION_COOKIE", "GITHUBTOKEN", "NPM_CONFIG_TOKEN",
]  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_the_value_of_a_variable_named_as_a_secret_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "q7Zk29dLm4")
    assert list(kinds("x q7Zk29dLm4 y")) == [f"the value of {name}"] and strike("q7Zk29dLm4") == STRUCK


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "SENTRY_DSN", "HTTPS_PROXY", "MONGODB_URI"])
def test_of_an_address_only_user_and_password_are_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "scheme://ada:q7Zk29dLm4@host.example/db")
    assert strike("as ada:q7Zk29dLm4 on host.example") == f"as {STRUCK} on host.example"
    monkeypatch.setenv(name, "http://proxy.example:3128")
    assert strike("http://proxy.example:3128/x") == "http://proxy.example:3128/x"


PLAIN_SETTINGS = [
    ("HTTP_AUTH", "kerberos"),
    ("SORT_KEY", "learning_rate"), ("PARTITION_KEY", "us-east-1"), ("CACHE_KEY", "validation_exact_match"),
    ("GOOGLE_CREDENTIALS", "/home/ada/google.json"), ("EOS_TOKEN", "<|end_of_text|>"), 
    ("SESSION_COOKIE", "disabled-here"),
    ("PWD", "/home/ada/runs"), ("MY_KEY", "short"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PLAIN_SETTINGS)
def test_a_plain_setting_under_such_a_name_is_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    config = {"model": {value.replace("/", "_"): 1.0, "x": value}}
    refuse(config)
    run_directory.reserve(tmp_path / "run", config, [f"x={value}"])
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == config


def test_keys_and_what_is_written_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of these variables are also keys, numbers and words of YAML: only values of texts are struck."""
    monkeypatch.setenv("A_SECRET", "learning_rate")
    monkeypatch.setenv("B_SECRET", "0.00012345")
    monkeypatch.setenv("C_SECRET", '"steps": 12')
    config = {"learning_rate": 0.00012345, "text": "the learning_rate is 0.00012345"}
    run_directory.reserve(tmp_path / "run", config, ["learning_rate=1"])
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written == {"learning_rate": 0.00012345, "text": f"the {STRUCK} is {STRUCK}"}
    run_directory.write_summary(tmp_path / "run", {"steps": 12, "error": "x"})
    assert run_directory.read_summary(tmp_path / "run") == {"steps": 12, "error": "x"}


@pytest.mark.parametrize(
    "typed", [["-m", "optim.lr=1e-3,2e-3"], ["launcher=local", "optim.lr=1,2"], ["sweeper=optuna", "optim.lr=1,2"], []]
)
def test_a_secret_on_the_command_line_is_refused_before_hydra_writes_it(
    typed: list[str], tmp_path: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused("train", f"data.subset={TOKEN}", *typed)
    assert error.startswith("error: data.subset holds a Hugging Face token") and TOKEN not in error
    assert list(tmp_path.iterdir()) == []


def test_a_secret_in_a_key_or_of_one_s_own_is_refused_too(
    tmp_path: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PASS", "q7Zk29dLm4")
    assert "holds the value of MY_PASS" in refused("train", "data.subset=q7Zk29dLm4")
    error = refused("train", f"+data.{TOKEN}=1")
    assert TOKEN not in error and list(tmp_path.iterdir()) == []


def test_nothing_that_a_run_or_sweep_leaves_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_PASS", "q7Zk29dLm4")
    both = f"{TOKEN} q7Zk29dLm4"
    monkeypatch.setattr(run_directory, "git", lambda *arguments: f"+token = {both}")
    monkeypatch.setattr(sys, "argv", ["train", f"x={both}"])
    assert "q7Z" not in str(run_directory.commit()) and TOKEN not in str(run_directory.commit())
    run_directory.claim(tmp_path / "s/0", {"resume": "auto"}, [f"x={both}"])
    run_directory.note_failure(tmp_path / "s/0", 0, ValueError(both))
    entries = [{"num": 0, "overrides": [both], "job_id": None, "run_dir": "0"}]
    Sweep(tmp_path / "s", "/", ["train", both], {"nodes": 1}, entries=entries).write()
    (tmp_path / "s/.submitit/local_0").mkdir(parents=True)
    (tmp_path / "s/.submitit/local_0/0_0_log.err").write_text(f"Traceback (most recent call last)\n{both}")
    write_point(tmp_path / "other", 0, [], [], "failed")
    (tmp_path / "other/0/summary.json").replace(tmp_path / "s/0/other.json")
    found = Sweep.read(tmp_path / "s").observed({})
    page = report.page(
        report.data(found, ranked(found, "val/loss"), "val/loss", "last")
        | {"points": [{"tracebacks": [("log", both)]}]}
    )
    written = page + "".join(p.read_text() for p in (tmp_path / "s").rglob("*") if p.suffix in (".json", ".yaml"))
    assert "q7Zk29dLm4" not in written and TOKEN not in written and written.count(STRUCK) > 6
    assert "Traceback" not in capsys.readouterr().err


def test_the_output_of_a_rank_is_struck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MY_PASS", "q7Zk29dLm4")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    secrets.strike_output()
    secrets.strike_output()
    assert isinstance(sys.stderr, Striking) and not isinstance(sys.stderr.stream, Striking)
    print(f"out {TOKEN}", flush=True)
    logging.StreamHandler(sys.stderr).emit(logging.LogRecord("x", 30, "f", 1, "log q7Zk29dLm4", None, None))
    try:
        raise ValueError(TOKEN)
    except ValueError:
        import traceback

        traceback.print_exc()
    out, error = capsys.readouterr()
    assert out == f"out {STRUCK}\n" and f"log {STRUCK}" in error and f"ValueError: {STRUCK}" in error


def test_a_script_for_sbatch_with_one_is_not_made(tmp_path: Path) -> None:
    from sftlab.config.groups import CONF

    options: dict[str, Any] = yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"]
    points = Points(tmp_path, "x", "", tmp_path / "code", {0: tmp_path / "0"})
    make_launcher({**options, "setup": ["export HF_HOME=/x"]}).script(points)
    with pytest.raises(LaunchError, match="would hold a Hugging Face token"):
        make_launcher({**options, "setup": [f"export HF_TOKEN={TOKEN}"]}).script(points)


def test_a_vocabulary_is_not_taken_for_secrets_and_a_text_is_searched(tmp_path: Path) -> None:
    loose = "Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {loose: 1}}))
    refuse_folder(tmp_path)
    (tmp_path / "notes.md").write_text(loose)
    with pytest.raises(ValueError, match=r"notes\.md: an authorisation header"):
        refuse_folder(tmp_path)
    (tmp_path / "notes.md").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {TOKEN: 1}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: a Hugging Face token"):
        refuse_folder(tmp_path)


@pytest.mark.parametrize("unit", ["a-", "a.b_", "://", "ey.", "sk-a-", "key=", "a:b@", "Bearer "])
def test_a_long_text_is_struck_in_time_in_proportion(unit: str) -> None:
    """A pattern that looks ahead without bound took minutes for a megabyte of hyphens."""
    import time

    def seconds(n: int) -> float:
        began = time.process_time()
        strike(unit * (n // len(unit)))
        return time.process_time() - began

    assert min(seconds(400_000), seconds(400_000)) < 12 * max(min(seconds(100_000), seconds(100_000)), 0.02)


def test_a_report_of_scores_is_struck(tmp_path: Path) -> None:
    write_report(tmp_path / "scores.json", {"scores": {"f1": 0.5}, "data": f"rows?token={TOKEN}"})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"scores": {"f1": 0.5}, "data": f"rows?token={STRUCK}"}
