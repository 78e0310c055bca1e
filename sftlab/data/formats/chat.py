"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`. The row shows which of the two it has.

Both are normalised to what chat templates take. The template words them (data/template.py).
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from dataclasses import field as field_of
from datetime import date
from typing import Any, ClassVar, Literal

from sftlab.data.format import (
    Columns,
    Conversation,
    Fields,
    Format,
    Row,
    checked_weight,
    field,
    id_field,
    reference_of,
    weight_field,
)
from sftlab.data.formats.tool_calls import said, tool_call_scores, without_thought
from sftlab.data.spelling import REASONING, REASONING_KEYS
from sftlab.data.turns import TURNS

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
COLUMNS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
FLAGS = ("weight", "train", "training", "loss", "mask")
KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "id")
CALL_KEYS = frozenset({"id", "type", "index", "function", "name", "arguments"})
PART_KEYS = frozenset({"type", "text"})
MESSAGE_KEYS = frozenset({*KEYS, *REASONING_KEYS, *FLAGS})
SUPERVISE = ("all", "last")


@dataclass(frozen=True)
class Chat(Format):
    """Learn every assistant turn (`supervise: all`) or the last one only (`last`).

    A turn's flags (`weight`, `train`, `loss`, `mask`) scale its loss or leave it out; a row's `weight` scales all of
    them. `template_path` is a file with the Jinja chat template to use instead of the tokenizer's; it is saved with the
    model. `template_kwargs` are values for the template's variables, such as enable_thinking; they are saved with it.
    `date` (YYYY-MM-DD) is what a template that writes the date takes for today; a run's config keeps its own.
    """

    converses: ClassVar[bool] = True
    message_keys: ClassVar[tuple[str, ...]] = (*KEYS, *REASONING_KEYS, *FLAGS)

    supervise: Literal["all", "last"] = "all"
    template_path: str | None = None
    turns: Literal["auto", "together", "apart"] = "auto"
    reasoning: Literal["learn", "context", "drop"] = "learn"
    date: str | None = field_of(default=None, repr=False)  # it is in the fingerprint where the template writes a date
    columns: Columns | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for key, known in (("supervise", SUPERVISE), ("turns", TURNS), ("reasoning", REASONING)):
            if getattr(self, key) not in known:
                raise ValueError(f"data.format.{key}={getattr(self, key)}: expected {' or '.join(known)}")
        if self.date is not None:
            object.__setattr__(self, "date", str(self.date))  # YAML reads 2026-01-31 as a date
            try:
                date.fromisoformat(str(self.date))
            except ValueError:
                raise ValueError(f"data.format.date={self.date}: expected YYYY-MM-DD") from None

    def to_text(self, fields: Fields) -> Conversation:
        """Return the conversation."""
        given = turns(fields)
        unknown: tuple[tuple[str, str], ...] = ()
        if all(map(is_plain, given)):
            messages = tuple(map(dict, given))
        else:
            messages = tuple(message(m, i) for i, m in enumerate(given, 1))
            unknown = tuple(found for i, m in enumerate(given, 1) for found in unknown_keys(m, i))
        messages = with_system(messages, fields)
        shift = len(messages) - len(given)
        spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not spoken:
            raise ValueError("the conversation has no assistant turn: there is nothing to learn")
        if messages[0]["role"] == "assistant":
            raise ValueError(
                "the conversation starts with the assistant: the first turn must be the user's or system's"
            )
        row = weight_field(fields)
        weights = {i: turn_weight(m, i + 1 - shift) * row for i, m in enumerate(messages)}
        learned = [i for i in spoken if weights[i] > 0]
        if self.supervise == "last":
            learned = [i for i in learned if i == spoken[-1]]
        for i in learned:
            if not messages[i].get("tool_calls") and not str(messages[i].get("content") or "").strip():
                raise ValueError(f"message {i + 1 - shift} is an empty assistant turn: there is nothing to learn")
        return Conversation(
            messages=messages,
            supervised=tuple(learned),
            tools=tools(fields),
            id=id_field(fields),
            group=json.dumps(messages[: spoken[0]]),  # forks of one conversation share their opening
            references=reference_of(messages[spoken[-1]]),
            weights=() if all(weights[i] == 1 for i in learned) else tuple(weights[i] for i in learned),
            unknown=unknown,
        )

    def score(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Return whether an answer is a reference, or how right its tool calls are where the reference is one."""
        calls = tool_call_scores(answer, references)
        if calls:
            return calls
        words = [without_thought(r) for r in references]
        return max((super(Chat, self).score(form, words) for form in said(answer)), key=lambda s: s["exact_match"])


def turn_weight(message: dict[str, Any], number: int) -> float:
    """Return the loss weight that a message's flags give it, and remove them. Raises: ValueError that names the flag.

    OpenAI has `weight`; others have `train`, `training` or `loss` (learn this), and `mask` (do not).
    """
    if len(message) == 2:  # a role and its words
        return 1.0
    weight, learn = 1.0, False
    for flag in FLAGS:
        value = message.pop(flag, None)
        if value is None:
            continue
        given = checked_weight(value, f"message {number}: {flag}")
        if flag == "mask":
            given = 1.0 - min(given, 1.0)
        else:
            learn = learn or given > 0
        weight *= given
    if learn and message["role"] != "assistant":
        raise ValueError(
            f"message {number} ({message['role']}) is flagged to be learned, but only assistant turns are: remove the "
            f"flag ({', '.join(FLAGS)})"
        )
    return weight


def turns(fields: Fields) -> list[Any]:
    """Return the list of turns of a row, OpenAI's or ShareGPT's."""
    name = first_of(COLUMNS, fields) or "messages"
    found = parsed(field(fields, name), name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"field {name!r} must be a list of messages, and not empty")
    return found


def first_of(names: Sequence[str], fields: Fields) -> str | None:
    """Return the first of these columns that a row has and that is not null; only the first name can be renamed."""
    renamed = isinstance(fields, Row) and fields.column(names[0]) != names[0]
    return next((name for name in names[: 1 if renamed else None] if fields.get(name) is not None), None)


def with_system(messages: tuple[dict[str, Any], ...], fields: Fields) -> tuple[dict[str, Any], ...]:
    """Return the messages with the system message of a column of its own before them.

    Raises: ValueError if the row has two that differ.
    """
    found = {messages[0]["content"]: "the first message"} if messages[0]["role"] == "system" else {}
    for name in SYSTEMS:
        text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"field {name!r} holds {type(text).__name__}, expected text")
        if text and text.strip():
            found.setdefault(text, f"field {name!r}")
    if len(found) > 1:
        raise ValueError(f"the row has two system messages that differ: {' and '.join(found.values())}")
    if not found or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": next(iter(found))}, *messages)


def tools(fields: Fields) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a row in OpenAI's shape: given as a list, as JSON, as a list of JSON texts; None for none."""
    name = first_of(TOOLS, fields)
    found = parsed(fields[name], name) if name else None
    if not found:
        return None
    if not isinstance(found, list):
        raise ValueError(f"field {name!r} holds {type(found).__name__}, expected a list of tools, or JSON of one")
    made = []
    for i, tool in enumerate(found, 1):
        tool = parsed(tool, f"tool {i}")
        if not isinstance(tool, Mapping) or not ("function" in tool or "name" in tool):
            raise ValueError(f"tool {i} is {tool!r}, expected {{'type': 'function', 'function': {{'name': ...}}}}")
        bare = {key: value for key, value in tool.items() if key != "type"}
        made.append(dict(tool) if "function" in tool else {"type": "function", "function": bare})
    return tuple(made)


def unknown_keys(turn: Any, number: int) -> list[tuple[str, str]]:
    """Return the keys of a turn, of its calls and of the parts of its content that this format does not know."""
    if not isinstance(turn, Mapping):
        return []
    found = [(key, f"message {number}") for key in extra(turn, MESSAGE_KEYS)]
    calls, parts = turn.get("tool_calls"), turn.get("content")
    for call in calls if isinstance(calls, list) else ():
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
    calls = [*calls_of(out.pop("tool_calls", None), number), *calls_of(out.pop("function_call", None), number)]
    if role in CALLS:
        calls += calls_of(out.get("content"), number)
        out["content"] = ""
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
    return {"role": known, **out}


def calls_of(given: Any, number: int) -> list[dict[str, Any]]:
    """Return the calls of a turn: of a list, of one call, of JSON of either; none for an empty value."""
    given = parsed(given, f"message {number}")
    return [call(c) for c in (given if isinstance(given, list) else [given])] if given else []


def call(given: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's shape; its arguments are an object, because templates print them with `tojson`."""
    if not isinstance(given, Mapping) or not isinstance(given.get("function", given), Mapping):
        raise ValueError(f"a tool call is {given!r}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    function = dict(given.get("function", given))
    if "name" not in function:
        raise ValueError(f"a tool call names no function: {given!r}")
    arguments = parsed(function.get("arguments"), f"arguments of {function['name']}") or {}
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
