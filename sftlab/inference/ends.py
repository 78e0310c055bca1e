"""The tokens that end an answer: those that a model names, and those that it learned from its data.

A base model that learns a chat ends its turns with another token than its generation_config.json names. Without that
token there, plain transformers and vLLM run over the end of a turn (LlamaFactory #7454, ms-swift #3113).
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig

from sftlab.data.example_set import ExampleSet
from sftlab.data.template import special_texts


def ends_of(generation: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: those of a model's generation config, and the tokenizer's."""
    return frozenset(listed(generation)) | frozenset(i for i in [tokenizer.eos_token_id] if i is not None)


def listed(generation: GenerationConfig) -> list[int]:
    """Return the tokens that a generation config names as ends."""
    own = generation.eos_token_id
    return [int(e) for e in (own if isinstance(own, list) else [own]) if e is not None]


def ending(generation: GenerationConfig, learned: Iterable[int]) -> GenerationConfig:
    """Return a generation config that ends answers with the learned tokens too, after its own."""
    made = copy.deepcopy(generation)
    ends = list(dict.fromkeys([*listed(generation), *sorted(learned)]))
    made.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return made


def learned_ends(examples: ExampleSet, tokenizer: Any) -> frozenset[int]:
    """Return the special tokens that training examples end with, as their last target."""
    last = [part.last_targets for part in examples.parts.values()]
    return special(np.unique(np.concatenate(last)).tolist(), tokenizer)


def special(tokens: Sequence[int], tokenizer: Any) -> frozenset[int]:
    """Return the special ones among these tokens."""
    return frozenset(map(int, tokens)) & frozenset(tokenizer.convert_tokens_to_ids(sorted(special_texts(tokenizer))))
