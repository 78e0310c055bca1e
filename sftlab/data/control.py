"""Control tokens that stand in the data as text: to a tokenizer `<|im_end|>` in a question is one token, not letters.

`data.control_tokens` says what becomes of such a row: `count` trains on it and the report names it, `error` refuses it,
`escape` makes the text plain: each control token becomes a private character, and is tokenised letter by letter.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sftlab.data.format import Conversation, Text
from sftlab.data.template import special_texts

CONTROL_TOKENS = ("count", "error", "escape")
FIRST = 0x100000  # the second plane for private use; places.py uses the first


class Control:
    """The control tokens of one tokenizer, in the texts of rows."""

    def __init__(self, tokenizer: Any, mode: str = "count") -> None:
        self.mode = mode
        self.texts = sorted(special_texts(tokenizer), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self.openings = sorted({t[0] for t in self.texts})
        self.escaped = re.compile(f"[{chr(FIRST)}-{chr(FIRST + len(self.texts))}]")

    def find(self, text: str) -> str | None:
        """Return the first control token in a text."""
        if not any(opening in text for opening in self.openings):
            return None
        match = self.pattern.search(text)
        return match.group() if match else None

    def checked(self, source: Text | Conversation) -> tuple[Any, bool]:
        """Return the row as it is to be worded, and whether it holds control tokens. Raises: ValueError for `error`."""
        found = next(filter(None, map(self.find, given_texts(source))), None)
        if found is None:
            return source, False
        if self.mode == "error":
            raise ValueError(
                f"the text holds {found}, which is a control token of this tokenizer: take it out, or set "
                "data.control_tokens=escape to learn it as plain letters"
            )
        return (changed(source, self.escape) if self.mode == "escape" else source), True

    def escape(self, text: str) -> str:
        """Return a text with a private character for each control token."""
        if self.escaped.search(text):
            raise ValueError("the text holds private characters (U+100000 on), which data.control_tokens=escape needs")
        return self.pattern.sub(lambda m: chr(FIRST + self.texts.index(m.group())), text)

    def plain(self, character: str) -> str:
        """Return the control token that a private character stands for."""
        return self.texts[ord(character) - FIRST]


def given_texts(source: Text | Conversation) -> Iterator[str]:
    """Yield the texts of a row; the words of plain messages as one, because most rows hold nothing else."""
    if isinstance(source, Text):
        yield from (source.prompt, source.completion)
        return
    plain = [m["content"] for m in source.messages if len(m) == 2 and isinstance(m.get("content"), str)]
    yield "\n".join(plain)
    if len(plain) < len(source.messages) or source.tools:
        yield from strings([m for m in source.messages if len(m) != 2 or not isinstance(m.get("content"), str)])
        yield from strings(source.tools)


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a row with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Text):
        return replace(value, prompt=change(value.prompt), completion=change(value.completion))
    if isinstance(value, Conversation):
        return replace(value, messages=changed(value.messages, change), tools=changed(value.tools, change))
    if isinstance(value, Mapping):
        return {key: changed(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(changed(part, change) for part in value)
    return value
