"""The last MLP on scored tokens only: the same loss and gradients, fewer tokens, and only where it is safe."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.models.decoder import decoder_blocks
from sftlab.models.scorer import Scorer
from sftlab.models.trim import only_at, position_wise
from sftlab.parallel.fsdp2 import fsdp2
from tests.checkpoints.test_pretrained import FAMILIES
from tests.support import random_examples, tiny_llama


def batch(rows: int = 2) -> Any:
    made = lay_out(random_examples(10, longest=24), "tree", 128)
    given = collate(made[:rows], rows, 128)
    again = {name: torch.cat([getattr(given, name), getattr(given, name)[:5]]) for name in ("at", "weight")}
    return replace(given, **again, target=torch.cat([given.target, given.target[:5] + 1]))  # branch points


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k != "mixtral"])
def test_loss_and_gradients_are_those_of_the_whole_mlp(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **FAMILIES[kind])
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    found = []
    for whole in (False, True):
        scorer = Scorer(model)
        assert len(scorer.scored_only) == 1
        if whole:
            scorer.scored_only = ()
        given = batch()
        assert len(given.at.unique()) < len(given.at) < given.tokens.numel(), "a branch point predicts twice"
        nll = scorer(given).nll
        parameters = dict(model.named_parameters())
        found.append([nll.detach(), *torch.autograd.grad(nll, list(parameters.values()))])
    for ours, theirs, name in zip(*found, ["loss", *parameters], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def seen_by_mlps(scorer: Scorer, given: Any) -> list[int]:
    """Return how many tokens the gate of each block's MLP gets."""
    counts: list[int] = []
    handles = [
        block.mlp.gate_proj.register_forward_pre_hook(lambda module, x: counts.append(x[0].numel() // x[0].shape[-1]))
        for block in scorer.model.model.layers
    ]
    scorer(given)
    for handle in handles:
        handle.remove()
    return counts


def test_only_the_last_block_and_only_while_it_scores(one: Any) -> None:
    model = tiny_llama(layers=3, attn_implementation="sdpa")
    scorer, given = Scorer(model), batch()
    every, scored = given.tokens.numel(), len(given.at.unique())
    assert seen_by_mlps(scorer, given) == [every, every, scored]
    with torch.no_grad():
        assert seen_by_mlps(scorer, given) == [every, every, scored]
        hidden = scorer.hidden(given)
        assert torch.equal(hidden, model.model(given.tokens, position_ids=given.position,
            attention_mask=scorer_mask(scorer, given)).last_hidden_state.flatten(0, 1))  # fmt: skip
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def scorer_mask(scorer: Scorer, given: Any) -> Any:
    from sftlab.models.attention import forest_mask

    return forest_mask(scorer.model.config, given.reach, given.position)


@pytest.mark.parametrize("how", [{"compile": True}, {"activation_checkpointing": "full"}, {}])
def test_blocks_that_are_compiled_or_recomputed_are_left_alone(
    how: dict[str, Any], one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: None)
    assert len(fsdp2(Scorer(tiny_llama()), one, **how).scored_only) == (not how)


def test_an_mlp_that_is_given_more_than_its_tokens_gets_them_all() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=320, hidden_size=64, n_layer=2, n_head=4, eos_token_id=1)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    tokens, at = torch.arange(3, 35)[None], torch.tensor([3, 9, 9, 31])
    assert len(position_wise(model)) == 1
    whole = model.transformer(tokens).last_hidden_state[0]
    with only_at(position_wise(model), at):
        trimmed = model.transformer(tokens).last_hidden_state[0]
    assert torch.equal(trimmed, whole)


def test_it_is_the_last_block_and_no_experts() -> None:
    model = tiny_llama(layers=3)
    assert position_wise(model) == (model.model.layers[2].mlp,) == (decoder_blocks(model)[-1][2].mlp,)
    names = {name for name, _ in Scorer(model).named_parameters()}
    assert names == {f"model.{name}" for name, _ in model.named_parameters()}
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **FAMILIES["mixtral"]))
    assert position_wise(experts) == ()
    model.model.layers[2].mlp.act_fn = torch.nn.PReLU()
    assert position_wise(model) == (), "what else has parameters may mix tokens"
