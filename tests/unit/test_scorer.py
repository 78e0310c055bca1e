"""The chunked head: its gradients are those of logits made at once."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
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
