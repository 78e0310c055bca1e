"""The HTTP side of the transformers engine: /health, /v1/models, /v1/completions and /v1/chat/completions.

Prompts are tokenised and answers generated in threads, so that /health responds meanwhile. A client that leaves ends
its generation. An error that is not the client's fault is described in the log and not to the client.
"""

import asyncio
import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sftlab.serving.door import Door
from sftlab.serving.engine import Engine, Piece, Sampling, TooLong
from sftlab.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    decode,
    envelope,
    parse,
    shown,
    usage,
)

log = logging.getLogger(__name__)
BROKEN = RequestError("the server failed at this request; its log says why", 500)


def make_app(engine: Engine, model: str, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> Starlette:
    """Return the application that serves `engine` under the name `model`; the door admits these hosts and origins."""
    began = int(time.time())

    async def health(_: HttpRequest) -> Response:
        return Response()

    async def models(_: HttpRequest) -> Response:
        card = {"id": model, "object": "model", "created": began, "owned_by": "sftlab", "max_model_len": engine.longest}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(http: HttpRequest) -> Response:
        raw = await http.body()
        request = await run_in_threadpool(lambda: parse(CompletionRequest, decode(raw), model))
        return await respond(http, await run_in_threadpool(Completions, engine, model, request))

    async def chat(http: HttpRequest) -> Response:
        raw = await http.body()
        request = await run_in_threadpool(lambda: parse(ChatRequest, decode(raw), model))
        return await respond(http, await run_in_threadpool(Chat, engine, model, request))

    cors = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"])] if origins else []
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[*cors, Middleware(Door, hosts=hosts, origins=origins)],
        exception_handlers={
            RequestError: refused,
            ClientDisconnect: gone,
            HTTPException: not_there,
            Exception: failed,
        },
    )


class Answer(ABC):
    """The answers to one request, whole or in pieces."""

    whole: str
    piece: str

    def __init__(
        self,
        engine: Engine,
        model: str,
        request: Request,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        ends: frozenset[int],
    ) -> None:
        """Raise RequestError before anything is sent if a prompt does not fit or holds an unknown token."""
        self.engine, self.model, self.request, self.prompts, self.ends = engine, model, request, prompts, ends
        self.left = threading.Event()  # set once the client has gone
        self.how = sampling(engine, request, max_tokens)
        try:
            for prompt in prompts:
                engine.check(prompt, max_tokens)
        except ValueError as error:
            raise RequestError(str(error)) from None

    @abstractmethod
    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return one whole answer."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """Return one piece of an answer."""

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of all answers, one answer after the other."""
        for i, prompt in enumerate(self.prompts):
            for piece in self.engine.answer(prompt, self.how, self.ends, self.left):
                yield i, piece
            if self.left.is_set():
                return

    def body(self) -> dict[str, Any]:
        """Return all answers whole, as one response body."""
        texts, last = [""] * len(self.prompts), [Piece("")] * len(self.prompts)
        for i, piece in self.pieces():
            texts[i], last[i] = texts[i] + piece.text, piece
        choices = [self.choice(i, t, p.finish_reason) for i, (t, p) in enumerate(zip(texts, last, strict=True))]
        counts = usage(sum(map(len, self.prompts)), sum(p.num_tokens for p in last))
        return envelope(self.whole, self.model, choices, usage=counts)

    def events(self) -> Generator[str, None, None]:
        """Yield the answers as server-sent events. An error becomes an event and ends the stream."""
        head = envelope(self.piece, self.model, [])
        started: set[int] = set()
        total = 0
        try:
            for i, piece in self.pieces():
                yield event({**head, "choices": [self.delta(i, piece, i not in started)]})
                started.add(i)
                total += piece.num_tokens
            if self.request.stream_options and self.request.stream_options.include_usage:
                yield event({**head, "usage": usage(sum(map(len, self.prompts)), total)})
        except Exception:
            log.exception("the answer failed")
            yield event(BROKEN.body())
        yield "data: [DONE]\n\n"


