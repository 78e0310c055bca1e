"""The trainer: what happens at which step, in which order, and the arithmetic of one step by hand."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sftlab.data.example import Example
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.models.scorer import Score, Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import World
from sftlab.training.ending import Ending
from sftlab.training.faults import NonFinite, OutOfMemory
from sftlab.training.optim import adamw
from sftlab.training.settings import TrainerSettings
from sftlab.training.trainer import Launched, Trainer
from sftlab.training.validation import Evaluation, Sample
from tests.support import random_examples, tiny_llama

Event = tuple[Any, ...]


class Two(nn.Module):
    """A scorer of two parameters, 1 and -2, whose microbatches say what their nll is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.synced: list[bool] = []

    def set_requires_gradient_sync(self, flag: bool) -> None:
        self.synced.append(flag)

    def forward(self, batch: "Microbatch") -> Score:
        return Score(batch.nll(self.w), torch.zeros(()))


@dataclass(frozen=True)
class Microbatch:
    """A microbatch whose nll is a function of the parameters."""

    nll: Callable[[Tensor], Tensor]
    devices: list[Any] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(3, 7))
    at: tuple[int, ...] = (0, 0)

    def to(self, device: Any) -> "Microbatch":
        self.devices.append(device)
        return self


def step_of(*nlls: Callable[[Tensor], Tensor], num_targets: float = 4.0, first: int = 0) -> Any:
    return SimpleNamespace(
        microbatches=[Microbatch(nll) for nll in nlls],
        num_targets=num_targets,
        num_examples=5,
        indices=np.arange(first, first + 2),
    )


@dataclass
class Around:
    """Everything around the trainer: it notes what is asked of it, and the clock goes on as the test says."""

    events: list[Event] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    restored: dict[str, Any] | None = None
    scores: dict[str, float] = field(default_factory=lambda: {"loss": 3.0})
    samples: tuple[Sample, ...] = (Sample("a", "p", "x", ("y",)),)
    stop_after: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    now_s: float = 1000.0
    step_s: float = 10.0
    evaluation_s: float = 100.0
    at_step: int = 0

    # The checkpoints.
    took_s = 0.0

    def restore(self, scorer: Any, optimizer: Any) -> dict[str, Any] | None:
        self.events.append(("restore",))
        return self.restored

    def save(self, step: int, scorer: Any, optimizer: Any, progress: dict[str, Any]) -> None:
        self.events.append(("save", step, progress))

    def wait(self) -> None:
        self.events.append(("wait",))

    def check(self, on_failed_save: str) -> None:
        self.events.append(("check", on_failed_save))

    # The metrics.
    def cut(self, step: int) -> None:
        self.events.append(("cut", step))

    def write_numbers(self, step: int, time_s: float, values: dict[str, float]) -> None:
        self.last |= values
        self.events.append(("write", step, time_s, dict(values)))

    # The loader.
    def steps(self, first: int, last: int) -> Iterator[Any]:
        for step in range(first, last + 1):
            self.now_s += self.step_s
            self.at_step = step
            self.events.append(("step", step))
            yield step_of(lambda w: 0 * w.sum())

    # What it is told to stop by.
    def agreed(self) -> bool:
        return self.at_step == self.stop_after

    def leave(self, say: Any) -> None:
        say("leaving")
        self.events.append(("leave",))
        raise SystemExit(75)

    # The throughput.
    @contextmanager
    def paused(self) -> Iterator[None]:
        self.events.append(("paused",))
        yield
        self.events.append(("goes on",))

    def evaluate(self) -> Evaluation:
        self.events.append(("evaluate",))
        self.now_s += self.evaluation_s
        return Evaluation(self.scores, self.samples)

    def kinds(self, *which: str) -> list[Event]:
        return [e[:2] for e in self.events if e[0] in which]


