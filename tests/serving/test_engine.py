"""The server's application, called in this process, around a model whose every answer is known beforehand.

The model goes by a table (see `table`): the alphabet, digits in a circle, a token of four letters, characters of
several bytes, and letters drawn with the chances 0.5, 0.3 and 0.2.
"""

import json
import string
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.models.scorer import Scorer
from sftlab.serving.app import make_app
from sftlab.serving.engine import Engine, Piece, Sampling
from sftlab.serving.protocol import IGNORED, UNSUPPORTED
from tests.asymmetric import model_of_a_table
from tests.support import byte_tokenizer, tiny_llama

NAME = "served, here"
HERE = "http://127.0.0.1"
CONTEXT = 40
BOS, END = 0, 1
# Names the roles in full; a single turn is continued where it ends, several are answered after a T.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages | length > 1 %}T{% endif %}"
    "{% if messages[0].content == 'refuse me' %}{{ raise_exception('no such talk') }}{% endif %}"
)
GRADED = string.ascii_letters + string.digits + string.punctuation  # 94 characters, the first the likeliest


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer(["wxyz"] * 9, vocab=262)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = TEMPLATE
    return made


def table(tokenizer: Any) -> dict[int, dict[int, float]]:
    """What follows each token, and how often."""
    number = tokenizer.convert_tokens_to_ids
    letters, digits = string.ascii_lowercase, string.digits
    sure = [*pairwise(letters), *zip(digits, digits[1:] + "0", strict=True)]
    sure += [("z", "</s>"), ("V", "wxyz"), ("wxyz", "!"), ("!", "</s>")]
    sure += [("T", "U"), ("U", "<end>"), ("<end>", "W"), ("W", "</s>")]
    sure += [("E", "Ã"), ("Ã", "©"), ("©", "</s>"), ("H", "â"), ("â", "</s>")]  # é, and the first byte of three
    found = {number(last): {number(after): 1.0} for last, after in sure}
    drawn = {number("P"): 0.5, number("Q"): 0.3, number("R"): 0.2}
    return found | dict.fromkeys(drawn, drawn)


def engine_of(model: Any, tokenizer: Any) -> Engine:
    return Engine(LoadedModel(Scorer(model).eval().requires_grad_(False), tokenizer, frozenset({END})))


def make_engine(tokenizer: Any, context: int = CONTEXT) -> Engine:
    model = model_of_a_table(table(tokenizer), vocab=len(tokenizer), max_position_embeddings=context)
    return engine_of(model, tokenizer)


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Engine:
    return make_engine(tokenizer)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(make_app(engine, NAME), base_url=HERE, raise_server_exceptions=False) as client:
        yield client


COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
JSON = [(b"host", b"localhost:8000"), (b"content-type", b"application/json")]


def post(client: TestClient, path: str, body: Any) -> Any:
    """Return the answer to a greedy request, which is 200."""
    reply = client.post(path, json={"model": NAME, "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def complete(client: TestClient, prompt: Any, **more: Any) -> Any:
    return post(client, COMPLETIONS, {"prompt": prompt, **more})


def text(client: TestClient, prompt: Any, **more: Any) -> str:
    (choice,) = complete(client, prompt, **more)["choices"]
    return str(choice["text"])


def talk(client: TestClient, *turns: tuple[str, Any], **more: Any) -> Any:
    return post(client, CHATS, {"messages": [{"role": r, "content": c} for r, c in turns], **more})


def stream(client: TestClient, path: str, **body: Any) -> list[Any]:
    """Return the events of a greedy stream, without the mark at its end."""
    reply = client.post(path, json={"model": NAME, "temperature": 0, "stream": True, **body})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    *lines, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "") and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refusal(client: TestClient, path: str, status: int = 400, **body: Any) -> str:
    """Return the words of a refusal, whose shape is the protocol's."""
    reply = client.post(path, json={"model": NAME, "temperature": 0, **body})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert reply.json().keys() == {"error"} and error == {
        "message": error["message"],
        "type": kind,
        "param": None,
        "code": None,
    }
    return str(error["message"])


# Answers


def test_health_and_the_card_of_the_model(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    listed = client.get("/v1/models").json()
    (card,) = listed.pop("data")
    assert listed == {"object": "list"} and isinstance(card.pop("created"), int)
    assert card == {"id": NAME, "object": "model", "owned_by": "sftlab", "max_model_len": CONTEXT}


def test_a_completion_of_two_prompts_is_as_worked_out_by_hand(client: TestClient) -> None:
    """BOS and "x" are answered y, z and the end; BOS, "1" and "2" are answered 3, 4, 5, 6 and 7."""
    answer = complete(client, ["x", "12"], max_tokens=5)
    assert answer.pop("id").startswith("cmpl-") and isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": NAME,
        "choices": [
            {"index": 0, "text": "yz", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "34567", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13},
    }


def test_a_chat_ends_with_its_turn_and_a_completion_with_its_text(client: TestClient) -> None:
    """system:s1user:22T has 17 tokens; a chat's turn ends at <end>, which a continued text runs over."""
    answer = talk(client, ("system", "s1"), ("user", "22"))
    assert answer.pop("id").startswith("chatcmpl-") and isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": NAME,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "U"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 17, "completion_tokens": 2, "total_tokens": 19},
    }
    continued = complete(client, "T")
    assert continued["choices"][0]["text"] == "UW" and continued["usage"]["completion_tokens"] == 4


def test_a_message_in_parts_is_its_parts_in_their_order(client: TestClient) -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "1"}]
    answer = talk(client, ("user", parts), max_tokens=2)
    assert answer["choices"][0]["message"]["content"] == "23" and answer["usage"]["prompt_tokens"] == len("user:b1")


