"""The objective over microbatches and ranks, training and evaluating, against plain transformers on separate rows."""

import time
from functools import partial, partialmethod
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.common.metrics import Metrics
from sftlab.data.batch import collate
from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS
from sftlab.data.loader import Loader, RowLayout, Step
from sftlab.data.plan import Plan
from sftlab.models.compiled import tracing
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.console import Console
from sftlab.training.ending import Ending
from sftlab.training.laps import Laps
from sftlab.training.settings import TrainerSettings
from sftlab.training.throughput import Throughput
from sftlab.training.trainer import Trainer
from sftlab.training.validation import LossEvaluator
from tests.support import random_examples, run_distributed, tiny_llama

Gradients = dict[str, np.ndarray]


def masked(e: Example) -> Example:
    return Example(e.tokens, np.zeros(len(e), bool), e.id, e.group)


def ragged(num: int = 8) -> list[Example]:
    """Return examples of unequal lengths of which some have one target and some have all: a mean of means is wrong."""
    out = []
    for i, e in enumerate(random_examples(num, seed=3)):
        supervised = np.zeros(len(e), bool)
        supervised[1 if i % 2 else -1 :] = True
        out.append(Example(e.tokens, supervised, e.id, e.group))
    return out


def silent() -> list[Example]:
    """Return three examples without a target but one: with two rows a rank or fewer, a rank has none."""
    first, *rest = ragged(4)
    return [first, *map(masked, rest)]


STEPS = {
    **{(name, layout, per): make for name, make in (("ragged", ragged), ("silent", silent)) for layout in LAYOUTS
       for per in (1, 8)},
}  # fmt: skip
EVALUATED = [("tree", 1, 4), ("tree", 4, 8), ("packed", 100, 1), ("padded", 4, 1), ("padded", 5, 8)]


def loader(world: Any, examples: list[Example], layout: str, per: int, batch_size: int) -> Loader:
    plan = Plan(np.array([e.group for e in examples]), batch_size, seed=0, shuffle=False, group_by_prefix=False)
    return Loader(examples, plan, RowLayout(layout, 128, per, world.rank, world.size, pad_token=2))


def trainer(world: Any, scorer: Scorer, seen: Gradients) -> Trainer:
    """Return a trainer whose updates change nothing and leave the gradients in `seen`."""
    optimizer = torch.optim.SGD(scorer.parameters(), lr=0.0)

    def note(*_: Any) -> None:
        for name, p in scorer.model.named_parameters():
            seen[name] = cast(Any, p.grad).full_tensor().numpy()

    optimizer.register_step_pre_hook(note)
    unused: Any = None
    return Trainer(
        scorer=scorer,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        loader=unused,
        evaluators=[],
        checkpoints=unused,
        metrics=Metrics(None),
        console=Console(1, None, quiet=True),
        throughput=Throughput(scorer, world, Laps(scorer, optimizer, world.device)),
        world=world,
        settings=TrainerSettings(batch_size=1, clip_grad_norm=None),
        ending=Ending(world=world, last_step=1),
        stop=unused,
        warm_up=unused,
        around=unused,
    )


def everything(world: Any) -> dict[Any, Any]:
    """Return what one step of each kind gives on this rank, and every evaluation."""
    model = tiny_llama().config
    model._attn_implementation = "sdpa"
    scorer = fsdp2(Scorer(skeleton(model)), world, param_dtype="float32")
    broadcast_weights(scorer, partial(tiny_llama), world)
    found: dict[Any, Any] = {}
    for (name, layout, per), make in STEPS.items():
        seen: Gradients = {}
        examples = make()
        step = loader(world, examples, layout, per, len(examples)).step(1)
        values = {**trainer(world, scorer, seen).train_step(1, step).read(), "train/targets": step.num_targets}
        shapes = [len(step.microbatches), sum(int(b.weight.sum()) for b in step.microbatches)]
        found[name, layout, per] = (values, {n: g.copy() for n, g in seen.items()}, shapes)
    for layout, batch_size, per in EVALUATED:
        examples = [*ragged(11), *silent()]
        given = loader(world, examples, layout, per, batch_size)
        evaluate = LossEvaluator(scorer, examples, given.plan, given.row_layout, world)
        found[layout, batch_size, per, "val"] = dict(evaluate().scores)
    return found