def trainer(
    around: Around, world: World, max_steps: int = 11, optimizer: Any = None, scorer: Any = None, **settings: Any
) -> Trainer:
    def note(name: str) -> Callable[..., None]:
        return lambda *given: around.events.append((name, *given))

    made: Any = scorer or Two()
    collaborators: dict[str, Any] = {
        "loader": SimpleNamespace(
            steps=around.steps,
            plan=SimpleNamespace(steps_per_epoch=4),
            examples=[SimpleNamespace(id=f"e{i}") for i in range(9)],
        ),
        "evaluators": [around.evaluate],
        "checkpoints": around,
        "metrics": SimpleNamespace(
            cut=around.cut,
            at_start=lambda sample: ({}, []),
            write_numbers=around.write_numbers,
            write_answers=note("answers"),
            last=around.last,
        ),
        "console": SimpleNamespace(
            say=around.said.append,
            working=lambda text: None,
            step=note("shown"),
            evaluation=note("shown evaluation"),
            recall=lambda *_: None,
        ),
        "throughput": SimpleNamespace(add=note("add"), paused=around.paused, take_rates=lambda: {"perf/x": 1.0}),
        "stop": SimpleNamespace(agreed=around.agreed, leave=around.leave, steps=nullcontext, interrupted=lambda: False),
        "warm_up": note("warmed up"),
        "around": lambda steps: steps,
    }
    return Trainer(
        scorer=made,
        optimizer=optimizer or torch.optim.SGD(made.parameters(), lr=0.1),
        schedule=lambda step: 1 / step,
        world=world,
        settings=TrainerSettings(**{"batch_size": 1, **settings}),
        ending=Ending(world=world, last_step=max_steps),
        **collaborators,
    )


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Around:
    made = Around()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now_s)
    return made


def test_eleven_steps_logged_every_4_evaluated_every_3_saved_every_7(around: Around, one: World) -> None:
    made = trainer(around, one, log_every=4, eval_every=3, save_every=7, on_failed_save="stop")
    assert made.fit() == 3.0
    happened = around.kinds("restore", "cut", "step", "shown", "shown evaluation", "save")
    expected: list[Event] = [("restore",), ("cut", 0), ("shown evaluation", 0)]
    for step in range(1, 12):
        expected.append(("step", step))
        expected += [("shown", step)] if step in (4, 8, 11) else []
        expected += [("shown evaluation", step)] if step in (3, 6, 9, 11) else []
        expected += [("save", step)] if step in (7, 11) else []
    assert happened == expected
    assert around.kinds("check") == [("check", "stop")] * 12  # after every step, and at the end
    assert around.events[-2:] == [("wait",), ("check", "stop")]
    # A step takes 10 s, an evaluation 100; that before training does not count.
    times = {(e[1], "train/loss" in e[3]): e[2] for e in around.events if e[0] == "write"}
    assert times == {
        (0, False): 0.0, (3, False): 130.0, (4, True): 140.0, (6, False): 260.0, (8, True): 280.0, (9, False): 390.0,
        (11, True): 410.0, (11, False): 510.0,
    }  # fmt: skip


def test_a_failed_save_at_the_end_is_an_error_though_the_run_would_go_on(around: Around, one: World) -> None:
    trainer(around, one, max_steps=2).fit()
    assert around.kinds("check") == [("check", "continue"), ("check", "continue"), ("check", "stop")]


def test_by_default_all_is_logged_and_the_rest_happens_at_the_end(around: Around, one: World) -> None:
    trainer(around, one, max_steps=3).fit()
    assert around.kinds("shown") == [("shown", 1), ("shown", 2), ("shown", 3)]
    assert around.kinds("shown evaluation") == [("shown evaluation", 0), ("shown evaluation", 3)]
    assert around.kinds("save") == [("save", 3)]


