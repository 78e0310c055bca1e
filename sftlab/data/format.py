"""Formats: what a row of a source means. A format turns a row into text and marks the part to learn.

A format is one file in `formats/` and one YAML, or your own class by `_target_`. It returns a `Text`, which it words
itself, or a `Conversation`, which the chat template words.
"""

import dataclasses
import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

Fields = Mapping[str, Any]
Columns = Mapping[str, str | None]


class Row(Mapping[str, Any]):
    """The fields of a row by the names that a format asks for. `asked` are the columns that it asked for.

    `columns` says which column holds what the format knows by another name.
    """

    def __init__(self, fields: Fields, columns: Columns) -> None:
        self.fields, self.columns = fields, columns
        self.asked: set[str] = set()

    def column(self, name: str) -> str:
        """Return the column that holds what the format calls `name`."""
        return self.columns.get(name) or name

    def __getitem__(self, name: str) -> Any:
        column = self.column(name)
        self.asked.add(column)
        return self.fields[column]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` (Mapping's own is slow for a field that is not there)."""
        column = self.column(name)
        self.asked.add(column)
        return self.fields.get(column, default)

    def __contains__(self, name: object) -> bool:
        column = self.column(str(name))
        self.asked.add(column)
        return column in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


@dataclass(frozen=True)
class Text:
    """A prompt and the completion that is learned, joined unchanged; the renderer adds BOS and end-of-text.

    `group` is equal for examples that are worth computing together; `references` are the accepted answers; `weight`
    scales the loss of every token.
    """

    prompt: str
    completion: str
    id: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them (`role`, `content`, perhaps `tool_calls`). The first is not the assistant's.

    `supervised` are the indices of the assistant messages that are learned, in order; `weights` scales the loss of each
    (empty: all count once). `unknown` names the keys of messages that the format does not know: (key, where it
    stands). Other fields are as in `Text`.
    """

    messages: tuple[Fields, ...]
    supervised: tuple[int, ...]
    tools: tuple[Fields, ...] | None = None
    id: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def turn_weights(self) -> tuple[float, ...]:
        """The weight of each learned turn."""
        return self.weights or (1.0,) * len(self.supervised)


def reference_of(message: Fields) -> tuple[str, ...]:
    """Return the accepted answer of an assistant's turn: its words, or its tool calls as JSON; empty if it has none."""
    if message.get("tool_calls"):
        calls = [{k: c["function"][k] for k in ("name", "arguments")} for c in message["tool_calls"]]
        return (json.dumps({"tool_calls": calls}, ensure_ascii=False),)
    words = message.get("content")
    return (words.strip(),) if isinstance(words, str) and words.strip() else ()


class Format(ABC):
    """Read rows of one kind. Subclasses are frozen dataclasses: their repr and `version` key the cache of tokens.

    `columns` names the column of what the format knows by another name: {question: frage}. A format that returns
    conversations sets `converses` and the `message_keys` that it knows, may name a file with a chat template, and says
    how conversations are worded (turns.py, spelling.py).
    """

    version: ClassVar[int] = 1
    converses: ClassVar[bool] = False
    message_keys: ClassVar[tuple[str, ...]] = ()
    template_path: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    turns: str = "auto"
    reasoning: str = "learn"
    date: str | None = None
    columns: Columns | None = None

    def row(self, fields: Fields) -> Row:
        """Return a row by the names that this format asks for."""
        return Row(fields, self.columns or {})

    def named(self) -> dict[str, str]:
        """Return the columns that the settings name, other than by default: {column: the setting's key}."""
        renamed = (self.columns or {}).items()
        found = {column: f"columns.{name}" for name, column in renamed if column and column != name}
        texts = ((f, getattr(self, f.name)) for f in settings(self))
        return found | {value: f.name for f, value in texts if isinstance(value, str) and value != f.default}

    @abstractmethod
    def to_text(self, fields: Fields) -> Text | Conversation:
        """Return the text of a row. Raises: ValueError that says what is wrong with the row (the caller says where)."""

    def prompt_text(self, fields: Fields) -> str:
        """Return the prompt of a row as inference sees it. A format overrides this to need no answer.

        Raises: ValueError for a conversation, because the chat template words it.
        """
        text = None if self.converses else self.to_text(fields)
        if text is None or isinstance(text, Conversation):
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


def settings(format: Format) -> tuple[dataclasses.Field[Any], ...]:
    """Return the settings of a format, none if it is no dataclass."""
    return dataclasses.fields(format) if dataclasses.is_dataclass(format) else ()


class MissingColumn(ValueError):
    """A row lacks the column `column`. `there` are those that it has."""

    def __init__(self, column: str, there: Iterable[str]) -> None:
        self.column, self.there = column, list(there)
        super().__init__(f"no field {column!r}; it has {', '.join(map(repr, self.there)) or 'none'}")

    def guess(self) -> str | None:
        """Return the column that is most like the one that is missing."""
        return closest(self.column, self.there)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, if one is."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, 1, 0.6)
    return by_lower[found[0]] if found else None


def field(fields: Fields, name: str) -> Any:
    """Return a field. Raises: MissingColumn that names it and the fields that exist."""
    if name not in fields:
        raise MissingColumn(fields.column(name) if isinstance(fields, Row) else name, fields)
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


def weight_field(fields: Fields) -> float:
    """Return the row's own loss weight, 1 if it has none. Raises: ValueError unless it is a number of at least 0."""
    return checked_weight(fields.get("weight"), "field 'weight'")


def checked_weight(value: Any, name: str) -> float:
    """Return a loss weight; None is 1, and true and false are 1 and 0. Raises: ValueError that names it."""
    if value is None:
        return 1.0
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}: expected a number of at least 0, which scales the loss")
    return float(value)


def id_field(fields: Fields) -> str | None:
    """Return the row's own id, or None if it has none."""
    value = fields.get("id")
    return None if value is None else str(value)
