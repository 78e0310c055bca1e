"""Formats: what a row of a source means. A format turns a row into text and marks the part to learn.

A format is one file in `formats/` and one YAML, or your own class by `_target_`. It returns a `Text`, which it words
itself, or a `Conversation`, which the chat template words.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A prompt and the completion that is learned, joined unchanged; the renderer adds BOS and end-of-text.

    `group` is equal for examples that are worth computing together; `references` are the accepted answers.
    """

    prompt: str
    completion: str
    id: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them (`role`, `content`, perhaps `tool_calls`). The first is not the assistant's.

    `supervised` are the indices of the assistant messages that are learned, in order. Other fields are as in `Text`.
    """

    messages: tuple[Fields, ...]
    supervised: tuple[int, ...]
    tools: tuple[Fields, ...] | None = None
    id: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()


class Format(ABC):
    """Read rows of one kind. Subclasses are frozen dataclasses: their repr and `version` key the cache of tokens.

    A format that returns conversations sets `converses`, and may name a file with the chat template to use.
    """

    version: ClassVar[int] = 1
    converses: ClassVar[bool] = False
    template_path: str | None = None

    @abstractmethod
    def to_text(self, fields: Fields) -> Text | Conversation:
        """Return the text of a row. Raises: ValueError that says what is wrong with the row (the caller says where)."""

    def prompt_text(self, fields: Fields) -> str:
        """Return the prompt of a row as inference sees it. A format overrides this to need no answer.

        Raises: ValueError for a conversation, because the chat template words it.
        """
        text = self.to_text(fields)
        if isinstance(text, Conversation):
            raise ValueError("this format's rows are conversations, worded by the chat template: use chat=true")
        return text.prompt

    def score(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Return the scores of a generated answer, each from 0 to 1; by default, whether it is a reference."""
        return {"exact_match": float(answer.strip() in [r.strip() for r in references])}

    def rows(self, document: Any) -> list[Fields]:
        """Return the rows of a whole JSON document; by default it must be a list of them."""
        if isinstance(document, list):
            return document
        raise ValueError("expected a JSON list of rows, or one JSON object per line (.jsonl)")


def field(fields: Fields, name: str) -> Any:
    """Return a field. Raises: ValueError that names it and the fields that exist."""
    if name not in fields:
        raise ValueError(f"no field {name!r}; it has {', '.join(map(repr, fields)) or 'none'}")
    return fields[name]


def text_field(fields: Fields, name: str) -> str:
    """Return a field that must be text. Raises: ValueError that names the field and what it holds."""
    value = field(fields, name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, expected text")
    return value


def learned_field(fields: Fields, name: str) -> str:
    """Return a text field that is to be learned. Raises: ValueError also if it is blank."""
    value = text_field(fields, name)
    if not value.strip():
        raise ValueError(f"field {name!r} is empty: there is nothing to learn")
    return value


def id_field(fields: Fields) -> str | None:
    """Return the row's own id, or None if it has none."""
    value = fields.get("id")
    return None if value is None else str(value)
