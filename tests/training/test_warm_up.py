"""The warm-up: every shape once, fewer rows where memory runs out, eager code where compiling fails."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.models.compiled import compile_block, only_traces
from sftlab.models.scorer import Scorer, after_error
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import World
from sftlab.training.faults import OutOfMemory, memory_for
from sftlab.training.optim import adamw
from sftlab.training.warm_up import WarmUp, lengthened, reserved
from tests.support import random_examples, tiny_llama


def loader(rows: int = 4, joined: bool = True, row_length: int = 128) -> Loader:
    examples = random_examples(row_length // 3, longest=50)
    plan = Plan(np.arange(len(examples)), len(examples) // 2, 0, shuffle=False, group_by_prefix=False)
    return Loader(examples, plan, RowLayout("packed", row_length, rows, 0, 1, 2, fixed_shapes=True, joined=joined))


class Made:
    """A warm-up of a small sharded model, what it says, and which shapes go through the first block."""

    def __init__(self, world: World, **settings: Any) -> None:
        self.scorer = fsdp2(Scorer(tiny_llama(attn_implementation="sdpa")), world)
        self.shapes: list[tuple[int, bool]] = []
        given: dict[str, Any] = {"compiled": False, "evaluates": True, "halves": True, "loader": loader(), **settings}
        self.optimizer = adamw(self.scorer, lr=1e-3)
        self.said: list[str] = []
        self.shown: list[str] = []
        self.warm_up = WarmUp(scorer=self.scorer, optimizer=self.optimizer, world=world, console=self, **given)
        self.blocks = self.scorer.model.model.layers
        self.blocks[0].register_forward_pre_hook(
            lambda module, given: self.shapes.append((given[0].shape[0] * given[0].shape[1], torch.is_grad_enabled()))
        )

    def say(self, text: str) -> None:
        self.said.append(text)

    def working(self, text: str) -> None:
        self.shown.append(text)

    def gradients(self) -> list[torch.Tensor]:
        batch = self.warm_up.loader.step(1).microbatches[0]
        self.scorer(batch).nll.backward()
        found = [p.grad.full_tensor().clone() for p in self.scorer.parameters()]  # type: ignore[union-attr]
        self.scorer.zero_grad()
        return found


def test_on_a_cpu_that_compiles_nothing_nothing_is_warmed_up(one: World) -> None:
    made = Made(one)
    made.warm_up()
    assert made.shapes == [] and made.said == []


@pytest.mark.parametrize("evaluates", [True, False])
def test_every_shape_is_run_and_changes_nothing(evaluates: bool, one: World) -> None:
    """Steps have two microbatches here: whole gradients are kept from the first to the second."""
    made = Made(one, compiled=True, evaluates=evaluates, halves=False)
    weights: list[float] = []
    made.scorer.register_forward_pre_hook(lambda module, given: weights.append(float(given[0].weight.abs().sum())))
    before = [p.full_tensor().clone() for p in made.scorer.parameters()]  # type: ignore[attr-defined]
    made.warm_up()
    full = max(b.tokens.numel() for s in (1, 2) for b in made.warm_up.loader.step(s).microbatches)
    expected = [(256, False), (full, True), (full, True), (full, False)]
    assert made.shapes == (expected if evaluates else expected[:-1]) and full == 512
    assert made.said == [], "no block was compiled"
    assert weights == [0.0] * len(made.shapes)
    assert made.shown == ["compiling ..."] * (1 + evaluates) + [""]
    assert all(p.grad is None for p in made.scorer.parameters()) and not made.optimizer.state
    for p, old in zip(made.scorer.parameters(), before, strict=True):
        assert torch.equal(p.full_tensor(), old)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rows", "kept"), [(4, 4), (8, 0)])
def test_gradients_are_kept_between_microbatches_as_in_a_step_that_has_several(
    rows: int, kept: int, one: World
) -> None:
    made = Made(one, compiled=True, evaluates=False, loader=loader(rows=rows))
    assert {len(s.microbatches) for s in made.warm_up.loader.heaviest()} == {2 if kept else 1}
    (group,) = {each._fsdp_param_group for each in [made.blocks[0]._get_fsdp_state()]}
    held: list[int] = []

    def note(module: Any, given: Any) -> None:
        found = [p._unsharded_param.grad for p in group.fsdp_params] if torch.is_grad_enabled() else []
        held.append(sum(g.element_size() for g in found if g is not None) // max(1, len(found)))

    made.blocks[0].register_forward_pre_hook(note)
    made.warm_up()
    assert held == ([0, 0, kept] if kept else [0, 0]), "bytes a parameter when a microbatch begins"
    assert all(p.grad is None for p in made.scorer.parameters())


@pytest.mark.parametrize(("rows", "short"), [(4, 256), (2, 384)])
def test_what_is_compiled_is_traced_for_another_length_first(rows: int, short: int, one: World) -> None:
    made = Made(one, compiled=True, loader=loader(rows=rows))
    seen: list[tuple[int, bool]] = []
    made.blocks[0].register_forward_pre_hook(lambda module, given: seen.append((given[0].shape[1], only_traces.get())))
    made.warm_up()
    assert seen[0] == (short, True) and {traced for _, traced in seen[1:]} == {False}
    assert seen[1][0] == 128 * rows != short


@pytest.mark.parametrize(("attention", "compiles"), [("flex_by_reach", True), ("sdpa", False)])
def test_flex_attention_is_compiled_without_compiled_blocks_too(attention: str, compiles: bool, one: World) -> None:
    made = Made(one)
    made.scorer.model.config._attn_implementation = attention
    assert made.warm_up.compiles == compiles


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("most", "rows", "tokens"), [(1024, 4, 1024), (600, 2, 512), (400, 1, 256)])
def test_rows_are_halved_until_they_fit_and_training_is_as_if_nothing_had_happened(
    most: int, rows: int, tokens: int, where: str, one: World
) -> None:
    made = Made(one, loader=loader(row_length=256), compiled=True)

    def full(module: nn.Module, given: Any, output: Any) -> Any:
        if output.shape[1] <= most:
            return output
        return FailsInBackward.apply(output) if where == "backward" else fail()

    made.blocks[1].register_forward_hook(full)
    made.warm_up()
    assert made.warm_up.loader.row_layout.rows_per_microbatch == rows
    assert made.shapes[-2] == (tokens, True) and made.shapes[-1] == (tokens, False)
    halved = [line for line in made.said if "does not fit in the device's memory: halved" in line]
    assert len(halved) == {4: 0, 2: 1, 1: 2}[rows]
    assert made.said[-1] == f"microbatches of 1 x {tokens:,} tokens fit in the device's memory"
    fresh = Made(one, loader=made.warm_up.loader)
    for ours, theirs in zip(made.gradients(), fresh.gradients(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("halves", [True, False])
def test_one_row_that_does_not_fit_is_an_error_as_are_more_that_were_asked_for(halves: bool, one: World) -> None:
    made = Made(one, halves=halves, compiled=True)
    made.blocks[1].register_forward_hook(fail)
    with pytest.raises(OutOfMemory, match=r"out of memory with a microbatch of 1 rows of \d+ tokens"):
        made.warm_up()
    assert made.warm_up.loader.row_layout.rows_per_microbatch == (1 if halves else 4)


def test_joined_rows_that_a_step_does_not_fill_are_not_tried_twice(one: World) -> None:
    made = Made(one, loader=loader(rows=64))
    full = max(b.tokens.numel() for s in (1, 2) for b in made.warm_up.loader.step(s).microbatches)
    assert 4 < made.warm_up.rows() == -(-full // 128) < 20
    padded = Made(one, loader=loader(rows=3, joined=False))
    assert padded.warm_up.rows() == 3


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside Dynamo
def test_where_compiling_fails_the_run_goes_on_with_eager_blocks_and_says_so(
    one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(one, compiled=True, halves=False)

    def broken(graph: Any, given: Any) -> Any:
        raise RuntimeError("no C compiler found\nand 40 lines more")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend=broken: real(f, backend=backend))
    for block in made.blocks:
        compile_block(block)
    made.warm_up()
    (line,) = made.said
    assert line == (
        "torch.compile failed (BackendCompilerFailed: backend='broken' raised: RuntimeError: no C compiler found): the "
        "run continues with eager blocks, which is slower"
    )
    assert not made.warm_up.compiled
    fresh = Made(one, loader=made.warm_up.loader)
    for ours, theirs in zip(made.gradients(), fresh.gradients(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_of_the_model_itself_is_no_error_of_the_compiler(one: World) -> None:
    made = Made(one, compiled=True)

    def wrong(*_: Any) -> None:
        raise KeyError("sliding_attention")

    made.blocks[1].register_forward_hook(wrong)
    with pytest.raises(KeyError, match="sliding_attention"):
        made.warm_up()
    assert BackendCompilerFailed is not None


def test_memory_for_the_optimisers_state_is_held_while_rows_are_tried(
    one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(one)
    held: list[int] = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: held.append(t.nbytes) or real(t, **k))
    with reserved(made.optimizer):
        pass
    assert sum(held) == 2 * sum(p.numel() * 4 for p in made.scorer.parameters())
    held.clear()
    made.optimizer.state.update({p: {"step": 1} for p in made.scorer.parameters()})
    with reserved(made.optimizer):
        assert held == []


def test_where_one_rank_of_several_runs_out_of_memory_all_stop(one: World) -> None:
    """The others have begun to exchange what it never sends, so nothing may follow in these processes."""
    made = Made(one)
    asked: list[bool] = []
    made.warm_up = replace(made.warm_up, world=SimpleNamespace(any=lambda flag: asked.append(flag) or True, max=int))  # type: ignore[arg-type]
    for failed, flags in ((None, [False, True]), (OutOfMemory("no"), [True, False])):
        made.warm_up.__dict__["failed"] = lambda batch, training, failed=failed: failed
        asked.clear()
        with pytest.raises(OutOfMemory, match=r"fits on some ranks and not on others\. .*rows_per_microbatch=2"):
            made.warm_up.fits()
        assert asked == flags


def test_every_rank_tries_what_the_longest_of_all_has(one: World) -> None:
    made = Made(one)
    own = made.warm_up.loader.largest()
    made.warm_up = replace(made.warm_up, world=SimpleNamespace(max=lambda length: length + 128))  # type: ignore[arg-type]
    found = made.warm_up.largest()
    assert found.tokens.shape == (1, own.tokens.shape[1] + 128)
    with torch.no_grad():
        ours, theirs = (made.scorer(batch).nll for batch in (found, own))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    rows = collate(lay_out(random_examples(6, longest=20), "packed", 80), 4, 80)
    with torch.no_grad():
        ours, theirs = (made.scorer(batch).nll for batch in (lengthened(rows, 112), rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory"])
def test_memory_that_runs_out_while_a_kernel_is_loaded_is_memory_too(words: str) -> None:
    with pytest.raises(OutOfMemory, match="microbatch of 1 rows"), memory_for(collate([], 1, 8)):
        raise RuntimeError(words)


def test_a_backward_that_failed_leaves_nothing_for_the_next(one: World) -> None:
    made = Made(one)
    expected = made.gradients()
    failing = made.blocks[0].register_full_backward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        made.gradients()
    failing.remove()
    after_error(made.scorer)
    made.scorer.zero_grad()
    for ours, theirs in zip(made.gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)
