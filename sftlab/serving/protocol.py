"""The part of the OpenAI protocol that the transformers engine supports: request checks, answers and errors.

A request for an unsupported feature is refused by name: ignoring `logprobs` or `n` would silently give a wrong answer.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
}


class RequestError(Exception):
    """An error for the client: what to change, with the HTTP status."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """Return the error as the openai client reads it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class StreamOptions(BaseModel):
    """Whether a stream ends with the token counts."""

    include_usage: bool = False


class Request(BaseModel):
    """The fields of both kinds of request. None means the model's own default."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in found if s]


class CompletionRequest(Request):
    """POST /v1/completions: continue prompts of text or tokens."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)  # the protocol's own default

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each as text or as tokens."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", self.prompt if several else [self.prompt])


class Part(BaseModel):
    """A piece of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Return the message in the form that a chat template takes."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(Request):
    """POST /v1/chat/completions: the assistant's next turn."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: Any, model: str) -> R:
    """Return the checked request. Raises: RequestError that names the field and why it is refused."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise RequestError(f"{name}={body[name]!r}: the transformers engine has no {name}; engine=vllm may")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise RequestError(said) from None
    if request.model not in (None, model):
        raise RequestError(f"model={request.model}: there is no such model here; this server has {model}", 404)
    return request


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