@pytest.fixture(scope="module")
def on(one: Any) -> dict[int, list[dict[Any, Any]]]:
    """What every rank found, by the number of ranks."""
    return {1: [everything(one)], 2: run_distributed(everything, 2), 4: run_distributed(everything, 4)}


def plain(examples: list[Example]) -> tuple[float, Gradients, int, int]:
    """Return loss, gradients, right guesses and targets of transformers on one row at a time, labels -100 if masked."""
    model = tiny_llama()
    count = sum(int(e.supervised.sum()) for e in examples)
    loss, correct = torch.zeros(()), 0
    for e in examples:
        ids = torch.from_numpy(e.tokens.astype(np.int64))
        labels = torch.where(torch.from_numpy(e.supervised), ids, -100)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        correct += int((logits.argmax(-1) == labels).sum())
    (loss / count).backward()
    gradients = {name: cast(Any, p.grad).numpy() for name, p in model.named_parameters()}
    return float(loss.detach() / count), gradients, correct, count


def same(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=2e-4, atol=2e-6 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gauntlet_01_one_microbatch_of_8_and_8_of_one_have_the_same_gradients(layout: str, on: Any) -> None:
    loss, gradients, _, count = plain(ragged())
    (found,) = on[1]
    for per in (1, 8):
        values, ours, (num, targets) = found["ragged", layout, per]
        if layout == "padded":
            assert num == 8 // per
        assert targets == values["train/targets"] == count
        assert values["train/loss"] == pytest.approx(loss, rel=1e-6)
        same(ours, gradients)
    several, single = (found["ragged", layout, per][2][0] for per in (1, 8))
    assert several > single == 1


@pytest.mark.parametrize("name", ["ragged", "silent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gauntlet_02_any_number_of_ranks_has_the_same_gradients(name: str, layout: str, on: Any) -> None:
    make = {"ragged": ragged, "silent": silent}[name]
    loss, gradients, _, count = plain(make())
    for ranks in (1, 2, 4):
        for per in (1, 8):
            here = [found[name, layout, per] for found in on[ranks]]
            targets = [shape[1] for _, _, shape in here]
            assert sum(targets) == count
            if ranks > 1 and layout == "padded":
                assert len(set(targets)) > 1  # uneven
                assert name == "ragged" or targets.count(0) == ranks - 1  # some ranks have none
            for values, ours, shape in here:
                assert shape[0] == here[0][2][0]  # as many microbatches on every rank, or collectives hang
                assert values["train/loss"] == pytest.approx(loss, rel=1e-6)
                assert values["train/targets"] == count
                same(ours, gradients)


def test_gauntlet_03_the_denominator_counts_predictions_and_a_short_last_window_is_right(one: Any) -> None:
    examples = ragged(14)
    scorer = Scorer(tiny_llama())
    scorer.model.config._attn_implementation = "sdpa"
    scorer = fsdp2(scorer, one, param_dtype="float32")
    for layout in LAYOUTS:
        given = loader(one, examples, layout, 4, batch_size=6)
        assert given.plan.steps_per_epoch == 3
        for step, chosen in ((1, examples[:6]), (3, examples[12:]), (4, examples[:6])):
            seen: Gradients = {}
            data = given.step(step)
            values = trainer(one, scorer, seen).train_step(step, data).read()
            loss, gradients, _, count = plain(chosen)
            assert data.num_targets == count and data.num_examples == len(chosen)
            assert values["train/loss"] == pytest.approx(loss, rel=1e-6)
            same(seen, gradients)


@pytest.mark.parametrize(("layout", "batch_size", "per"), EVALUATED)
def test_gauntlet_04_the_evaluation_loss_depends_on_nothing_but_model_and_data(
    layout: str, batch_size: int, per: int, on: Any
) -> None:
    loss, _, correct, count = plain([*ragged(11), *silent()])
    for ranks in (1, 2, 4):
        for found in on[ranks]:
            scores = found[layout, batch_size, per, "val"]
            assert scores["loss"] == pytest.approx(loss, rel=1e-6)
            assert scores["token_accuracy"] == pytest.approx(correct / count, abs=1e-9)
            assert scores["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gauntlet_05_a_microbatch_without_a_target_is_no_nan_and_no_zero(layout: str, on: Any) -> None:
    loss, gradients, _, count = plain(silent()[:1])
    for ranks in (1, 2, 4):
        for found in on[ranks]:
            values, ours, _ = found["silent", layout, 1]
            assert values["train/targets"] == count
            assert values["train/loss"] == pytest.approx(loss, rel=1e-6) and loss > 1
            assert np.isfinite(values["train/grad_norm"])
            same(ours, gradients)


def test_gauntlet_26_tokens_effective_tokens_and_targets_are_three_numbers(one: Any, monkeypatch: Any) -> None:
    examples = ragged(12)
    alone = sum(map(len, examples))
    targets = sum(int(e.supervised.sum()) for e in examples)
    numbers: dict[str, tuple[int, ...]] = {}
    for layout in LAYOUTS:
        for ranks in (1, 3):
            arrangers = [RowLayout(layout, 128, 2, r, ranks, pad_token=2) for r in range(ranks)]
            steps: list[Step] = [a.arrange(examples, np.arange(12)) for a in arrangers]
            through = sum(b.tokens.numel() for s in steps for b in s.microbatches)  # padding of every rank included
            for s in steps:
                assert (s.num_tokens, s.num_effective_tokens, s.num_targets) == (through, alone, targets)
                assert s.num_examples == 12 == sum(b.num_examples for s in steps for b in s.microbatches)
                assert s.num_nodes == sum(b.num_tokens for s in steps for b in s.microbatches)
            numbers[layout] = (through, steps[0].num_nodes)
            small = Scorer(tiny_llama())
            meter = Throughput(small, one, Laps(small, torch.optim.SGD(small.parameters()), one.device))
            clock = iter([100.0, 102.0])
            monkeypatch.setattr("sftlab.training.throughput.time.perf_counter", lambda clock=clock: next(clock))
            meter.began_s = time.perf_counter()
            meter.add(steps[-1])
            rates = meter.take_rates()
            monkeypatch.undo()
            assert rates["perf/tokens_per_s"] == through / 2
            assert rates["perf/effective_tokens_per_s"] == alone / 2
            assert rates["perf/targets_per_s"] == targets / 2
            assert rates["perf/examples_per_s"] == 6
    assert numbers["tree"][1] < alone == numbers["packed"][1] == numbers["padded"][1]
    assert alone < numbers["padded"][0] and targets < alone


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks, we do not
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gauntlet_27_nothing_is_compiled_after_warm_up(layout: str, one: Any, monkeypatch: Any) -> None:
    """Dynamo's guards decide what is compiled for, whatever the backend. Without fixed shapes a lone row, which Dynamo
    treats apart, compiles once more.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    scorer = Scorer(tiny_llama())
    scorer.model.config._attn_implementation = "sdpa"
    scorer = fsdp2(scorer, one, param_dtype="float32", compile=True)
    examples = random_examples(40, seed=5, longest=240)
    plan = Plan(np.arange(len(examples)), 3, seed=0, shuffle=True, group_by_prefix=False)
    made = Loader(examples, plan, RowLayout(layout, 512, 2, 0, 1, pad_token=2, fixed_shapes=True))
    with torch.no_grad(), tracing():
        scorer(collate([], 2, 256))
    scorer(made.largest()).nll.backward()  # as the warm-up does
    scorer.zero_grad(set_to_none=True)
    shapes = []
    for step in range(1, 2 * plan.steps_per_epoch):
        data = made.step(step)
        shapes.append({tuple(b.tokens.shape) for b in data.microbatches})
        with torch.compiler.set_stance("fail_on_recompile"):
            trainer(one, scorer, {}).train_step(step, data)
    assert len(set.union(*shapes)) > 1 and sum(len(b.at) for b in data.microbatches) > 0
