"""Rates, operations and MFU, against numbers worked out by hand."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS
from sftlab.data.loader import RowLayout, Step
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World
from sftlab.training.laps import Laps
from sftlab.training.throughput import FlopCount, Throughput
from tests.support import tiny_llama

Clock = Callable[[float], None]


def step(**counts: float) -> Step:
    """Return a step of which only these sums are known."""
    zero: dict[str, Any] = dict.fromkeys(
        ("num_targets", "num_examples", "num_tokens", "num_effective_tokens", "num_predictions", "num_nodes"), 0
    )
    return Step(**{**zero, "microbatches": [], "num_rows": 0, "pairs": 0, "indices": np.arange(0), **counts})


def laps(scorer: Scorer) -> Laps:
    return Laps(scorer, torch.optim.SGD(scorer.parameters()), torch.device("cpu"))


def perf(meter: Throughput) -> dict[str, float]:
    return {name: value for name, value in meter.take_rates().items() if name.startswith("perf/")}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until it is told to go on by so many seconds."""
    now_s = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def go_on(seconds: float) -> None:
        now_s[0] += seconds

    return go_on


def test_operations_of_a_step_by_hand() -> None:
    """A Llama of 3 layers, width 32, 4 query heads and 2 of keys and values, of dimension 16: wider than 32 / 4."""
    count = FlopCount(Scorer(tiny_llama(layers=3, tied=False, head_dim=16)))
    layer = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64  # queries, keys and values, output; gate, up and down
    assert count.body == 6 * 3 * layer  # norms are no matmuls, and the embedding is a table
    assert count.head == 6 * 320 * 32
    assert count.attention == 3 * 4 * 16  # 3 layers, all query heads
    made = step(num_nodes=1000, num_predictions=7, pairs=90_000, num_tokens=5000, num_effective_tokens=4000)
    assert count.of(made) == 6 * (3 * layer * 1000 + 320 * 32 * 7) + 12 * 192 * 90_000


def test_a_head_dimension_that_the_config_does_not_name_is_the_width_over_the_heads() -> None:
    config = GPT2Config(vocab_size=320, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=1)
    count = FlopCount(Scorer(GPT2LMHeadModel(config)))
    assert count.attention == 2 * 3 * 8
    assert count.body == 6 * 2 * (24 * 72 + 24 * 24 + 2 * 24 * 96)


def test_heads_that_differ_from_layer_to_layer_are_counted_as_they_are() -> None:
    """Gemma 4's are twice as wide in layers of full attention, and its config has no one width to read."""
    made = AutoConfig.for_model(
        "gemma4_text", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=8, pad_token_id=2,
        vocab_size_per_layer_input=320, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    assert FlopCount(Scorer(AutoModelForCausalLM.from_config(made))).attention == 4 * (16 + 16 + 32)


def test_operations_are_those_of_the_mathematics_in_every_layout() -> None:
    """Two texts of 5 and 3 tokens have 15 + 6 pairs, whether they are packed, padded or trees without branches."""
    examples = [
        Example(np.arange(start, start + n, dtype=np.int32), np.arange(n) == n - 1, id="", num_prompt=0)
        for start, n in ((10, 5), (50, 3))
    ]
    count = FlopCount(Scorer(tiny_llama()))
    expected = count.body * 8 + count.head * 2 + 12 * count.attention * 21
    tokens = {}
    for layout in LAYOUTS:
        made = RowLayout(layout, 64, 1, 0, 1, pad_token=2).arrange(examples, np.arange(2))
        assert (made.num_nodes, made.num_predictions, made.pairs) == (8, 2, 21), layout
        assert count.of(made) == expected, layout
        tokens[layout] = made.num_tokens
    assert tokens == {"packed": 16, "tree": 16, "padded": 32}, "padding differs and counts nothing"


def test_rates_leave_out_pauses_and_begin_anew_at_each_reading(one: World, clock: Clock) -> None:
    scorer = Scorer(tiny_llama())
    meter = Throughput(scorer, one, laps(scorer))
    for _ in range(2):
        clock(2.0)
        meter.add(step(num_examples=6, num_tokens=500, num_effective_tokens=700, num_targets=30))
    with meter.paused():
        clock(100.0)
    clock(1.0)
    assert perf(meter) == {
        "perf/examples_per_s": 12 / 5,
        "perf/tokens_per_s": 1000 / 5,
        "perf/effective_tokens_per_s": 1400 / 5,
        "perf/targets_per_s": 60 / 5,
    }
    clock(4.0)
    meter.add(step(num_examples=2, num_tokens=8, num_effective_tokens=9, num_targets=3))
    assert perf(meter) == {
        "perf/examples_per_s": 2 / 4,
        "perf/tokens_per_s": 8 / 4,
        "perf/effective_tokens_per_s": 9 / 4,
        "perf/targets_per_s": 3 / 4,
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_mfu_is_a_share_of_the_peak_of_all_devices(
    name: str, peak: float | None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 3)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: asked.append(d) or name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: asked.append(d) or 3 * 2**30)
    scorer = Scorer(tiny_llama())
    meter = Throughput(scorer, World(rank=0, size=4, local_rank=0, device=device), laps(scorer))
    clock(2.0)
    made = step(num_nodes=10**6, num_predictions=10**5, pairs=10**8, num_tokens=10**7)
    meter.add(made)
    meter.add(made)
    rates = meter.take_rates()
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    flops = 2 * (6 * (2 * layer * 10**6 + 320 * 32 * 10**5) + 12 * 2 * 32 * 10**8)
    assert rates.get("perf/mfu") == (pytest.approx(flops / 2.0 / (4 * peak)) if peak else None)
    assert rates["mem/peak_gib"] == 3.0
    assert asked == [device, device]
    clock(1.0)
    assert meter.take_rates().get("perf/mfu") == (0.0 if peak else None), "operations are summed since the last reading"


def test_a_second_is_counted_for_the_part_in_which_it_passes(one: World, clock: Clock) -> None:
    """Two microbatches of a step, an evaluation with a forward of its own, two steps: by hand."""
    scorer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(scorer.parameters())
    hooked: list[torch.nn.Module] = [scorer]
    found = Laps(hooked[0], optimizer, one.device)
    scorer.register_forward_hook(lambda *_: clock(3.0), prepend=True)
    optimizer.register_step_pre_hook(lambda *_: clock(7.0))

    def items() -> Any:
        for i in range(2):
            clock(1.0)
            yield i

    for _ in found.waited_for(items()):
        for _ in range(2):
            clock(0.25)  # goes to the device
            loss = scorer(torch.ones(1, 1)).sum()
            clock(5.0)
            loss.backward()
        optimizer.step()
        clock(11.0)
        with found.inside("evaluation"), torch.no_grad():
            clock(13.0)
            scorer(torch.ones(1, 1))
    taken = found.take(2)
    assert taken == {
        "time/data_s": 1.0, "time/between_s": 0.25 + 11.0, "time/forward_s": 6.0, "time/backward_s": 10.25,
        "time/optimizer_s": 7.0, "time/evaluation_s": 16.0,
    }  # fmt: skip
    assert found.take(2) == {}
