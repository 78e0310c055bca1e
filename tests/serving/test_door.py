"""Who may ask the server, in what form and how much; what odd requests get; a client that leaves."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsBase as Parameters
from starlette.testclient import TestClient

from sftlab.serving import door
from sftlab.serving.app import make_app
from sftlab.serving.door import SETTINGS, Door
from sftlab.serving.engine import Engine
from sftlab.serving.protocol import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest, RequestError, parse
from sftlab.serving.servers import TransformersServer, bind
from tests.serving.test_engine import (  # noqa: F401  fixtures
    CHATS,
    COMPLETIONS,
    HERE,
    JSON,
    NAME,
    engine,
    make_engine,
    refusal,
    tokenizer,
)

ASK = {"prompt": "x", "temperature": 0, "max_tokens": 2}


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:  # noqa: F811
    app = make_app(engine, NAME, hosts=["gpu7.example"], origins=["http://localhost:3000"])
    with TestClient(app, base_url=HERE, raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:8000", 200), ("[::1]:8000", 200), ("10.1.2.3", 200), ("GPU7.example:80", 200),
        (socket.gethostname(), 200), ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403), ("2130706433", 403), ("x", 403), ("", 403),
    ],
)  # fmt: skip
def test_a_name_that_is_none_of_this_machines_reads_nothing(client: TestClient, host: str, status: int) -> None:
    """DNS rebinding: a page of evil.example lets its name point to 127.0.0.1, and would read the answer."""
    for reply in (
        client.get("/v1/models", headers={"Host": host}),
        client.post(COMPLETIONS, json=ASK, headers={"Host": host}),
    ):
        assert reply.status_code == status
        if status == 403:
            assert "allowed_hosts=" in reply.json()["error"]["message"] and NAME not in reply.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1"}, 200), ({"Origin": "http://localhost:3000"}, 200), ({}, 200),
        ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:9"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200), ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)  # fmt: skip
def test_a_page_of_another_site_gets_nothing(client: TestClient, headers: dict[str, str], status: int) -> None:
    for reply in (client.get("/v1/models", headers=headers), client.post(COMPLETIONS, json=ASK, headers=headers)):
        assert reply.status_code == status
        allowed = headers.get("Origin") == "http://localhost:3000"
        assert reply.headers.get("access-control-allow-origin") == ("http://localhost:3000" if allowed else None)
    preflight = {"Origin": headers.get("Origin", "http://a"), "Access-Control-Request-Method": "POST"}
    assert (client.options(COMPLETIONS, headers=preflight).status_code == 200) == allowed


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(client: TestClient, kind: str) -> None:
    """A form of any page can send these without asking the server first."""
    reply = client.post(COMPLETIONS, content=json.dumps(ASK), headers={"Content-Type": kind})
    assert reply.status_code == 415 and "send JSON" in reply.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_whatever_its_header_says(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_BODY_BYTES", 1000)
    large = json.dumps({**ASK, "user": "u" * 1000}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (large, (large[i : i + 100] for i in range(0, len(large), 100))):  # the second in chunks, unsaid
        reply = client.post(COMPLETIONS, content=content, headers=headers)  # type: ignore[arg-type]
        assert reply.status_code == 413 and "larger than" in reply.json()["error"]["message"]
    reply = client.post(COMPLETIONS, content=large, headers={**headers, "Content-Length": "many"})
    assert reply.status_code == 400


MANY: dict[str, tuple[str, dict[str, Any]]] = {
    "objects in place of prompts": (COMPLETIONS, {"prompt": [{}] * 300_000}),
    "numbers that are no tokens": (COMPLETIONS, {"prompt": [0.5] * 300_000}),
    "lists of them": (COMPLETIONS, {"prompt": [[0.5] * 300_000]}),
    "messages without a role": (CHATS, {"messages": [{}] * 300_000}),
    "fields": (COMPLETIONS, {"prompt": "a", **{f"k{i}": 1 for i in range(100_000)}}),
    "fields of a message": (CHATS, {"messages": [{f"k{i}": 1 for i in range(100_000)}]}),
}


@pytest.mark.parametrize("how", MANY)
def test_a_great_number_of_wrong_values_costs_nothing(how: str) -> None:
    """An error for each took 55 s of one request of 4 MiB, and 2 GB; nobody else was answered meanwhile."""
    path, body = MANY[how]
    began_s = time.process_time()
    with pytest.raises(RequestError) as refused:
        parse(CompletionRequest if path == COMPLETIONS else ChatRequest, body, "m")
    assert time.process_time() - began_s < 0.5 and len(str(refused.value)) < 10_000
    assert " at 0x" not in str(refused.value)


def test_a_body_in_pieces_is_counted_before_any_application_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads a body whole, and a body in pieces says no length."""
    monkeypatch.setattr(door, "MAX_BODY_BYTES", 1000)
    kept = bytearray()
    sent: list[Any] = []

    async def keeps(scope: Any, receive: Any, send: Any) -> None:
        while True:
            kept.extend((await receive())["body"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 300, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    asyncio.run(Door(keeps, (), ())({"type": "http", "method": "POST", "headers": headers}, receive, send))
    assert len(kept) == 900 and sent[0]["status"] == 413 and b"larger than" in sent[1]["body"]


def test_a_header_without_an_end_is_not_kept(engine: Engine) -> None:  # noqa: F811
    bound = bind("127.0.0.1", 0)
    server = TransformersServer(make_app(engine, NAME), bound)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with socket.create_connection(bound.getsockname()[:2], timeout=5) as client:
            with contextlib.suppress(ConnectionError):  # the server hangs up
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (4 << 20))
            try:
                answer = client.recv(1000)  # else it waits for more
            except ConnectionError:
                answer = b""
            assert not answer or b" 400 " in answer
    finally:
        server.stop()
        thread.join()


def test_a_prompt_that_cannot_fit_is_not_tokenised(
    client: TestClient,
    engine: Engine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(engine.loaded), "encode", lambda *_: pytest.fail("it was tokenised"))
    monkeypatch.setattr(type(engine.loaded), "encode_chat", lambda *_: pytest.fail("it was tokenised"))
    long = "x" * (engine.longest_chars + 1)
    assert "never holds more than" in refusal(client, COMPLETIONS, status=413, prompt=["a", long])
    assert "never holds" in refusal(client, CHATS, status=413, messages=[{"role": "user", "content": long}])


CHAT = {"messages": [{"role": "user", "content": "1"}]}
ODD: list[tuple[str, Any]] = [
    ("seed", 1e30), ("seed", 10**30), ("seed", -(10**30)), ("seed", 0.5), ("temperature", 1e-320),
    ("temperature", 1e-9), ("temperature", 101), ("temperature", 10**400), ("temperature", True if False else "hot"),
    ("top_k", 10**30), ("top_p", -1e-320), ("max_tokens", 10**30), ("stop", ["a"] * 17), ("stop", "a" * 1001),
    ("stop", [None]), ("prompt", {"a": 1}), ("prompt", [[1, "a"]]), ("prompt", [10**30]), ("prompt", ["a"] * 129),
    ("prompt", []), ("stream_options", {"include_usage": True, "more": 1}), ("n", 10**30), ("model", 5),
    ("no_such_field", 1), ("max_token", 5), ("min_p", 0.1), ("stream", [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ODD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ODD)])
def test_odd_values_are_the_clients_error_and_named(client: TestClient, name: str, value: Any) -> None:
    assert name in refusal(client, COMPLETIONS, **{**ASK, name: value})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", "the body is not JSON: Exceeds the limit"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "\\udfff", "prompt": "x"}', "half of a surrogate pair"),
        (b'{"prompt": "x", "\\ud800": 1}', "half of a surrogate pair"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is no number"),
        (b'{"prompt": "x", "temperature": Infinity}', "Infinity is no number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b"", "the body is not JSON"),
    ],
)
def test_bodies_that_no_honest_client_sends(client: TestClient, raw: bytes, said: str) -> None:
    reply = client.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text
    assert len(reply.text) < 2000


@pytest.mark.parametrize(
    "extra", [{"name": "a"}, {"tool_calls": [{"id": "a"}]}, {"tool_call_id": "a"}, {"reasoning_content": "a"}, {"a": 1}]
)
def test_what_a_message_holds_beside_its_text_is_refused_unless_it_is_empty(
    client: TestClient, extra: dict[str, Any]
) -> None:
    message = {"role": "user", "content": "1"}
    said = refusal(client, CHATS, messages=[{**message, **extra}])
    assert said.startswith(f"messages.0.{next(iter(extra))}: ")
    empty = {**dict.fromkeys(extra), "refusal": None, "annotations": [], "tool_calls": []}
    reply = client.post(CHATS, json={"messages": [{**message, **empty}], "max_tokens": 1, "temperature": 0})
    assert reply.status_code == 200, reply.text


def test_every_field_of_the_protocol_is_used_refused_or_ignored_on_purpose() -> None:
    for given, request in ((Parameters, CompletionRequest), (ChatParameters, ChatRequest)):
        known = {*request.model_fields, *UNSUPPORTED, *IGNORED}
        assert get_type_hints(given).keys() <= known, get_type_hints(given).keys() - known
    assert not {*IGNORED} & {*UNSUPPORTED}


def test_an_error_tells_nothing_of_this_machine(
    client: TestClient,
    engine: Engine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("/home/ada/secret.key HF_TOKEN=hf_abc")

    monkeypatch.setattr("sftlab.serving.engine.decode", lambda *_, **__: broken())
    replies = [client.post(COMPLETIONS, json={**ASK, "stream": streamed}) for streamed in (False, True)]
    monkeypatch.setattr(type(engine.loaded), "encode_chat", lambda *_: broken())
    replies.append(client.post(CHATS, json=CHAT))
    monkeypatch.setattr(type(engine.loaded), "encode", lambda *_: broken())
    replies.append(client.post(COMPLETIONS, json=ASK))
    for reply in replies:
        assert "secret" not in reply.text and "hf_abc" not in reply.text and "/home" not in reply.text
    assert [r.status_code for r in replies] == [500, 200, 400, 500]


def test_a_template_that_does_not_end_is_stopped(
    client: TestClient,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sftlab.data.template.TEMPLATE_S", 0.3)
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", bomb)
    assert "took longer than 0.3 s" in refusal(client, CHATS, **CHAT)


def test_health_answers_while_a_prompt_is_tokenised(
    client: TestClient,
    engine: Engine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, healthy = threading.Event(), threading.Event()
    encode, in_time = type(engine.loaded).encode, []

    def slow(*given: Any) -> Any:
        begun.set()
        in_time.append(healthy.wait(20))
        return encode(*given)

    monkeypatch.setattr(type(engine.loaded), "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, COMPLETIONS, json=ASK)
        assert begun.wait(20) and client.get("/health").status_code == 200
        healthy.set()
        assert answer.result().status_code == 200
    assert in_time == [True]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_leaves_stops_its_generation(tokenizer: Any, streamed: bool, waiting: bool) -> None:  # noqa: F811
    """Whether it was being answered, whole or in pieces, or still waited for its turn."""
    engine = make_engine(tokenizer, context=100_000)  # noqa: F811
    steps: list[int] = []
    engine.model.base_model.register_forward_pre_hook(lambda *_: steps.append(1))
    app = make_app(engine, NAME)
    body = {"prompt": "1", "temperature": 0, "max_tokens": 90_000, "stream": streamed}
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": JSON, "query_string": b""}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "root_path": ""}

    async def ask() -> None:
        asked: list[bool] = []

        async def receive() -> dict[str, Any]:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            until_s = time.monotonic() + 0.3
            while (not steps and not waiting) or time.monotonic() < until_s:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        await asyncio.wait_for(app(scope, receive, send), 20)

    if waiting:
        engine.turn.acquire()
    asyncio.run(ask())
    if waiting:
        engine.turn.release()
    assert (len(steps) == 0) if waiting else (0 < len(steps) < 90_000)
    until_s = time.monotonic() + 5
    while engine.turn.locked() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not engine.turn.locked(), "the next one need not wait"


def test_the_door_before_vllm_takes_its_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setenv(SETTINGS, json.dumps({"hosts": ["mine.example"], "origins": ["http://page.example"]}))
    made = Door(app)
    sent: list[Any] = []
    for kind, host in (("lifespan", ""), ("http", "mine.example"), ("http", "evil.example"), ("websocket", "evil")):
        headers = [(b"host", host.encode()), (b"origin", b"http://page.example")]
        asyncio.run(made({"type": kind, "method": "GET", "headers": headers}, None, send))
    assert seen == ["lifespan", "http"]
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body", "websocket.close"]
    assert sent[0]["status"] == 403
