"""GSM8K: grade-school maths, with a worked solution that ends in `#### answer`. That number is scored.

Source: Cobbe et al. 2021, https://arxiv.org/abs/2110.14168; the prompt is that of lm-evaluation-harness.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sftlab.data.format import Columns, Fields, Format, Text, id_field, learned_field

NUMBER = re.compile(r"####\s*\$?\s*(-?[\d.,]*\d)")


@dataclass(frozen=True)
class Gsm8k(Format):
    """The solution is learned unchanged, including its `<<48/2=24>>` calculator notes, as in the paper."""

    columns: Columns | None = None

    def to_text(self, fields: Fields) -> Text:
        """Return `Question: ... Answer:` and the solution."""
        question, answer = learned_field(fields, "question"), learned_field(fields, "answer")
        if number(answer) is None:
            raise ValueError(f"field 'answer' has no number after '####': it ends {answer[-40:]!r}")
        return Text(
            prompt=f"Question: {question}\nAnswer:",
            completion=f" {answer}",
            id=id_field(fields),
            group=question,
            references=(answer,),
        )

    def score(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Return whether the number after #### equals a reference's; an answer without one is wrong."""
        given = number(answer)
        return {"exact_match": float(given is not None and given in [number(r) for r in references])}


def number(answer: str) -> str | None:
    """Return the number after the first `####`, without thousands separators and trailing decimal zeros, or None."""
    match = NUMBER.search(answer)
    if match is None:
        return None
    digits = match.group(1).replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
