"""Rendering: from text to tokens with the targets marked.

The prompt and the completion are tokenised together, as inference will see them joined, and the boundary is found on
the tokens of the joint text: a token that holds any character of the completion is supervised, so a merge across the
boundary masks nothing of the answer. One BOS where the tokenizer adds one; the end-of-text token is always supervised.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftlab.data.example import Example
from sftlab.data.format import Text


class Renderer:
    """Turn texts into examples with one tokenizer. Raises: ValueError if it has no end-of-text token or is not fast."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no end-of-text token: a model trained without one never "
                "stops. Set eos_token in its tokenizer_config.json, or name another with model.tokenizer="
            )
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json)")
        self.eos = int(tokenizer.eos_token_id)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()

    def examples(self, texts: Sequence[Text], wheres: Sequence[str]) -> list[Example]:
        """Return the examples of these texts; `wheres` name the rows that have no id of their own."""
        joint = self.backend.encode_batch([t.prompt + t.completion for t in texts])
        return [self._example(t, e, w) for t, e, w in zip(texts, joint, wheres, strict=True)]

    def _example(self, text: Text, encoding: Any, where: str) -> Example:
        ids = encoding.ids
        if ids and ids[-1] == self.eos and encoding.special_tokens_mask[-1]:
            ids = ids[:-1]  # the tokenizer adds one itself
        num_prompt = first_token(encoding, len(text.prompt), len(text.prompt) + len(text.completion), len(ids))
        tokens = np.array([*ids, self.eos], np.int32)
        supervised = np.zeros(len(tokens), bool)
        # Nothing predicts the first token, so it is never a target: an example without prompt or BOS begins unscored.
        supervised[max(1, num_prompt) :] = True
        return Example(
            tokens=tokens,
            supervised=supervised,
            id=str(text.id) if text.id is not None else where,
            group=text_hash(text.group if text.group is not None else where),
            num_prompt=num_prompt,
            references=text.references,
        )


def first_token(encoding: Any, start: int, stop: int, num_tokens: int) -> int:
    """Return the first token that holds a character of text[start:stop]; `num_tokens` if none does.

    Characters without a token are stepped over: byte-level tokenizers leave the space out of a word's offsets.
    """
    for character in range(start, stop):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return num_tokens


def text_hash(text: str) -> int:
    """Return a 63-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
