"""DecodingSettings in forest rows gives the tokens of transformers' `generate`, prompt by prompt."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from sftlab.inference.decoding import decode
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.shared_rows import batches
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


def uniform() -> Scorer:
    """A model to which every one of 320 tokens is as likely as any other."""
    scorer = made(CONFIGS["llama"])
    torch.nn.init.zeros_(scorer.model.get_output_embeddings().weight)
    return scorer


def test_a_tiny_top_p_and_a_top_k_of_one_are_greedy() -> None:
    scorer = made(CONFIGS["llama"])
    prompts = [e.tokens for e in random_examples(6, longest=50)]
    greedy = dict(decode(scorer, prompts, DecodingSettings(max_new_tokens=8), ENDS))
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-5}):
        how = DecodingSettings(**{"max_new_tokens": 8, "temperature": 3.0, "seed": 5} | narrow)
        assert dict(decode(scorer, prompts, how, ENDS)) == greedy
    assert dict(decode(scorer, prompts, DecodingSettings(max_new_tokens=8, temperature=3.0), ENDS)) != greedy


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (40, 0.5)])
def test_only_the_likeliest_tokens_are_drawn(top_k: int, top_p: float) -> None:
    """First the temperature, then the `top_k` likeliest, then of these the fewest that hold `top_p` together."""
    scorer, temperature = made(CONFIGS["llama"]), 6.0
    prompt = random_examples(1, longest=20)[0].tokens
    with torch.no_grad():
        logits = scorer.model(torch.tensor(prompt[None].astype(int))).logits[0, -1]

    def likeliest(temperature: float) -> dict[int, float]:
        share, token = (logits / temperature).softmax(-1).sort(descending=True)
        share = share[: top_k or None] / share[: top_k or None].sum()
        count = int((share.cumsum(0) < top_p - 1e-6).sum()) + 1 if top_p < 1 else len(share)
        share = share[:count] / share[:count].sum()
        return dict(zip(token[:count].tolist(), share.tolist(), strict=True))

    expected = likeliest(temperature)
    assert top_p == 1 or len(expected) > len(likeliest(1.0)) > 0  # without the temperature there would be fewer
    how = DecodingSettings(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, batch_size=500)
    drawn = [tokens[0] for _, tokens in decode(scorer, [prompt] * 1500, how, frozenset())]
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        error = (share * (1 - share) / 1500) ** 0.5
        assert abs(drawn.count(token) / 1500 - share) < 4.5 * error


def test_every_draw_has_noise_of_its_own() -> None:
    """Seed, prompt and step each change the draw: where all tokens are alike two draws agree once in 320."""
    prompts = [np.full(3, 9, np.int32)] * 40
    seeds = [DecodingSettings(max_new_tokens=14, temperature=1.0, seed=s, batch_size=40) for s in (0, 1)]
    found = [dict(decode(uniform(), prompts, how, frozenset())) for how in seeds]
    draws = np.array([[answers[i] for i in range(40)] for answers in found])
    assert draws.shape == (2, 40, 14) and len(np.unique(draws)) > 290
    for axis, name in enumerate(("seed", "prompt", "step")):
        ahead = np.take(draws, range(1, draws.shape[axis]), axis)
        behind = np.take(draws, range(draws.shape[axis] - 1), axis)
        assert (ahead == behind).mean() < 0.02, f"the next {name} draws the same token"
    square = draws[0, :14]
    assert (square == square.T).sum() < 14 + 8  # prompt 3 at step 5 is not prompt 5 at step 3


@pytest.mark.parametrize("share", [True, False])
def test_each_prompt_has_its_own_room_in_the_context(share: bool) -> None:
    """Branches of one row end where their own text meets the context's end, or after `max_new_tokens`."""
    scorer = made(CONFIGS["llama"])
    stem = random_examples(1, longest=200, seed=1)[0].tokens[:90]
    stem = np.resize(stem, 90)
    prompts = [np.concatenate([stem, np.arange(n, dtype=np.int32) + 50 + n]) for n in (20, 30, 37, 5)]
    how = DecodingSettings(max_new_tokens=16, share_prefixes=share)
    lengths = {i: len(tokens) for i, tokens in decode(scorer, prompts, how, frozenset())}
    assert lengths == {0: 16, 1: 8, 2: 1, 3: 16}  # 128 tokens of context, less 90 and each one's own


