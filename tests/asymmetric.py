"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import numpy as np

from sftlab.data.example import Example

# {number of ranks: `parallel.replicate`s of it}: meshes of 1 x 4, 2 x 2, 4 x 1, 1 x 3 and 3 x 1. Only 2 x 2 is the same
# with its two dimensions swapped.
MESHES = {4: (1, 2, 4), 3: (1, 3)}


def for_ranks_that_get_unequal_shares() -> list[Example]:
    """Return seven examples with answers, whose ids run against their order: three ranks get 3, 2 and 2, or 4, 2 and 1.

    A mean of the ranks' means is wrong, and so is an order taken for that of the ids.
    """
    found = []
    for i in range(7):
        tokens = np.arange(10 + i, 10 + i + 5 + i, dtype=np.int32)
        supervised = np.arange(5 + i) >= 3 + i // 2
        found.append(Example(tokens, supervised, id=f"e{9 - i}", num_prompt=3 + i // 2, references=(f"answer {i}",)))
    return found
from pathlib import Path
from typing import Any

# Rows that cannot be used, at both sides of the first block's end and in the last, shorter block.
BAD_ROWS = (998, 1000, 1001, 2400)


def rows_over_every_block(num: int = 2500, bad: tuple[int, ...] = BAD_ROWS) -> list[dict[str, Any]]:
    """Return questions that fill two and a half blocks, each with its own number in it, so that none may be lost.

    Breaks: a row dropped where one block ends, a bad row that shifts those behind it, an id or reference of another.
    """
    rows: list[dict[str, Any]] = []
    for i in range(num):
        answers = [f"a{i}", f"b{i}", "c"][: 1 + i % 3]
        row = {"context": f"Passage {i // 7}.", "question": f"Which is {i}?", "answers": {"text": answers}}
        rows.append({**row, "id": f"own{i}" if i % 3 == 0 else None})
    for i in bad:
        rows[i]["answers"] = {"text": [" "]}
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
import math
from collections.abc import Mapping
from typing import Any

import torch

from tests.support import tiny_llama


def model_of_a_table(follows: Mapping[int, Mapping[int, float]], vocab: int, **config: Any) -> Any:
    """Return a Llama that draws its next token from `follows[last token]`, whatever stands before.

    Breaks a generation that does not pass its options on: what each of them changes can be worked out by hand.
    """
    sizes = {"hidden_size": vocab, "intermediate_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_llama(vocab=vocab, tied=False, layers=1, head_dim=2, **sizes, **config)
    logits = torch.full((vocab, vocab), -40.0)
    for last, chances in follows.items():
        for token, chance in chances.items():
            logits[token, last] = math.log(chance)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.copy_(logits * (1 / vocab + model.config.rms_norm_eps) ** 0.5)  # undoes the final norm
    return model
