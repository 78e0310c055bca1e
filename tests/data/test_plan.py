"""The plan and the forest, whatever the examples: every prediction exactly once, no row over length, the same again."""

from collections import Counter
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab.data.batch import Batch
from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS, assign_to_ranks, best_fit, lay_out
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.mixture import draw, quotas
from sftlab.data.plan import Plan, exact_fill, first_fit, pack_groups

# Few letters and short texts, so that equal texts, texts that others begin with and branches at every depth are common.
EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(3, 5), st.booleans()), min_size=1, max_size=24), min_size=1, max_size=24
)
STEM = np.tile(np.array([3, 4, 5], np.int32), 6)  # a common beginning longer than what units must share


def examples_of(drawn: list[list[tuple[int, bool]]], stem: int) -> list[Example]:
    """Return examples of the drawn (token, supervised) pairs, every other one with a common beginning."""
    out = []
    for i, pairs in enumerate(drawn):
        front = STEM[: stem if i % 2 else 0]
        tokens = np.concatenate([front, np.array([t for t, _ in pairs], np.int32)])
        supervised = np.array([*(j % 3 == 1 for j in range(len(front))), *(s for _, s in pairs)], bool)
        supervised[0] = False
        out.append(Example(tokens, supervised, str(i), group=int(tokens[0])))
    return out


def asked(examples: list[Example]) -> Counter[tuple[bytes, int]]:
    """Return how often each (text so far, next token) is to be predicted."""
    return Counter(
        (e.tokens[:j].tobytes(), int(e.tokens[j])) for e in examples for j in np.flatnonzero(e.supervised).tolist()
    )


def made(batch: Batch) -> Counter[tuple[bytes, int]]:
    """Return the same of a batch, read off its tensors: a token's text is what it sees."""
    found: Counter[tuple[bytes, int]] = Counter()
    length = batch.tokens.shape[1]
    tokens, reach = batch.tokens.numpy().astype(np.int32), batch.reach.numpy()
    for at, target, weight in zip(batch.at.tolist(), batch.target.tolist(), batch.weight.tolist(), strict=True):
        row, i = divmod(at, length)
        seen = np.flatnonzero((np.arange(length) <= i) & (i < reach[row]))
        assert batch.position[row, i] == len(seen) - 1
        found[tokens[row, seen].tobytes(), target] += int(weight)
    return +found


