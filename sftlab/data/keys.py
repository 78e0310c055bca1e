"""Keys: which columns and keys the rows have, and which of them nobody reads. So nothing is left out in silence."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sftlab.data.format import Format, MissingColumn, Row, closest, settings

UNKNOWN = ("error", "count")


@dataclass
class Keys:
    """Counts of rows by column: those that have it, of these those whose format asked for it, and those without it.

    `unknown` counts the keys of messages that nobody reads.
    """

    there: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def count(self, row: Row, unknown: Iterable[str] = ()) -> None:
        """Count the columns of one row, once its format has asked for what it wants."""
        there = row.fields.keys()
        self.there.update(there)
        self.asked.update(there & row.asked)
        self.absent.update(row.asked - there)
        self.unknown.update(unknown)

    def add(self, text: str) -> None:
        """Add the counts that `to_json` wrote."""
        for name, counts in json.loads(text).items():
            getattr(self, name).update(counts)

    def to_json(self) -> str:
        """Return the counts as JSON."""
        return json.dumps(vars(self))

    @property
    def unread(self) -> dict[str, int]:
        """The columns that the format asked for in no row, and in how many rows they are."""
        return {name: count for name, count in sorted(self.there.items()) if name not in self.asked}

    def check(self, format: Format, where: str, key: str) -> None:
        """Raise ValueError for a setting that names a column which no row has, or which the format never asks for."""
        for column, setting in format.named().items():
            if self.absent[column] and column not in self.there:
                raise ValueError(
                    f"{key}.format.{setting}={column}: no row of {where} has this column; "
                    f"{did_you_mean(column, self.there)}they have {', '.join(map(repr, sorted(self.there)))}"
                )
        wanted = self.asked.keys() | self.absent.keys()
        columns = format.columns or {}
        for name, to in columns.items():
            if to is not None and to not in wanted:
                known = {n for n in wanted if n not in columns.values()}
                raise ValueError(
                    f"{key}.format.columns.{name}={to} has no effect: {did_you_mean(name, known)}this format asks for "
                    f"{', '.join(sorted(known)) or 'no other column'}"
                )


def advice(error: MissingColumn, format: Format, row: Row, key: str) -> str:
    """Return what to type where a column is missing: the setting that names it, with a column that nobody reads yet."""
    taken = {"id", *row.asked, *(str(getattr(format, f.name)) for f in settings(format))}
    free = [name for name in row.fields if name not in taken]
    guess = error.guess() or (free[0] if len(free) == 1 else "COLUMN")
    own = next((f.name for f in settings(format) if getattr(format, f.name) == error.column), None)
    renamed = next((name for name, column in (format.columns or {}).items() if column == error.column), error.column)
    setting = f"{own}={guess}" if own else f"columns={{{renamed}:{guess}}}"
    several = f" ({' or '.join(free)})" if guess == "COLUMN" and free else ""
    return f"say which column it is: {key}.format.{setting}{several}"


def refusal(unknown: Iterable[tuple[str, str]], format: Format, key: str) -> str:
    """Return what is wrong with a row whose messages have keys that nobody reads."""
    name, where = next(iter(unknown))
    known = format.message_keys
    return (
        f"{where} has the key {name!r}, which neither the format nor the chat template reads; "
        f"{did_you_mean(name, known)}a message has {', '.join(known)}. "
        f"{key}.unknown=count leaves such keys out, and counts them"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for the known name most like `name`, or nothing."""
    found = closest(name.rpartition(".")[2], known)
    return f"did you mean {found}? " if found else ""


def words_of(chat_template: str | Mapping[str, str] | None) -> set[str]:
    """Return the words in the code of a chat template: the keys that it may read are among them.

    A text in quotes counts if it is one word, as a key is. Llama's template writes `'"parameters": '`, and reads none.
    """
    texts = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template or ""]
    code = " ".join(block for text in texts for block in re.findall(r"\{[{%](.*?)[%}]\}", text, re.DOTALL))
    code = re.sub(
        r"'([^']*)'|\"([^\"]*)\"", lambda m: f" {w} " if re.fullmatch(r"\w+", w := m[1] or m[2] or "") else " ", code
    )
    return set(re.findall(r"\w+", code))


def unread_keys(text: Any, words: set[str]) -> list[tuple[str, str]]:
    """Return the keys of a conversation that its format does not know and that the template's words do not name."""
    return [(key, where) for key, where in getattr(text, "unknown", ()) if key.rpartition(".")[2] not in words]
