"""SQuAD: a passage, a question about it, and an answer taken from the passage.

It reads the hub's schema (`answers.text` is a list) and SQuAD's own nested JSON, v1.1 and v2. The text is that of NeMo
AutoModel's guide without its trailing space. On tokenizers without a BOS, that space would merge into the answer's
first word and mask it.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftlab.data.format import Columns, Fields, Format, Text, field, id_field, text_field


@dataclass(frozen=True)
class Squad(Format):
    """Questions about passages. The first answer is learned, and all answers are accepted.

    A v2 question that its passage does not answer has an empty list of answers; then `unanswerable` is learned.
    """

    unanswerable: str = "unanswerable"
    columns: Columns | None = None

    def to_text(self, fields: Fields) -> Text:
        """Return `Context: ... Question: ... Answer:` and the first answer."""
        prompt = self.prompt_text(fields)
        answers = field(fields, "answers")
        texts = answers.get("text") if isinstance(answers, Mapping) else None
        if not isinstance(texts, list):
            raise ValueError("field 'answers' must hold {'text': [answers...]}, as rajpurkar/squad on the hub does")
        texts = texts or [self.unanswerable]
        if not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"an answer is empty: answers.text is {texts!r}")
        return Text(
            prompt=prompt,
            completion=f" {texts[0]}",
            id=id_field(fields),
            group=fields["context"],
            references=tuple(texts),
        )

    def prompt_text(self, fields: Fields) -> str:
        """Return `Context: ... Question: ... Answer:`."""
        return f"Context: {text_field(fields, 'context')} Question: {text_field(fields, 'question')} Answer:"

    def score(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Return exact match and F1 against the best of the references, from 0 to 1, as the official script does."""
        return {
            "exact_match": max(float(normalised(answer) == normalised(r)) for r in references),
            "f1": max(f1(answer, r) for r in references),
        }

    def rows(self, document: Any) -> list[Fields]:
        """Return the rows of SQuAD's nested JSON: data -> paragraphs -> qas -> answers."""
        if isinstance(document, list):
            return document
        if not isinstance(document, Mapping) or "data" not in document:
            raise ValueError("this is not SQuAD: expected {'data': [{'paragraphs': [{'context', 'qas': [...]}]}]}")
        rows: list[Fields] = []
        for article in document["data"]:
            for paragraph in field(article, "paragraphs"):
                context = field(paragraph, "context")
                for qa in field(paragraph, "qas"):
                    # An unanswerable v2 question keeps "plausible" answers in another field, and none here.
                    texts = [field(answer, "text") for answer in qa.get("answers") or []]
                    rows.append({**qa, "context": context, "answers": {"text": texts}})
        return rows


def normalised(text: str) -> str:
    """Return text in lower case without punctuation, articles and double spaces.

    Source: SQuAD's evaluate-v1.1.py, https://worksheets.codalab.org/rest/bundles/0xbcd57bee090b421c982906709c8c27e1/.
    """
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of word precision and recall, after normalisation."""
    ours, theirs = normalised(answer).split(), normalised(reference).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)
