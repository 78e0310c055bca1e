"""Weight decay is where it belongs, and nowhere else."""

import pytest
import torch
from torch import nn

from sftlab.config.binding import check_node
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


@pytest.mark.parametrize("lr", [0, -1e-3, float("nan")])
def test_a_learning_rate_is_above_zero(lr: float) -> None:
    with pytest.raises(ValueError, match=rf"^optim\.lr={lr}: expected a number above 0$"):
        check_node("optim", {"_target_": "sftlab.training.optim.adamw", "_partial_": True, "lr": lr})


def test_every_option_reaches_every_parameter_group() -> None:
    optimizer = adamw(
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), lr=0.25, weight_decay=0.125, betas=(0.5, 0.75), eps=1e-3
    )
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.125, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.25, (0.5, 0.75), 1e-3, True)


def test_what_an_option_is_where_nobody_sets_it() -> None:
    optimizer = adamw(nn.Linear(3, 2), lr=0.25)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_two_updates_by_hand() -> None:
    """Gradients 1 and 0: the moments are b (1 - b), and (1 - b^2) without their bias; the ratio is b / (1 + b)."""
    layer = nn.Linear(1, 1, bias=False)
    optimizer = adamw(layer, lr=0.1, weight_decay=0.0, betas=(0.5, 0.25), eps=0.125)
    moved = []
    for gradient in (1.0, 0.0):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
        moved.append(float((before - layer.weight).detach()))
    assert moved == pytest.approx([0.1 / 1.125, 0.1 * (1 / 3) / (0.2**0.5 + 0.125)], rel=1e-5)


def test_a_group_without_parameters_is_left_out() -> None:
    assert [g["weight_decay"] for g in adamw(nn.Linear(3, 2, bias=False), lr=1.0, weight_decay=0.5).param_groups] == [
        0.5
    ]
    assert [g["weight_decay"] for g in adamw(nn.Embedding(3, 2), lr=1.0, weight_decay=0.5).param_groups] == [0.0]
