"""The chunked head: its gradients are those of logits made at once."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
from sftlab.models.head import FusedLoss, PredictionLoss, chunks
from sftlab.models.scorer import Scorer
from tests.support import random_examples, tiny_llama


def batch_of(num: int, longest: int = 40) -> Batch:
    rows = lay_out(random_examples(num, longest=longest), "tree", 128)
    batch = collate(rows, len(rows), 128)
    weight = batch.weight * torch.linspace(0.1, 3.0, len(batch.weight))  # far from uniform
    return Batch(**{**vars(batch), "weight": weight})


def reference(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of the model's own head, all logits at once, in the model's dtype."""
    scorer = Scorer(copy.deepcopy(model), chunk=10**9)
    logits = scorer.model.get_output_embeddings()(scorer.hidden(batch))[batch.at]
    loss = (batch.weight * F.cross_entropy(logits.float(), batch.target, reduction="none")).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in scorer.model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_gauntlet_16_chunked_scoring_has_the_gradients_of_unchunked(chunk: int, tied: bool) -> None:
    model, batch = tiny_llama(tied=tied), batch_of(20)
    assert len(batch.at) > 2 * chunk
    loss, expected = reference(model, batch)
    scorer = Scorer(model, chunk)
    nll = scorer(batch).nll
    nll.backward()
    assert torch.allclose(nll.detach(), loss, rtol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max())), name


def test_gauntlet_16_chunks_of_a_bfloat16_head_are_summed_in_float32() -> None:
    """Many small chunks lose no more of the head's gradient than one large one does."""
    torch.manual_seed(0)
    model = tiny_llama(tied=False).bfloat16()
    batch = batch_of(60)
    exact = copy.deepcopy(model).float()  # the same bfloat16 weights
    _, expected = reference(exact, batch)
    head = expected["lm_head.weight"]

    def error(chunk: int) -> float:
        ours = copy.deepcopy(model)
        Scorer(ours, chunk)(batch).nll.backward()
        return float((ours.lm_head.weight.grad.float() - head).norm() / head.norm())

    once, chunked = error(10**9), error(4)
    assert len(batch.at) > 200
    assert chunked < 1.5 * once, (once, chunked)


