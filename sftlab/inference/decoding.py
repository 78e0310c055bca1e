"""Decode prompts: the one way to an answer, within a run and after it, whole or token by token.

Prompts that share a prefix share its computation and its cache (shared_rows.py). A model whose layers mix the tokens of
a row by another rule than attention has one prompt per row, with its own cache (own_rows.py). Either way the next
tokens are chosen in next_token.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sftlab.data.example import Example
from sftlab.inference.next_token import DecodingSettings, NextToken, Prompt
from sftlab.inference.own_rows import OwnRows, alike
from sftlab.inference.shared_rows import Forward, SharedRows, batches
from sftlab.models.architecture import longest_text
from sftlab.models.scorer import Scorer

OnToken = Callable[[int, int], None]


@torch.no_grad()
def at_once(compute: Callable[[], Tensor]) -> Tensor:
    """Run a forward of a model whose parameters are whole."""
    return compute()


def decode(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    decoding: DecodingSettings,
    ends: frozenset[int],
    numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    forward: Forward = at_once,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens without the ending one) of each prompt, one batch of similar shape at a time.

    `ends` are the tokens that end a text. `numbers` identify the prompts in sampling (default: their index).
    `on_token` is called with every new token as it is chosen, but for the ending one; `forward` runs each forward.
    Raises: ValueError for a prompt that leaves no room in the model's context, and for a generation config of the model
    that asks for what cannot be done.
    """
    longest = longest_text(scorer.model.config)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < longest:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens; this model's context holds {longest}, prompt and answer "
                "together: shorten the prompt"
                if len(prompt)
                else f"prompt {i + 1} is empty"
            )
    ids = range(len(prompts)) if numbers is None else numbers
    choose = NextToken(scorer.model, decoding, prompts, ids, ends, longest)
    for rows in laid_out(scorer, prompts, decoding, forward):
        yield from grow(rows, choose, on_token)


def laid_out(
    scorer: Scorer, prompts: Sequence[Prompt], decoding: DecodingSettings, forward: Forward
) -> Iterator[SharedRows | OwnRows]:
    """Yield each batch of prompts in rows that the model takes, read once."""
    model: Any = scorer.model
    if scorer.apart:
        # RWKV's state mixes the rows of a batch (transformers 5.23), and other states of this kind are as old.
        rows_at_once = decoding.batch_size if model._supports_default_dynamic_cache() else 1
        for part in alike(prompts, rows_at_once, decoding.max_new_tokens):
            yield OwnRows(scorer, [prompts[i] for i in part], part, forward)
        return
    examples = [Example(p, np.zeros(len(p), bool), id=str(i)) for i, p in enumerate(prompts)]
    for rows in batches(examples, decoding.batch_size, decoding.share_prefixes):
        yield SharedRows(scorer, rows, forward)


def grow(rows: SharedRows | OwnRows, choose: NextToken, on_token: OnToken | None) -> list[tuple[int, list[int]]]:
    """Return (index, new tokens) of every prompt of these rows, once all have ended."""
    out: dict[int, list[int]] = {}
    while len(index := rows.growing):
        for i in index.tolist():
            out.setdefault(i, [])
        tokens = choose(rows.logits, index, out)
        ended = np.zeros(len(index), bool)
        for k, (i, token) in enumerate(zip(index.tolist(), tokens.tolist(), strict=True)):
            if token not in choose.ends:
                out[i].append(token)
                if on_token is not None:
                    on_token(i, token)
            ended[k] = token in choose.ends or len(out[i]) >= choose.room(i)
        rows.advance(tokens, ended)
    return list(out.items())
