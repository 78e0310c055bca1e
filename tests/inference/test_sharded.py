"""Answers within a run are those of `generate`, prompt by prompt, and the model trains on as if there were none."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from sftlab.inference.sharded import Generator, fits, inference
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import World
from tests.support import byte_tokenizer, random_examples, tiny_llama


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """A model with weights large enough that its answers differ from prompt to prompt."""
    model = tiny_llama(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Scorer(model).train()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    return [e.tokens for e in random_examples(11, longest=30)]


def alone(scorer: Scorer, prompt: Any, most: int, eos: int) -> list[int]:
    """Return what transformers makes of one prompt without padding, up to an end."""
    ids = torch.tensor(prompt[None].astype(int))
    out = scorer.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, eos_token_id=eos, pad_token_id=2
    )
    return [int(t) for t in out[0, len(prompt) :]]


def generator(scorer: Scorer, tokenizer: Any, **how: Any) -> Generator:
    return Generator(scorer, tokenizer, frozenset({tokenizer.eos_token_id}), cast(Any, None), **how, gather=True)


def test_answers_are_in_the_order_of_their_prompts_and_those_of_each_alone(
    scorer: Scorer, tokenizer: Any, prompts: list[Any]
) -> None:
    expected = [tokenizer.decode(alone(scorer, p, 5, 1), skip_special_tokens=True).strip() for p in prompts]
    seen: list[int] = []

    def spy(module: Any, given: Any, named: Any) -> None:
        seen.append(len(named["input_ids"]))
        assert not scorer.training and not torch.is_grad_enabled() and module.config._attn_implementation == "sdpa"

    watch = scorer.model.model.register_forward_pre_hook(spy, with_kwargs=True)
    assert generator(scorer, tokenizer, max_new_tokens=5, batch_size=4).answers(prompts) == expected
    watch.remove()
    assert len(set(expected)) > 8 and max(seen) <= 4


def test_no_prompts_have_no_answers(scorer: Scorer, tokenizer: Any) -> None:
    assert generator(scorer, tokenizer).answers([]) == []


def test_an_answer_ends_at_one_of_its_ends(scorer: Scorer, tokenizer: Any, prompts: list[Any]) -> None:
    free = alone(scorer, prompts[0], 8, -1)
    assert free[3] not in free[:3] and 1 not in free
    ending = Generator(scorer, tokenizer, frozenset({1, free[3]}), cast(Any, None), max_new_tokens=8, gather=True)
    (answer,) = ending.answers(prompts[:1])
    assert answer == tokenizer.decode(free[:3], skip_special_tokens=True).strip() != ""


@pytest.mark.parametrize("most", [1, 6])
def test_an_answer_has_as_many_tokens_as_it_may(
    most: int, scorer: Scorer, tokenizer: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(Generator, "decode_text", lambda self, tokens: lengths.append(len(tokens)) or "x")
    tokenizer.eos_token = "<s>"
    generator(scorer, tokenizer, max_new_tokens=most).answers(prompts[:3])
    assert lengths == [most] * 3


def test_a_model_is_whole_where_what_is_missing_is_at_most_half_of_what_is_free(
    one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thirds of every parameter lie elsewhere, and each takes two bytes in bfloat16."""
    scorer = fsdp2(Scorer(tiny_llama()), one, param_dtype="bfloat16")
    whole = sum(p.numel() for p in scorer.parameters())
    assert fits(scorer, one), "nothing is missing"
    monkeypatch.setattr("sftlab.inference.sharded.local_part", lambda p: p.to_local().flatten()[: p.numel() // 3])
    missing = 2 * sum(p.numel() - p.numel() // 3 for p in scorer.parameters())
    assert whole < missing < 2 * whole
    for free, expected in ((2 * missing, True), (2 * missing - 2, False)):
        monkeypatch.setattr("sftlab.inference.sharded.free_bytes", lambda device, free=free: free)
        assert fits(scorer, one) == expected


def test_special_tokens_are_no_text(scorer: Scorer, tokenizer: Any) -> None:
    tokens = np.array([0, *tokenizer("bread", add_special_tokens=False).input_ids, 1, 2], np.int32)
    assert generator(scorer, tokenizer).decode_text(tokens) == "bread"


def test_an_error_in_between_leaves_the_model_training_with_its_own_attention(scorer: Scorer) -> None:
    scorer.model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="mine"), inference(scorer):
        assert not scorer.training and not scorer.model.training and not torch.is_grad_enabled()
        assert scorer.model.config._attn_implementation == "sdpa"
        raise ValueError("mine")
    assert scorer.training and scorer.model.training and torch.is_grad_enabled()
    assert scorer.model.config._attn_implementation == "eager"
    scorer.model.config._attn_implementation = "sdpa"


def test_what_an_option_is_where_nobody_sets_it(scorer: Scorer, tokenizer: Any) -> None:
    made = Generator(scorer, tokenizer, frozenset(), cast(Any, None))
    assert (made.max_new_tokens, made.batch_size, made.gather) == (32, 32, "auto")