@settings(max_examples=150, deadline=None)
@given(
    drawn=EXAMPLES,
    stem=st.integers(0, 18),
    layout=st.sampled_from(LAYOUTS),
    room=st.integers(0, 60),
    ranks=st.integers(1, 5),
    per=st.integers(1, 4),
    batch_size=st.integers(1, 30),
    shuffle=st.booleans(),
    grouped=st.booleans(),
    fixed=st.booleans(),
    joined=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_gauntlet_14_every_prediction_is_made_once_an_epoch(
    drawn: Any, stem: int, layout: str, room: int, ranks: int, per: int, batch_size: int, shuffle: bool, grouped: bool,
    fixed: bool, joined: bool, epoch: int,
) -> None:  # fmt: skip
    examples = examples_of(drawn, stem)
    row_length = max(map(len, examples)) + room
    plan = Plan(np.array([e.group for e in examples]), batch_size, 7, shuffle, grouped)
    joined = joined and layout != "padded"
    layouts = [RowLayout(layout, row_length, per, r, ranks, 2, fixed, joined=joined) for r in range(ranks)]
    loaders = [Loader(examples, plan, row_layout) for row_layout in layouts]
    met: Counter[tuple[bytes, int]] = Counter()
    indices: list[int] = []
    for number in range(1, plan.steps_per_epoch + 1):
        steps = [loader.step(epoch * plan.steps_per_epoch + number) for loader in loaders]
        indices += steps[0].indices.tolist()
        chosen = [examples[i] for i in steps[0].indices]
        found = sum((made(b) for s in steps for b in s.microbatches), Counter())
        assert found == asked(chosen)  # not in the epoch only: in its own step
        met += found
        assert len({len(s.microbatches) for s in steps}) == 1
        assert max(map(len, lay_out(chosen, layout, row_length))) <= row_length
        for s in steps:
            assert s.indices.tolist() == steps[0].indices.tolist()
            assert s.num_targets == sum(found.values())
            for b in s.microbatches:
                most = row_length * (per if joined else 1)
                assert b.tokens.shape[0] <= (1 if joined else per)
                assert b.tokens.shape[1] < max(most + 128, 257 if fixed else 0)
        assert len(chosen) == batch_size or number == plan.steps_per_epoch
    assert sorted(indices) == list(range(len(examples)))
    assert met == asked(examples)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
    grouped=st.booleans(),
)
def test_a_plan_is_a_function_of_its_seed(
    groups: list[int], batch_size: int, seed: int, shuffle: bool, grouped: bool
) -> None:
    keys = np.array(groups)
    plan, again = (Plan(keys, batch_size, seed, shuffle, grouped) for _ in range(2))
    steps = list(range(1, 3 * plan.steps_per_epoch + 1))
    straight = [plan.examples(s).tolist() for s in steps]
    assert [again.examples(s).tolist() for s in reversed(steps)][::-1] == straight  # whichever is asked for first
    for epoch in range(3):
        mine = straight[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(chain(*mine)) == list(range(len(groups)))
        assert all(len(s) == batch_size for s in mine[:-1])
    if not shuffle and not grouped:
        assert list(chain(*straight[: plan.steps_per_epoch])) == list(range(len(groups)))


def test_seeds_and_epochs_give_other_orders() -> None:
    groups = np.arange(1000) // 4
    for grouped in (True, False):
        orders = [Plan(groups, 32, s, True, grouped).order(e).tolist() for s, e in ((0, 0), (1, 0), (0, 1))]
        assert len({tuple(o) for o in orders}) == 3


def test_the_order_is_the_same_for_ever() -> None:
    """splitmix64 in Python's own integers, so that no version of numpy may change what a seed means."""

    def hashed(*parts: int) -> int:
        state = 0
        for part in parts:
            z = (state + part + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            state = z ^ (z >> 31)
        return state

    for seed, epoch in ((0, 0), (17, 3)):
        expected = sorted(range(500), key=lambda i, s=seed, e=epoch: hashed(s, e, i))
        assert Plan(np.arange(500), 32, seed, True, False).order(epoch).tolist() == expected


def test_the_order_with_groups_is_the_same_for_ever_too() -> None:
    """A run that is resumed with a later version must find its examples where it left them."""
    plan = Plan(np.array([7, 7, 7, 2, 2, 9, 9, 9, 9, 4, 5, 5]), 4, 3, True, True)
    assert plan.order(0).tolist() == [7, 8, 11, 10, 5, 6, 0, 2, 9, 3, 4, 1]
    assert plan.order(1).tolist() == [6, 7, 2, 0, 1, 3, 4, 9, 11, 10, 5, 8]


def test_grouping_keeps_examples_of_a_group_in_one_step() -> None:
    groups = np.repeat(np.arange(400), np.random.default_rng(0).integers(1, 9, 400))
    plan = Plan(groups, 32, 0, True, True)
    steps = [groups[plan.examples(s)] for s in range(1, plan.steps_per_epoch + 1)]
    whole = sum(len(set(s)) for s in steps)
    assert whole <= 401  # a group cut in two counts twice, and only the last steps have no others to fill them
    assert sum(len(set(groups[Plan(groups, 32, 0, True, False).examples(s)])) for s in range(1, len(steps))) > 1000


def test_a_large_group_is_dealt_out_so_that_steps_are_mixed() -> None:
    groups = np.concatenate([np.zeros(300, int), np.arange(1, 301)])
    plan = Plan(groups, 20, 0, True, True)
    shares = [float((groups[plan.examples(s)] == 0).mean()) for s in range(1, plan.steps_per_epoch + 1)]
    assert np.mean([s == 1.0 for s in shares]) < 0.2  # dealt out in whole steps, half of them would be of that group
    assert sum(0 < s < 1 for s in shares) > 15


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match="need at least 1"):
        Plan(np.zeros(3, int), batch_size, 0)
    with pytest.raises(ValueError, match="holds no example"):
        Plan(np.zeros(0, int), 1, 0)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=60), ranks=st.integers(1, 8))