def test_a_run_that_is_resumed_goes_on_after_its_checkpoint(around: Around, one: World) -> None:
    around.restored = {"step": 5, "time_s": 77.0, "skipped": [{"step": 2, "examples": ["e1"]}]}
    made = trainer(around, one, max_steps=7, save_every=6)
    made.fit()
    assert around.kinds("cut", "step", "shown evaluation", "save") == [
        ("cut", 5), ("step", 6), ("save", 6), ("step", 7), ("shown evaluation", 7), ("save", 7),
    ]  # fmt: skip
    first, last = (e[2] for e in around.events if e[0] == "save")
    assert (first["time_s"], last["time_s"]) == (87.0, 197.0)
    assert first["skipped"] == [{"step": 2, "examples": ["e1"]}]


def test_a_finished_run_that_is_resumed_does_nothing_more(around: Around, one: World) -> None:
    around.restored = {"step": 3, "time_s": 1.0, "skipped": []}
    trainer(around, one, max_steps=3).fit()
    assert around.kinds("step", "save", "evaluate") == []


def test_a_run_that_is_told_to_stop_saves_after_this_step_and_leaves(around: Around, one: World) -> None:
    around.stop_after = 5
    with pytest.raises(SystemExit):
        trainer(around, one, log_every=5, eval_every=4).fit()
    after = around.events[around.events.index(("step", 5)) :]
    assert [e[0] for e in after] == ["step", "add", "write", "shown", "save", "wait", "leave"]
    assert around.said == ["leaving"]


@pytest.mark.parametrize(
    ("scores", "expected"), [({"loss": 2.5}, 2.5), ({"f1": 0.5}, 0.0), ({}, 0.0)], ids=["loss", "no loss", "nothing"]
)
def test_the_score_is_the_validation_loss_or_else_the_training_loss(
    scores: dict[str, float], expected: float, around: Around, one: World
) -> None:
    around.scores = scores
    assert trainer(around, one, max_steps=2).fit() == expected


def test_a_score_that_nobody_has_is_not_a_number(around: Around, one: World) -> None:
    around.restored = {"step": 2, "time_s": 1.0, "skipped": []}
    assert math.isnan(trainer(around, one, max_steps=2).fit())


def test_what_evaluators_find_is_written_shown_and_remembered(around: Around, one: World) -> None:
    made = trainer(around, one)
    other = Sample("b", "q", "z", ("w",))
    made.evaluators = [around.evaluate, lambda: Evaluation({"f1": 0.25}, [other])]
    made.began_s = around.now_s - 7
    made.evaluate(6)
    scores, samples = {"val/loss": 3.0, "val/f1": 0.25}, [*around.samples, other]
    assert around.events == [
        ("paused",), ("evaluate",), ("goes on",), ("write", 6, 107.0, scores),
        ("shown evaluation", 6, scores, samples), ("answers", 6, samples),
    ]  # fmt: skip
    assert made.scored == (6, 3.0)


def test_without_evaluators_nothing_is_written(around: Around, one: World) -> None:
    made = trainer(around, one)
    made.evaluators = []
    made.evaluate(6)
    assert around.events == [("paused",), ("goes on",), ("answers", 6, [])]
    assert made.scored[0] == 6 and math.isnan(made.scored[1])


@pytest.mark.parametrize(
    ("scored", "score"), [((9, 1.5), 1.5), ((8, 1.5), None), ((9, math.nan), None), ((9, math.inf), None)]
)
def test_what_a_checkpoint_keeps_beside_tensors(
    scored: tuple[int, float], score: float | None, around: Around, one: World
) -> None:
    made = trainer(around, one)
    made.scored, made.skipped = scored, [{"step": 2}]
    made.spent_s, made.began_s = 5.0, around.now_s - 3
    progress = made.progress(9)
    assert progress == {
        "time_s": 8.0,
        "score": score,
        "skipped": [{"step": 2}],
        "cut_short": False,
        "ending": {"best": None, "best_step": 0, "misses": 0, "max_hours": None},
        "next": {"epoch": 2, "step_in_epoch": 1},  # 4 steps an epoch: the tenth step is the second of the third
    }
    made.skipped.append({"step": 10})
    assert progress["skipped"] == [{"step": 2}], "what is being written does not change meanwhile"


