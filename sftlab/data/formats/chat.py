"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`. The row shows which of the two it has.

Both are normalised to what chat templates take. The template words them (data/template.py).
"""

import json
from collections.abc import Mapping, Sequence
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
from sftlab.data.messages import FLAGS, KEYS, TOOLS, is_plain, message, parsed, unknown_keys
from sftlab.data.spelling import REASONING, REASONING_KEYS
from sftlab.data.turns import TURNS

COLUMNS = ("messages", "conversations", "conversation")
PAIR = ("prompt", "completion")
SYSTEMS = ("system", "system_prompt")
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
        given, asked = turns(fields)
        unknown: tuple[tuple[str, str], ...] = ()
        if all(map(is_plain, given)):
            messages = tuple(map(dict, given))
        else:
            messages = tuple(message(m, i) for i, m in enumerate(given, 1))
            unknown = tuple(found for i, m in enumerate(given, 1) for found in unknown_keys(m, i))
        offered = tools(fields, messages)
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
        learned = [i for i in spoken if weights[i] > 0 and i - shift >= asked]
        if self.supervise == "last":
            learned = [i for i in learned if i == spoken[-1]]
        for i in learned:
            if not messages[i].get("tool_calls") and not str(messages[i].get("content") or "").strip():
                raise ValueError(f"message {i + 1 - shift} is an empty assistant turn: there is nothing to learn")
        return Conversation(
            messages=messages,
            supervised=tuple(learned),
            tools=offered,
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


def turns(fields: Fields) -> tuple[list[Any], int]:
    """Return the list of turns of a row, OpenAI's or ShareGPT's, and how many of the first are not learned.

    TRL has two lists, a prompt and its completion, and only the completion is learned.
    """
    name = first_of(COLUMNS, fields)
    if name is None and isinstance(fields.get(PAIR[0]), list) and isinstance(fields.get(PAIR[1]), list):
        prompt, completion = (fields[column] for column in PAIR)
        if prompt and completion:
            return [*prompt, *completion], len(prompt)
    name = name or "messages"
    found = parsed(field(fields, name), name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"field {name!r} must be a list of messages, and not empty")
    return found, 0


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


def tools(fields: Fields, messages: Sequence[dict[str, Any]] = ()) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a row in OpenAI's shape: given as a list, as JSON, as a list of JSON texts; None for none.

    They may stand in a message, which loses them. Raises: ValueError if the row has two lists that differ.
    """
    places = {name: fields[name] for name in [first_of(TOOLS, fields)] if name}
    for i, m in enumerate(messages, 1):
        places |= {f"{name} of message {i}": m.pop(name) for name in TOOLS if name in m}
    lists = {name: found for name, value in places.items() if (found := parsed(value, name))}
    if not lists:
        return None
    name, found = next(iter(lists.items()))
    if other := next((n for n, value in lists.items() if value != found), None):
        raise ValueError(f"the row has two lists of tools that differ: {name!r} and {other!r}")
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
