"""tokens.html: examples token by token, with the probability of every target before and after training, in colour.

The page needs no network and no script. What comes from data or a tokenizer is escaped. token_page.html has its style.
Source: the idea is levanter's, which draws such a page in its runs.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftlab.common.files import write_whole
from sftlab.common.secrets import strike
from sftlab.common.words import plain
from sftlab.data.example import Example
from sftlab.models.scorer import Scorer
from sftlab.scoring.example_lines import target_scores

MOST_EXAMPLES = 50
MOST_CONTEXT = 500  # characters of text between targets; of a longer one the middle is left out
TEMPLATE = Path(__file__).with_suffix(".html")


class TokenPage:
    """A page on some examples. It is measured `before` and `after`, and then written."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.examples = examples
        self.batch_size = batch_size
        self.nll: dict[str, list[NDArray[np.float64]]] = {}

    def measure(self, when: str, scorer: Scorer) -> None:
        """Take the nll of every target, `before` or `after` training, from a model."""
        found = [np.zeros(0) for _ in self.examples]
        for indices, nll, _ in target_scores(scorer, self.examples, self.batch_size):
            for i in np.unique(indices):
                found[i] = nll[indices == i]
        self.nll[when] = found

    def write(self, path: Path, title: str, total: int) -> Path:
        """Write the page on these of `total` examples; return its path."""
        before, after = (np.concatenate([*self.nll[when], np.zeros(0)]) for when in ("before", "after"))
        about = f"{len(self.examples):,} of {total:,} examples, {len(after):,} targets"
        parts = {
            "TITLE": shown(title),
            "ABOUT": about,
            "BEFORE": mean(before),
            "AFTER": mean(after),
            "BETTER": f"{(after < before).mean() if len(after) else 0:.0%}",
            "EXAMPLES": "\n".join(map(self._example, range(len(self.examples)))),
        }
        text = TEMPLATE.read_text(encoding="utf-8")
        head, *fields = text.split("<!--")  # one pass: a text that looks like a field of the page is no field
        for field in fields:
            name, _, rest = field.partition("-->")
            head += parts[name] + rest
        write_whole(path, strike(head))
        return path

    def _example(self, i: int) -> str:
        e, before, after = self.examples[i], self.nll["before"][i], self.nll["after"][i]
        texts = token_texts(self.tokenizer, e.tokens.tolist())
        out, context, target = [], "", 0
        for text, learned in zip(texts, e.supervised.tolist(), strict=True):
            if not learned:
                context += text
                continue
            out += [surroundings(context), token(text, float(before[target]), float(after[target]))]
            context, target = "", target + 1
        out.append(surroundings(context))
        return (
            f"<article><h2>{shown(e.id)} <span>{len(after)} targets, {mean(before)} before, {mean(after)} after</span>"
            f"</h2><p>{''.join(out)}</p></article>"
        )


def token(text: str, before: float, after: float) -> str:
    """Return one target as HTML: its text, its probabilities for the style, and the numbers to hover over."""
    p, q = np.exp(-before), np.exp(-after)
    said = f"before {p:.4f} ({-before:.3f} nats), after {q:.4f} ({-after:.3f} nats)"
    change = "up" if q > p else "down"
    return (
        f'<b class="{change}" style="--before:{p:.3f};--after:{q:.3f};--change:{abs(q - p):.3f}" title="{said}" '
        f'tabindex="0">{shown(text) or "&middot;"}</b>'
    )


def surroundings(text: str) -> str:
    """Return text without targets as HTML, shortened in the middle."""
    if len(text) > MOST_CONTEXT:
        half = MOST_CONTEXT // 2
        return f"{shown(text[:half])}<i> ... {len(text) - 2 * half:,} characters ... </i>{shown(text[-half:])}"
    return shown(text)


def shown(text: str) -> str:
    """Return text for HTML: escaped, control characters written out, a line break seen as one and made."""
    return "<i>&#8629;</i>\n".join(escape(plain(line)) for line in text.split("\n"))


def mean(nll: NDArray[np.float64]) -> str:
    """Return the mean log-probability of some targets in words."""
    return f"{-nll.mean():.3f} nats" if len(nll) else "no target"


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return each token's part of the text. A character of several tokens is the last one's; the others' are empty.

    A token is decoded after the one before it, because some tokenizers drop the space of the first.
    """

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts, begin, done = [], 0, 0
    for i in range(len(tokens)):
        earlier, now = decode(tokens[begin:done]), decode(tokens[begin : i + 1])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(tokens):
            texts.append("")
            continue
        texts.append(now[len(earlier) :])
        begin, done = done, i + 1
    return texts
