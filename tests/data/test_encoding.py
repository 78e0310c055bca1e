"""Encoding: tokens and their characters without the tokenizer's own offsets are those with them."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from sftlab.data.encoding import Encoder, Summed, byte_lengths
from tests.kinds import tokenizer

TEXTS = [
    "",
    "plain words",
    "naïve café — 漢字 🙂🙂 end",
    "<|im_start|>user\nhä?<|im_end|>\n",
    " \n\t two  spaces ",
    "ﬁ é e\u0301",
]


def backend(kind: str) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer(kind).backend_tokenizer.to_str())
    made.post_processor = None  # it leaves a word's space out of the offsets
    return made


@pytest.mark.parametrize("kind", ["llama3", "qwen", "gpt2", "sentencepiece"])
def test_every_character_lies_in_the_token_that_the_tokenizer_says(kind: str) -> None:
    made = backend(kind)
    rng = np.random.default_rng(0)
    letters = [*"aé漢🙂 \n.e\u0301", "<|im_end|>"]
    texts = [*TEXTS, *("".join(rng.choice(letters, 30)) for _ in range(40))]
    found = Encoder(made).encode(texts)
    for text, (tokens, encoding) in zip(texts, found, strict=True):
        real: Any = made.encode(text, add_special_tokens=False)
        assert tokens.tolist() == real.ids
        assert [encoding.char_to_token(c) for c in range(len(text))] == [
            real.char_to_token(c) for c in range(len(text))
        ]
        assert [encoding.token_to_chars(t) for t in range(len(tokens))] == [
            real.token_to_chars(t) for t in range(len(tokens))
        ]
    assert any(isinstance(e, Summed) for _, e in found) == (kind != "sentencepiece")


def test_a_text_that_a_normaliser_changed_is_asked_for_its_offsets() -> None:
    made = backend("qwen")
    made.normalizer = normalizers.NFC()
    (_, whole), (tokens, changed) = Encoder(made).encode(["café", "cafe\u0301"])
    assert isinstance(whole, Summed) and not isinstance(changed, Summed)
    assert changed.char_to_token(3) == 3 and len(tokens) == 5


def test_tokens_that_swallow_white_space_or_add_it_are_asked_for_their_offsets() -> None:
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel

    made = backend("qwen")
    assert byte_lengths(made) is not None
    made.add_special_tokens([AddedToken("<s>", rstrip=True)])
    assert byte_lengths(made) is None
    spaced = backend("qwen")
    spaced.pre_tokenizer = ByteLevel(add_prefix_space=True)
    assert byte_lengths(spaced) is None