def test_max_tokens_and_what_holds_without_it(client: TestClient) -> None:
    assert text(client, "0", max_tokens=1) == "1"
    assert len(text(client, "0")) == 16  # the protocol's default
    assert len(text(client, "0", max_tokens=None)) == CONTEXT - 2  # BOS and the prompt
    lengths = [({}, CONTEXT - len("user:0")), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 4}, 4)]
    lengths += [({"max_tokens": 5, "max_completion_tokens": 3}, 3), ({"max_tokens": 3, "max_completion_tokens": 6}, 6)]
    for given, length in lengths:
        (choice,) = talk(client, ("user", "0"), **given)["choices"]
        assert (len(choice["message"]["content"]), choice["finish_reason"]) == (length, "length")


def test_the_context_is_filled_to_its_last_token_and_no_further(client: TestClient) -> None:
    long = "1" * 36  # 37 tokens with BOS
    assert text(client, long, max_tokens=3) == "234"
    assert refusal(client, COMPLETIONS, prompt=long, max_tokens=4) == (
        "the prompt has 37 tokens and 4 more are asked for, but this model's context holds 40: "
        "shorten the prompt or lower max_tokens"
    )
    assert text(client, "1" * 38, max_tokens=None) == "2"
    full = {"prompt": ["1", "1" * 39], "max_tokens": None}  # the second of them
    assert refusal(client, COMPLETIONS, **full).startswith("the prompt has 40 tokens, but this model's context holds")
    assert refusal(client, COMPLETIONS, **full, stream=True).startswith("the prompt has 40 tokens, but")
    chat = {"messages": [{"role": "user", "content": "1"}]}
    assert "35 more are asked for" in refusal(client, CHATS, **chat, max_completion_tokens=35, max_tokens=1)


def test_prompts_of_tokens(client: TestClient, tokenizer: Any) -> None:
    one, two = tokenizer.convert_tokens_to_ids(["1", "2"])
    answer = complete(client, [one, two], max_tokens=2)
    assert answer["choices"][0]["text"] == "34" and answer["usage"]["prompt_tokens"] == 2  # no BOS is added to them
    several = complete(client, [[two], [two, one]], max_tokens=2)["choices"]
    assert [(c["index"], c["text"]) for c in several] == [(0, "34"), (1, "23")]
    last = len(tokenizer) - 1
    assert text(client, [last]) == "W" and complete(client, [0], max_tokens=1)["usage"]["total_tokens"] == 2
    for wrong in ([last + 1], [-1], [one, last + 1, two], [[one], [-1]]):
        said = refusal(client, COMPLETIONS, prompt=wrong)
        assert said == f"a token of the prompt is not in the vocabulary, which has {last + 1}"
    assert refusal(client, COMPLETIONS, prompt=[[one], []]) == "the prompt is empty"
    assert refusal(client, COMPLETIONS, prompt=[]).startswith("prompt.")


