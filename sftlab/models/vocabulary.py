"""Tokens that a model did not have: they are added to the tokenizer, and get rows in the embedding and in the head.

A model that is trained has its final size from the start, because its config says so. Its files may hold fewer rows.
What the other rows begin as is said here once, for a whole model and for the part that one rank keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CHUNK = 8192  # rows that are summed at a time: a mean must be the same however many ranks ask for it


@dataclass(frozen=True)
class NewRows:
    """Which rows of the embedding and the head are new, and what they begin as.

    Files hold `held` rows, the model has `size`. A row of a new token begins as the mean of the rows in `pieces`, where
    it has any. Every other new row, from `held` on, begins as the mean of the first `known` rows.
    """

    held: int
    size: int
    known: int
    pieces: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def copy(self, target: Tensor, part: tuple[slice, ...], source: Any) -> None:
        """Fill `target`, the part of a tensor of `size` rows, from `source`, which has `held` rows.

        `source` is a tensor, or a slice of a safetensors file, of which no more is read than needed. Means are summed
        in float64 over whole rows, so that no sharding changes a bit.
        """
        begin, end = part[0].start, part[0].stop
        old = min(end, self.held)
        if begin < old:
            target[: old - begin].copy_(source[(slice(begin, old), *part[1:])])
        mean: Tensor | None = None
        for row in range(begin, end):
            if row < self.held and row not in self.pieces:
                continue
            if self.pieces.get(row):
                value = torch.stack([source[i : i + 1][0].double() for i in self.pieces[row]]).mean(0)
            else:
                value = mean = mean_of(source, self.known) if mean is None else mean
            target[row - begin].copy_(value[part[1:]])

    def check(self, rows: Mapping[str, int], kind: str) -> None:
        """Raise ValueError if an embedding or head of a model of this kind does not have `size` rows."""
        for name, num in rows.items():
            if num != self.size:
                raise ValueError(
                    f"model.add_tokens: {name} of {kind} has {num} rows, and the vocabulary {self.size} tokens. New "
                    "tokens cannot be added to this architecture"
                )


def mean_of(source: Any, rows: int) -> Tensor:
    """Return the mean of the first rows of a tensor or of a slice of a file, in float64."""
    total = sum(source[i : min(i + CHUNK, rows)].double().sum(0) for i in range(0, rows, CHUNK))
    assert isinstance(total, Tensor)
    return total / rows


def tensors_of_tokens(model: "PreTrainedModel") -> dict[str, nn.Parameter]:
    """Return the parameters that have a row for each token, by name: of the embedding and of the head."""
    parts = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    own = {id(p) for part in parts for p in part.parameters()}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def add_to(tokenizer: Any, special: Sequence[str], words: Sequence[str]) -> None:
    """Add tokens to a tokenizer that it does not have yet."""
    from tokenizers import AddedToken

    if special:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    if words:
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in words])


def new_rows(config: "PreTrainedConfig", old: Any, tokenizer: Any, multiple: int, kind: str) -> NewRows:
    """Return what a model of this config needs for a tokenizer, which was `old` before tokens were added.

    The size is the least multiple that holds every token, and never less than the model has.
    """
    held = config.get_text_config().vocab_size
    earlier, vocabulary = old.get_vocab(), tokenizer.get_vocab()
    size = max(held, *(i + 1 for i in vocabulary.values()))
    pieces: dict[int, Sequence[int]] = {}
    for token, number in vocabulary.items():
        if token in earlier and number < held:
            continue
        spelled = old(token, add_special_tokens=False)["input_ids"] if kind == "pieces" else []
        pieces[number] = [i for i in spelled if i < held and i != number]
    return NewRows(held, -(-size // multiple) * multiple, min(held, len(old)), pieces)


def grow(model: "PreTrainedModel", new: NewRows) -> "PreTrainedModel":
    """Return a whole model with its new rows."""
    before = {name: value.detach().clone() for name, value in tensors_of_tokens(model).items()}
    if new.size > new.held:
        model.resize_token_embeddings(new.size, mean_resizing=False)
    new.check({name: len(value) for name, value in tensors_of_tokens(model).items()}, type(model).__name__)
    with torch.no_grad():
        for name, value in tensors_of_tokens(model).items():
            new.copy(value, tuple(slice(0, n) for n in value.shape), before[name])
    return model


def check_vocabulary(config: "PreTrainedConfig", tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has tokens that the model has no row for."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model embeds {size}. If the "
            "model shall learn the others, give it rows for them with model.vocabulary_multiple=1 (or 128). Otherwise "
            "they do not belong together: name the model's own in model.tokenizer"
        )
