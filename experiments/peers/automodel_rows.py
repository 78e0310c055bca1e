"""The rows of every other side as NeMo AutoModel takes them: labels shifted by one, and what pads each field."""

import json
from typing import Any

from sides import IGNORED, tokenised


def tokenised_rows(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Return every row of a file in SQuAD's schema."""
    pads = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            tokens, labels = tokenised(tokenizer, json.loads(line))
            row = {"input_ids": tokens[:-1], "labels": labels[1:], "attention_mask": [1] * (len(tokens) - 1)}
            found.append({**row, "___PAD_TOKEN_IDS___": pads})
    return found