def test_greedy_answers_take_the_likeliest_token_also_behind_padding(tokenizer: Any) -> None:
    """A padding token inside a prompt is a token like any other."""
    model = tiny_llama(seed=3, vocab=len(tokenizer), tied=False, initializer_range=0.3)
    prompt = [BOS, 90, 91, tokenizer.pad_token_id, 92]
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    pieces = list(engine_of(model, tokenizer).answer(prompt, Sampling(8, temperature=0.0), frozenset()))
    assert "".join(p.text for p in pieces) == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert pieces[-1].num_tokens == 8 and len(set(ids[len(prompt) :])) > 2


# Stops

STOPS: list[tuple[str, Any, str, str, int]] = [  # prompt, stop, answer, finish reason, tokens until then
    ("a", "e", "bcd", "stop", 4),
    ("a", ["e"], "bcd", "stop", 4),
    ("a", ["no such", "fg"], "bcde", "stop", 6),  # the second, over two tokens
    ("a", ["de", "cde"], "b", "stop", 4),  # both end with the same token: the earliest cuts
    ("a", ["cde", "de"], "b", "stop", 4),
    ("V", ["y", "x"], "w", "stop", 1),  # both in one token
    ("V", ["yz!"], "wx", "stop", 2),
    ("a", ["", "d"], "bc", "stop", 3),  # an empty one asks for nothing
    ("a", "", "bcdefg", "length", 6),
    ("a", [], "bcdefg", "length", 6),
    ("a", None, "bcdefg", "length", 6),
    ("a", ["a"], "bcdefg", "length", 6),  # the prompt's own text does not count
    ("a", "b", "", "stop", 1),
    ("a", "g", "bcdef", "stop", 6),  # the last token that there is room for
    ("a", "gh", "bcdefg", "length", 6),  # a beginning that nothing comes of is shown
    ("x", "z?", "yz", "stop", 3),
]


@pytest.mark.parametrize(("prompt", "stop", "answer", "reason", "tokens"), STOPS)
def test_the_earliest_stop_ends_the_answer(
    client: TestClient, prompt: str, stop: Any, answer: str, reason: str, tokens: int
) -> None:
    whole = complete(client, prompt, stop=stop, max_tokens=6)
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (answer, reason)
    assert whole["usage"]["completion_tokens"] == tokens
    asked = {"prompt": prompt, "stop": stop, "max_tokens": 6, "stream_options": {"include_usage": True}}
    *pieces, last = stream(client, COMPLETIONS, **asked)
    assert "".join(p["choices"][0]["text"] for p in pieces) == answer
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert last["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("prompt", "stop", "pieces"),
    [
        ("a", [], ["b", "c", "d", "e", "f", "g", ""]),
        ("a", ["cdx", "dez"], ["b", "c", "def", "g", ""]),  # c, cd and then de may begin a stop
        ("a", ["dez", "cdx"], ["b", "c", "def", "g", ""]),
        ("a", ["fx"], ["b", "c", "d", "e", "fg", ""]),
        ("a", ["gx"], ["b", "c", "d", "e", "f", "g"]),
        ("E", [], ["é", ""]),  # not before its second byte
        ("H", [], ["\N{REPLACEMENT CHARACTER}"]),  # the other two bytes never come
        ("V", ["z?"], ["wxy", "z!", ""]),
    ],
)
def test_what_may_begin_a_stop_is_held_back(
    client: TestClient, prompt: str, stop: list[str], pieces: list[str]
) -> None:
    events = stream(client, COMPLETIONS, prompt=prompt, stop=stop, max_tokens=6)
    assert [e["choices"][0]["text"] for e in events] == pieces


# Streams


def test_a_stream_of_two_prompts_event_by_event(client: TestClient) -> None:
    events = stream(client, COMPLETIONS, prompt=["x", "12"], max_tokens=3, stream_options={"include_usage": True})
    heads = [{k: v for k, v in e.items() if k not in ("choices", "usage")} for e in events]
    assert all(head == heads[0] for head in heads) and heads[0].pop("id").startswith("cmpl-")
    assert isinstance(heads[0].pop("created"), int) and heads[0] == {"object": "text_completion", "model": NAME}
    *pieces, last = events
    assert [(c["index"], c["text"], c["finish_reason"]) for p in pieces for c in p["choices"]] == [
        (0, "y", None),
        (0, "z", None),
        (0, "", "stop"),
        (1, "3", None),
        (1, "4", None),
        (1, "5", None),
        (1, "", "length"),
    ]
    assert all("usage" not in p for p in pieces) and last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_usage_comes_only_where_it_is_asked_for(client: TestClient) -> None:
    for options in (None, {}, {"include_usage": False}):
        events = stream(client, COMPLETIONS, prompt="x", stream_options=options)
        assert all("usage" not in e and e["choices"] for e in events)