def by_hand(**settings: Any) -> tuple[list[Callable[[Tensor], Tensor]], list[float], float]:
    """Return three microbatches, their gradient and loss over 4 targets at (1, -2)."""
    nlls: list[Callable[[Tensor], Tensor]] = [lambda w: 2 * 3 * w[0], lambda w: w[1], lambda w: w[0] + w[1]]
    return nlls, [7 / 4, 2 / 4], (6 - 2 - 1) / 4


@pytest.mark.parametrize("most", [None, 0.5, 5.0])
def test_one_update_by_hand(most: float | None, around: Around, one: World) -> None:
    nlls, gradient, loss = by_hand()
    scorer = Two()
    optimizer = torch.optim.SGD([{"params": [scorer.w]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)
    made = trainer(around, one, scorer=scorer, optimizer=optimizer, clip_grad_norm=most)
    data = step_of(*nlls)
    values = made.train_step(4, data).read()
    norm = (1.75**2 + 0.5**2) ** 0.5  # 1.82
    assert values == {"train/loss": pytest.approx(loss), "train/grad_norm": pytest.approx(norm)}
    clipped = 0.5 / norm if most == 0.5 else 1.0
    assert scorer.w.tolist() == pytest.approx([w - 0.025 * clipped * g for w, g in zip((1, -2), gradient, strict=True)])
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.025]
    assert scorer.synced == [False, False, True], "ranks meet once a step, at its last microbatch"
    assert [b.devices for b in data.microbatches] == [[one.device]] * 3
    assert scorer.w.grad is None and around.events == []
    made.train_step(8, data)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8, "a factor of the first rate, not of the last"


def test_the_schedule_is_a_factor_on_every_groups_own_rate(around: Around, one: World) -> None:
    scorer = Two()
    other = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [scorer.w], "lr": 0.25}, {"params": [other], "lr": 8.0}])
    made = trainer(around, one, scorer=scorer, optimizer=optimizer)
    for step in (2, 4):
        launch(made, step, step_of(lambda w: w.sum()))
        made.read_steps(leave=0)
        assert around.last["train/lr"] == 0.25 / step
        assert [g["lr"] for g in optimizer.param_groups] == [0.25 / step, 8.0 / step]


def test_a_step_without_a_target_has_a_loss_of_zero(around: Around, one: World) -> None:
    values = trainer(around, one).train_step(1, step_of(lambda w: 0 * w.sum(), num_targets=0.0))
    assert values.read()["train/loss"] == 0.0


# At (1, -2): a loss that is no number, one that is infinite, and a finite loss with an infinite gradient.
SPOILED = [lambda w: w[0] * math.nan, lambda w: w[0] / 0, lambda w: torch.sqrt(w[0] - 1)]


def launch(made: Trainer, step: int, data: Any) -> None:
    made.launched.append(Launched(step, data, made.train_step(step, data)))


def sgd(scorer: Two) -> torch.optim.Optimizer:
    return torch.optim.SGD(scorer.parameters(), lr=0.1)


