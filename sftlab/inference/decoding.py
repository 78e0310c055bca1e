"""Decode prompts in forest rows. Prompts that share a prefix share its computation and its cache.

A row holds the prefix tree of some prompts, with one key-value cache per row. The continuation of a prompt is a branch
that grows from its last token, by the rule of training rows (data/forest.py). A prompt that shares nothing gets a row
of its own, as in an ordinary padded batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from sftlab.data.batch import Batch, collate
from sftlab.data.example import Example
from sftlab.data.forest import Row, row, shared_units, sort_key
from sftlab.data.plan import hash64
from sftlab.models.attention import by_layer, forest_mask
from sftlab.models.scorer import Scorer

Prompt = NDArray[np.int32]
OnToken = Callable[[int, int], None]
RowOf = tuple[Row, list[int]]  # a row, and the index of each path's example

ROW_TOKENS = 1024  # tokens of prompts per row; the mask is dense, so a longer row costs more than it shares


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How to decode. Temperature 0 is greedy; `top_k` and `top_p` limit the tokens to sample from (0 and 1: all).

    The noise of a sample depends only on `seed`, the prompt's number and the step, never on the rest of the batch.
    """

    max_new_tokens: int = 256
    batch_size: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} top_k={self.top_k} top_p={self.top_p}: expected temperature and top_k "
                "of at least 0, and top_p above 0 and at most 1"
            )


def decode(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    decoding: DecodingSettings,
    ends: frozenset[int],
    numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens without the ending one) of each prompt, one batch of similar shape at a time.

    `ends` are the tokens that end a text. `numbers` identify the prompts in sampling (default: their index).
    `on_token` is called with every new token as it is chosen.
    Raises: ValueError for a prompt that leaves no room in the model's context.
    """
    longest = scorer.model.config.get_text_config().max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < longest:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens; this model's context holds {longest}, prompt and answer "
                "together: shorten the prompt"
                if len(prompt)
                else f"prompt {i + 1} is empty"
            )
    grower = Grower(scorer, decoding, ends, range(len(prompts)) if numbers is None else numbers, longest, on_token)
    examples = [Example(p, np.zeros(len(p), bool), id=str(i)) for i, p in enumerate(prompts)]
    for rows in batches(examples, decoding.batch_size, decoding.share_prefixes):
        with torch.inference_mode():
            done = grower(rows)
        yield from done


def batches(examples: Sequence[Example], batch_size: int, share_prefixes: bool) -> Iterator[list[RowOf]]:
    """Yield batches of rows of similar shape, with at most `batch_size` examples; a row comes with their indices."""
    number = {id(e): i for i, e in enumerate(examples)}
    units = [[e] for e in examples]
    if share_prefixes:
        units = [unit for unit, _ in shared_units(examples, max([ROW_TOKENS, *map(len, examples)]))]
    parts = [sorted(unit[i : i + batch_size], key=sort_key) for unit in units for i in range(0, len(unit), batch_size)]
    parts.sort(key=lambda part: (-len(part), -max(map(len, part))))
    batch: list[RowOf] = []
    for part in parts:
        if batch and sum(len(indices) for _, indices in batch) + len(part) > batch_size:
            yield batch
            batch = []
        batch.append((row([part]), [number[id(e)] for e in part]))
    if batch:
        yield batch


@dataclass
class Slots:
    """The state of the continuations of a batch of rows: slot s of row r grows prompt `index[r, s]`.

    Shapes: index (R, S), -1 where a slot has ended or is unused; position (R, S) of its newest token; sees (R, S, K),
    which of the cache's columns it attends to; column_position (R, K).
    """

    index: NDArray[np.int64]
    position: Tensor
    sees: Tensor
    column_position: Tensor

    @classmethod
    def at_leaves(cls, rows: Sequence[RowOf], forest: Batch) -> tuple["Slots", Tensor]:
        """Return the slots of these rows, one at the last token of each prompt, and those tokens' columns (R, S)."""
        shape = (len(rows), max(len(indices) for _, indices in rows))
        index, leaves = np.full(shape, -1), np.zeros(shape, np.int64)
        for r, (tree, indices) in enumerate(rows):
            index[r, : len(indices)], leaves[r, : len(indices)] = indices, [path[-1] for path in tree.paths]
        at = torch.from_numpy(leaves).to(forest.tokens.device)
        columns = torch.arange(forest.tokens.shape[1], device=at.device)
        sees = (columns <= at[..., None]) & (at[..., None] < forest.reach[:, None, :])
        return cls(index, forest.position.gather(1, at), sees, forest.position), at

    def drop_ended(self, tokens: NDArray[np.int64], cache: DynamicCache) -> NDArray[np.int64]:
        """Drop slots that have ended, and ended rows once they are half of all; return the tokens of the rest."""
        rows = np.flatnonzero((self.index >= 0).any(1))
        if len(rows) <= len(self.index) // 2:  # copying the cache costs about one step, so do it when half of it goes
            rest = torch.from_numpy(rows).to(self.sees.device)
            cache.batch_select_indices(rest)
            self.position, self.sees = self.position[rest], self.sees[rest]
            self.index, self.column_position, tokens = self.index[rows], self.column_position[rest], tokens[rows]
        live = self.index >= 0
        kept = np.argsort(~live, axis=1, kind="stable")[:, : live.sum(1).max()]
        chosen = torch.from_numpy(kept).to(self.sees.device)
        self.index = np.take_along_axis(self.index, kept, 1)
        self.position = self.position.gather(1, chosen)
        self.sees = self.sees.gather(1, chosen[..., None].expand(-1, -1, self.sees.shape[2]))
        return np.take_along_axis(tokens, kept, 1)

    def advance(self) -> None:
        """Add one column per slot for its next token. A slot sees its own new column and no other."""
        num_rows, width = self.index.shape
        own = torch.eye(width, dtype=torch.bool, device=self.sees.device).expand(num_rows, -1, -1)
        self.position = self.position + 1
        self.sees = torch.cat([self.sees, own], 2)
        self.column_position = torch.cat([self.column_position, self.position], 1)

    def mask(self, window: int | None) -> Tensor:
        """Return the (R, 1, S, K) attention mask of the newest tokens, in a layer with this window."""
        if window is None:
            return self.sees[:, None]
        near = self.position[:, :, None] - self.column_position[:, None, :] < window
        return (self.sees & near)[:, None]


