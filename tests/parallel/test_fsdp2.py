"""How a scorer is spread: every option off its default, on one rank. Worlds of several are in test_arithmetic."""

from collections import Counter
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
from sftlab.models.decoder import decoder_blocks
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import compute_dtype, fsdp2
from tests.support import random_examples, tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", torch.bfloat16), ("auto", "cpu", torch.float32),
        ("float32", "cuda", torch.float32), ("bfloat16", "cpu", torch.bfloat16),
    ],
)  # fmt: skip
def test_what_is_computed_in(name: str, device: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert compute_dtype(name, torch.device(device)) == expected


def test_a_dtype_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^parallel\.param_dtype=float16: expected auto, float32 or bfloat16$"):
        compute_dtype("float16", CPU)


def scorer() -> Scorer:
    made = Scorer(tiny_llama(layers=3))
    made.model.config._attn_implementation = "sdpa"
    return made


def batch() -> Batch:
    return collate(lay_out(random_examples(3, longest=20), "packed", 64), 2, 64)


def test_without_copies_a_parameter_lies_on_a_mesh_of_one_dimension(one: Any) -> None:
    meshes = {p.device_mesh.ndim for p in fsdp2(scorer(), one).parameters() if isinstance(p, DTensor)}
    assert meshes == {1}


@pytest.mark.parametrize("replicate", [0, -1, 2])
def test_copies_divide_the_ranks(replicate: int, one: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^parallel\.replicate={replicate} must divide the number of processes, 1: use 1$"
    ):
        fsdp2(scorer(), one, replicate=replicate)


def test_nine_ranks_are_no_two_copies(one: Any) -> None:
    with pytest.raises(ValueError, match=r"replicate=2 must divide the number of processes, 9"):
        fsdp2(scorer(), replace(one, size=9), replicate=2)


def test_every_block_and_then_the_root_are_sharded_as_the_options_say(
    one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    real = fsdp.fully_shard

    def spy(module: nn.Module, **given: Any) -> Any:
        calls.append((module, given))
        return real(module, **{**given, "offload_policy": fsdp.OffloadPolicy()})  # offloading pins memory: CUDA only

    monkeypatch.setattr(fsdp, "fully_shard", spy)
    for offload in (False, True):
        calls.clear()
        made = scorer()
        blocks = list(made.model.model.layers)
        assert fsdp2(made, one, param_dtype="bfloat16", cpu_offload=offload) is made
        assert [module for module, _ in calls] == [*blocks, made]
        for _, given in calls:
            assert isinstance(given["offload_policy"], fsdp.CPUOffloadPolicy) == offload
            policy = given["mp_policy"]
            assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
            assert policy.output_dtype is None and policy.cast_forward_inputs is False
    fsdp2(scorer(), one)
    assert calls[-1][1]["mp_policy"].param_dtype == compute_dtype("auto", one.device)


def gradients(made: Scorer) -> list[torch.Tensor]:
    made(batch()).nll.backward()
    found = []
    for p in made.parameters():
        gradient: Any = p.grad
        found.append(gradient.full_tensor())
    return found


class Products(TorchDispatchMode):
    """Count matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_no_gradient_and_recomputes_all_or_the_cheap_half(one: Any) -> None:
    found, counts = {}, {}
    for how in ("none", "full", "selective"):
        made = scorer()
        made.model.config._attn_implementation = "sdpa"
        made = fsdp2(made, one, activation_checkpointing=how)
        with Products() as counted:
            found[how] = gradients(made)
        counts[how] = counted.counts
    for how in ("full", "selective"):
        for ours, theirs in zip(found[how], found["none"], strict=True):
            torch.testing.assert_close(ours, theirs)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert [counts[how][attention] for how in counts] == [3, 6, 3], "three blocks; selective keeps what attention gives"
    once = counts["none"]["mm"]
    again = {how: counts[how]["mm"] - once for how in counts}
    # Seven products in a block. The last one, whose result no gradient needs, is not made again.
    assert again["full"] == 3 * 6 and again["selective"] == 3 * 3


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_compile_compiles_every_block_and_the_loss_and_nothing_else(
    how: str, one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recomputed lies inside what is compiled: the block that is compiled is the one in the model."""
    compiled: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", partialmethod(lambda self, **given: compiled.append((self, given))))
    monkeypatch.setattr("sftlab.models.compiled.compile_block", lambda block: compiled.append((block, {})))
    fsdp2(scorer(), one)
    assert compiled == []
    made = fsdp2(scorer(), one, compile=True, activation_checkpointing=how)
    blocks = [(block, {}) for block in made.model.model.layers]
    assert len(blocks) == 3 and compiled == [*blocks, (made.loss, {"dynamic": True})]


def test_decoder_blocks_are_the_longest_list_of_modules() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList([nn.Linear(1, 1)])
            self.many = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
            self.fewer = nn.ModuleList([nn.Linear(1, 1)])

    other = Other()
    assert decoder_blocks(other) == [(other.many, "0", other.many[0]), (other.many, "1", other.many[1])]
    with pytest.raises(ValueError, match=r"^Linear has no list of decoder blocks to shard$"):
        decoder_blocks(nn.Linear(1, 1))