class Completions(Answer):
    """Continuations of prompts, each given as text or as tokens."""

    whole = piece = "text_completion"

    def __init__(self, engine: Engine, model: str, request: CompletionRequest) -> None:
        refuse_long(engine, [p for p in request.prompts if isinstance(p, str)])
        prompts = [p if isinstance(p, list) else engine.loaded.encode(p).tolist() for p in request.prompts]
        super().__init__(engine, model, request, prompts, request.max_tokens, engine.loaded.ends)

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return one whole answer."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """Return one piece of an answer."""
        return self.choice(index, piece.text, piece.finish_reason)


class Chat(Answer):
    """The assistant's next turn."""

    whole, piece = "chat.completion", "chat.completion.chunk"

    def __init__(self, engine: Engine, model: str, request: ChatRequest) -> None:
        talk = engine.loaded
        if not talk.tokenizer.chat_template:
            raise RequestError("this model has no chat template: it only continues text: use /v1/completions")
        messages = [m.plain() for m in request.messages]
        refuse_long(engine, ["".join(m["content"] for m in messages)])
        try:
            prompt, ends = talk.encode_chat(messages).tolist(), talk.turn_ends()
        except (TemplateError, TimeoutError) as error:  # the template's own raise_exception, or what it cannot do
            raise RequestError(f"the chat template refuses these messages: {shown(str(error))}") from error
        except Exception as error:  # its words may name what lies on this machine
            log.exception("the chat template failed")
            raise RequestError(f"the chat template refuses these messages ({type(error).__name__})") from error
        max_tokens = request.max_completion_tokens or request.max_tokens
        super().__init__(engine, model, request, [prompt], max_tokens, ends)

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return one whole answer."""
        return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}

    def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """Return one piece of an answer."""
        role = {"role": "assistant"} if first else {}
        return {"index": index, "delta": {**role, "content": piece.text}, "finish_reason": piece.finish_reason}


def refuse_long(engine: Engine, texts: Sequence[str]) -> None:
    """Raise RequestError for texts that are not worth tokenising."""
    try:
        engine.check_size(texts)
    except TooLong as error:
        raise RequestError(str(error), 413) from None


def sampling(engine: Engine, request: Request, max_tokens: int | None) -> Sampling:
    """Return how to choose tokens: by the request's settings, else by the model's generation_config."""
    asked = {key: getattr(request, key) for key in ("temperature", "top_p", "top_k")}
    chosen = engine.defaults() | {key: value for key, value in asked.items() if value is not None}
    return Sampling(max_tokens=max_tokens, seed=request.seed, stop=request.stops, **chosen)


async def respond(http: HttpRequest, answer: Answer) -> Response:
    """Return the whole answer, or a stream of it."""
    if answer.request.stream:
        return StreamingResponse(close_with(http, answer.events(), answer.left), media_type="text/event-stream")
    watching = asyncio.create_task(watch(http, answer.left))
    try:
        return JSONResponse(await run_in_threadpool(answer.body))
    finally:
        watching.cancel()


async def watch(http: HttpRequest, left: threading.Event) -> None:
    """Say when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    left.set()


async def close_with(
    http: HttpRequest, events: Generator[str, None, None], left: threading.Event
) -> AsyncIterator[str]:
    """Yield events; end the generation when the client disconnects.

    Cancelling alone would not: it waits for the thread, which waits for the next token, which may wait for its turn.
    """
    watching = asyncio.create_task(watch(http, left))
    try:
        async for item in iterate_in_threadpool(events):
            yield item
    finally:
        watching.cancel()
        left.set()
        events.close()


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


async def refused(_: HttpRequest, error: Exception) -> Response:
    """Return the response to a request that is refused."""
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), status_code=error.status)


async def gone(_: HttpRequest, error: Exception) -> Response:
    """Return the response to a client that left before its body was whole: nobody reads it, and the log has no need."""
    return Response(status_code=400)


async def not_there(http: HttpRequest, error: Exception) -> Response:
    """Return the response to a request for an unknown path or method."""
    assert isinstance(error, HTTPException)
    known = "/health, /v1/models, /v1/completions and /v1/chat/completions"
    said = RequestError(f"{http.method} {http.url.path}: {error.detail}; this server has {known}", error.status_code)
    return JSONResponse(said.body(), status_code=error.status_code)


async def failed(_: HttpRequest, error: Exception) -> Response:
    """Return the response to a request that broke the server; the log holds the traceback."""
    log.error("a request failed", exc_info=error)
    return JSONResponse(BROKEN.body(), status_code=500)
