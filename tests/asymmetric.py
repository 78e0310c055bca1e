"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

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
