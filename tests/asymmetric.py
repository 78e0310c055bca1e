"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import os
import random

import numpy as np
import pytest
import torch


def seed_generators(seed: int) -> None:
    """Seed torch's, numpy's and Python's generator, each otherwise, and leave a half-used normal draw in the last two.

    For a resume that gives every rank the generators of rank 0, or forgets one of the three.
    """
    torch.manual_seed(100 + seed)
    np.random.seed(200 + seed)
    random.seed(300 + seed)
    np.random.standard_normal()
    random.gauss(0, 1)


def draws() -> dict[str, list[float]]:
    """Return the next draws of every generator of this process; the normal ones come from what is left over."""
    return {
        "torch": torch.rand(3).tolist(),
        "numpy": [float(np.random.standard_normal()), *np.random.random(3).tolist()],
        "python": [random.gauss(0, 1), random.random(), random.random()],
    }


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every file that is made to survive a power cut is added, by the name that it has then."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    return synced
