"""A process's random generators come back with the state that they had: the next draw of each is the same."""

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sftlab.checkpoints import rng
from tests.asymmetric import draws, seed_generators

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The other tests of this process draw as if these had not run."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def test_the_next_draw_of_every_generator_comes_back() -> None:
    seed_generators(1)
    text = rng.state(CPU)
    expected = draws()
    assert draws() != expected
    seed_generators(2)
    rng.restore(text, CPU)
    assert draws() == expected


def test_a_run_that_moved_from_a_gpu_to_a_cpu_has_its_other_generators_back() -> None:
    seed_generators(1)
    text = json.dumps(json.loads(rng.state(CPU)) | {"cuda": "a state that no CPU has"})
    expected = draws()
    rng.restore(text, CPU)
    assert draws() == expected


def test_to_read_the_state_draws_nothing() -> None:
    seed_generators(1)
    expected = draws()
    seed_generators(1)
    rng.state(CPU)
    assert draws() == expected


def test_every_rank_has_a_name_of_its_own() -> None:
    assert len({rng.key(rank) for rank in range(2000)}) == 2000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_next_draw_of_the_device_comes_back() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(3)
    text = rng.state(device)
    expected = torch.rand(4, device=device).tolist()
    rng.restore(text, device)
    assert torch.rand(4, device=device).tolist() == expected