@dataclass(frozen=True)
class Grower:
    """Grow the continuations of batches of rows."""

    scorer: Scorer
    decoding: DecodingSettings
    ends: frozenset[int]
    numbers: Sequence[int]
    longest: int
    on_token: OnToken | None

    def __call__(self, rows: Sequence[RowOf]) -> list[tuple[int, list[int]]]:
        """Return (index, new tokens) of every prompt of these rows."""
        model, cache = self.scorer.model, DynamicCache()
        forest = collate([r for r, _ in rows], len(rows), max(len(r) for r, _ in rows)).to(model.device)
        slots, leaves = Slots.at_leaves(rows, forest)
        out: dict[int, list[int]] = {i: [] for _, indices in rows for i in indices}
        room = {
            i: min(self.decoding.max_new_tokens, self.longest - int(tree.position[path[-1]]) - 1)
            for tree, indices in rows
            for i, path in zip(indices, tree.paths, strict=True)
        }
        states = self._forward(
            forest.tokens, forest.position, forest_mask(model.config, forest.reach, forest.position), cache
        )
        states = states.gather(1, leaves[..., None].expand(-1, -1, states.shape[-1]))
        while True:
            tokens = np.zeros(slots.index.shape, np.int64)
            live = np.nonzero(slots.index >= 0)
            tokens[live] = self._choose(states[live], slots.index[live], out)
            for r, s in zip(*live, strict=True):
                i, token = int(slots.index[r, s]), int(tokens[r, s])
                if token not in self.ends:
                    out[i].append(token)
                    if self.on_token is not None:
                        self.on_token(i, token)
                if token in self.ends or len(out[i]) >= room[i]:
                    slots.index[r, s] = -1
            if not (slots.index >= 0).any():
                return list(out.items())
            tokens = slots.drop_ended(tokens, cache)
            slots.advance()
            states = self._forward(
                torch.from_numpy(tokens).to(model.device), slots.position, by_layer(model.config, slots.mask), cache
            )

    def _forward(self, tokens: Tensor, position: Tensor, mask: Any, cache: DynamicCache) -> Tensor:
        states: Tensor = self.scorer.model.base_model(
            input_ids=tokens, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return states

    def _choose(self, states: Tensor, index: NDArray[np.int64], out: dict[int, list[int]]) -> NDArray[np.int64]:
        """Return the next token of each live slot, (n,)."""
        logits, decoding = self.scorer.logits(states), self.decoding
        if decoding.temperature > 0:
            logits = logits / decoding.temperature
            if decoding.top_k:
                logits = TopKLogitsWarper(decoding.top_k)(None, logits)
            if decoding.top_p < 1:
                logits = TopPLogitsWarper(decoding.top_p)(None, logits)
            # If the noise is exponential, argmax of p / noise is a draw from p. Each drawn token has its own generator.
            seeds = [int(hash64(decoding.seed, self.numbers[i], len(out[i]))[0] >> 1) for i in index]
            noise = [
                torch.empty(logits.shape[1]).exponential_(generator=torch.Generator().manual_seed(s)) for s in seeds
            ]
            logits = logits.softmax(-1) / torch.stack(noise).to(logits.device)
        chosen: NDArray[np.int64] = logits.argmax(-1).cpu().numpy()
        return chosen
