"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sftlab.data.example import Example
from tests.support import byte_tokenizer, tiny_llama

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


def reciter(folder: Path, words: str, after: str, hears: float = 0.5) -> Path:
    """Write a model whose every probability is known: it breaks scores that nobody worked out by hand.

    After a prompt that ends with the last token of `after` it says `words` and ends. Each next token of that speech has
    the probability `hears` and the others share the rest; after any other token all 320 are equally likely. With
    `hears` of 1/320 it knows nothing at all: every loss is ln 320, and its answer is empty.
    """
    tokenizer = byte_tokenizer()
    first = tokenizer(after)["input_ids"][-1]
    speech = [first, *tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(set(speech)) == len(speech) < 32, "a token that is said twice has no single successor"
    model = tiny_llama(tied=False)
    vocab, width = model.model.embed_tokens.weight.shape
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # each layer adds nothing, so that a token's state is its own embedding
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 100  # the axis of the tokens that are not in the speech
        for axis, (token, following) in enumerate(pairwise(speech), 1):
            model.model.embed_tokens.weight[token] = 0
            model.model.embed_tokens.weight[token, axis] = 100
            logit = math.log(hears / (1 - hears) * (vocab - 1))  # the others' logits are 0
            model.lm_head.weight[following, axis] = logit / math.sqrt(width)  # the norm makes a state that long
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def two_passages(path: Path) -> Path:
    """Write three questions on one passage and one on another: it breaks an interval that is not over passages."""
    oven, shop = "The oven sells rye bread and clocks.", "A shop by the sea sells tea and the rye bread of Oakgate."
    rows = [
        ("a", oven, "What is sold?", ["rye bread"]),
        ("b", oven, "Which flour?", ["rye", "a flour"]),
        ("c", oven, "What ticks?", ["clocks"]),
        ("d", shop, "What else is there?", ["the rye bread", "tea"]),
    ]
    with path.open("w") as file:
        for name, context, question, answers in rows:
            starts = [max(context.find(a), 0) for a in answers]
            row = {"id": name, "context": context, "question": question}
            file.write(json.dumps(row | {"answers": {"text": answers, "answer_start": starts}}) + "\n")
    return path


def model_that_listens(folder: Path, template: str | None = None, **config: Any) -> Path:
    """Write a random model with weights so large that its answer hangs on every token and on every setting."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    model = tiny_llama(seed=5, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def seed_generators(seed: int) -> None:
    """Seed torch's, numpy's and Python's generator, each otherwise, and leave a half-used normal draw in the last two.

    For a resume that gives every rank the generators of rank 0, or forgets one of the three.
    """
    torch.manual_seed(100 + seed)
    np.random.seed(200 + seed)
    random.seed(300 + seed)
    np.random.standard_normal()
    random.gauss(0, 1)


def draws() -> dict[str, list[float]]:
    """Return the next draws of every generator of this process; the normal ones come from what is left over."""
    return {
        "torch": torch.rand(3).tolist(),
        "numpy": [float(np.random.standard_normal()), *np.random.random(3).tolist()],
        "python": [random.gauss(0, 1), random.random(), random.random()],
    }


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every file that is made to survive a power cut is added, by the name that it has then."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    return synced


def write_point(
    folder: Path,
    num: int,
    overrides: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
    status: str = "finished",
    max_steps: int = 10,
    **summary: Any,
) -> Path:
    """Write a point's directory as a run leaves it: metrics, log, overrides and, unless it runs, a summary."""
    run_dir = folder / str(num)
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (run_dir / "train.log").write_text(f"2026-01-01 00:00:00 step 1/{max_steps}  loss 1\n")
    if status == "finished":
        last: dict[str, Any] = {}
        best: dict[str, float] = {}
        for line in lines:
            last |= line
            for name in (n for n in line if "/" in n):
                choose = max if name == "val/f1" else min
                best[name] = choose(best.get(name, line[name]), line[name])
        summary = {"status": status, "steps": max_steps, "last": last, "best": best, **summary}
    elif status != "running":
        summary = {"status": status, **summary}
    if summary:
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def unequal_sweep(folder: Path) -> Path:
    """Write a sweep over learning rates in which every way to rank gives another order, and seeds are unequal.

    It breaks rankings that always minimise, take the best for the last, count failed or running points, take a point's
    number for its rank, or give each group the same number of seeds. Last values of the finished points:

        lr    seed  point  val/loss  best loss  val/f1  val/perplexity
        0.01  0     0      2.0       0.5        0.7     7
        0.01  1     3      2.4       0.7        0.9     11
        0.1   0     2      1.0       0.9        0.3     3
        0.1   1     6      1.5       1.4        0.2     4
        0.1   2     4      2.0       1.9        0.4     8
        1     0     5      1.9       1.7        0.5     6
        1     1     1      failed at step 4, when it had a loss of 0.2
        10    0     7      runs; at step 4 of 10, 6 s after its start, it has a loss of 0.1
    """
    finished = {
        0: ("0.01", 0, 2.0, 0.5, 0.7, 7),
        3: ("0.01", 1, 2.4, 0.7, 0.9, 11),
        2: ("0.1", 0, 1.0, 0.9, 0.3, 3),
        6: ("0.1", 1, 1.5, 1.4, 0.2, 4),
        4: ("0.1", 2, 2.0, 1.9, 0.4, 8),
        5: ("1", 0, 1.9, 1.7, 0.5, 6),
    }
    for num, (lr, seed, loss, best, f1, perplexity) in finished.items():
        middle = {"step": 6, "time_s": 3.0, "val/loss": best, "val/f1": f1 - 0.1, "val/perplexity": perplexity + 1}
        end = {"step": 10, "time_s": 5.0, "val/loss": loss, "val/f1": f1, "val/perplexity": perplexity}
        lines = [
            {"step": 0, "time_s": 0.0, "val/loss": 9.0, "val/f1": 0.0, "val/perplexity": 8000},
            *({"step": s, "time_s": s / 2, "train/loss": loss + 10 - s} for s in range(1, 7)),
            middle,
            *({"step": s, "time_s": s / 2, "train/loss": loss + 10 - s} for s in range(7, 11)),
            end,
        ]
        write_point(folder, num, [f"optim.lr={lr}", f"seed={seed}"], lines)
    early = [{"step": 4, "time_s": 2.0, "train/loss": 0.2, "val/loss": 0.2, "val/f1": 1.0, "val/perplexity": 1}]
    write_point(folder, 1, ["optim.lr=1", "seed=1"], early, "failed", error="ValueError: it broke")
    now = [{"step": 4, "time_s": 6.0, "train/loss": 0.1, "val/loss": 0.1, "val/f1": 1.0, "val/perplexity": 1}]
    write_point(folder, 7, ["optim.lr=10", "seed=0"], now, "running")
    return folder
