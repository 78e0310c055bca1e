"""Bad input ends in an error that names it and says what to do, and blocks no second try in the same directory."""

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sftlab.training.run import run
from tests.runs import compose
from tests.support import REPO, byte_tokenizer, make_model_folder, read_jsonl

Files = tuple[Path, Path]
FEW = ("trainer.max_steps=1", "evaluation.num_answers=0", "trainer.batch_size=2")


def write(path: Path, content: Any) -> Path:
    """Write JSON, or for .jsonl a line an element."""
    text = "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def attempts(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, squad_files: Files
) -> tuple[Path, dict[str, str]]:
    """Try one bad thing after the other in one run directory, then the right thing; return how each ended."""
    folder = tmp_path_factory.mktemp("bad")
    good = read_jsonl(squad_files[0])[:4]
    nested = [
        {"paragraphs": [{"context": "Ada sells tea.", "qas": [{"question": "What?", "answers": [{"txt": "tea"}]}]}]}
    ]
    without = byte_tokenizer()
    without.eos_token = None
    no_end = make_model_folder(folder / "no_end")
    (no_end / "tokenizer_config.json").unlink()
    without.save_pretrained(no_end)
    data = {
        "missing file": folder / "nowhere.jsonl",
        "missing folder": folder / "nowhere",
        "not squad": write(folder / "not_squad.json", {"rows": [1, 2]}),
        "not squad inside": write(folder / "inside.json", {"data": nested}),
        "not json": folder / "broken.json",
        "no context": write(folder / "no_context.jsonl", [*good[:2], {"question": "Who?", "answers": {"text": ["a"]}}]),
        "no answers": write(folder / "no_answers.jsonl", [good[0], {"context": "Tea.", "question": "What?"}]),
        "empty answer": write(
            folder / "empty.jsonl", [good[0], {"context": "Tea.", "question": "What?", "answers": {"text": [" "]}}]
        ),
        "answer is no list": write(
            folder / "text.jsonl", [{"context": "Tea.", "question": "What?", "answers": {"text": "tea"}}]
        ),
        "unknown suffix": folder / "table.xls",
    }
    data["not json"].write_text('{"data": [')
    data["unknown suffix"].write_text("a,b")
    configs = {name: compose(folder / "run", model_folder, (path, squad_files[1]), *FEW) for name, path in data.items()}
    configs |= {
        "missing model": compose(folder / "run", folder / "no_model", squad_files, *FEW),
        "missing tokenizer": compose(
            folder / "run", model_folder, squad_files, *FEW, f"model.tokenizer={folder / 'no_tokenizer'}"
        ),
        "no end": compose(folder / "run", no_end, squad_files, *FEW),
        "overlong": compose(folder / "run", model_folder, squad_files, *FEW, "data.max_length=86"),
        "all overlong": compose(
            folder / "run", model_folder, squad_files, *FEW, "data.max_length=5", "data.overlong=drop"
        ),
        "right": compose(folder / "run", model_folder, squad_files, *FEW),
        "drop": compose(folder / "drop", model_folder, squad_files, *FEW, "data.max_length=86", "data.overlong=drop"),
        "truncate": compose(
            folder / "truncate", model_folder, squad_files, *FEW, "data.max_length=86", "data.overlong=truncate"
        ),
    }
    return folder, {name: end_of(config) for name, config in configs.items()}


def end_of(config: dict[str, Any]) -> str:
    """Run a config in this process; return how it ended."""
    try:
        return f"score {run(config, [])!r}"
    except SystemExit as left:
        return f"exit {left.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        ("missing file", ["FileNotFoundError: data.path=", "nowhere.jsonl: no such file or folder"]),
        ("missing folder", ["FileNotFoundError: data.path=", "nowhere: no such file or folder"]),
        ("not squad", ["not_squad.json: this is not SQuAD: expected {'data': [{'paragraphs':"]),
        ("not squad inside", ["inside.json", "no field 'text'", "'txt'"]),
        ("not json", ["broken.json: this is not JSON", "line 1"]),
        ("no context", ["no_context.jsonl:3", "no field 'context'", "'question', 'answers'"]),
        ("no answers", ["no_answers.jsonl:2", "no field 'answers'"]),
        ("empty answer", ["empty.jsonl:2", "an answer is empty"]),
        ("answer is no list", ["text.jsonl:1", "must hold {'text': [answers...]}"]),
        ("unknown suffix", ["table.xls: cannot read a .xls; expected", ".jsonl"]),
        ("missing model", ["model.name_or_path=", "no_model: no such folder"]),
        ("missing tokenizer", ["model.tokenizer=", "no_tokenizer: no such folder"]),
        ("no end", ["no_end", "end-of-text token", "eos_token", "model.tokenizer="]),
        (
            "overlong",
            [
                "14 of 36 examples are longer than data.max_length=86",
                "Raise data.max_length, or set data.overlong=drop or truncate",
            ],
        ),
        ("all overlong", ["data.max_length"]),
    ],
)
def test_bad_data_and_models_are_named(attempts: tuple[Path, dict[str, str]], attempt: str, said: list[str]) -> None:
    end = attempts[1][attempt]
    assert not end.startswith(("score", "exit", "RunDirError")) and all(text in end for text in said), end


