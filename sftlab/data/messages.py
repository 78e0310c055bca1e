"""One message: a turn as files have it, OpenAI's or ShareGPT's, as chat templates take it.

A call's arguments, its reasoning and its content may be spelt in many ways. What cannot be told is an error that names
the message; nothing is left out.
"""

import json
from collections.abc import Mapping, Set
from typing import Any

from sftlab.data.format import Fields
from sftlab.data.formats.tool_calls import ARGUMENTS
from sftlab.data.spelling import REASONING_KEYS, THOUGHT

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "function": "tool",
    "tool_response": "tool",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # turns of these roles hold a call as their words
TOOLS = ("tools", "functions")
FLAGS = ("weight", "train", "training", "loss", "mask")
KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "id")
CALL_KEYS = frozenset({"id", "type", "index", "function", "name", *ARGUMENTS})
PART_KEYS = frozenset({"type", "text"})
MESSAGE_KEYS = frozenset({*KEYS, *REASONING_KEYS, *FLAGS, *TOOLS})


def unknown_keys(turn: Any, number: int) -> list[tuple[str, str]]:
    """Return the keys of a turn, of its calls and of the parts of its content that this format does not know."""
    if not isinstance(turn, Mapping):
        return []
    found = [(key, f"message {number}") for key in extra(turn, MESSAGE_KEYS)]
    parts = turn.get("content")
    for call in raw_calls(turn, number):
        inner = call.get("function", {}) if isinstance(call, Mapping) else {}
        for keys in (call, inner):
            found += [(f"tool_calls.{key}", f"message {number}") for key in extra(keys, CALL_KEYS)]
    for part in parts if isinstance(parts, list) else ():
        found += [(f"content.{key}", f"message {number}") for key in extra(part, PART_KEYS)]
    return found


def is_plain(turn: Any) -> bool:
    """Return whether a turn is a known role and its words, as nearly all are: it needs nothing looked at."""
    return (
        isinstance(turn, Mapping)
        and len(turn) == 2
        and turn.get("role") in ROLES
        and isinstance(turn.get("content"), str)
    )


def extra(given: Any, known: Set[str]) -> list[str]:
    """Return the keys of a mapping that are not known and hold something."""
    odd = given.keys() - known if isinstance(given, Mapping) else ()
    return [key for key in given if given[key] not in (None, "", [], {}) and key in odd] if odd else []


def message(turn: Any, number: int) -> dict[str, Any]:
    """Return one turn, the `number`-th, as chat templates take it. Raises: ValueError that names it."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is {type(turn).__name__}, expected {{'role': ..., 'content': ...}}")
    # Columnar files hold every key in every message, null where it was not given.
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.get("from", turn.get("role"))
    out = {key: value for key, value in turn.items() if key not in ("role", "from", "value")}
    if "value" in turn:
        out["content"] = turn["value"]
        if turn.get("content", turn["value"]) != turn["value"]:
            raise ValueError(f"message {number} has both 'content' and 'value', and they differ")
    known = SHAREGPT_ROLES.get(str(role), role)
    if known not in ROLES:
        raise ValueError(
            f"message {number} has the unknown role {role!r}: expected {', '.join(ROLES)}, or ShareGPT's "
            f"{', '.join(SHAREGPT_ROLES)}"
        )
    calls = [call(c) for c in raw_calls(turn, number)]
    out.pop("tool_calls", None)
    out.pop("function_call", None)
    if role in CALLS:
        out["content"] = ""
    if calls and known != "assistant":
        raise ValueError(f"message {number} ({role}) has tool calls, which only an assistant turn may have")
    if calls:
        out["tool_calls"] = calls
    if "content" not in out and not calls:
        raise ValueError(f"message {number} ({role}) has no content; it has {', '.join(turn)}")
    content = out.setdefault("content", "")
    if isinstance(content, list):  # OpenAI's content parts
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"message {number} ({role}) has content that is not text")
        out["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has content of type {type(content).__name__}, expected text")
    return one_thought({"role": known, **out}, number)


def one_thought(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a message with its reasoning under one key. Raises: ValueError for two that differ, and for no text."""
    found = {key: message.pop(key) for key in REASONING_KEYS if key in message}
    thoughts = {key: thought_of(value, f"message {number}: {key}") for key, value in found.items() if value}
    if not thoughts:
        return message
    if message["role"] != "assistant":
        raise ValueError(f"message {number} ({message['role']}) has reasoning, which only an assistant turn may have")
    match = THOUGHT.match(message["content"]) if "</think>" in message["content"] else None
    written = {"content": match["thought"]} if match else {}
    if len({t.strip() for t in (*thoughts.values(), *written.values())}) > 1:
        raise ValueError(
            f"message {number} has reasoning in {' and in '.join({**thoughts, **written})}, and they differ"
        )
    content = message["content"][match.end() :] if match else message["content"]
    return {**message, "content": content, **dict([next(iter(thoughts.items()))])}


def thought_of(given: Any, name: str) -> str:
    """Return reasoning as text: given as that, or in parts. Raises: ValueError for anything else."""
    parts = given if isinstance(given, list) else [{"text": given}]
    texts = [p.get("text", p.get("thinking")) if isinstance(p, Mapping) else p for p in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise ValueError(f"{name} holds {type(given).__name__} ({str(given)[:40]}), expected text")
    return ("" if isinstance(parts[0], Mapping) else "\n").join(found)


def raw_calls(turn: Fields, number: int) -> list[Any]:
    """Return the calls of a turn as they are given: a list, one call, JSON of either, or the words of a call."""
    given = [turn.get("tool_calls"), turn.get("function_call")]
    if turn.get("from", turn.get("role")) in CALLS:
        given.append(turn.get("value", turn.get("content")))
    found: list[Any] = []
    for value in given:
        value = parsed(value, f"message {number}")
        found += value if isinstance(value, list) else [value] if value else []
    return found


def call(given: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's shape; its arguments are an object, because templates print them with `tojson`."""
    if not isinstance(given, Mapping) or not isinstance(given.get("function", given), Mapping):
        raise ValueError(f"a tool call is {given!r}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    function = dict(given.get("function", given))
    if "name" not in function:
        raise ValueError(f"a tool call names no function: {given!r}")
    given_as = {key: function.pop(key) for key in ARGUMENTS if key in function}
    if len(several := [key for key, value in given_as.items() if value]) > 1:
        raise ValueError(f"a call of {function['name']} has both {several[0]!r} and {several[1]!r}")
    arguments = parsed(next(filter(None, given_as.values()), None), f"arguments of {function['name']}") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments of {function['name']} are {arguments!r}, expected an object")
    function["arguments"] = arguments
    return {"type": "function", **({"id": given["id"]} if "id" in given else {}), "function": function}


def parsed(value: Any, name: str) -> Any:
    """Return a value, parsed if it is a JSON string; None for an empty one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is a string that is not JSON ({error})") from None