def test_a_chat_s_stream_names_the_role_once(client: TestClient) -> None:
    messages = [{"role": "user", "content": "1"}]
    events = stream(client, CHATS, messages=messages, max_tokens=2)
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and events[0]["id"].startswith("chatcmpl-")
    assert [c for e in events for c in e["choices"]] == [
        {"index": 0, "delta": {"role": "assistant", "content": "2"}, "finish_reason": None},
        {"index": 0, "delta": {"content": "3"}, "finish_reason": None},
        {"index": 0, "delta": {"content": ""}, "finish_reason": "length"},
    ]


# Sampling: after P, Q or R come P, Q and R with the chances 0.5, 0.3 and 0.2.


def drawn(client: TestClient, **how: Any) -> str:
    return text(client, "P", **{"max_tokens": 30, "seed": 3, **how})


@pytest.mark.parametrize(
    ("how", "letters"),
    [
        ({"temperature": 1}, "PQR"),
        ({"temperature": None}, "PQR"),  # nothing is asked for, and the model asks for nothing
        ({"temperature": 0}, "P"),
        ({"temperature": 0.05}, "P"),
        ({"temperature": 1, "top_p": 0.4}, "P"),
        ({"temperature": 1, "top_p": 0.6}, "PQ"),
        ({"temperature": 1, "top_p": 1}, "PQR"),
        ({"temperature": 1, "top_k": 1}, "P"),
        ({"temperature": 1, "top_k": 2}, "PQ"),
        ({"temperature": 1, "top_k": 0}, "PQR"),
    ],
)
def test_temperature_top_p_and_top_k_choose_among_what_they_leave(
    client: TestClient, how: dict[str, Any], letters: str
) -> None:
    assert set(drawn(client, **how)) == set(letters)


def test_a_high_temperature_evens_the_chances_out(tokenizer: Any) -> None:
    engine = make_engine(tokenizer, context=400)
    prompt = engine.loaded.encode("P").tolist()
    how = Sampling(300, temperature=3.0, top_k=3, seed=1)  # 0.5 : 0.3 : 0.2, each to the power of a third
    found = Counter("".join(p.text for p in engine.answer(prompt, how, frozenset())))
    assert found.total() == 300 and {k: v / 300 for k, v in found.items()} == pytest.approx(
        {"P": 0.390, "Q": 0.329, "R": 0.287}, abs=0.08
    )


def test_without_top_k_every_token_can_come(tokenizer: Any) -> None:
    """transformers' own default keeps the likeliest 50."""
    number = tokenizer.convert_tokens_to_ids
    chances = {number(c): 0.98**i for i, c in enumerate(GRADED)}
    model = model_of_a_table(dict.fromkeys(chances, chances), len(tokenizer))
    pieces = engine_of(model, tokenizer).answer([number("a")], Sampling(60, seed=1), frozenset())
    assert max(GRADED.index(c) for p in pieces for c in p.text) >= 50


def test_a_seed_is_an_answer_s_own(client: TestClient) -> None:
    how = {"temperature": 1, "max_tokens": 30}
    state = torch.random.get_rng_state()
    zero, again, other = (drawn(client, seed=s, **how) for s in (0, 0, 1))
    assert zero == again != other
    assert torch.equal(torch.random.get_rng_state(), state), "a seed leaves the process's own generator alone"
    assert len({drawn(client, seed=None, **how) for _ in range(3)}) == 3, "and without one no answer repeats another"


