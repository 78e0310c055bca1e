"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`. The row shows which of the two it has.

Both are normalised to what chat templates take. The template words them (data/template.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sftlab.data.format import Conversation, Fields, Format, field, id_field

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
SUPERVISE = ("all", "last")


@dataclass(frozen=True)
class Chat(Format):
    """Learn every assistant turn (`supervise: all`) or the last one only (`last`).

    A turn with OpenAI's `weight: 0` is never learned. `template_path` is a file with the Jinja chat template to use
    instead of the tokenizer's; it is saved with the model.
    """

    converses: ClassVar[bool] = True

    supervise: str = "all"
    template_path: str | None = None

    def __post_init__(self) -> None:
        if self.supervise not in SUPERVISE:
            raise ValueError(f"data.format.supervise={self.supervise}: expected {' or '.join(SUPERVISE)}")

    def to_text(self, fields: Fields) -> Conversation:
        """Return the conversation."""
        messages = tuple(message(m, i) for i, m in enumerate(turns(fields), 1))
        spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not spoken:
            raise ValueError("the conversation has no assistant turn: there is nothing to learn")
        if messages[0]["role"] == "assistant":
            raise ValueError(
                "the conversation starts with the assistant: the first turn must be the user's or system's"
            )
        learned = [i for i in spoken if messages[i].pop("weight", 1) != 0]
        for i in learned:
            if not messages[i].get("tool_calls") and not str(messages[i].get("content") or "").strip():
                raise ValueError(f"message {i + 1} is an empty assistant turn: there is nothing to learn")
        tools = parsed(fields.get("tools"), "tools")
        reply = messages[spoken[-1]].get("content")
        return Conversation(
            messages=messages,
            supervised=tuple(learned if self.supervise == "all" else [i for i in learned if i == spoken[-1]]),
            tools=tuple(tools) if tools else None,
            id=id_field(fields),
            group=json.dumps(messages[: spoken[0]]),  # forks of one conversation share their opening
            references=(reply.strip(),) if isinstance(reply, str) and reply.strip() else (),
        )


def turns(fields: Fields) -> list[Any]:
    """Return the list of turns of a row, OpenAI's or ShareGPT's."""
    name = next((n for n in ("messages", "conversations", "conversation") if fields.get(n) is not None), "messages")
    found = parsed(field(fields, name), name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"field {name!r} must be a list of messages, and not empty")
    return found


def message(turn: Any, number: int) -> dict[str, Any]:
    """Return one turn, the `number`-th, as chat templates take it. Raises: ValueError that names it."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is {type(turn).__name__}, expected {{'role': ..., 'content': ...}}")
    # Columnar files hold every key in every message, null where it was not given.
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn:
        role, content = turn["from"], turn.get("value")
        out = {"content": content} if content is not None else {}
    else:
        role, out = turn.get("role"), {key: value for key, value in turn.items() if key != "role"}
    known = SHAREGPT_ROLES.get(str(role), role)
    if known not in ROLES:
        raise ValueError(
            f"message {number} has the unknown role {role!r}: expected {', '.join(ROLES)}, or ShareGPT's "
            f"{', '.join(SHAREGPT_ROLES)}"
        )
    if role == "function_call":
        out = {"content": "", "tool_calls": [call(parsed(out.get("content"), f"message {number}"))]}
    elif "tool_calls" in out:
        out["tool_calls"] = [call(c) for c in out["tool_calls"]]
    if "content" not in out and "tool_calls" not in out:
        raise ValueError(f"message {number} ({role}) has no content; it has {', '.join(turn)}")
    content = out.setdefault("content", "")
    if isinstance(content, list):  # OpenAI's content parts
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"message {number} ({role}) has content that is not text")
        out["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has content of type {type(content).__name__}, expected text")
    return {"role": known, **out}


def call(given: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's shape; its arguments are an object, because templates print them with `tojson`."""
    if not isinstance(given, Mapping) or not isinstance(given.get("function", given), Mapping):
        raise ValueError(f"a tool call is {given!r}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    function = dict(given.get("function", given))
    if "name" not in function:
        raise ValueError(f"a tool call names no function: {given!r}")
    function["arguments"] = parsed(function.get("arguments") or {}, f"arguments of {function['name']}")
    return {"type": "function", **({"id": given["id"]} if "id" in given else {}), "function": function}


def parsed(value: Any, name: str) -> Any:
    """Return a value, parsed if it is a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is a string that is not JSON ({error})") from None
