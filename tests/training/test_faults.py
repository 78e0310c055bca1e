"""Errors of torch and the network become ours, which say what to change; others stay what they were."""

import pytest
import torch

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.training.faults import NonFinite, OutOfMemory, RankLost, lost_ranks, memory_for, shown
from tests.support import random_examples


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_an_allocators_error_becomes_ours_with_the_microbatch_and_what_to_type(error: RuntimeError) -> None:
    batch = collate(lay_out(random_examples(3, longest=10), "padded", 32), 3, 32)
    num = len(batch.at)
    words = f"a microbatch of 3 rows of 32 tokens, {num} predictions"
    with pytest.raises(OutOfMemory, match=words) as found, memory_for(batch):
        raise error
    assert found.value.__cause__ is error
    for key in ("rows_per_microbatch", "data.row_length", "data.max_length", "activation_checkpointing=full"):
        assert key in str(found.value)


def test_an_allocation_that_really_fails_is_noticed() -> None:
    batch = collate(lay_out(random_examples(1, longest=10), "padded", 32), 1, 32)
    with pytest.raises(OutOfMemory), memory_for(batch):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_another_error_in_a_microbatch_stays_what_it_was() -> None:
    batch = collate(lay_out(random_examples(1, longest=10), "padded", 32), 1, 32)
    with pytest.raises(RuntimeError, match="shapes do not fit") as found, memory_for(batch):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(found.value, OutOfMemory)


@pytest.mark.parametrize(
    "words",
    [
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
        "NCCL error: remote process exited or there was a network error",
    ],
)  # fmt: skip
def test_a_lost_peer_becomes_ours_and_says_that_the_command_resumes(words: str) -> None:
    error = RuntimeError(f"[gloo/transport/tcp/pair.cc:534] {words} [127.0.0.1]:1234")
    with pytest.raises(RankLost, match=r"another rank has ended .*the same command resumes") as found, lost_ranks():
        raise error
    assert found.value.__cause__ is error and str(error) in str(found.value)


def test_an_error_that_has_nothing_to_do_with_peers_stays_what_it_was() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit") as found, lost_ranks():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(found.value, RankLost)


def test_what_a_step_without_a_number_says() -> None:
    ids = [f"e{i}" for i in range(10)]
    first = str(NonFinite(7, float("nan"), 1.5, ids, 0))
    assert first.startswith("step 7: the loss is nan and the gradient norm 1.5; the update was not made. Examples of")
    assert "of this step: e0, e1, e2, e3, e4, e5, e6, e7 and 2 more. Lower optim.lr" in first
    assert "2 earlier steps were skipped (trainer.skip_nonfinite). Examples" in str(NonFinite(7, 1.0, 2.0, ids, 2))


def test_eight_names_are_shown_and_the_others_counted() -> None:
    assert shown([]) == ""
    assert shown(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert shown(list("abcdefghi")) == "a, b, c, d, e, f, g, h and 1 more"
    assert shown(list("abc"), 2) == "a, b and 1 more"
