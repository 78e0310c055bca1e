"""What is typed for each parallelism reaches the one function that spreads, and what that makes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import sftlab.parallel.ddp
import sftlab.parallel.fsdp2
import sftlab.parallel.fsdp2_tp
import sftlab.parallel.hsdp
from sftlab.parallel.ddp import ddp
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.fsdp2_tp import fsdp2_tp
from sftlab.parallel.hsdp import hsdp
from sftlab.parallel.world import World
from tests.parallel.test_fsdp2 import batch, scorer

SIX = World(0, 6, 0, torch.device("cpu"))
Calls = list[tuple[World, int, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `spread` is called with by each constructor; it spreads nothing."""
    seen: Calls = []

    def spread(scorer: Any, world: World, replicate: int, **options: Any) -> Any:
        seen.append((world, replicate, options))
        return scorer

    for module in (sftlab.parallel.ddp, sftlab.parallel.fsdp2, sftlab.parallel.fsdp2_tp, sftlab.parallel.hsdp):
        monkeypatch.setattr(module, "spread", spread)
    return seen


TYPED = {
    "param_dtype": "bfloat16", "reshard_after_forward": False, "prefetch": 2, "cpu_offload": True,
    "compile": True, "activation_checkpointing": "full",
}  # fmt: skip


def test_fsdp2_hands_on_what_is_typed(calls: Calls) -> None:
    more = {"compile": True, "activation_checkpointing": "full"}
    fsdp2(
        None,
        SIX,
        param_dtype="bfloat16",
        replicate=3,
        reshard_after_forward=False,
        prefetch=2,
        cpu_offload=True,
        **more,
    )  # type: ignore[arg-type]
    assert calls == [(SIX, 3, TYPED)]


def test_hsdp_hands_on_what_is_typed(calls: Calls) -> None:
    more = {"compile": True, "activation_checkpointing": "full"}
    hsdp(
        None,
        SIX,
        param_dtype="bfloat16",
        replicate=3,
        reshard_after_forward=False,
        prefetch=2,
        cpu_offload=True,
        **more,
    )  # type: ignore[arg-type]
    assert calls == [(SIX, 3, TYPED)]


def test_ddp_hands_on_what_is_typed(calls: Calls) -> None:
    more = {"compile": True, "activation_checkpointing": "full"}
    ddp(None, SIX, param_dtype="bfloat16", cpu_offload=True, **more)  # type: ignore[arg-type]
    assert calls == [(SIX, 6, {**TYPED, "prefetch": 0})]


def test_fsdp2_tp_hands_on_what_is_typed(calls: Calls) -> None:
    more = {"compile": True, "activation_checkpointing": "full"}
    fsdp2_tp(
        None, SIX, tensor=3, replicate=2, param_dtype="bfloat16", reshard_after_forward=False, prefetch=2,
        cpu_offload=True, **more,
    )  # type: ignore[arg-type] # fmt: skip
    assert calls == [(replace(SIX, tensor=3), 2, TYPED)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reshard_after_forward": 2}, r"^parallel\.reshard_after_forward=2: expected auto, true or false$"),
        ({"reshard_after_forward": "yes"}, r"^parallel\.reshard_after_forward=yes: expected auto, true or false$"),
        ({"prefetch": -1}, r"^parallel\.prefetch=-1: expected a number of blocks, 0 or more$"),
        ({"prefetch": True}, r"^parallel\.prefetch=True: expected a number of blocks, 0 or more$"),
    ],
)
def test_other_values_are_refused(options: dict[str, Any], message: str, one: Any) -> None:
    with pytest.raises(ValueError, match=message):
        fsdp2(scorer(), one, **options)


def test_blocks_are_gathered_as_far_in_advance_as_typed(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[Any, list[Any]]]] = {"forward": [], "backward": []}

    def noting(way: str) -> Callable[[Any, list[Any]], None]:
        return lambda module, modules: told[way].append((module, modules))

    monkeypatch.setattr(FSDPModule, "set_modules_to_forward_prefetch", noting("forward"))
    monkeypatch.setattr(FSDPModule, "set_modules_to_backward_prefetch", noting("backward"))
    fsdp2(scorer(), one)
    assert told == {"forward": [], "backward": []}
    first, second, third = fsdp2(scorer(), one, prefetch=2).model.model.layers
    assert told["forward"] == [(first, [second, third]), (second, [third]), (third, [])]
    assert told["backward"] == [(first, []), (second, [first]), (third, [second, first])]


def test_shards_on_the_host_train_as_others_do(one: Any) -> None:
    found = []
    for offload in (False, True):
        made = fsdp2(scorer(), one, cpu_offload=offload)
        assert made.on_host == offload
        made(batch()).nll.backward()
        found.append([p.grad.full_tensor() for p in made.parameters()])  # type: ignore[union-attr, operator]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
