"""The serve command with the openai client: greedy answers are generate's; streams, chats, refusals, busy ports."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from sftlab.assets import FOLDER as ASSETS
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import resolve
from sftlab.serving.app import make_app
from sftlab.serving.engine import Engine
from sftlab.serving.protocol import UNSUPPORTED
from sftlab.serving.servers import TransformersServer, bind, wait_until_healthy
from tests.people.conftest import Typed
from tests.support import REPO, command, read_jsonl

NAME = "demo, served"
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
    try:
        for line in process.stdout:
            lines.append(line)
            if "try it:" in line:
                break
        match = re.search(r"on (http://\S+)", "".join(lines))
        assert match and "ready after" in "".join(lines), "".join(lines)
        rest = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
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
    done = command("generate", f"run={demo_run}", *files, "max_new_tokens=12")
    assert done.returncode == 0, done.stderr
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
    (answer,) = re.findall(r"answered: (.*)", shown)
    assert answer == "(nothing)" or answer.startswith(" ".join(generated[0].split()))
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
    assert "cannot be used" in refused("serve", f"run={demo_run}", "engine=transformers", "port=99999")
    assert "host=203.0.113.1" in refused("serve", f"run={demo_run}", "engine=transformers", "host=203.0.113.1")


def test_what_is_missing_is_named(demo_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"run={demo_run}"
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "pip install 'sftlab[vllm]'" in refused("serve", run, "engine=vllm")
    assert f"vllm_python={sys.executable} has no vLLM" in refused(
        "serve", run, "engine=vllm", f"vllm_python={sys.executable}"
    )
    assert "no such program" in refused("serve", run, "engine=vllm", "vllm_python=/nowhere/python")
    assert "expected auto, vllm, transformers" in refused("serve", run, "engine=triton")
    assert "did you mean port" in refused("serve", run, "prt=1")
    assert "run= is missing" in refused("serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn: pip install 'sftlab[serve]'" in refused("serve", run)


def test_a_server_that_cannot_answer_ends(demo_run: Path) -> None:
    done = command("serve", f"run={demo_run}", "engine=transformers", "port=0", f"prompt={'word ' * 5000}")
    assert done.returncode == 1 and "the server started but does not answer" in done.stderr
    assert "context holds 4096" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not VLLM_PYTHON, reason="SFTLAB_VLLM_PYTHON names no Python that has vLLM")
def test_vllm_gives_the_same_answers(demo_run: Path, tmp_path: Path, generated: list[str]) -> None:
    plain = tmp_path / "run"
    plain.symlink_to(demo_run)
    arguments = (f"run={plain}", "engine=vllm", "port=0", f"vllm_python={VLLM_PYTHON}", "name=demo")
    with serving(*arguments) as served, OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["demo"]
        assert [complete(client, p, name="demo").choices[0].text.strip() for p in PROMPTS] == generated