def fused_adamw(scorer: Two) -> torch.optim.Optimizer:
    return torch.optim.AdamW(scorer.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("made_by", [sgd, fused_adamw])
@pytest.mark.parametrize("spoiled", SPOILED, ids=["nan", "infinite loss", "infinite gradient"])
def test_a_step_that_is_no_number_changes_nothing_but_is_counted(
    spoiled: Any, made_by: Any, around: Around, one: World
) -> None:
    scorer = Two()
    made = trainer(around, one, scorer=scorer, optimizer=made_by(scorer), skip_nonfinite=1)
    launch(made, 3, step_of(spoiled, first=4))
    assert scorer.w.tolist() == [1.0, -2.0] and scorer.w.grad is None
    made.read_steps(leave=0)
    assert made.skipped == [{"step": 3, "examples": ["e4", "e5"]}]
    assert around.said[0].startswith("step 3: skipped, loss ") and around.said[0].endswith("; examples: e4, e5")
    assert [e[0] for e in around.events] == ["add", "write", "shown"]
    launch(made, 4, step_of(lambda w: w.sum()))
    assert scorer.w.tolist() != [1.0, -2.0], "and the next is as ever"
    launch(made, 5, step_of(spoiled, first=6))
    with pytest.raises(NonFinite, match=r"step 5: .* 1 earlier steps were skipped .* e6, e7\. Lower"):
        made.read_steps(leave=0)
    assert len(made.skipped) == 1


def test_a_step_left_out_does_not_count_in_adamws_bias_correction(around: Around, one: World) -> None:
    found = []
    for steps in (
        [lambda w: w.square().sum()] * 2,
        [lambda w: w.square().sum(), SPOILED[0], lambda w: w.square().sum()],
    ):
        scorer = Two()
        made = trainer(around, one, scorer=scorer, optimizer=fused_adamw(scorer))
        made.schedule = lambda step: 1.0
        for step, nll in enumerate(steps, 1):
            made.train_step(step, step_of(nll))
        found.append(scorer.w.tolist())
    assert found[0] == found[1]


def test_on_a_gpu_the_host_reads_a_step_later_and_everything_before_it_evaluates_or_saves(
    around: Around, one: World
) -> None:
    made = trainer(around, one, max_steps=6, eval_every=4, save_every=2)
    assert made.lag == 0, "a CPU has nothing to wait for"
    made.lag = 1
    made.fit()
    assert around.kinds("step", "write", "evaluate", "save") == [
        ("evaluate",), ("write", 0), ("step", 1), ("step", 2), ("write", 1), ("write", 2), ("save", 2), ("step", 3),
        ("step", 4), ("write", 3), ("write", 4), ("evaluate",), ("write", 4), ("save", 4), ("step", 5), ("step", 6),
        ("write", 5), ("write", 6), ("evaluate",), ("write", 6), ("save", 6),
    ]  # fmt: skip
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), size=1)
    assert trainer(around, gpu).lag == 1


def test_on_a_gpu_a_spoiled_step_is_named_one_step_later_at_the_most(around: Around, one: World) -> None:
    made = trainer(around, one, max_steps=9)
    made.evaluators, made.lag, around.stop_after = [], 1, 99
    given = iter(range(9))

    def steps(first: int, last: int) -> Iterator[Any]:
        for step in range(first, last + 1):
            around.events.append(("step", step))
            yield step_of(SPOILED[0] if step == 4 else lambda w: w.sum(), first=next(given) % 4)

    made.loader.steps = steps  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match=r"^step 4: .* e3, e4\."):
        made.fit()
    assert around.kinds("step")[-1] == ("step", 5) and around.kinds("write")[-1] == ("write", 3)


class ReadBack(TorchDispatchMode):
    """Note every operation that makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "item", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device(one: World, around: Around) -> None:
    """On a GPU each of these would make the device idle. Masks, head, norm, clipping and AdamW are the run's own."""
    scorer = fsdp2(Scorer(tiny_llama(attn_implementation="sdpa"), chunk=7), one)
    scorer.scored_only = ()  # as on a GPU
    made = trainer(around, one, scorer=scorer, optimizer=adamw(scorer, lr=1e-3), clip_grad_norm=0.1)
    examples = random_examples(6, longest=30)
    data = RowLayout("tree", 64, 1, 0, 1, 2).arrange(examples, np.arange(6))
    assert len(data.microbatches) > 1
    made.train_step(1, data)  # AdamW's state is made in its first step
    with ReadBack() as reads:
        arriving = made.train_step(2, data)
    assert reads.found == []
    with ReadBack() as reads:
        float(torch.ones(()))
    assert reads.found == ["aten._local_scalar_dense.default"], "the instrument sees what it is for"
    assert arriving.read()["train/loss"] > 0


