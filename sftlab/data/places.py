"""Places: where the words of each message stand in a conversation's text.

The conversation is rendered once more with a private character on both sides of every message's words. If taking these
out gives the text itself, they say where the words are. A conversation of a known shape needs not even that: what
stands between the words is the same (Walk).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftlab.data.format import Fields
from sftlab.data.template import ChatTemplate, Span

FIRST, LAST = 0xF0000, 0xFFFFD  # a plane for private use: no tokenizer or template treats it specially
PRIVATE = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


def places(template: ChatTemplate, messages: Sequence[Fields], tools: Any, text: str) -> dict[int, Span]:
    """Return (start, stop) of the words of each message, without white space around them, where they can be told."""
    if len(messages) * 2 > LAST - FIRST or PRIVATE.search(text):
        return {}
    try:
        marked = template.text([{**m, "content": mark(m.get("content"), i)} for i, m in enumerate(messages)], tools)
    except ValueError:
        return {}
    found: dict[int, list[int]] = {}
    for count, match in enumerate(PRIVATE.finditer(marked)):
        found.setdefault(ord(match.group()) - FIRST, []).append(match.start() - count)
    if not PRIVATE.sub("", marked).startswith(text):
        return {}
    pairs = {i: (found.get(2 * i, []), found.get(2 * i + 1, [])) for i in range(len(messages))}
    return {i: (a[0], b[0]) for i, (a, b) in pairs.items() if len(a) == len(b) == 1}


def mark(words: Any, i: int) -> Any:
    """Return words with the two private characters of message i around them, inside the white space."""
    if not isinstance(words, str) or not words.strip():
        return words
    bare = words.strip()
    lead, _, trail = words.partition(bare)
    return f"{lead}{chr(FIRST + 2 * i)}{bare}{chr(FIRST + 2 * i + 1)}{trail}"


def flags(messages: Sequence[Fields], i: int) -> tuple[Any, ...]:
    """Return what a template may word turn i differently for: its own kind and its neighbours'."""
    return tuple(kind(messages[j]) if 0 <= j < len(messages) else None for j in (i - 1, i, i + 1))


def kind(message: Fields) -> tuple[Any, ...]:
    """Return what a message is made of."""
    content: Any = message.get("content")
    present = tuple(sorted(key for key, value in message.items() if value and key != "content"))
    words = isinstance(content, str) and bool(content.strip())
    return message["role"], present, words, words and "</think>" in content, len(message.get("tool_calls") or ())


@dataclass(frozen=True)
class Walk:
    """What stands between the words of plain conversations of one shape, and how their turns lie to the words.

    `between` has one text more than there are messages. `turns` holds (message, start after the words of the message
    before, stop after its own words) of each learned turn.
    """

    between: tuple[str, ...]
    turns: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(
        cls,
        text: str,
        messages: Sequence[Fields],
        where: Mapping[int, Span],
        supervised: Sequence[int],
        spans: Sequence[Sequence[Span]],
    ) -> "Walk | None":
        """Return the walk through a text; None if it cannot be told from this one."""
        if len(where) < len(messages) or any(m["content"] != m["content"].strip() for m in messages):
            return None
        cuts = [0, *(at for i in range(len(messages)) for at in where[i]), len(text)]
        if cuts != sorted(cuts) or supervised[0] == 0 or any(len(turn) > 1 for turn in spans):
            return None
        between = tuple(text[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True))
        turns = [(i, s[0][0] - where[i - 1][1], s[0][1] - where[i][1]) for i, s in zip(supervised, spans, strict=True)]
        return cls(between, tuple(turns))

    def spans(self, text: str, messages: Sequence[Fields]) -> list[list[Span]] | None:
        """Return the learned spans of another text of this shape; None if it is not worded like the first."""
        at, stops = 0, []
        for i, message in enumerate(messages):
            if not text.startswith(self.between[i], at):
                return None
            at += len(self.between[i])
            words = message["content"]
            follows = self.between[i + 1]
            if not (text.startswith(words, at) and text.startswith(follows, at + len(words))):
                forms = (words.strip(), words.lstrip(), words.rstrip())  # what a template may have trimmed
                words = next(
                    (f for f in forms if text.startswith(f, at) and text.startswith(follows, at + len(f))), None
                )
                if words is None:
                    return None
            at += len(words)
            stops.append(at)
        if at + len(self.between[-1]) != len(text):
            return None
        return [[(stops[i - 1] + a, stops[i] + b)] for i, a, b in self.turns]


class Offsets:
    """How far turns lie from the messages beside them, known from turns that were rendered by themselves."""

    def __init__(
        self, text: str, messages: Sequence[Fields], where: Mapping[int, Span], known: Mapping[int, Sequence[Span]]
    ) -> None:
        self.text, self.messages, self.where = text, messages, where
        self.before: dict[Any, set[str]] = {}
        self.behind: dict[Any, set[tuple[bool, str]]] = {}
        for i, spans in known.items():
            start, stop = spans[0][0], spans[-1][1]
            if i - 1 in where:
                self.before.setdefault(flags(messages, i), set()).add(text[where[i - 1][1] : start])
            if i in where:
                self.behind.setdefault(flags(messages, i), set()).add((True, text[where[i][1] : stop]))
            elif i + 1 in where:
                self.behind.setdefault(flags(messages, i), set()).add((False, text[stop : where[i + 1][0]]))

    def span(self, i: int) -> Span | None:
        """Return where turn i lies; None if its neighbours do not tell."""
        kind = flags(self.messages, i)
        before, behind = self.before.get(kind, ()), self.behind.get(kind, ())
        if len(before) != 1 or len(behind) != 1 or i - 1 not in self.where:
            return None
        (lead,), ((own, tail),) = before, behind
        begin = self.where[i - 1][1]
        if own:
            if i not in self.where:
                return None
            stop = self.where[i][1] + len(tail)
            known = self.text.startswith(tail, self.where[i][1])
        else:
            if i + 1 not in self.where:
                return None
            stop = self.where[i + 1][0] - len(tail)
            known = self.text.startswith(tail, stop)
        return (begin + len(lead), stop) if known and self.text.startswith(lead, begin) else None