@pytest.mark.parametrize("training", [True, False])
def test_no_more_than_a_chunk_of_logits_is_made_at_once_and_none_twice(training: bool) -> None:
    model, batch = tiny_llama(), batch_of(20)
    made: list[int] = []
    scorer = Scorer(model, 7)
    scorer.loss.register_forward_hook(lambda module, given, out: made.append(len(given[0])))
    model.lm_head.register_forward_hook(lambda module, given, out: made.append(len(out)))
    with torch.set_grad_enabled(training):
        nll = scorer(batch).nll
    assert nll.requires_grad == training
    if training:
        nll.backward()
    assert sum(made) == len(batch.at) and len(made) == -(-len(batch.at) // 7) and max(made) - min(made) <= 1
    assert Scorer(model).chunk == 2048


@pytest.mark.parametrize(("num", "most", "sizes"), [(1, 4, [1]), (4, 4, [4]), (5, 4, [2, 3]), (9, 4, [3, 3, 3])])
def test_chunks_are_of_like_length(num: int, most: int, sizes: list[int]) -> None:
    parts = list(chunks(num, most))
    assert [len(range(num)[part]) for part in parts] == sizes
    assert [i for part in parts for i in range(num)[part]] == list(range(num))


def test_no_logits_are_kept_for_backward() -> None:
    model, batch = tiny_llama(tied=False), batch_of(20)
    hidden = Scorer(model).hidden(batch)[batch.at].detach().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        FusedLoss.apply(hidden, model.lm_head.weight, None, batch.target, batch.weight, PredictionLoss(), 7)
    assert sorted(kept) == sorted([hidden.numel(), model.lm_head.weight.numel()])


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_made_only_for_what_is_trained(tied: bool) -> None:
    model, batch = tiny_llama(tied=tied), batch_of(20)
    _, expected = reference(model, batch)
    model.lm_head.weight.requires_grad_(False)
    Scorer(model, 7)(batch).nll.backward()
    assert model.lm_head.weight.grad is None
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"logit_scale": 0.25}, {"final_logit_softcapping": 0.5}, {"logits_scaling": 0.2}]
)
def test_gauntlet_16_the_fused_gradients_are_those_of_autograd_in_float64(
    settings: dict[str, float], bias: bool
) -> None:
    model = tiny_llama(tied=False, **settings).double()
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 320, dtype=torch.float64))
    scorer, batch = Scorer(model, 7), batch_of(20)
    weight = batch.weight.double()
    hidden = scorer.hidden(batch)[batch.at]
    nll = (weight * F.cross_entropy(scorer.logits(hidden), batch.target, reduction="none")).sum()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(3 * nll, list(parameters.values()))
    ours = scorer(Batch(**{**vars(batch), "weight": weight})).nll
    torch.testing.assert_close(ours, nll, rtol=1e-12, atol=0)
    for name, want, found in zip(
        parameters, expected, torch.autograd.grad(3 * ours, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


class Doubled(torch.nn.Linear):
    """A head that is more than one matrix."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * super().forward(given)


def test_a_head_that_is_more_than_a_matrix_is_called_as_it_stands() -> None:
    model, batch = tiny_llama(tied=False), batch_of(20)
    twice = copy.deepcopy(model)
    twice.lm_head.__class__ = Doubled
    with torch.no_grad():
        model.lm_head.weight *= 2
    loss, expected = reference(model, batch)
    nll = Scorer(twice, 7)(batch).nll
    nll.backward()
    assert float(nll.detach()) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(twice.lm_head.weight.grad, 2 * expected["lm_head.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 10**9])
def test_the_weight_of_right_guesses_by_hand(chunk: int) -> None:
    """A third of the targets is what the model guesses; their weights, all different, add up to `correct`."""
    model, batch = tiny_llama(), batch_of(20)
    scorer = Scorer(model, chunk)
    guesses = scorer.logits(scorer.hidden(batch)[batch.at]).argmax(-1)
    right = torch.arange(len(batch.at)) % 3 == 0
    batch = Batch(**{**vars(batch), "target": torch.where(right, guesses, (guesses + 1) % 320)})
    assert float(scorer(batch).correct) == 0  # in training nobody asks
    with torch.no_grad():
        score = scorer(batch)
    assert not score.correct.requires_grad and score.nll.dtype == score.correct.dtype == torch.float32
    assert float(score.correct) == pytest.approx(float(batch.weight[right].sum()))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2.0, -4.0]),
        ({"logit_scale": 0.25}, [0.5, -1.0]),  # Cohere
        ({"logits_scaling": 8.0}, [0.25, -0.5]),  # Granite
        ({"final_logit_softcapping": 3.0}, [3 * math.tanh(2 / 3), -3 * math.tanh(4 / 3)]),  # Gemma 2
        ({"logits_scaling": 2.0, "final_logit_softcapping": 3.0}, [3 * math.tanh(1 / 3), -3 * math.tanh(2 / 3)]),
    ],
)
def test_what_is_done_to_logits_by_hand(settings: dict[str, float], expected: list[float]) -> None:
    model = tiny_llama(tied=False, **settings)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[5, 0], model.lm_head.weight[6, 0] = 2.0, -4.0
    logits = Scorer(model).logits(F.one_hot(torch.tensor([0]), 32).float())
    assert logits[0, 5:7].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("of", "gives"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_logits_are_float32_or_better(of: str, gives: str) -> None:
    model = tiny_llama().to(getattr(torch, of))
    assert Scorer(model).logits(torch.zeros(1, 32, dtype=getattr(torch, of))).dtype == getattr(torch, gives)
