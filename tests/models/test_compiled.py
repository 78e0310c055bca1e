"""Compiled blocks: one graph for every length and for evaluation, the same numbers, and nothing of answers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
from sftlab.models import flex
from sftlab.models.compiled import compile_block, uncompile_block
from sftlab.models.decoder import decoder_blocks
from sftlab.models.scorer import Scorer
from tests.support import random_examples, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # the compiler's own, on import
]


@pytest.fixture(autouse=True)
def _dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Dynamo's guards decide and run its graphs op by op. A CPU's FlexAttention has no backward but there."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    flex.kernel.cache_clear()
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    flex.kernel.cache_clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def batch_of(length: int, seed: int = 0) -> Batch:
    (row,) = lay_out(random_examples(6, seed, longest=length // 8, groups=2), "tree", length)[:1]
    return collate([row], 1, length)


def scorer_of(attention: str) -> Scorer:
    made = Scorer(tiny_llama(attn_implementation="sdpa")).train()
    made.model.config._attn_implementation = attention
    made.scored_only = ()
    return made


def gradients(scorer: Scorer, batch: Batch) -> list[torch.Tensor]:
    scorer.zero_grad()
    scorer(batch).nll.backward()
    return [p.grad.clone() for p in scorer.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "eager", flex.NAME])
def test_a_block_is_one_graph_for_every_length_and_for_evaluation(attention: str) -> None:
    plain, compiled = scorer_of(attention if attention != flex.NAME else "sdpa"), scorer_of(attention)
    compiled.load_state_dict(plain.state_dict())
    for _, _, block in decoder_blocks(compiled.model):
        compile_block(block)
    for length in (640, 256, 1024, 2176):
        batch = batch_of(length, length)
        for ours, theirs in zip(gradients(compiled, batch), gradients(plain, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            ours, theirs = compiled(batch), plain(batch)
        assert not ours.nll.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert graphs() == 1
    for _, _, block in decoder_blocks(compiled.model):
        uncompile_block(block)
    batch = batch_of(384)
    torch.testing.assert_close(gradients(compiled, batch), gradients(plain, batch), rtol=1e-5, atol=1e-4)
    assert graphs() == 1 + (attention == flex.NAME), "FlexAttention is compiled by itself then"


def test_evaluation_keeps_nothing_for_backward_and_answers_are_made_as_always() -> None:
    scorer = scorer_of("sdpa")
    blocks = [block for _, _, block in decoder_blocks(scorer.model)]
    seen: list[tuple[bool, bool]] = []
    for block in blocks:
        real = block.forward

        def noting(hidden: torch.Tensor, *given: Any, real: Any = real, **named: Any) -> Any:
            seen.append((torch.is_grad_enabled(), hidden.requires_grad))
            return real(hidden, *given, **named)

        block.forward = noting
        compile_block(block)
        block.register_forward_hook(lambda module, given, made: seen.append((torch.is_grad_enabled(), False)))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        states = scorer.hidden(batch_of(256))
        assert not states.requires_grad and seen == [(True, True), (False, False)] * len(blocks)
        seen.clear()
        scorer.eval()
        scorer.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
        assert set(seen) == {(False, False)}, "with a cache, whose keys would keep all that made them"
