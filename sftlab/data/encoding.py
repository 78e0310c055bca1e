"""Encoding: the tokens of texts, and which characters each holds.

A tokenizer's own offsets cost a quarter of its time. A byte-level tokenizer (GPT-2's kind: Llama 3, Qwen, gpt-oss) does
not need them: each token's text says how many bytes it holds, so their sums say where it lies. Other tokenizers, and
texts whose bytes a tokenizer changed (a normaliser), are asked for their offsets.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

Tokens = NDArray[np.int32]


class Encoder:
    """Encode texts with one tokenizer, without special tokens around them."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.num_bytes = byte_lengths(backend)

    def encode(self, texts: Sequence[str]) -> list[tuple[Tokens, Any]]:
        """Return (tokens, encoding) of each text; the encoding has `char_to_token` and `token_to_chars`."""
        if self.num_bytes is None:
            return [self._asked(e) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]
        fast = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._summed(text, np.array(e.ids, np.int32)) for text, e in zip(texts, fast, strict=True)]

    def _summed(self, text: str, tokens: Tokens) -> tuple[Tokens, Any]:
        assert self.num_bytes is not None
        summed = Summed(text, np.cumsum(self.num_bytes[tokens]))
        if len(tokens) and summed.ends[-1] == summed.num_bytes:
            return tokens, summed
        return self._asked(self.backend.encode(text, add_special_tokens=False))

    def _asked(self, encoding: Any) -> tuple[Tokens, Any]:
        return np.array(encoding.ids, np.int32), encoding


class Summed:
    """Where the tokens of a text lie; `ends` are the bytes after which each ends, (n,)."""

    def __init__(self, text: str, ends: NDArray[np.int64]) -> None:
        self.text, self.ends, self.ascii = text, ends, text.isascii()

    @cached_property
    def content(self) -> bytes:
        """The text in UTF-8."""
        return self.text.encode()

    @property
    def num_bytes(self) -> int:
        """The bytes of the text."""
        return len(self.text) if self.ascii else len(self.content)

    def char_to_token(self, character: int) -> int:
        """Return the first token that holds a byte of a character."""
        byte = character if self.ascii else len(self.text[:character].encode())
        return int(np.searchsorted(self.ends, byte, side="right"))

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return (first, last + 1) of the characters that a token holds bytes of."""
        start, stop = int(self.ends[token - 1]) if token else 0, int(self.ends[token])
        if self.ascii:
            return start, stop
        split = stop < len(self.content) and self.content[stop] & 0xC0 == 0x80  # in the middle of a character
        before, through = (len(self.content[:at].decode(errors="ignore")) for at in (start, stop))
        return before, through + split


def byte_lengths(backend: Tokenizer) -> NDArray[np.int64] | None:
    """Return how many bytes of a text each token holds; None if the tokens of this tokenizer do not say."""
    config = json.loads(backend.to_str())
    before = config["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    added = config["added_tokens"]
    if not byte_level or any(step.get("add_prefix_space") for step in byte_level):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):  # these swallow the white space beside them
        return None
    own = {token["id"]: len(token["content"].encode()) for token in added}
    alphabet = set(ByteLevel.alphabet())
    lengths = np.full(max(backend.get_vocab().values()) + 1, -(2**40), np.int64)  # no text has tokens of these
    for text, token in backend.get_vocab().items():
        if token in own or alphabet.issuperset(text):
            lengths[token] = own.get(token, len(text))  # one letter of the alphabet is one byte
    return lengths
