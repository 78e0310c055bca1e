"""The serve command with the openai client: greedy answers are generate's; streams, chats, refusals, busy ports."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from sftlab import generate, serve
from sftlab.assets import FOLDER as ASSETS
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import TrainedModel, resolve
from sftlab.serving.app import make_app
from sftlab.serving.engine import Engine
from sftlab.serving.protocol import UNSUPPORTED
from sftlab.serving.servers import (
    TransformersServer,
    VllmServer,
    ask,
    bind,
    has_vllm,
    vllm_command,
    wait_until_healthy,
)
from sftlab.serving.session import default_name
from tests.commands import Typed
from tests.support import REPO, free_port, read_jsonl

NAME = "demo, served"
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLLM_PYTHON = os.environ.get("SFTLAB_VLLM_PYTHON")  # the Python of an environment with vLLM


@dataclass
class Served:
    """A server at work, and what it has printed so far."""

    url: str
    lines: list[str]
    process: subprocess.Popen[str]


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """`python -m sftlab.serve` from its smoke query on, ended as a person would."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    typed = [sys.executable, "-m", "sftlab.serve", *arguments]
    process = subprocess.Popen(
        typed, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    rest = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    try:
        for line in process.stdout:
            lines.append(line)
            if "try it:" in line:
                break
        match = re.search(r"on (http://\S+)", "".join(lines))
        assert match and "ready after" in "".join(lines), "".join(lines)
        rest.start()
        yield Served(match[1], lines, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        rest.join(10)
        assert "stopped\n" in lines
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if rest.ident is not None:
            rest.join(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def served(demo_run: Path) -> Iterator[Served]:
    with serving(f"run={demo_run}", "engine=transformers", "port=0", f"name='{NAME}'", f"prompt={PROMPTS[0]}") as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def validation_prompts(num: int) -> list[str]:
    rows = [json.loads(line) for line in (ASSETS / "demo" / "validation.jsonl").read_text().splitlines()]
    return [f"Context: {r['context']} Question: {r['question']} Answer:" for r in rows[:: len(rows) // num]][:num]


PROMPTS = [*validation_prompts(6), "Once upon a time", "Context: {é, [x]} = 'ß' Question: \u2603? Answer:"]


@pytest.fixture(scope="module")
def generated(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `generate` answers to the same prompts."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    files = (f"prompts={folder}/prompts.jsonl", f"output={folder}/answers.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sftlab-generate", f"run={demo_run}", *files, "max_new_tokens=12"])
        generate.main()
    return [line["answer"] for line in read_jsonl(folder / "answers.jsonl")]


@pytest.fixture(scope="module")
def longest(generated: list[str]) -> int:
    """The number of the prompt with the longest answer."""
    return max(range(len(generated)), key=lambda i: len(generated[i]))


def complete(client: OpenAI, prompt: Any, name: str = NAME, **more: Any) -> Any:
    return client.completions.create(**{"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, **more})


def test_greedy_answers_are_generate_s(client: OpenAI, generated: list[str]) -> None:
    answers = [complete(client, p).choices[0] for p in PROMPTS]
    assert [a.text.strip() for a in answers] == generated
    assert len(set(generated)) > 3 and {a.finish_reason for a in answers} <= {"stop", "length"}
    several = complete(client, PROMPTS[:3]).choices
    assert [(c.index, c.text.strip()) for c in several] == list(enumerate(generated[:3]))


def test_clients_at_once_get_their_own_answers(client: OpenAI, generated: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda p: complete(client, p).choices[0].text.strip(), PROMPTS))
    assert answers == generated


def test_health_and_the_run_s_model_alone(served: Served, client: OpenAI) -> None:
    with urllib.request.urlopen(f"{served.url}/health", timeout=10) as reply:
        assert reply.status == 200
    assert [m.id for m in client.models.list()] == [NAME]


def test_the_smoke_query_is_shown(served: Served, generated: list[str]) -> None:
    shown = "".join(served.lines)
    assert served.url.startswith("http://127.0.0.1:") and "served by transformers" in shown
    assert f"asked: {' '.join(PROMPTS[0].split())[:20]}" in shown
    (answer,) = re.findall(r"answered: (.*)", shown)
    assert generated[0] and answer.startswith(" ".join(generated[0].split()))
    assert f"curl {served.url}/v1/completions" in shown


def test_a_stream_is_the_answer_in_pieces(client: OpenAI, generated: list[str], longest: int) -> None:
    pieces = list(complete(client, PROMPTS[longest], stream=True, stream_options={"include_usage": True}))
    texts = [c.text for p in pieces for c in p.choices]
    assert "".join(texts).strip() == generated[longest] and len([t for t in texts if t]) > 1
    assert [c.finish_reason for p in pieces for c in p.choices][-1] in ("stop", "length")
    whole = complete(client, PROMPTS[longest]).usage
    assert pieces[-1].usage == whole and 0 < whole.completion_tokens <= 12


def test_a_stop_ends_the_answer(client: OpenAI, longest: int) -> None:
    full = complete(client, PROMPTS[longest]).choices[0].text
    stop = full[len(full) // 2 :][:2]
    cut = complete(client, PROMPTS[longest], stop=[stop]).choices[0]
    assert cut.text == full[: full.index(stop)] and cut.finish_reason == "stop"
    streamed = "".join(p.choices[0].text for p in complete(client, PROMPTS[longest], stop=[stop], stream=True))
    assert streamed == cut.text


def test_a_sample_is_its_seed_s(client: OpenAI) -> None:
    how = {"temperature": 1.5, "top_p": 0.9, "extra_body": {"top_k": 50}}
    first, second, other = (complete(client, "Once", seed=s, **how).choices[0].text for s in (1, 1, 2))
    assert first == second != other


def test_gauntlet_09_a_prompt_with_a_bos_has_one(client: OpenAI, demo_run: Path, generated: list[str]) -> None:
    tokenizer = resolve(str(demo_run)).load_tokenizer()
    plain = complete(client, PROMPTS[0])
    twice = complete(client, tokenizer.bos_token + PROMPTS[0])
    ids = tokenizer(PROMPTS[0])["input_ids"]
    assert plain.usage.prompt_tokens == twice.usage.prompt_tokens == len(ids) and ids[0] == tokenizer.bos_token_id
    assert twice.choices[0].text == complete(client, ids).choices[0].text == plain.choices[0].text


def test_a_chat_is_generate_s(client: OpenAI, demo_run: Path, typed: Typed, tmp_path: Path) -> None:
    said = ["Hello, [you]", *PROMPTS]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in said]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = (f"prompts={tmp_path}/chats.jsonl", f"output={tmp_path}/answers.jsonl")
    typed("generate", f"run={demo_run}", *files, "max_new_tokens=8")
    expected = [line["answer"] for line in read_jsonl(tmp_path / "answers.jsonl")]
    asked: list[Any] = [{"model": NAME, **row, "temperature": 0} for row in rows]
    answers = [client.chat.completions.create(**a, max_tokens=8).choices[0].message for a in asked]
    assert [a.content.strip() for a in answers] == expected and any(a.content for a in answers)
    assert {a.role for a in answers} == {"assistant"}
    longest = max(range(len(said)), key=lambda i: len(answers[i].content))
    stream = list(client.chat.completions.create(**asked[longest], max_completion_tokens=8, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in stream) == answers[longest].content


def test_what_cannot_be_answered_is_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"model=gpt-4: there is no such model.*{NAME}"):
        complete(client, "a", name="gpt-4")
    with pytest.raises(openai.BadRequestError, match="context holds 4096"):
        complete(client, "word " * 5000)
    with pytest.raises(openai.BadRequestError, match="4096 more are asked for"):
        complete(client, "a", max_tokens=4096)
    for name, value in {"n": 2, "logprobs": 3, "echo": True, "frequency_penalty": 0.5}.items():
        assert name in UNSUPPORTED
        with pytest.raises(openai.BadRequestError, match=f"{name}=.*has no {name}"):
            complete(client, "a", **{name: value})
    with pytest.raises(openai.BadRequestError, match=r"temperature: .*greater than or equal to 0"):
        complete(client, "a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        complete(client, [10**6])
    with pytest.raises(openai.NotFoundError, match="this server has /health"):
        client.embeddings.create(model=NAME, input="a")


def test_a_model_without_a_chat_template_says_so(model_folder: Path) -> None:
    """In a thread of this process: no command, no signals."""
    loaded = LoadedModel.load(resolve(str(model_folder)), torch.device("cpu"))
    server = TransformersServer(make_app(Engine(loaded), "tiny"), bound := bind("127.0.0.1", 0))
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        running = threading.Event()
        running.set()
        assert wait_until_healthy(url, running, 30)
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
            assert complete(client, "a", name="tiny").usage.completion_tokens > 0
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


def test_a_busy_port(served: Served, demo_run: Path, refused: Typed) -> None:
    port = served.url.rpartition(":")[2]
    error = refused("serve", f"run={demo_run}", "engine=transformers", f"port={port}")
    assert f"port={port} is busy" in error and "port=0" in error
    assert "port=99999: expected a whole number from 0 to 65535" in refused("serve", f"run={demo_run}", "port=99999")
    assert "host=203.0.113.1" in refused("serve", f"run={demo_run}", "engine=transformers", "host=203.0.113.1")


def test_what_is_missing_is_named(demo_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"run={demo_run}"
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "pip install 'sftlab[vllm]'" in refused("serve", run, "engine=vllm")
    assert f"vllm_python={sys.executable} has no vLLM" in refused(
        "serve", run, "engine=vllm", f"vllm_python={sys.executable}"
    )
    assert "no such program" in refused("serve", run, "engine=vllm", "vllm_python=/nowhere/python")
    assert "expected one of auto, vllm, transformers" in refused("serve", run, "engine=triton")
    assert "did you mean port" in refused("serve", run, "prt=1")
    assert "run= is missing" in refused("serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn: pip install 'sftlab[serve]'" in refused("serve", run)


def test_a_server_that_cannot_answer_ends(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = (f"run={model_folder}", "engine=transformers", "port=0", f"prompt={'word ' * 5000}")
    monkeypatch.setattr(sys, "argv", ["sftlab-serve", *typed])
    with pytest.raises(SystemExit) as stop:
        serve.main()
    error = capfd.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: the server started but does not answer: /v1/completions")
    assert "context of 2048 tokens never holds more than" in error and "Traceback" not in error


def test_host_port_and_engine_are_those_typed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fake_vllm: str
) -> None:
    """In this process, up to the Ctrl-C that a person would press."""
    url, running, found = f"http://127.0.0.2:{(port := free_port())}", threading.Event(), []
    running.set()

    def visit() -> None:
        if wait_until_healthy(url, running, 30):
            with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
                found.extend(json.load(reply)["data"])
        if running.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    typed = (f"run={model_folder}", "engine=transformers", "host=127.0.0.2", f"port={port}", f"vllm_python={fake_vllm}")
    monkeypatch.setattr(sys, "argv", ["sftlab-serve", *typed])
    visitor.start()
    try:
        serve.main()
    finally:
        running.clear()
        visitor.join()
    lines = capfd.readouterr().out.splitlines()
    assert [(card["id"], card["max_model_len"]) for card in found] == [(model_folder.name, 2048)]
    assert lines[0] == f"{model_folder.name}: {model_folder}, served by transformers on {url}"
    assert lines[1] == "host=127.0.0.2: everybody who can reach this machine can use it; there is no password"
    assert "stopped" in lines


def test_the_door_is_as_typed(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What allowed_hosts= and allowed_origins= name may ask, and nothing else of its kind."""
    url, codes = f"http://127.0.0.1:{(port := free_port())}", []
    running = threading.Event()
    running.set()

    def visit() -> None:
        if wait_until_healthy(url, running, 30):
            for host in ("mine.example", "evil.example"):
                for origin in ("http://page.example", "http://evil.example"):
                    headers = {"Host": host, "Origin": origin}
                    try:
                        urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers=headers)).close()
                        codes.append(200)
                    except urllib.error.HTTPError as error:
                        codes.append(error.code)
                        error.close()
        if running.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    typed = ("engine=transformers", "allowed_hosts=[mine.example]", "allowed_origins=['http://page.example']")
    monkeypatch.setattr(sys, "argv", ["sftlab-serve", f"run={model_folder}", f"port={port}", *typed])
    visitor.start()
    try:
        serve.main()
    finally:
        running.clear()
        visitor.join()
    assert codes == [200, 403, 403, 403]


# A program that stands in for a Python with vLLM: it notes how it was called, answers one question and ends with 3. It
# refuses the question where FAKE=refuses, and then waits to be stopped; it ends with 5 at once where FAKE=dies.
FAKE = """#!{python} -SE
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer

def note(**more):
    with open(sys.argv[0] + ".json", "w") as file:
        json.dump({{"arguments": sys.argv[1:], **more}}, file)

def terminated(*_):
    note(terminated=True)
    os._exit(0)

if sys.argv[1] == "-c":
    sys.exit(0)
mode = os.environ.get("FAKE")
if mode == "dies":
    sys.exit(5)
signal.signal(signal.SIGTERM, terminated)
signal.alarm(30)

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_GET(self):
        self.answer(200, b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "refuses":
            self.answer(400, b"no, thanks")
            return
        note(path=self.path, body=body, no_usage=os.environ["VLLM_NO_USAGE_STATS"], type=self.headers["Content-Type"])
        self.answer(200, json.dumps({{"choices": [{{"text": " of vLLM"}}]}}).encode())
        os._exit(3)

    def log_message(self, *_):
        pass

class Server(TCPServer):
    allow_reuse_address = True
    address_family = 10 if ":" in sys.argv[sys.argv.index("--host") + 1] else 2

Server((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program, in a home folder of its own; its note lies beside it."""
    program = tmp_path / "home" / "python"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(program.parent))
    return "~/python"


def serve_to_its_end(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the command in this process until it exits; return its exit code."""
    threads = set(threading.enumerate())
    monkeypatch.setattr(sys, "argv", ["sftlab-serve", *arguments])
    with pytest.raises(SystemExit) as stop:
        serve.main()
    assert set(threading.enumerate()) <= threads, "nothing waits on for a server that has ended"
    return stop.value.code


@pytest.mark.parametrize(("host", "trusted"), [("0.0.0.0", True), ("::", False), ("127.0.0.1", False)])
def test_vllm_gets_everything_that_was_typed(
    host: str,
    trusted: bool,
    fake_vllm: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if ":" in host:
        try:
            bind("::1", 0).close()
        except ValueError:
            pytest.skip("this machine has no IPv6")
    run = tmp_path / "a run"
    run.mkdir()
    (run / "model").symlink_to(model_folder)
    (run / "config.yaml").write_text(f"model: {{trust_remote_code: {str(trusted).lower()}}}\n")
    port = free_port()
    typed = [f"run={run}", f"host='{host}'", f"port={port}", f"vllm_python={fake_vllm}", "prompt=Who, [me]?"]
    typed += ["name=mine", "trust=true"] if trusted else []  # what the config says counts for nothing
    code = serve_to_its_end(monkeypatch, *typed, "vllm_arguments=[--max-model-len,256]")
    noted = json.loads((tmp_path / "home" / "python.json").read_text())
    name = "mine" if trusted else "a run"
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(run / "model")]
    arguments += ["--served-model-name", name, "--generation-config", "auto", "--host", host, "--port", str(port)]
    arguments += ["--dtype", str(LoadedModel.load(resolve(str(model_folder)), HERE).scorer.model.dtype)[6:]]
    arguments += ["--trust-remote-code"] * trusted
    arguments += ["--allowed-origins", "[]", "--middleware", "sftlab_door.Door", "--max-model-len", "256"]
    assert noted == {
        "arguments": arguments,
        "path": "/v1/completions",
        "body": {"model": name, "prompt": "Who, [me]?", "max_tokens": 16, "temperature": 0},
        "no_usage": "1",
        "type": "application/json",
    }
    assert code == 3, "the engine's own"
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"{name}: {run / 'model'}, served by vllm on http://{shown}:{port}"
    warning = f"host={host}: everybody who can reach this machine can use it; there is no password"
    assert (warning in lines) == (host != "127.0.0.1")
    assert " ".join([str(tmp_path / "home" / "python"), *arguments]) in lines
    assert any(line.startswith("ready after ") and line.endswith("; asked: Who, [me]?") for line in lines)
    assert f"{'answered':>24}: of vLLM" in lines
    assert f"try it: curl http://{shown}:{port}/v1/completions -H 'Content-Type: application/json' \\" in lines
    assert f'"model": "{name}"' in lines[-1]


def test_vllm_that_refuses_the_first_question_is_stopped(
    fake_vllm: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE", "refuses")
    typed = (f"run={model_folder}", "engine=vllm", "port=0", f"vllm_python={fake_vllm}")
    assert serve_to_its_end(monkeypatch, *typed) == 1
    said = "error: the server started but does not answer: /v1/completions answers 400: no, thanks\n"
    assert capfd.readouterr().err == said
    assert json.loads((tmp_path / "home" / "python.json").read_text())["terminated"]


def test_vllm_that_ends_before_it_answers_gives_its_exit_code(
    fake_vllm: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE", "dies")
    typed = (f"run={model_folder}", "engine=vllm", "port=0", f"vllm_python={fake_vllm}")
    assert serve_to_its_end(monkeypatch, *typed) == 5
    assert "ready after" not in capfd.readouterr().out


def test_vllm_s_process_ends_with_this_one() -> None:
    """SIGTERM reaches this process once vLLM's has started."""
    server = VllmServer([sys.executable, "-SEc", "import time; time.sleep(60)"])
    before = signal.getsignal(signal.SIGTERM)
    server.stop()  # before it runs there is nothing to stop

    def terminate() -> None:
        while server.process is None:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(terminate)
        server.run()
    assert server.process is not None and server.process.wait(30) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    server.stop()  # nor is there afterwards


def test_vllm_is_killed_where_it_does_not_end_gently() -> None:
    calls: list[Any] = []

    class Deaf:
        def poll(self) -> None:
            return None

        def terminate(self) -> None:
            calls.append("terminate")

        def wait(self, limit_s: float) -> None:
            calls.append(limit_s)
            raise subprocess.TimeoutExpired("vllm", limit_s)

        def kill(self) -> None:
            calls.append("kill")

    server = VllmServer([])
    server.process = Deaf()  # type: ignore[assignment]
    server.stop()
    assert calls == ["terminate", 20, "kill"]


def test_the_command_for_vllm_in_this_python(tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "N", "host": "H", "port": 5, "dtype": "float16", "python": None}
    given |= {"trust_remote_code": False, "arguments": ()}
    plain = vllm_command("M", **given)
    assert plain == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "M", "--served-model-name", "N"),
        *("--generation-config", "auto", "--host", "H", "--port", "5", "--dtype", "float16"),
        *("--allowed-origins", "[]", "--middleware", "sftlab_door.Door"),
    ]
    (tmp_path / "generation_config.json").write_text("{}")
    adapter = vllm_command("M", **given, adapter=(str(tmp_path), 8))
    ends = [adapter[i + 1] for i, word in enumerate(adapter) if word == "--generation-config"]
    assert ends == ["auto", str(tmp_path)], "vLLM takes the last, and what an adapter learned stands beside it"


def test_whether_a_python_has_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("raise SystemExit('it is not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert has_vllm(None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert has_vllm(sys.executable)


def test_a_model_is_called_after_its_run_its_folder_or_its_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert default_name(TrainedModel(".", "model", Path("."))) == "run"
    assert default_name(TrainedModel("model", "model")) == "model"
    assert default_name(TrainedModel(".", ".")) == "run"
    assert default_name(TrainedModel("ada/demo", "ada/demo")) == "ada/demo"
    assert default_name(TrainedModel("asset://demo/model", "asset://demo/model")) == "demo/model"


def test_a_bound_port_listens_and_is_nobody_else_s() -> None:
    with bind("127.0.0.2", 0) as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.2" and port > 0
        with socket.create_connection((host, port), timeout=10):
            pass
        with pytest.raises(ValueError, match=f"^port={port} is busy, another program listens there: give another"):
            bind(host, port)
        bind("127.0.0.1", port).close()  # another address
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR), "a server that has ended blocks no port"
    again = bind(host, port)
    assert again.getsockname() == (host, port)
    again.close()


class Warming(BaseHTTPRequestHandler):
    """A server that is not ready, then half ready, then ready; it refuses every question."""

    statuses: list[int]

    def do_GET(self) -> None:
        self.answer(self.statuses.pop(0) if self.path == "/health" else 404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(418)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0" if status == 204 else "3")
        self.end_headers()
        self.wfile.write(b"" if status == 204 else b"t\xffa")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_is_healthy_once_it_answers_200() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Warming)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url, running = f"http://127.0.0.1:{server.server_port}", threading.Event()
    Warming.statuses = [503, 204, 200, 200]
    try:
        assert not wait_until_healthy(url, running, 30), "it has ended"
        running.set()
        assert not wait_until_healthy(url, running, 0), "no time is left"
        assert wait_until_healthy(url, running, 30) and Warming.statuses == [200]
        with pytest.raises(ValueError, match=r"^/v1/x answers 418: t\ufffda$"):
            ask(url, "/v1/x", {"a": 1})
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(not VLLM_PYTHON, reason="SFTLAB_VLLM_PYTHON names no Python that has vLLM")
def test_vllm_gives_the_same_answers(demo_run: Path, tmp_path: Path, generated: list[str]) -> None:
    plain = tmp_path / "run"
    plain.symlink_to(demo_run)
    arguments = (f"run={plain}", "engine=vllm", "port=0", f"vllm_python={VLLM_PYTHON}", "name=demo")
    with serving(*arguments) as served, OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["demo"]
        assert [complete(client, p, name="demo").choices[0].text.strip() for p in PROMPTS] == generated
        for headers, body, status in (
            ({}, b'{"model": "demo", "prompt": "x", "max_tokens": 2}', 200),
            ({"Host": "evil.example"}, b'{"model": "demo", "prompt": "x"}', 403),
            ({"Origin": "https://evil.example"}, b'{"model": "demo", "prompt": "x"}', 403),
            ({"Sec-Fetch-Site": "cross-site"}, b'{"model": "demo", "prompt": "x"}', 403),
            ({"Content-Type": "text/plain"}, b'{"model": "demo", "prompt": "x"}', 415),
            ({"Content-Length": str(5 << 20)}, b"{", 413),
        ):
            headers = {"Content-Type": "application/json", **headers}
            request = urllib.request.Request(f"{served.url}/v1/completions", body, headers)
            try:
                found = urllib.request.urlopen(request, timeout=60).status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, (headers, status)
