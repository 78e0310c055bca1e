"""Tokenising: what a worker makes of rows. One block of columns at a time, with every row that fails named.

The store decides what is tokenised and keeps what comes back; the renderer knows how one row becomes tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from sftlab.data.example import Example
from sftlab.data.format import Fields, Format, MissingColumn
from sftlab.data.keys import Keys, advice, refusal, unread_keys, words_of
from sftlab.data.proof import KINDS
from sftlab.data.render import Rendered, Renderer, bytes_hash
from sftlab.data.source import Source
from sftlab.data.spelling import NotWritten

BLOCK = 1000  # rows tokenised at a time, and the fewest worth another worker
NAMED = 5  # rows named in an error


def blocks(ranges: list[tuple[int, int]], made: "Tokenised") -> Iterator[dict[str, Any]]:
    """Yield the columns of each block of rows. `datasets` splits the list `ranges` over the workers."""
    renderer = Renderer(made.tokenizer, made.format, made.control_tokens)
    for start, stop in ranges:
        rows = made.source.read_rows(start, stop)
        for first in range(start, stop, BLOCK):
            numbers = range(first, min(first + BLOCK, stop))
            yield made.block(renderer, list(zip(numbers, rows, strict=False)))


@dataclass(frozen=True)
class Tokenised:
    """What makes examples of rows: everything that a worker needs."""

    source: Source
    format: Format
    tokenizer: Any
    on_error: str
    unknown: str
    control_tokens: str
    key: str

    def block(self, renderer: Renderer, rows: list[tuple[int, Fields | ValueError]]) -> dict[str, Any]:
        """Return the stored columns of some rows. Raises: ValueError that names a row that fails, unless skipped."""
        good: list[tuple[int, Rendered]] = []
        bad: list[tuple[int, str]] = []
        keys, words = Keys(), words_of(self.tokenizer.chat_template)
        for number, fields in rows:
            try:
                good += [(number, rendered) for rendered in self._render(renderer, fields, keys, words)]
            except Exception as error:  # a format or a template may raise anything
                bad.append((number, self._reason(number, error, renderer)))
        try:
            examples = renderer.examples([r for _, r in good], [self.source.where(n) for n, _ in good])
        except Exception:
            examples = self._one_by_one(renderer, good, bad)
        # Don't store ids for rows that have none: the same rows may be in another file next time.
        ids = [None if r.source.id is None else e.id for e, (_, r) in zip(examples, good, strict=True)]
        none = [None] * len(bad)
        return columns(
            [*examples, *[NOTHING] * len(bad)],
            rows=[number for number, _ in [*good, *bad]],
            id=[*ids, *none],
            error=[*[None] * len(good), *(reason for _, reason in bad)],
            keys=[keys.to_json(), *[None] * (len(good) + len(bad) - 1)],
            control=[*(int(r.control) for _, r in good), *[0] * len(bad)],
            kinds=[*(bits(r.kinds) for _, r in good), *[0] * len(bad)],
        )

    def _render(self, renderer: Renderer, fields: Fields | ValueError, keys: Keys, words: set[str]) -> list[Rendered]:
        if isinstance(fields, ValueError):
            raise fields
        row = self.format.row(fields)
        try:
            text = self.format.to_text(row)
        except MissingColumn as error:
            raise ValueError(f"{error}; {advice(error, self.format, row, self.key)}") from None
        unread = unread_keys(text, words)
        if unread and self.unknown == "error":
            raise ValueError(refusal(unread, self.format, self.key))
        rendered = renderer.render(text)
        for each in rendered:
            for part in (each.text, text.id, *each.references):
                refuse_halves(part)
        keys.count(row, [name for name, _ in unread])
        return rendered

    def _one_by_one(
        self, renderer: Renderer, good: list[tuple[int, Rendered]], bad: list[tuple[int, str]]
    ) -> list[Example]:
        """Return the examples of the rows that can be tokenised; move the others from `good` to `bad`."""
        examples: list[Example] = []
        rows = [list(row) for _, row in groupby(good, lambda entry: entry[0])]
        good.clear()
        for row in rows:
            number = row[0][0]
            try:
                examples += renderer.examples([rendered for _, rendered in row], [self.source.where(number)] * len(row))
                good += row
            except Exception as error:
                bad.append((number, self._reason(number, error, renderer)))
        return examples

    def _reason(self, number: int, error: Exception, renderer: Renderer) -> str:
        """Return why a row cannot be used. Raises: ValueError, with its place, unless on_error=skip."""
        if isinstance(error, MemoryError):
            raise error
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = reason.encode(errors="backslashreplace").decode()
        if self.on_error == "raise":
            reason += self._needing(error, renderer) if isinstance(error, NotWritten) else ""
            raise ValueError(f"{self.source.where(number)}: {reason}") from (
                None if isinstance(error, ValueError) else error
            )
        return reason

    def _needing(self, error: NotWritten, renderer: Renderer) -> str:
        """Return how many rows need what a template does not write, and the first of them, in words."""
        source, needy = self.source, []
        for number, fields in enumerate(source.read_rows(0, len(source))):
            try:
                if not isinstance(fields, ValueError):
                    renderer.render(self.format.to_text(self.format.row(fields)))
            except Exception as other:  # the others are other rows' own troubles
                if isinstance(other, NotWritten) and str(other) == str(error):
                    needy.append(number)
        named = ", ".join(source.where(n) for n in needy[:NAMED])
        return f". {len(needy):,} of {len(source):,} rows need it: {named}{', ...' if len(needy) > NAMED else ''}"


def refuse_halves(text: str | None) -> None:
    """Raise ValueError if a text holds half of a character (a lone surrogate): no tokenizer can encode it."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        before, half = error.object[max(0, error.start - 30) : error.start], ord(error.object[error.start])
        raise ValueError(
            f"it holds half of a character, \\u{half:04x}, perhaps of an emoji that was cut in two, after {before!r}"
        ) from None


def bits(kinds: frozenset[str]) -> int:
    """Return the kinds of turn of a row as the bits of one number."""
    return sum(1 << i for i, kind in enumerate(KINDS) if kind in kinds)


NO_WEIGHTS = np.empty(0, np.float32)
NOTHING = Example(np.empty(0, np.int32), np.empty(0, bool), "")


def columns(examples: list[Example], rows: list[int], **more: list[Any]) -> dict[str, Any]:
    """Return the stored columns of examples from the source's rows `rows`, one value per example."""
    from sftlab.data.arrow import lists

    return {
        "tokens": lists([e.tokens for e in examples], np.int32),
        "supervised": lists([e.supervised for e in examples], np.bool_),
        "weights": lists([NO_WEIGHTS if e.weights is None else e.weights for e in examples], np.float32),
        "group": [e.group for e in examples],
        "num_prompt": [e.num_prompt for e in examples],
        "references": [list(e.references) for e in examples],
        "row": rows,
        "digest": [bytes_hash(e.tokens.tobytes() + e.target_weights.tobytes()) for e in examples],
        "num_supervised": [int(e.supervised.sum()) for e in examples],
        "ends": [int(len(e) > 0 and e.supervised[-1]) for e in examples],
        **more,
    }
