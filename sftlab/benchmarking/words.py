"""Nonsense texts of a given number of tokens, whatever the tokenizer."""

from typing import Any

import numpy as np

NUM_WORDS = 1024
CONSONANTS, VOWELS = list("bdfgklmnprstvz"), list("aeiou")


class Words:
    """Words of one to four syllables with their lengths in tokens. The same seed and tokenizer give the same texts."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        syllables = self.rng.choice(CONSONANTS, (NUM_WORDS, 4)), self.rng.choice(VOWELS, (NUM_WORDS, 4))
        counts = self.rng.integers(1, 5, NUM_WORDS)
        spelled = [["".join(pair) for pair in zip(*row, strict=True)] for row in zip(*syllables, strict=True)]
        self.words = np.array(["".join(s[:n]) for s, n in zip(spelled, counts, strict=True)])
        twice = tokenizer([f"{w} {w}" for w in self.words], add_special_tokens=False)["input_ids"]
        once = tokenizer(list(self.words), add_special_tokens=False)["input_ids"]
        # What a word adds to a text, its space included.
        self.tokens = np.array([max(1, len(b) - len(a)) for a, b in zip(once, twice, strict=True)])

    def text(self, num_tokens: int) -> str:
        """Return a text of `num_tokens` tokens, half a word more or less; at least one word."""
        chosen = self.rng.integers(0, NUM_WORDS, 2 + num_tokens)
        nearest = np.abs(np.cumsum(self.tokens[chosen]) - num_tokens).argmin()
        return " ".join(self.words[chosen[: nearest + 1]])

    def lengths(self, mean: float, sigma: float, scale: float) -> int:
        """Return a length in tokens from a log-normal distribution with this mean; `sigma` is that of the logarithm.

        No length is over four times the mean, so that rows and positions need not hold a rare giant.
        """
        drawn = self.rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)
        return max(1, int(scale * min(drawn, 4 * mean)))
