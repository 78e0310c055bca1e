"""The part of the OpenAI protocol that the transformers engine supports: request checks, answers and errors.

Every field is used, refused by name (UNSUPPORTED, or unknown), or one of IGNORED, which changes no answer: leaving out
`logprobs` or `n` would silently give a wrong one.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # each with the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "verbosity": (),
    "prediction": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}
# These say who asks, how an account is billed or what a provider may keep. None of that exists here.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip
MAX_PROMPTS = 128  # of one completion request
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_FIELDS = 100  # of one object


class RequestError(Exception):
    """An error for the client: what to change, with the HTTP status."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """Return the error as the openai client reads it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class Strict(BaseModel):
    """An object whose unknown fields are refused; those that are null say nothing and are dropped."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object has {len(given)} fields, and none here takes more than {MAX_FIELDS}")
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class StreamOptions(Strict):
    """Whether a stream ends with the token counts. `include_obfuscation` pads a stream against listeners: not here."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


def _greedy_or_sampled(temperature: float) -> float:
    """Below 0.001 the logits divided by the temperature overflow."""
    if 0 < temperature < 1e-3:
        raise ValueError("expected 0 (greedy), or at least 0.001")
    return temperature


class First(FailFast):
    """Says that a list's first wrong item is enough: of a million the errors took 2 GB and 55 s. A union hashes it."""

    __hash__ = object.__hash__


Item = TypeVar("Item")
Many = Annotated[list[Item], First()]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]


class Request(Strict):
    """The fields of both kinds of request. None means the model's own default."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_greedy_or_sampled)] | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in found if s]


class CompletionRequest(Request):
    """POST /v1/completions: continue prompts of text or tokens."""

    prompt: (
        str
        | Annotated[Many[str] | Many[Many[int]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Many[int], Field(min_length=1)]
    )
    max_tokens: int | None = Field(16, ge=1)  # the protocol's own default

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each as text or as tokens."""
        several = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return cast("list[str | list[int]]", self.prompt if several else [self.prompt])


class Part(Strict):
    """A piece of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation. What an answer of this protocol holds beside its text may be sent back empty."""

    role: str
    content: str | list[Part]
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """Return the message in the form that a chat template takes."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(Request):
    """POST /v1/chat/completions: the assistant's next turn."""

    messages: Many[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


R = TypeVar("R", bound=Request)
MOST_ERRORS = 20  # of a request, shown in one refusal


def parse(kind: type[R], body: Any, model: str) -> R:
    """Return the checked request. Raises: RequestError that names the field and why it is refused."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise RequestError(
                f"{name}={shown(repr(body[name]))}: the transformers engine has no {name}; engine=vllm may"
            )
    known = {name: value for name, value in body.items() if name not in UNSUPPORTED and name not in IGNORED}
    try:
        request = kind.model_validate(known)
    except ValidationError as error:
        raise RequestError("; ".join(map(said, error.errors()[:MOST_ERRORS]))) from None
    if request.model not in (None, model):
        raise RequestError(
            f"model={shown(request.model or '')}: there is no such model here; this server has {model}", 404
        )
    return request


def said(error: Any) -> str:
    """Return what is wrong with one field."""
    # pydantic names a choice between types by its validators, and these by their addresses in memory
    field = ".".join(str(part) for part in error["loc"] if "function-" not in str(part))[:200] or "body"
    what = "no such field" if error["type"] == "extra_forbidden" else str(error["msg"])
    return f"{field}: {what[:300]}"


def shown(text: str, most: int = 200) -> str:
    """Return what a client wrote, not longer than a message may be."""
    return text if len(text) <= most else text[:most] + "..."


def decode(raw: bytes) -> Any:
    """Return the JSON of a body. Raises: RequestError if it is none, or holds what no text or number can be."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise RequestError("the body is not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise RequestError("a text of the body holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {shown(str(error))}") from None
    return body


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def envelope(kind: str, model: str, choices: Sequence[Mapping[str, Any]], **rest: Any) -> dict[str, Any]:
    """Return the response that holds `choices`: a whole answer, or a piece of a stream."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return {**head, "choices": list(choices), **rest}


def usage(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