def test_what_the_model_s_generation_config_asks_for_is_the_default(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine.model.generation_config
    for key, value, letters in (("top_k", 2, "PQ"), ("top_p", 0.4, "P"), ("temperature", 0.05, "P")):
        with monkeypatch.context() as patch:
            patch.setattr(own, key, value)
            assert set(drawn(client, temperature=None)) == set("PQR"), "it does not ask for sampling"
            patch.setattr(own, "do_sample", True)
            assert set(drawn(client, temperature=None)) == set(letters)
            asked = {"temperature": 1, "top_p": 1, "top_k": 0}
            assert set(drawn(client, **asked)) == set("PQR"), "and the request's own word counts for more"


# Several at once


def test_seeded_answers_at_once_are_those_of_each_alone(tokenizer: Any) -> None:
    engine = make_engine(tokenizer, context=400)
    prompt = engine.loaded.encode("P").tolist()

    def answer(seed: int) -> str:
        return "".join(p.text for p in engine.answer(prompt, Sampling(100, seed=seed), frozenset()))

    alone = [answer(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, (1, 2))) == alone


@pytest.mark.parametrize("streamed", [False, True])
def test_health_answers_while_the_model_thinks(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """The model thinks until /health has answered, or gives up."""
    thinking, healthy = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def slow(*given: Any, **settings: Any) -> Any:
        thinking.set()
        in_time.append(healthy.wait(20))
        return decode(*given, **settings)

    monkeypatch.setattr("sftlab.serving.engine.decode", slow)
    with ThreadPoolExecutor(1) as pool:
        body = {"model": NAME, "prompt": "x", "temperature": 0, "stream": streamed}
        answer = pool.submit(client.post, COMPLETIONS, json=body)
        assert thinking.wait(20) and client.get("/health").status_code == 200
        healthy.set()
        assert answer.result().status_code == 200
    assert in_time == [True]


def test_an_answer_that_nobody_reads_on_ends_its_generation(tokenizer: Any) -> None:
    engine = make_engine(tokenizer, context=5000)
    steps: list[int] = []
    engine.model.model.register_forward_pre_hook(lambda *_: steps.append(1))
    answer = engine.answer(engine.loaded.encode("1").tolist(), Sampling(4000, temperature=0.0), frozenset())
    assert next(answer) == Piece("2")
    answer.close()  # type: ignore[attr-defined]
    assert 0 < len(steps) < 4000 and not engine.turn.locked()  # the next one need not wait


def test_a_client_that_goes_away_ends_the_generation(tokenizer: Any) -> None:
    """The application as a server calls it: the client leaves after the first piece."""
    import anyio

    engine = make_engine(tokenizer, context=5000)
    steps: list[int] = []
    engine.model.model.register_forward_pre_hook(lambda *_: steps.append(1))
    app = make_app(engine, NAME)
    body = {"prompt": "1", "temperature": 0, "max_tokens": 4000, "stream": True}
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": JSON, "query_string": b""}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "root_path": ""}

    async def ask() -> None:
        gone, asked = anyio.Event(), []

        async def receive() -> dict[str, Any]:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                gone.set()

        await app(scope, receive, send)

    anyio.run(ask)
    assert 0 < len(steps) < 4000 and not engine.turn.locked()


# Refusals

ASKED: dict[str, Any] = {
    "n": 2,
    "best_of": 3,
    "echo": True,
    "suffix": "s",
    "logprobs": 5,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "tools": [{"type": "function"}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "function_call": {"name": "f"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "a"},
    "modalities": ["audio"],
    "audio": {"voice": "a"},
    "web_search_options": {"a": 1},
    "moderation": {"a": 1},
}
NOTHING: list[tuple[str, Any]] = [
    ("n", 1), ("best_of", 1), ("echo", False), ("suffix", ""), ("logprobs", False), ("top_logprobs", 0),
    ("logit_bias", {}), ("frequency_penalty", 0), ("presence_penalty", 0.0), ("tools", []), ("functions", []),
    ("tool_choice", "none"), ("tool_choice", "auto"), ("response_format", {"type": "text"}), ("function_call", "none"),
    ("modalities", ["text"]),
]  # fmt: skip


def test_what_the_engine_lacks_is_refused_by_name_and_never_ignored(client: TestClient) -> None:
    assert ASKED.keys() == UNSUPPORTED.keys()
    assert {name for name, _ in NOTHING} == {name for name, neutral in UNSUPPORTED.items() if neutral}
    chat = {"messages": [{"role": "user", "content": "1"}]}
    for name, value in ASKED.items():
        said = f"{name}={value!r}: the transformers engine has no {name}; engine=vllm may"
        assert refusal(client, COMPLETIONS, prompt="x", **{name: value}) == said
        assert refusal(client, CHATS, **chat, **{name: value}) == said


def test_values_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    for name, value in [*NOTHING, *((name, None) for name in UNSUPPORTED)]:
        assert text(client, "x", **{name: value}) == "yz"
    for name in IGNORED:
        assert text(client, "x", **{name: "somebody"}) == "yz"


CHAT = {"messages": [{"role": "user", "content": "1"}]}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"temperature": -0.1}, "temperature: Input should be greater than or equal to 0"),
    (COMPLETIONS, {"temperature": "warm"}, "temperature: "),
    (COMPLETIONS, {"top_p": 0}, "top_p: Input should be greater than 0"),
    (COMPLETIONS, {"top_p": 1.01}, "top_p: Input should be less than or equal to 1"),
    (COMPLETIONS, {"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    (COMPLETIONS, {"seed": "s"}, "seed: "),
    (COMPLETIONS, {"stream": "perhaps"}, "stream: "),
    (COMPLETIONS, {"stream_options": {"include_usage": "no way"}}, "stream_options.include_usage: "),
    (COMPLETIONS, {"stop": 5}, "stop."),
    (COMPLETIONS, {"prompt": None}, "prompt."),
    (CHATS, {**CHAT, "max_tokens": 0}, "max_tokens: "),
    (CHATS, {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens: "),
    (CHATS, {"messages": []}, "messages: List should have at least 1 item"),
    (CHATS, {}, "messages: Field required"),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}, "messages.0.content."),
    (CHATS, {"messages": [{"content": "a"}]}, "messages.0.role: Field required"),
]


@pytest.mark.parametrize(("path", "body", "said"), WRONG)
def test_a_wrong_field_is_named(client: TestClient, path: str, body: dict[str, Any], said: str) -> None:
    prompt = {"prompt": "x"} if path == COMPLETIONS else {}
    assert refusal(client, path, **{**prompt, **body}).startswith(said)


def test_every_wrong_field_is_named(client: TestClient) -> None:
    said = refusal(client, COMPLETIONS, prompt="x", top_k=-1, max_tokens=0)
    assert said.startswith("top_k: ") and "; max_tokens: " in said


def test_the_model_is_this_one_or_left_out(client: TestClient) -> None:
    said = "model=other: there is no such model here; this server has served, here"
    assert refusal(client, COMPLETIONS, status=404, prompt="x", model="other") == said
    assert refusal(client, CHATS, status=404, **CHAT, model="other") == said
    assert text(client, "x", model=None) == "yz"


def test_bodies_and_paths_that_are_none(client: TestClient) -> None:
    for path in (COMPLETIONS, CHATS):
        reply = client.post(path, content=b"{", headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("the body is not JSON: ")
        reply = client.post(path, json=["prompt"])
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, "the body must be a JSON object")
        reply = client.get(path)
        known = "this server has /health, /v1/models, /v1/completions and /v1/chat/completions"
        said = f"GET {path}: Method Not Allowed; {known}"
        assert (reply.status_code, reply.json()["error"]["message"]) == (405, said)
    reply = client.post("/v1/embeddings", json={})
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, f"POST /v1/embeddings: Not Found; {known}")


def test_a_chat_that_the_template_refuses(client: TestClient, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [{"role": "user", "content": "refuse me"}]
    said = refusal(client, CHATS, messages=refused)
    assert said.startswith("the chat template refuses these messages: ") and "no such talk" in said
    monkeypatch.setattr(tokenizer, "chat_template", None)
    said = "this model has no chat template: it only continues text: use /v1/completions"
    assert refusal(client, CHATS, **CHAT) == said


def test_a_model_that_breaks_is_reported_and_the_next_request_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "the server failed at this request; its log says why"

    def broken(scorer: Any, prompts: Any, *settings: Any, on_token: Any) -> Any:
        on_token(0, int(prompts[0][-1]))
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("sftlab.serving.engine.decode", broken)
        assert refusal(client, COMPLETIONS, status=500, prompt="x") == said
        first, last = stream(client, COMPLETIONS, prompt="x", stream_options={"include_usage": True})
    assert first["choices"][0]["text"] == "x"
    assert last == {"error": {"message": said, "type": "server_error", "param": None, "code": None}}
    assert text(client, "x") == "yz"
