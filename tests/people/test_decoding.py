"""DecodingSettings in forest rows gives the tokens of transformers' `generate`, prompt by prompt."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from sftlab.inference.decoding import DecodingSettings, batches, decode
from sftlab.models.scorer import Scorer
from tests.support import random_examples

ENDS = frozenset(range(1, 40))
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral, a window of 8": MistralConfig(**SHAPE, sliding_window=8),
    "qwen3, a window of 8 in half of the layers": Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}


def made(config: Any) -> Scorer:
    """A model with weights large enough that its answers differ from prompt to prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Scorer(model).eval()


def reference(scorer: Scorer, prompt: Any, max_new_tokens: int) -> list[int]:
    out = scorer.model.generate(
        input_ids=torch.tensor(prompt[None].astype(int)),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ENDS),
        pad_token_id=0,
    )
    return [t for t in out[0, len(prompt) :].tolist() if t not in ENDS]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_generate(name: str, share: bool) -> None:
    scorer = made(CONFIGS[name])
    prompts = [e.tokens for e in random_examples(24, longest=50)]
    prompts += [prompts[0], prompts[1][: len(prompts[1]) // 2 + 1]]  # one twice, one the beginning of another
    answers = dict(
        decode(scorer, prompts, DecodingSettings(max_new_tokens=16, batch_size=7, share_prefixes=share), ENDS)
    )
    expected = [reference(scorer, p, 16) for p in prompts]
    assert [answers[i] for i in range(len(prompts))] == expected
    assert len({len(e) for e in expected}) > 3  # they end at different steps, or nothing was tested of that


def test_prefixes_are_laid_once() -> None:
    examples = random_examples(24, longest=50)
    alone = sum(len(row) for rows in batches(examples, 8, share_prefixes=False) for row, _ in rows)
    shared = [part for rows in batches(examples, 8, share_prefixes=True) for part in rows]
    assert alone == sum(map(len, examples)) and sum(len(row) for row, _ in shared) < alone
    assert sorted(i for _, indices in shared for i in indices) == list(range(24))
    for row, indices in shared:
        for path, i in zip(row.paths, indices, strict=True):
            assert row.tokens[path].tolist() == examples[i].tokens.tolist()


def test_a_sample_depends_on_seed_and_prompt_alone() -> None:
    scorer = made(CONFIGS["llama"])
    prompts = [e.tokens for e in random_examples(12, longest=50)]

    def sampled(numbers: list[int], **how: Any) -> dict[int, list[int]]:
        how = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9, "top_k": 50} | how
        found = decode(scorer, [prompts[n] for n in numbers], DecodingSettings(**how), ENDS, numbers=numbers)
        return {numbers[i]: tokens for i, tokens in found}

    one = sampled(list(range(12)))
    assert sampled(list(range(12)), batch_size=3, share_prefixes=False) == one
    assert sampled([7, 3]) == {n: one[n] for n in (7, 3)}
    assert sampled(list(range(12)), seed=1) != one


def test_sampling_draws_with_the_model_s_probabilities() -> None:
    scorer = made(CONFIGS["llama"])
    prompt = random_examples(1, longest=20)[0].tokens
    with torch.no_grad():
        logits = scorer.model(torch.tensor(prompt[None].astype(int))).logits[0, -1]
    expected = (logits / 1.5).softmax(-1).numpy()
    how = DecodingSettings(max_new_tokens=1, temperature=1.5, batch_size=500)
    drawn = [tokens[0] for _, tokens in decode(scorer, [prompt] * 4000, how, frozenset())]
    found = np.bincount(drawn, minlength=320) / 4000
    chance = np.sqrt(2 / np.pi * expected * (1 - expected) / 4000).sum()  # what 4,000 draws are off by on average
    assert np.abs(found - expected).sum() < 1.2 * chance
    assert np.abs(found - np.roll(expected, 1)).sum() > 2 * chance


def test_a_prompt_must_fit_the_context() -> None:
    scorer = made(CONFIGS["llama"])
    with pytest.raises(ValueError, match="prompt 2 has 128 tokens; this model's context holds 128"):
        list(decode(scorer, [np.ones(3, np.int32), np.ones(128, np.int32)], DecodingSettings(), ENDS))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        list(decode(scorer, [np.ones(0, np.int32)], DecodingSettings(), ENDS))
    ((_, tokens),) = decode(scorer, [np.full(120, 99, np.int32)], DecodingSettings(), frozenset())
    assert len(tokens) == 8  # as many as the context has room for, the last one never fed


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"batch_size": 0}])
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DecodingSettings(**bad)
