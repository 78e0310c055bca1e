"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

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