def test_bins_hold_everything_once_and_ranks_are_even(sizes: list[int], ranks: int) -> None:
    bins = best_fit(sizes, 50)
    assert sorted(chain(*bins)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= 50 for b in bins)
    filled = sorted(sum(sizes[i] for i in b) for b in bins)
    assert all(a + b > 50 for a, b in pairwise(filled))  # no two would have fitted in one
    shares = assign_to_ranks(sizes, ranks)
    assert sorted(chain(*shares)) == list(range(len(sizes)))
    most = -(-len(sizes) // ranks)
    assert max(map(len, shares)) == most
    load = [sum(sizes[i] for i in s) for s in shares]
    for r, mine in enumerate(shares):  # no rank's last row would have been better with one that had room for it
        others = [load[o] for o in range(ranks) if o != r and len(shares[o]) < most]
        assert not mine or all(load[r] - sizes[mine[-1]] <= other for other in others)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=5), seed=st.integers(0, 3)
)
def test_a_mixture_is_exact_in_its_proportions(parts: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [s for s, _ in parts], [w for _, w in parts]
    counts = quotas(sizes, weights)
    total = sum(counts)
    for size, weight, count in zip(sizes, weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
        times = np.bincount(draw(size, count), minlength=size)
        assert times.sum() == count and len(times) == size
        assert times.max() - times.min() <= 1
        assert count >= size and times.min() >= 1  # nothing is left out
    assert min(c - s for c, s in zip(counts, sizes, strict=True)) <= 1  # no longer an epoch than it must be
    assert quotas(sizes, weights) == counts


def test_groups_of_half_a_step_stay_whole() -> None:
    groups = np.repeat(np.arange(40), 10)
    plan = Plan(groups, 20, 0, True, True)
    for step in range(1, plan.steps_per_epoch + 1):
        assert (
            np.bincount(groups[plan.examples(step)]).max() == 10 == np.bincount(groups[plan.examples(step)]).sum() / 2
        )


def test_large_groups_are_spread_over_the_epoch() -> None:
    """By first members alone large groups come first: one of the most is met at once."""
    groups = np.concatenate([np.repeat(np.arange(20), 30), np.arange(20, 620)])
    order = Plan(groups, 60, 0, True, True).order(0)
    early = float((groups[order[:600]] < 20).mean())
    assert 0.35 < early < 0.65


def test_without_shuffling_groups_come_in_the_order_of_their_first_member() -> None:
    groups = np.array([5, 5, 1, 9, 1, 9, 3])
    assert Plan(groups, 4, 0, False, True).order(0).tolist() == [0, 1, 2, 4, 3, 5, 6]
    assert Plan(groups, 4, 0, False, True).order(4).tolist() == [0, 1, 2, 4, 3, 5, 6]
    assert Plan(groups, 2, 0, False, False).order(0).tolist() == list(range(7))
    assert Plan(groups, 3, 0, False, False).examples(3).tolist() == [6]
    assert Plan(groups, 3, 0, False, False).examples(4).tolist() == [0, 1, 2]
    assert Plan(groups, 7, 0).steps_per_epoch == 1 and Plan(groups, 3, 0).steps_per_epoch == 3


def test_members_of_a_group_meet_in_another_order_each_epoch() -> None:
    plan = Plan(np.zeros(12, int), 12, 0, True, True)
    assert plan.order(0).tolist() != plan.order(1).tolist() != list(range(12))


def test_no_more_than_two_epochs_are_remembered_and_each_is_the_same_again() -> None:
    plan = Plan(np.arange(50) // 3, 7, 1)
    first = [plan.order(e) for e in (0, 1, 2)]
    assert plan.order(2) is first[2] and plan.order(1) is first[1]  # the one being trained and the one prefetched
    assert plan.order(0) is not first[0] and plan.order(0).tolist() == first[0].tolist()


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), room=st.integers(1, 20))
def test_a_step_is_filled_exactly_where_that_can_be(sizes: list[int], room: int) -> None:
    sums = [(n, (0, *c)) for n in range(len(sizes)) for c in combinations(range(1, len(sizes)), n)]
    can = any(sum(sizes[i] for i in chosen) == room for _, chosen in sums)
    found = exact_fill(sizes, room)
    assert bool(found) == can
    if found:
        assert found[0] == 0 and found == sorted(set(found)) and sum(sizes[i] for i in found) == room


def test_what_fits_is_taken_in_order() -> None:
    assert first_fit([5, 4, 3, 1], 8) == [0, 2]
    assert first_fit([9, 4, 4, 1], 8) == [1, 2]
    assert first_fit([9], 8) == []


def test_groups_are_looked_for_behind_the_next_one_only_so_far() -> None:
    def packed(*lengths: int, batch_size: int = 10, look_ahead: int = 3) -> list[tuple[int, int]]:
        starts = np.cumsum([0, *lengths[:-1]])
        return list(
            zip(*(x.tolist() for x in pack_groups(starts, np.array(lengths), batch_size, look_ahead)), strict=True)
        )

    assert packed(6, 7, 4, 3) == [(0, 6), (13, 4), (6, 7), (17, 3)]
    # The 4 is beyond the look-ahead: the next group is cut, and its rest opens the next step.
    assert packed(6, 7, 7, 4) == [(0, 6), (6, 4), (10, 3), (13, 7), (20, 4)]
    assert packed(6, 7, 8, 7, look_ahead=2) == [(0, 6), (6, 4), (10, 3), (13, 7), (20, 1), (21, 7)]
    assert packed(6, 7, 7, 4, look_ahead=4) == [(0, 6), (20, 4), (6, 7), (13, 3), (16, 4)]
