"""Windows and parts, on a trainer that only sleeps: what is waited for is what is counted."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.benchmarking.parts import Stopwatch, is_collective, part_shares, watched
from sftlab.benchmarking.results import COMPARED, changes
from sftlab.benchmarking.windows import Steps, rates
from sftlab.data.loader import Step
from sftlab.training.arriving import send

CPU = torch.device("cpu")


class Scorer(torch.nn.Module):
    """Takes `forward_s` forward and `backward_s` backward."""

    def __init__(self, clock: "Clock", forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.clock, self.forward_s, self.backward_s = clock, forward_s, backward_s
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: object) -> torch.Tensor:
        self.clock.now_s += self.forward_s
        out = self.weight * 2
        out.register_hook(self._back)
        return out

    def _back(self, gradient: torch.Tensor) -> torch.Tensor:
        self.clock.now_s += self.backward_s
        return gradient


class Clock:
    now_s = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now_s)
    return made


def steps_of(
    clock: Clock, wait_s: float = 0.0, update_s: float = 0.0, microbatches: int = 2, loss: float = 6.0, lag: int = 0
) -> Steps:
    """Return steps that wait for their data, then take 1 s forward and 3 s backward per microbatch, then update."""
    scorer = Scorer(clock, 1.0, 3.0)
    made: dict[str, Any] = {"microbatches": [None] * microbatches, "num_rows": 1, "pairs": 0, "indices": np.arange(0)}
    counts = {"num_targets": 5, "num_examples": 4, "num_tokens": 100, "num_effective_tokens": 160, "num_nodes": 80}

    def loaded() -> Any:
        while True:
            clock.now_s += wait_s
            yield Step(**made, **counts, num_predictions=0)

    def train_step(step: int, data: Step) -> Any:
        for batch in data.microbatches:
            scorer(batch).backward()
        clock.now_s += update_s
        return send(("train/loss",), [torch.tensor(loss / step)])

    trainer: Any = SimpleNamespace(
        world=SimpleNamespace(device=CPU),
        loader=SimpleNamespace(steps=lambda first, last: loaded()),
        ending=SimpleNamespace(last_step=9),
        scorer=scorer,
        train_step=train_step,
        lag=lag,
    )
    return Steps(trainer)


def test_a_window_counts_its_steps_its_seconds_and_its_waiting(clock: Clock) -> None:
    window = steps_of(clock, wait_s=0.5, update_s=1.5).window(4)
    assert window.wall_s == 4 * (0.5 + 8 + 1.5) and window.wait_s == 2.0
    assert window.step_s == [10.0] * 4 and window.rate("num_examples") == 0.4


def test_losses_are_read_a_step_late_where_the_trainer_does_and_a_nan_ends_the_benchmark(clock: Clock) -> None:
    steps = steps_of(clock, lag=1)
    steps.window(3)
    assert steps.losses == [6.0, 3.0] and len(steps.launched) == 1
    with pytest.raises(ArithmeticError, match="step 1 has the loss nan"):
        steps_of(clock, loss=float("nan")).window(1)


def test_rates_are_medians_over_windows_and_padding_is_no_work(clock: Clock) -> None:
    steps = steps_of(clock, update_s=2.0)
    windows = [steps.window(2), steps.window(2), steps.window(2)]
    windows[1].wall_s *= 2
    flops: Any = SimpleNamespace(of=lambda step: 1000.0)
    found = rates(windows, flops)
    assert found["examples_per_s"] == 0.4 and found["examples_per_s_windows"] == [0.4, 0.2, 0.4]
    assert found["spread"] == pytest.approx(0.5) and found["flops_per_s"] == 100.0
    assert (found["tokens_per_s"], found["example_tokens_per_s"], found["supervised_per_s"]) == (10.0, 16.0, 0.5)
    assert found["padding"] == pytest.approx(0.2) and found["tokens_per_example"] == 40
    assert found["shared_tokens_per_example"] == 20 and found["microbatches_per_step"] == 2


def test_the_parts_of_a_step_are_its_forwards_its_backwards_and_the_rest(clock: Clock) -> None:
    shares = part_shares(steps_of(clock, update_s=2.0), 3, data_share=0.2)
    assert shares == pytest.approx({"data": 0.2, "forward": 0.16, "backward": 0.48, "optimiser": 0.16})


def test_watching_ends(clock: Clock) -> None:
    real = torch.Tensor.backward
    scorer = Scorer(clock, 1.0, 3.0)
    watch = Stopwatch(CPU)
    with pytest.raises(KeyError), watched(scorer, watch):
        scorer(None).backward()
        raise KeyError
    scorer(None).backward()
    assert watch.seconds == {"forward": 1.0, "backward": 3.0} and torch.Tensor.backward is real


def test_collectives_are_kernels_of_nccl_and_gloos_own_work() -> None:
    assert is_collective("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", cuda=True)
    assert not is_collective("nccl:_reduce_scatter_base", cuda=True)  # an annotation around the same kernel
    assert is_collective("gloo:all_gather", cuda=False) and not is_collective("c10d::allreduce_", cuda=False)


def test_a_change_is_a_regression_beyond_its_tolerance_and_only_for_the_worse() -> None:
    def layouts(rate: float, memory: float, first: float) -> dict[str, Any]:
        return {"layouts": {"tree": dict(zip(COMPARED, (rate, memory, first), strict=True))}}

    def worse(rate: float, memory: float, first: float, tolerance: float = 0.1) -> list[str]:
        found = changes(layouts(100, 10, 20), layouts(rate, memory, first), tolerance)
        return [c.name for c in found if c.worse]

    assert worse(91, 10.9, 26) == worse(1000, 1, 1) == []
    assert worse(89, 10, 20) == ["examples_per_s"] and worse(100, 11.5, 20) == ["peak_gib"]
    assert worse(100, 10, 30) == ["first_step_s"]  # three times the tolerance: it depends on caches
    assert worse(40, 25, 60, tolerance=0.5) == ["examples_per_s", "peak_gib"]
    assert str(changes(layouts(100, 10, 20), layouts(50, 10, 20), 0.1)[0]) == (
        "tree examples_per_s 50 against 100 (-50.0%)"
    )
