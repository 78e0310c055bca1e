"""Steps as microbatches: their numbers worked out by hand, the largest of an epoch, and what is laid out in advance."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.data.batch import Batch, collate, on_device
from sftlab.data.example import Example
from sftlab.data.forest import lay_out
from sftlab.data.loader import AHEAD, Loader, RowLayout, round_up
from sftlab.data.plan import Plan
from tests.support import random_examples

PAD = 2


def example(tokens: list[int], learned: list[int], group: int = 0) -> Example:
    supervised = np.zeros(len(tokens), bool)
    supervised[learned] = True
    return Example(np.array(tokens, np.int32), supervised, str(tokens), group)


THREE = [example([3, 4, 5, 6], [2, 3]), example([3, 4, 5, 7, 8], [2, 3, 4]), example([9, 10], [1])]


def of_lengths(*lengths: int) -> list[Example]:
    """Return examples that share nothing, all but the first of their tokens learned."""
    return [example([3 + 7 * i, *range(100 * i, 100 * i + n - 1)], list(range(1, n))) for i, n in enumerate(lengths)]


def arranged(examples: list[Example], layout: str, row_length: int, per: int, *rest: Any, **more: Any) -> Any:
    return RowLayout(layout, row_length, per, *rest, pad_token=PAD, **more).arrange(examples, np.arange(len(examples)))


def test_the_numbers_of_a_step_are_those_worked_out_by_hand() -> None:
    step = arranged(THREE, "tree", 64, 1, 0, 1)
    # 3 4 5 6, below 5 also 7 8, and 9 10: 8 tokens of the 11 are left. 5 is asked for twice, 6, 7, 8 and 10 once.
    assert (step.num_examples, step.num_rows, step.num_nodes, step.num_effective_tokens) == (3, 1, 8, 11)
    assert (step.num_predictions, step.num_targets, step.num_tokens) == (5, 6.0, 16)
    assert step.pairs == (1 + 2 + 3 + 4) + (4 + 5) + (1 + 2)
    assert step.indices.tolist() == [0, 1, 2]
    (batch,) = step.microbatches
    assert (batch.num_examples, batch.num_tokens) == (3, 8)
    assert batch.tokens.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10, *[PAD] * 8]]
    assert batch.position.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, *[0] * 8]]
    assert batch.reach.tolist() == [[6, 6, 6, 4, 6, 6, 8, 8, *range(9, 17)]]
    assert list(zip(batch.at.tolist(), batch.target.tolist(), batch.weight.tolist(), strict=True)) == [
        (1, 5, 2.0),
        (2, 6, 1.0),
        (2, 7, 1.0),
        (4, 8, 1.0),
        (6, 10, 1.0),
    ]


def test_rows_of_one_microbatch_are_of_like_length_and_each_rank_has_its_own() -> None:
    examples = of_lengths(40, 3, 38, 5)
    step = arranged(examples, "padded", 64, 2, 0, 1)
    assert [tuple(b.tokens.shape) for b in step.microbatches] == [(2, 48), (2, 16)]
    assert (step.num_tokens, step.num_nodes, step.num_rows) == (2 * 48 + 2 * 16, 86, 4)
    first, second = (arranged(examples, "padded", 64, 1, rank, 2) for rank in range(2))
    assert [b.num_tokens for b in first.microbatches] == [40, 3]  # the longest, and the shortest with it
    assert [b.num_tokens for b in second.microbatches] == [38, 5]
    for step in (first, second):  # what is summed over ranks is the same on each
        assert (step.num_tokens, step.num_nodes, step.num_rows, step.num_targets) == (48 + 16 + 48 + 16, 86, 4, 82.0)


def test_rows_are_made_for_all_ranks_and_a_last_microbatch_may_be_smaller() -> None:
    ranks = [arranged(of_lengths(30, 30, 30, 30), "packed", 128, 1, rank, 2) for rank in range(2)]
    assert [[b.num_tokens for b in s.microbatches] for s in ranks] == [[60], [60]]  # not one full row for the first
    three = arranged(of_lengths(30, 20, 10), "padded", 64, 2, 0, 1)
    assert [tuple(b.tokens.shape) for b in three.microbatches] == [(2, 32), (1, 16)]


def test_a_rank_without_rows_has_as_many_microbatches_all_padding() -> None:
    ranks = [arranged(of_lengths(30, 20, 10), "padded", 64, 1, rank, 4) for rank in range(4)]
    assert [[b.num_tokens for b in s.microbatches] for s in ranks] == [[30], [20], [10], [0]]
    (empty,) = ranks[3].microbatches
    assert empty.tokens.tolist() == [[PAD] * 16] and empty.weight.tolist() == [0.0, 0.0] and empty.num_examples == 0
    assert {s.num_tokens for s in ranks} == {32 + 32 + 16 + 16}


def test_fixed_shapes_are_few_and_every_microbatch_has_all_its_rows() -> None:
    step = arranged(of_lengths(300, 20, 260), "padded", 2048, 2, 0, 1, fixed_shapes=True)
    assert [tuple(b.tokens.shape) for b in step.microbatches] == [(2, 384), (2, 256)]  # multiples of 128
    small = arranged(of_lengths(30, 20), "padded", 512, 3, 0, 1, fixed_shapes=True)
    assert [tuple(b.tokens.shape) for b in small.microbatches] == [(3, 256)]  # and never less than two blocks


@pytest.mark.parametrize("layout", ["packed", "tree"])
def test_joined_rows_are_one_row_and_only_the_last_microbatch_is_not_full(layout: str) -> None:
    examples = of_lengths(*[100] * 13)
    step = arranged(examples, layout, 256, 2, 0, 1, fixed_shapes=True, joined=True)
    assert [tuple(b.tokens.shape) for b in step.microbatches] == [(1, 512), (1, 512), (1, 384)]
    assert [b.num_tokens for b in step.microbatches] == [500, 500, 300]
    apart = arranged(examples, layout, 256, 2, 0, 1, fixed_shapes=True)
    assert [tuple(b.tokens.shape) for b in apart.microbatches] == [(2, 256)] * 4
    ranks = [arranged(examples, layout, 256, 2, rank, 2, fixed_shapes=True, joined=True) for rank in range(2)]
    assert [[b.num_tokens for b in s.microbatches] for s in ranks] == [[400, 400], [400, 100]]


def test_memory_is_pinned_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Batch] = []
    monkeypatch.setattr(Batch, "pin_memory", lambda self: pinned.append(self) or self)
    arranged(THREE, "padded", 64, 1, 0, 1)
    assert pinned == []
    step = arranged(THREE, "padded", 64, 1, 0, 1, pin_memory=True)
    assert len(pinned) == 3 == len(step.microbatches)


@pytest.mark.parametrize(("n", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32)])
def test_rounding_up(n: int, expected: int) -> None:
    assert round_up(n, 16) == expected


def test_every_tensor_of_a_batch_moves_and_its_counts_stay() -> None:
    batch = collate(lay_out(THREE, "padded", 8), 3, 8)
    assert batch.tokens[0].tolist() == [3, 4, 5, 6, 0, 0, 0, 0]
    moved = batch.to(torch.device("meta"))
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6 and {t.device.type for t in tensors} == {"meta"}
    assert (moved.num_examples, moved.num_tokens) == (3, 11)
    assert batch.map(lambda t: t + 1).reach.tolist() == (batch.reach + 1).tolist()


@pytest.mark.parametrize("batch_size", [64, 256])
@pytest.mark.parametrize("most", [4096, 32768])
@pytest.mark.parametrize(("stem", "questions", "own"), [(150, 4, 24), (1, 1, 210)], ids=["SQuAD", "GSM8K"])
def test_compiled_steps_of_data_of_real_sizes_are_at_most_3_percent_padding(
    stem: int, questions: int, own: int, most: int, batch_size: int
) -> None:
    """Stand-ins with the lengths of SQuAD (five questions on a passage, 57 tokens each when shared) and of GSM8K."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(4 * batch_size // questions):
        passage = list(rng.integers(3, 9000, int(stem * rng.uniform(0.5, 2))))
        for _ in range(questions):
            tokens = [*passage, *rng.integers(3, 9000, int(own * rng.uniform(0.5, 2)))]
            examples.append(example(tokens, [len(tokens) - 1], group=i))
    plan = Plan(np.array([e.group for e in examples]), batch_size, 0)
    row_layout = RowLayout("tree", 4096, most // 4096, 0, 1, PAD, fixed_shapes=True, joined=True)
    made = [Loader(examples, plan, row_layout).step(step) for step in range(1, plan.steps_per_epoch + 1)]
    tokens, nodes = sum(s.num_tokens for s in made), sum(s.num_nodes for s in made)
    assert 0 < 1 - nodes / tokens <= 0.03
    assert {len(b.tokens) for s in made for b in s.microbatches} == {1}, "only lengths differ"


class Streams:
    """Stands in for CUDA's streams: notes what happens on which, in the order in which the host asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = "compute"
        monkeypatch.setattr("sftlab.data.batch.copy_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: None)
        monkeypatch.setattr(Batch, "to", lambda batch, device: self.copied(batch))

    def copied(self, batch: Batch) -> Batch:
        self.events.append(f"copy {batch.num_examples} on {self.current}")
        return batch

    def __enter__(self) -> None:
        self.current = "copies"

    def __exit__(self, *error: object) -> None:
        self.current = "compute"

    def record_event(self) -> str:
        return self.events[-1].split()[1]

    def wait_event(self, event: str) -> None:
        self.events.append(f"wait for {event}")


def test_on_a_gpu_the_next_microbatch_is_copied_while_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    batches = [collate(lay_out(THREE[:n], "padded", 8), n, 8) for n in (1, 2, 3)]
    for batch in on_device(batches, torch.device("cuda")):
        streams.events.append(f"compute {batch.num_examples}")
    assert streams.events == [
        "copy 1 on copies", "copy 2 on copies", "wait for 1", "compute 1",
        "copy 3 on copies", "wait for 2", "compute 2", "wait for 3", "compute 3",
    ]  # fmt: skip


# The loader ---------------------------------------------------------------------------------------------------------


def loader(examples: list[Example], batch_size: int, layout: str = "padded", shuffle: bool = False) -> Loader:
    plan = Plan(np.array([e.group for e in examples]), batch_size, 3, shuffle, False)
    return Loader(examples, plan, RowLayout(layout, 128, 1, 0, 1, PAD))


def size(batch: Batch) -> int:
    return batch.tokens.numel()


def test_the_largest_microbatch_is_the_largest_of_the_epoch() -> None:
    for seed in range(3):
        made = loader(random_examples(60, seed=seed, longest=50), 5, "tree", shuffle=True)
        every = [b for s in range(1, made.plan.steps_per_epoch + 1) for b in made.step(s).microbatches]
        most = max(map(size, every))
        assert most > min(map(size, every))
        assert size(made.largest()) == most
        lengths = np.array([len(e) for e in made.examples])
        told = Loader(made.examples, made.plan, made.row_layout, lengths)
        assert torch.equal(told.largest().tokens, made.largest().tokens)


def test_the_longest_example_is_found_where_other_steps_hold_more_tokens() -> None:
    assert size(loader(of_lengths(*[30, 30] * 5, 50, 2), 2).largest()) == 64


def test_the_fullest_step_is_found_where_other_steps_hold_longer_examples() -> None:
    assert size(loader(of_lengths(*[50, 2] * 5, 40, 40), 2, "packed").largest()) == 80


def test_the_largest_is_found_where_it_comes_last() -> None:
    assert size(loader(of_lengths(*range(3, 63)), 2).largest()) == 64


def test_of_two_as_large_the_largest_has_more_predictions() -> None:
    few, many = example(list(range(3, 33)), [29]), example(list(range(103, 133)), list(range(5, 30)))
    for examples in ([few, many], [many, few]):
        assert len(loader(examples, 1).largest().at) == 25


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (2, 4), (3, 9), (5, 4)])
def test_steps_come_in_order_and_are_those_asked_for(first: int, last: int) -> None:
    made = loader(of_lengths(9, 8, 7, 6, 5, 4, 3), 2, shuffle=True)  # 4 steps an epoch
    found = [s.indices.tolist() for s in made.steps(first, last)]
    assert found == [made.plan.examples(k).tolist() for k in range(first, last + 1)]


class Recorded(list[Example]):
    """Examples that note which were read."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__(examples)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(int(index))
        return super().__getitem__(index)


def test_no_more_steps_are_laid_out_in_advance_than_said() -> None:
    examples = Recorded(of_lengths(*[5] * 12))
    steps: Iterator[Any] = loader(examples, 1).steps(1, 12)
    for number, step in enumerate(steps):
        assert step.indices.tolist() == [number]
        assert len(examples.read) <= number + 1 + AHEAD < 16
    assert examples.read == list(range(12))
