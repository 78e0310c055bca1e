"""Rows of prompts that share prefixes, with one key-value cache per row.

A row holds the prefix tree of some prompts. The continuation of a prompt is a branch that grows from its last token, by
the rule of training rows (data/forest.py). A prompt that shares nothing has a row of its own, as in a padded batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from sftlab.data.batch import Batch, collate
from sftlab.data.example import Example
from sftlab.data.forest import Row, row, shared_units, sort_key
from sftlab.models.architecture import body
from sftlab.models.attention import cached_mask, forest_mask
from sftlab.models.scorer import Scorer

RowOf = tuple[Row, list[int]]  # a row, and the index of each path's example
Forward = Callable[[Callable[[], Tensor]], Tensor]  # how a forward is run: at once, or inside FSDP's root

ROW_TOKENS = 1024  # tokens of prompts per row; the mask is dense, so a longer row costs more than it shares


def batches(examples: Sequence[Example], batch_size: int, share_prefixes: bool) -> Iterator[list[RowOf]]:
    """Yield batches of rows of similar shape, with at most `batch_size` examples; a row comes with their indices."""
    number = {id(e): i for i, e in enumerate(examples)}
    units = [[e] for e in examples]
    if share_prefixes:
        longest = max([ROW_TOKENS, *map(len, examples)])
        units = [unit for unit, _ in shared_units(examples, longest, short_tree=0)]  # a batch takes many rows
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


class SharedRows:
    """A batch of such rows while it grows. `logits` (n, vocabulary) are those of the prompts in `growing`, (n,)."""

    def __init__(self, scorer: Scorer, rows: Sequence[RowOf], forward: Forward) -> None:
        self.scorer, self.forward, self.cache = scorer, forward, DynamicCache()
        config = scorer.model.config
        forest = collate([r for r, _ in rows], len(rows), max(len(r) for r, _ in rows)).to(scorer.model.device)
        self.slots, leaves = Slots.at_leaves(rows, forest)
        mask = forest_mask(config, forest.reach, forest.position)
        self.logits = self._logits(forest.tokens, forest.position, mask, leaves)

    @property
    def growing(self) -> NDArray[np.int64]:
        """The prompts that still grow."""
        return self.slots.index[self.slots.index >= 0]

    def advance(self, tokens: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        """Feed the next token of each growing prompt; those that have ended grow no more."""
        live = np.nonzero(self.slots.index >= 0)
        grid = np.zeros(self.slots.index.shape, np.int64)
        grid[live] = tokens
        self.slots.index[live] = np.where(ended, -1, self.slots.index[live])
        if not len(self.growing):
            return
        fed = torch.from_numpy(self.slots.drop_ended(grid, self.cache)).to(self.scorer.model.device)
        self.slots.advance()
        slots = self.slots
        mask = cached_mask(self.scorer.model.config, slots.sees, slots.position, slots.column_position)
        self.logits = self._logits(fed, slots.position, mask)

    def _logits(self, tokens: Tensor, position: Tensor, mask: Any, leaves: Tensor | None = None) -> Tensor:
        """Return the logits after these tokens, or after the tokens at `leaves`, of the growing prompts."""

        def compute() -> Tensor:
            states: Tensor = body(self.scorer.model)(
                input_ids=tokens, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True
            ).last_hidden_state
            if leaves is not None:
                states = states.gather(1, leaves[..., None].expand(-1, -1, states.shape[-1]))
            return self.scorer.logits(states[np.nonzero(self.slots.index >= 0)])

        return self.forward(compute)