def test_tokens_are_told_as_they_are_chosen() -> None:
    scorer = made(CONFIGS["llama"])
    prompts = [e.tokens for e in random_examples(9, longest=50)]
    told: list[tuple[int, int]] = []
    found = decode(
        scorer,
        prompts,
        DecodingSettings(max_new_tokens=6, batch_size=9),
        ENDS,
        on_token=lambda i, t: told.append((i, t)),
    )
    answers = dict(found)
    assert {i: [t for j, t in told if j == i] for i in range(9)} == answers
    first = [i for i, _ in told[: len([a for a in answers.values() if a])]]
    assert len(set(first)) == len(first)  # everybody's first token comes before anybody's second


def test_a_batch_holds_as_many_examples_as_it_may_and_no_more() -> None:
    examples = random_examples(23, longest=50)
    alone = [rows for rows in batches(examples, 5, share_prefixes=False)]
    assert [sum(len(indices) for _, indices in rows) for rows in alone] == [5, 5, 5, 5, 3]
    lengths = [len(row) for rows in alone for row, _ in rows]
    assert lengths == sorted(lengths, reverse=True)  # rows of like length, so that little is padding
    same = [examples[0]] * 1 + [
        type(examples[0])(np.concatenate([np.full(20, 7, np.int32), [i]]).astype(np.int32), np.zeros(21, bool), str(i))
        for i in range(12)
    ]
    shared = list(batches(same, 5, share_prefixes=True))
    assert all(sum(len(indices) for _, indices in rows) <= 5 for rows in shared)
    assert [len(indices) for rows in shared for _, indices in rows] == [5, 5, 2, 1]
    assert [len(row) for rows in shared for row, indices in rows if len(indices) > 1] == [25, 25, 22]


def test_prompts_are_shared_in_rows_of_limited_length() -> None:
    stem = np.resize(np.arange(50, 250, dtype=np.int32), 600)
    examples = [
        type(e)(np.concatenate([stem, np.full(200, 3 + i, np.int32)]), np.zeros(800, bool), str(i))
        for i, e in enumerate(random_examples(4))
    ]
    assert [len(row) for rows in batches(examples, 8, share_prefixes=True) for row, _ in rows] == [1000, 1000]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"batch_size": 2, "share_prefixes": False}, [(2, 33), (1, 31)]),
        ({"batch_size": 3, "share_prefixes": False}, [(3, 33)]),
        ({"batch_size": 3, "share_prefixes": True}, [(1, 36)]),
    ],
)
def test_prompts_are_computed_together_as_asked(how: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    """Three prompts of 31 to 33 tokens, 30 of them shared; the first computation of each batch holds its prompts."""
    scorer = made(CONFIGS["llama"])
    prompts = [np.array([*range(50, 80), *range(100 * n, 101 * n)], np.int32) for n in (1, 2, 3)]
    seen: list[tuple[int, ...]] = []
    scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    answers = dict(decode(scorer, prompts, DecodingSettings(max_new_tokens=2, **how), frozenset()))
    assert [shape for shape in seen if shape[1] > 3] == expected
    assert set(answers) == {0, 1, 2}


@pytest.mark.parametrize(
    "edge", [{"top_p": 1.0}, {"temperature": 0.0}, {"top_k": 0}, {"max_new_tokens": 1}, {"batch_size": 1}]
)
def test_settings_at_their_edges_are_taken(edge: dict[str, Any]) -> None:
    assert {key: getattr(DecodingSettings(**edge), key) for key in edge} == edge


@pytest.mark.parametrize("bad", [{"top_k": -1}, {"top_p": 1.01}, {"top_p": -0.5}, {"batch_size": -1}])
def test_settings_past_their_edges_are_refused(bad: dict[str, Any]) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{key}={value}.*expected"):
        DecodingSettings(**bad)


def test_the_longest_prompt_has_room_for_one_token() -> None:
    ((_, tokens),) = decode(made(CONFIGS["llama"]), [np.full(127, 99, np.int32)], DecodingSettings(), frozenset())
    assert len(tokens) == 1
