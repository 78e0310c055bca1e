"""Rendering: turns a row's text or conversation into tokens with the targets marked, by one mechanism for both.

Every row becomes one text and the spans of its characters that are learned. The text is tokenised whole, because
inference sees it joined. A token that holds any character of a span is supervised, so a merge across a boundary masks
nothing of the answer. Each example has one BOS, and the end of its text is supervised.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sftlab.data.example import Example
from sftlab.data.format import Conversation, Text
from sftlab.data.template import ChatTemplate, Span, leading_special


@dataclass(frozen=True)
class Rendered:
    """A text and its learned spans. `begin` adds the tokenizer's BOS to it, `end` its end-of-text token."""

    source: Text | Conversation
    text: str
    spans: Sequence[Span]
    begin: bool
    end: bool


class Renderer:
    """Turn rows into examples with one tokenizer. Raises: ValueError if it has no end-of-text token or is not fast."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no end-of-text token: a model trained without one never "
                "stops. Set eos_token in its tokenizer_config.json, or name another with model.tokenizer="
            )
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json)")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.begin = leading_special(tokenizer)
        # The post-processor adds special tokens, which we add ourselves. In byte-level tokenizers it also leaves the
        # space out of a word's offsets, which then do not say where the token begins.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None
        self.backend.no_padding()
        self.backend.no_truncation()
        self._template: ChatTemplate | None = None

    def render(self, source: Text | Conversation) -> Rendered:
        """Return the text of one row. Raises: ValueError if a template fails on it."""
        if isinstance(source, Text):
            text = source.prompt + source.completion
            return Rendered(source, text, [(len(source.prompt), len(text))], begin=True, end=True)
        self._template = self._template or ChatTemplate(self.tokenizer)
        text, spans, end = self._template.render(source)
        return Rendered(source, text, spans, begin=False, end=end)  # the template has the BOS (prepare_tokenizer)

    def examples(self, rendered: Sequence[Rendered], wheres: Sequence[str]) -> list[Example]:
        """Return the examples of these texts; a row without an id is named by its entry in `wheres`."""
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        return [self._example(r, e, w) for r, e, w in zip(rendered, encodings, wheres, strict=True)]

    def _example(self, rendered: Rendered, encoding: Any, where: str) -> Example:
        begin = self.begin if rendered.begin else []
        ids = encoding.ids
        tokens = np.array([*begin, *ids, *([self.eos] if rendered.end else [])], np.int32)
        supervised = np.zeros(len(tokens), bool)
        first = len(ids)
        for start, stop in rendered.spans:
            first, last = tokens_of(encoding, start, stop, len(rendered.text), len(ids))
            supervised[len(begin) + first : len(begin) + last] = True
        if rendered.end and rendered.spans:
            supervised[-1] = True
        supervised[:1] = False  # nothing predicts the first token
        source = rendered.source
        return Example(
            tokens=tokens,
            supervised=supervised,
            id=str(source.id) if source.id is not None else where,
            group=text_hash(source.group if source.group is not None else where),
            num_prompt=len(begin) + first,
            references=source.references,
        )


def tokens_of(encoding: Any, start: int, stop: int, num_chars: int, num_tokens: int) -> tuple[int, int]:
    """Return (first, last + 1) of the tokens that hold a character of text[start:stop], including merges across it."""
    first = first_token(encoding, start, stop, num_tokens)
    last = first_token(encoding, stop, num_chars, num_tokens)
    if last < num_tokens and encoding.token_to_chars(last)[0] < stop:
        last += 1
    return (min(first, last), last) if first == num_tokens else (first, max(first, last))


def first_token(encoding: Any, start: int, stop: int, num_tokens: int) -> int:
    """Return the first token that holds a character of text[start:stop]; `num_tokens` if none does.

    Characters without a token are skipped, because a normaliser may have dropped them.
    """
    for character in range(start, stop):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return num_tokens


def text_hash(text: str) -> int:
    """Return a 63-bit hash of a text, the same in every process."""
    return bytes_hash(text.encode(errors="surrogatepass"))


def bytes_hash(content: bytes) -> int:
    """Return a 63-bit hash of bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
