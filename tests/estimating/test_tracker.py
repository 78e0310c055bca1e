"""What the tracker counts, against sizes that are known."""

import gc

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sftlab.estimating.tracker import Tracker

KIB = 1024


def block(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_a_peak_is_what_lived_at_the_same_time_not_what_was_made() -> None:
    for fake in (False, True):
        with FakeTensorMode() if fake else torch.no_grad(), Tracker() as tracker:
            tracker.begin("work")
            a = block(4)
            b = block(8)
            view = b.view(8, KIB)
            del b
            c = block(1)
            del view, c
            gc.collect()
            d = block(2)
            assert tracker.now == 6 * KIB
            del a, d
        assert tracker.peaks["work"].total == 13 * KIB, fake
        assert tracker.peaks["work"].parts()["activations"] == 13 * KIB and tracker.now == 0


def test_a_storage_that_is_emptied_and_filled_counts_while_it_is_full() -> None:
    with Tracker() as tracker:
        tracker.begin("work")
        a = block(4)
        a.untyped_storage().resize_(0)
        b = block(3)
        assert tracker.now == 3 * KIB
        a.untyped_storage().resize_(4 * KIB)
        assert tracker.now == 7 * KIB
        del a, b
    assert tracker.peaks["work"].total == 7 * KIB and tracker.peaks["work"].parts()["gathered"] == 4 * KIB


def test_parts_follow_the_code_that_made_them_and_a_label_overrides() -> None:
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.grad = torch.ones_like(layer.weight)
    with Tracker() as tracker:
        tracker.begin("work")
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.step()
        with tracker.made_by("parameters"):
            kept = block(4)
        tracker.mark([kept], "adapter")
        assert tracker.bytes_of("adapter") == 4 * KIB
        assert 2 * 64 * 64 * 4 <= tracker.bytes_of("optimiser") < 2 * 64 * 64 * 4 + 64


def test_phases_have_peaks_of_their_own() -> None:
    with Tracker() as tracker:
        tracker.begin("first")
        a = block(4)
        tracker.begin("second")
        b = block(1)
        del a
        tracker.begin("third")
        del b
    totals = {name: peak.total for name, peak in tracker.peaks.items() if name != "start"}
    assert totals == {"first": 4 * KIB, "second": 5 * KIB, "third": 1 * KIB}