def test_the_garbage_collector_runs_between_steps_only(
    around: Around, one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, inside, collected = trainer(around, one, max_steps=120), [False], []
    real = made.train_step

    def stepping(step: int, data: Any) -> Any:
        inside[0] = True
        for _ in range(3000):
            cycle: list[Any] = []
            cycle.append(cycle)
        values = real(step, data)
        inside[0] = False
        return values

    monkeypatch.setattr(made, "train_step", stepping)
    was_on = gc.isenabled()
    gc.callbacks.append(lambda phase, info: collected.append(inside[0]))
    try:
        made.fit()
    finally:
        gc.callbacks.pop()
    assert collected and not any(collected)
    assert gc.isenabled() == was_on and gc.get_freeze_count() == 0


def test_running_out_of_memory_in_a_step_says_with_which_microbatch(around: Around, one: World) -> None:
    def fails(w: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="a microbatch of 3 rows of 7 tokens, 2 predictions"):
        trainer(around, one).train_step(1, step_of(lambda w: w.sum(), fails))


@pytest.mark.parametrize(("restored", "runs"), [(0, True), (10, True), (11, False)])
def test_a_run_that_has_steps_left_is_warmed_up_before_anything_else(
    restored: int, runs: bool, around: Around, one: World
) -> None:
    around.restored = {"step": restored, "time_s": 1.0, "skipped": []}
    trainer(around, one).fit()
    assert around.kinds("warmed up", "step", "evaluate")[:1] == ([("warmed up",)] if runs else [])


@pytest.mark.parametrize(("layout", "per"), [("padded", 1), ("padded", 3), ("packed", 1)])
@pytest.mark.parametrize("known", [True, False])
def test_the_largest_microbatch_is_the_largest_of_all_wherever_it_lies(layout: str, per: int, known: bool) -> None:
    """The longest example lies in the fourth of 12 steps, the most tokens in the ninth."""
    lengths = np.full(36, 5)
    lengths[10], lengths[24:27] = 60, (50, 50, 50)
    examples = [Example(np.full(n, i, np.int32), np.arange(n) > n // 2, f"e{i}") for i, n in enumerate(lengths)]
    plan = Plan(np.arange(36), 3, 0, shuffle=False, group_by_prefix=False)
    loader = Loader(examples, plan, RowLayout(layout, 160, per, 0, 1, 2), lengths if known else None)
    sizes = {s: [b.tokens.numel() for b in loader.step(s).microbatches] for s in range(1, 13)}
    largest = max(max(of) for of in sizes.values())
    assert largest not in (sizes[1][0], sizes[12][-1])
    assert loader.largest().tokens.numel() == largest


def test_of_microbatches_of_one_size_the_one_with_most_predictions_is_the_largest() -> None:
    examples = [Example(np.arange(16, dtype=np.int32), np.arange(16) >= 16 - n, "") for n in (1, 2, 9, 3)]
    plan = Plan(np.arange(4), 2, 0, shuffle=False, group_by_prefix=False)
    loader = Loader(examples, plan, RowLayout("padded", 16, 1, 0, 1, 2))
    assert len(loader.largest().at) == 9


@dataclass(frozen=True)
class Second(World):
    """A rank that is told what the first one has."""

    def broadcast(self, value: Any) -> Any:
        return ("told", value)


def test_every_rank_has_the_score_of_the_first(around: Around, one: World) -> None:
    """Only the first reads the metrics of a run that is resumed after its last step."""
    around.restored = {"step": 2, "time_s": 1.0, "skipped": []}
    around.last["val/loss"] = 2.5
    told: Any = trainer(around, Second(**vars(one)), max_steps=2).fit()
    assert told == ("told", 2.5)
