"""Weight decay is where it belongs, and nowhere else."""

import pytest
import torch
from torch import nn

from sftlab.models.scorer import Scorer
from sftlab.training.optim import adamw
from tests.support import tiny_llama


@pytest.mark.parametrize("tied", [True, False])
def test_no_decay_on_norms_biases_and_embeddings(tied: bool) -> None:
    scorer = Scorer(tiny_llama(tied=tied, attention_bias=True))
    optimizer = adamw(scorer, lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in scorer.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(names.values())  # every parameter once
    for name, value in decay.items():
        bare = "norm" in name or name.endswith("bias") or "embed_tokens" in name
        assert value == (0.0 if bare else 0.1), name
    assert any(name.endswith("bias") for name in decay) and ("model.lm_head.weight" in decay) == (not tied)


def test_decay_shrinks_only_what_is_decayed() -> None:
    scorer = Scorer(tiny_llama())
    before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
    optimizer = adamw(scorer, lr=0.1, weight_decay=0.5)
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in scorer.named_parameters():
        expected = before[name] * (0.95 if "proj" in name else 1.0)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_frozen_parameters_are_left_out() -> None:
    scorer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    scorer[0].requires_grad_(False)
    assert {id(p) for g in adamw(scorer, lr=1e-3).param_groups for p in g["params"]} == {
        id(p) for p in scorer[1].parameters()
    }


def test_a_learning_rate_is_above_zero() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr=0: expected a number above 0"):
        adamw(nn.Linear(1, 1), lr=0)