def test_the_right_thing_in_the_same_directory_runs(attempts: tuple[Path, dict[str, str]]) -> None:
    folder, ends = attempts
    assert ends["right"].startswith("score")
    assert json.loads((folder / "run/summary.json").read_text())["status"] == "finished"


def test_overlong_examples_are_dropped_or_truncated_with_the_count(attempts: tuple[Path, dict[str, str]]) -> None:
    folder, ends = attempts
    for how, word in (("drop", "dropped"), ("truncate", "truncated")):
        assert ends[how].startswith("score")
        (line,) = [t for t in (folder / how / "train.log").read_text().splitlines() if t.split()[:1] == ["training"]]
        assert word in line and "36 rows read" in line
        found = json.loads((folder / how / "data.json").read_text())
        assert word in json.dumps(found)


class Handler(BaseHTTPRequestHandler):
    """A hub whose repositories are called by how they answer: gated401, gated403, missing404."""

    def do_GET(self) -> None:
        status = next((s for s in (401, 403, 404) if str(s) in self.path), 404)
        code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}[status]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access is restricted" if status == 403 else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET
    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


# Several commands in one process: importing torch for each would take most of the time.
# The hub's client tries six times and waits 23 s for it: here it does not wait.
DRIVER = """
import contextlib, io, json, sys, time
from sftlab import train
time.sleep = lambda seconds: None
found = []
for argv in json.loads(sys.argv.pop()):
    if argv is None:  # the hub goes away
        print("pause", flush=True)
        sys.stdin.readline()
        continue
    sys.argv[1:] = argv
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            train.main()
        except SystemExit as left:
            code = left.code
    found.append([code, errors.getvalue()])
print(json.dumps(found))
"""


def typed(kind: str, repo: str, model: Path) -> list[str]:
    settings = ["model=hf", "data=squad", "trainer.max_steps=1", f"run_dir=run_{kind}"]
    if kind == "model":
        return [*settings, f"model.name_or_path={repo}"]
    return [*settings, f"model.name_or_path={model}", f"data.path={repo}"]


def says_what_to_do(error: str, kind: str, repo: str) -> None:
    key = "model.name_or_path" if kind == "model" else "data.path"
    assert f"error: {key}={repo}: cannot load this" in error and "from the hub" in error
    assert "licence" in error and "HF_TOKEN" in error and f"A local folder works too: {key}=FOLDER" in error
    assert "Traceback" not in error


CASES = [(kind, f"someone/thing{status}", status) for kind in ("model", "dataset") for status in (401, 403, 404)]
OFFLINE = [(kind, "someone/thing") for kind in ("model", "dataset")]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[tuple[int, str]]:
    """Run `train` with each of CASES against a hub that is there, and with each of OFFLINE against one that is gone;
    return exit codes and standard errors."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    folder = tmp_path_factory.mktemp("hub")
    env = os.environ | {
        "PYTHONPATH": str(REPO),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "home/hub"),
    }
    env.pop("HF_TOKEN", None)
    online = [typed(kind, repo, model_folder) for kind, repo, _ in CASES]
    offline = [typed(kind, repo, model_folder) for kind, repo in OFFLINE]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps([*online, None, *offline])],
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    while (line := driver.stdout.readline()) not in ("pause\n", ""):
        pass
    server.shutdown()
    server.server_close()
    thread.join()
    with socket.socket() as closed:
        closed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        closed.bind(("127.0.0.1", server.server_port))  # bound and not listening: a connection is refused
        out, errors = driver.communicate("\n", timeout=300)
    assert driver.returncode == 0 and line, errors
    return [(code, text) for code, text in json.loads(out.splitlines()[-1])]


def test_a_hub_that_answers_401_403_or_404(loads: list[tuple[int, str]]) -> None:
    for (kind, repo, status), (code, error) in zip(CASES, loads[: len(CASES)], strict=True):
        assert code == 1, error
        says_what_to_do(error, kind, repo)
        if kind == "model":  # datasets swallows the status
            assert f"HTTP {status}" in error


def test_no_network(loads: list[tuple[int, str]]) -> None:
    for (kind, repo), (code, error) in zip(OFFLINE, loads[len(CASES) :], strict=True):
        assert code == 1, error
        says_what_to_do(error, kind, repo)
        assert "no network" in error
