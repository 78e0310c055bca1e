"""Answers within a run are those of `generate`, prompt by prompt, and the model trains on as if there were none."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.inference.sharded import Generator, inference
from sftlab.models.scorer import Scorer
from tests.support import byte_tokenizer, random_examples, tiny_llama

CPU = torch.device("cpu")


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


def test_answers_are_in_the_order_of_their_prompts_and_those_of_each_alone(
    scorer: Scorer, tokenizer: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [tokenizer.decode(alone(scorer, p, 5, 1), skip_special_tokens=True).strip() for p in prompts]
    shapes: list[tuple[int, int]] = []
    generate = scorer.model.generate

    def spy(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        assert (given["input_ids"][given["attention_mask"] == 0] == 2).all()
        assert (
            not scorer.training and not torch.is_grad_enabled() and scorer.model.config._attn_implementation == "sdpa"
        )
        return generate(**given)

    monkeypatch.setattr(scorer.model, "generate", spy)
    assert Generator(scorer, tokenizer, CPU, max_new_tokens=5, batch_size=4).answers(prompts) == expected
    assert len(set(expected)) > 8
    longest = sorted(map(len, prompts), reverse=True)
    assert shapes == [(4, longest[0]), (4, longest[4]), (3, longest[8])], "prompts of like length together"


def test_no_prompts_have_no_answers(scorer: Scorer, tokenizer: Any) -> None:
    assert Generator(scorer, tokenizer, CPU).answers([]) == []


def test_an_answer_ends_at_the_tokenizers_end(scorer: Scorer, tokenizer: Any, prompts: list[Any]) -> None:
    """Where the model wrote some token in the middle of an answer, it is made to write the end."""
    free = alone(scorer, prompts[0], 8, -1)
    assert free[3] not in free[:3] and 1 not in free
    ending = copy.deepcopy(scorer)
    with torch.no_grad():
        head = ending.model.lm_head.weight
        head[[1, free[3]]] = head[[free[3], 1]]
    (answer,) = Generator(ending, tokenizer, CPU, max_new_tokens=8).answers(prompts[:1])
    assert answer == tokenizer.decode(free[:3], skip_special_tokens=True).strip() != ""


@pytest.mark.parametrize("most", [1, 6])
def test_an_answer_has_as_many_tokens_as_it_may(
    most: int, scorer: Scorer, tokenizer: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(Generator, "text", lambda self, tokens: lengths.append(len(tokens)) or "x")
    tokenizer.eos_token = "<s>"
    Generator(scorer, tokenizer, CPU, max_new_tokens=most).answers(prompts[:3])
    assert lengths == [most] * 3


def test_without_a_padding_token_prompts_are_padded_with_the_end(
    scorer: Scorer, tokenizer: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator(scorer, tokenizer, CPU, 5).answers(prompts)
    tokenizer.pad_token = None
    given: list[Any] = []
    generate = scorer.model.generate
    monkeypatch.setattr(scorer.model, "generate", lambda **g: given.append(g) or generate(**g))
    assert Generator(scorer, tokenizer, CPU, 5).answers(prompts) == expected
    assert set(given[0]["input_ids"][given[0]["attention_mask"] == 0].tolist()) == {1}
    assert given[0]["generation_config"].pad_token_id == 1


def test_special_tokens_are_no_text(scorer: Scorer, tokenizer: Any) -> None:
    tokens = np.array([0, *tokenizer("bread", add_special_tokens=False).input_ids, 1, 2], np.int32)
    assert Generator(scorer, tokenizer, CPU).text(tokens) == "bread"


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
    made = Generator(scorer, tokenizer, CPU)
    assert (made.max_new_tokens, made.batch_size) == (32, 32)
