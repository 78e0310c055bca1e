"""Rows of one prompt each, with whatever cache or state the model makes for itself.

This is for models that cannot share rows: layers that carry a state along the row (Mamba, hybrids, RWKV), positions or
windows that the model counts by itself. Nothing is padded, because padding would enter the state. All rows begin at the
same position: first they read as many tokens as the shortest prompt has, then one token per step, which is the next of
the prompt where it goes on, else the one that was chosen. What is passed from step to step is transformers' own
affair, so its `prepare_inputs_for_generation` and its two neighbours are called.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from sftlab.inference.shared_rows import Forward
from sftlab.models.scorer import Scorer


def alike(prompts: Sequence[NDArray[np.int32]], batch_size: int, most: int) -> Iterator[list[int]]:
    """Yield the indices of batches of prompts, the longest first; their lengths differ by at most `most` tokens."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or len(prompts[batch[0]]) - len(prompts[i]) > most):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class OwnRows:
    """A batch of such rows while it grows. `logits` (n, vocabulary) are those of the prompts in `growing`, (n,)."""

    def __init__(
        self, scorer: Scorer, prompts: Sequence[NDArray[np.int32]], index: Sequence[int], forward: Forward
    ) -> None:
        self.model: Any = scorer.model
        self.forward, self.index = forward, np.array(index)
        self.lengths = np.array([len(p) for p in prompts])
        self.live = np.ones(len(prompts), bool)
        self.width = int(self.lengths.min())
        self.texts = np.zeros((len(prompts), self.lengths.max()), np.int64)  # what a row reads before it writes
        for row, prompt in enumerate(prompts):
            self.texts[row, : len(prompt)] = prompt
        self.tokens = torch.from_numpy(self.texts[:, : self.width]).to(self.model.device)
        self.carried = self._first()
        self.logits = self._step()

    @property
    def growing(self) -> NDArray[np.int64]:
        """The prompts that still grow, among those read whole."""
        return self.index[self._writing]

    @property
    def _writing(self) -> NDArray[np.bool_]:
        return self.live & (self.lengths <= self.width)

    def advance(self, tokens: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        """Feed the next token of each growing prompt, and of those still read, until one grows or all have ended."""
        writing = self._writing
        column = np.zeros(len(self.index), np.int64)  # a row that has ended reads anything: nobody looks at it
        column[writing], self.live[writing] = tokens, ~ended
        while self.live.any():
            reading = np.flatnonzero(self.lengths > self.width)
            column[reading] = self.texts[reading, self.width] if len(reading) else 0
            self.tokens = torch.cat([self.tokens, torch.from_numpy(column[:, None]).to(self.tokens.device)], 1)
            self.width += 1
            self.logits = self._step()
            if len(self.growing):
                return

    def _first(self) -> dict[str, Any]:
        """Return the arguments of the first forward beside its tokens, with an empty cache if the model takes one."""
        taken = inspect.signature(self.model.forward).parameters
        rows, width = self.tokens.shape
        position = torch.arange(width, device=self.tokens.device).expand(rows, -1)
        possible = {"attention_mask": None, "position_ids": position, "logits_to_keep": 1}
        carried = {"use_cache": True} | {name: value for name, value in possible.items() if name in taken}
        how = GenerationConfig(use_cache=True)
        self.model._prepare_cache_for_generation(how, carried, GenerationMode.GREEDY_SEARCH, rows, self.texts.shape[1])
        return carried

    def _step(self) -> Tensor:
        first = self.width == int(self.lengths.min())
        given = self.model.prepare_inputs_for_generation(
            self.tokens, next_sequence_length=None if first else 1, is_first_iteration=first, **self.carried
        )
        writing = torch.from_numpy(self._writing).to(self.tokens.device)

        def compute() -> Tensor:
            made = self.model(**given, return_dict=True)
            self.carried = self.model._update_model_kwargs_for_generation(made, self.carried)
            return made.logits[writing, -1].float()  # type: ignore[no-any-return]

        return self.forward(compute)
