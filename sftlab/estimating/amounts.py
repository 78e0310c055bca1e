"""Amounts: what goes through the model in a step, from the data where it is on this machine, else from assumptions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sftlab.data.batch import Batch
from sftlab.data.loader import BLOCK, Loader, round_up
from sftlab.data.plan import Plan
from sftlab.estimating.devices import Device
from sftlab.estimating.rehearsal import full_rows
from sftlab.models.architecture import uses_flex
from sftlab.training.rows import MOST_TOKENS, ROW_TOKENS, make_row_layout, read_data

SAMPLED_STEPS = 8  # laid out for the averages
LONGEST = 4  # times the mean length: what a row is taken to need at least where the data is not read

# Examples, tokens of one in a row of its own, tokens after sharing, targets: with Llama 3's tokenizer.
KNOWN = {"rajpurkar/squad": (87_599, 191.6, 55.3, 5.4)}


@dataclass(frozen=True)
class Amounts:
    """What a run consists of. Numbers per step are means over all ranks; None where nothing tells them.

    `batch` is the largest microbatch of rank 0, of which a step has `num_microbatches`.
    """

    known_from: str
    batch: Batch
    num_microbatches: int
    num_examples: int | None
    tokens: float | None  # that go through the model, without padding
    effective_tokens: float | None  # in rows of their own
    predictions: float | None
    pairs: float | None  # (token, token it attends to)


def read_amounts(parts: Mapping[str, Any], config: Any, seed: int, num_ranks: int, device: Device) -> Amounts:
    """Return the amounts of the data itself. Raises: what reading it raises."""
    data, settings = parts["data"], parts["trainer"]
    tokenizer, train, val = read_data(parts["model"], data, config)
    plan = Plan(train.groups, settings.batch_size, seed, data.shuffle, data.groups_prefixes)
    where = torch.device("cuda" if device.cuda else "cpu")
    joined = uses_flex(config)
    row_layout = make_row_layout(data, settings, tokenizer, train, val, where, 0, num_ranks, joined)
    loader = Loader(train, plan, replace(row_layout, pin_memory=False), train.lengths)
    steps = [loader.step(step) for step in range(1, 1 + min(SAMPLED_STEPS, plan.steps_per_epoch))]

    def mean(name: str) -> float:
        return float(np.mean([getattr(step, name) for step in steps]))

    return Amounts(
        known_from=f"read: {len(train):,} examples",
        batch=loader.largest(),
        num_microbatches=max(len(step.microbatches) for step in steps),
        num_examples=len(train),
        tokens=mean("num_nodes"),
        effective_tokens=mean("num_effective_tokens"),
        predictions=mean("num_predictions"),
        pairs=mean("pairs"),
    )


def assumed_amounts(parts: Mapping[str, Any], own: Mapping[str, Any], num_ranks: int, device: Device) -> Amounts:
    """Return the amounts of data that is described by `estimate.` keys, or known; else those of full rows."""
    data, settings = parts["data"], parts["trainer"]
    known = KNOWN.get(str(getattr(data, "path", "")), (None, None, None, None))
    names = ("num_examples", "tokens_per_example", "shared_tokens_per_example", "targets_per_example")
    given = [own[name] for name in names]
    if own["tokens_per_example"] is None:
        given = [k if g is None else g for g, k in zip(given, known, strict=True)]
    num_examples, own_tokens, shared, targets = given
    length = data.row_length or min(ROW_TOKENS, data.max_length or ROW_TOKENS)
    if own_tokens is None:
        rank_tokens, source = float(length), f"not read: full rows of {length:,} tokens are assumed"
    else:
        shared = own_tokens if shared is None or data.layout != "tree" else shared
        rank_tokens = max(settings.batch_size * shared / num_ranks, min(length, LONGEST * own_tokens))
        source = f"not read: {own_tokens:,.1f} tokens per example, {shared:,.1f} after sharing, are assumed"
    most = max(length, MOST_TOKENS if device.cuda else ROW_TOKENS)
    if settings.rows_per_microbatch != "auto":
        most = length * settings.rows_per_microbatch
    microbatches = max(1, -(-int(rank_tokens) // most))
    tokens = round_up(int(rank_tokens / microbatches), BLOCK)
    share = 1.0 if own_tokens is None or targets is None else targets / shared
    total = None if own_tokens is None else settings.batch_size * shared
    per_row = min(tokens, length) if data.layout != "padded" else tokens
    rows = 1 if device.cuda else max(1, tokens // per_row)
    return Amounts(
        known_from=source,
        batch=full_rows(rows, tokens // rows, int(tokens * min(1.0, share))),
        num_microbatches=microbatches,
        num_examples=num_examples,
        tokens=total,
        effective_tokens=None if own_tokens is None else settings.batch_size * own_tokens,
        predictions=None if total is None else total * share,
        pairs=None if total is None else total * own_tokens / 2,
    )
