"""Compiled blocks: one graph for every length and for evaluation, the same numbers, and nothing of answers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
from sftlab.models import flex
from sftlab.models.compiled import compile_block, tracing, uncompile_block
from sftlab.models.decoder import decoder_blocks
from sftlab.models.scorer import Scorer
from tests.support import random_examples, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # the compiler's own, on import
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the graphs that Dynamo's guards ask for, which are run op by op. FlexAttention has no backward else."""
    made: list[Any] = []

    def op_by_op(graph: Any, given: list[Any]) -> Any:
        made.append([node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=op_by_op))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    for reset in (torch.compiler.reset, flex.kernel.cache_clear):
        reset()
    yield made
    for reset in (torch.compiler.reset, flex.kernel.cache_clear):
        reset()


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
def test_a_block_is_one_graph_for_every_length_and_for_evaluation(attention: str, graphs: list[Any]) -> None:
    plain, scorer = scorer_of(attention if attention != flex.NAME else "sdpa"), scorer_of(attention)
    scorer.load_state_dict(plain.state_dict())
    for _, _, block in decoder_blocks(scorer.model):
        compile_block(block)
    with torch.no_grad(), tracing():
        scorer(batch_of(384))
    assert not graphs, "tracing compiles nothing"
    for length in (640, 256, 1024, 2176):
        batch = batch_of(length, length)
        for ours, theirs in zip(gradients(scorer, batch), gradients(plain, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            ours, theirs = scorer(batch), plain(batch)
        assert not ours.nll.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (given,) = graphs
    states = next(v for v in given if isinstance(v, torch.Tensor) and v.dim() == 3)
    assert isinstance(states.shape[1], torch.SymInt) and type(states.shape[0]) is type(states.shape[2]) is int
    assert not [v for v in given if isinstance(v, torch.Tensor) and not v.dim()], "numbers of the model are constants"
    for _, _, block in decoder_blocks(scorer.model):
        uncompile_block(block)
    batch = batch_of(384)
    torch.testing.assert_close(gradients(scorer, batch), gradients(plain, batch), rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1 + (attention == flex.NAME), "FlexAttention is compiled by itself then"


def test_flex_attention_by_itself_is_compiled_once_for_every_length(graphs: list[Any]) -> None:
    scorer = scorer_of(flex.NAME)
    with torch.no_grad(), tracing():
        scorer(batch_of(384))
    assert not graphs
    for length in (640, 256, 1024):
        gradients(scorer, batch_of(length, length))
    assert len(graphs) == 1


def test_evaluation_keeps_nothing_for_backward_and_answers_are_made_as_always(graphs: list[Any]) -> None:
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


class Kind(torch.nn.Module):
    """A block that torch compiles by itself, because `kind` is a constant in it; it is given two tensors to learn."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, states: torch.Tensor, more: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (states * self.weight + more).sin() * self.kind + mask


def test_many_kinds_of_blocks_are_compiled_and_every_argument_is_as_in_training(graphs: list[Any]) -> None:
    blocks = torch.nn.ModuleList(Kind(kind) for kind in range(2, 14))
    for block in blocks:
        compile_block(block)
    first, second = (torch.nn.Parameter(torch.randn(4)) for _ in range(2))

    def through(length: int) -> torch.Tensor:
        shape = (1, length, 4)
        states, more, mask = first.expand(shape) * 1, second.expand(shape) * 1, torch.zeros(shape)
        for block in blocks:
            states = block(states, more, mask=mask)
        return states

    with torch.no_grad(), tracing():
        through(8)
    for length in (16, 24):
        through(length).sum().backward()
        with torch.no_grad():
            assert not through(length + 1).requires_grad
    assert len(graphs) == len(blocks)
    assert second.grad is not None and second.grad.abs().sum() > 0
