"""Where ranks meet, and how a process finds which it is."""

import os
import socket
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sftlab.parallel.world import World, find_rank, job_port, loopback, world

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_EXECUTOR", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a process that nothing has told its place; put back afterwards."""
    given = {k: v for k, v in os.environ.items() if k not in (*PLACES, "GLOO_SOCKET_IFNAME")}
    monkeypatch.setattr(os, "environ", given)
    return given


def test_jobs_that_follow_each_other_meet_at_other_ports() -> None:
    ports = [job_port(str(job)) for job in range(4_000_000, 4_010_000)]
    assert len(set(ports)) == len(ports)


def test_no_job_meets_at_a_port_that_a_connection_may_have() -> None:
    """Linux gives connections 32768 to 60999, and keeps those below 1024 for the system."""
    ports = {job_port(str(job)) for job in range(100_000)}
    assert min(ports) >= 1024 and max(ports) < 32_768


def test_torchruns_words_name_the_place(environment: dict[str, str]) -> None:
    assert find_rank() == (0, 1, 0)
    environment.update(RANK="5", WORLD_SIZE="8")
    assert find_rank() == (5, 8, 0)
    environment.update(LOCAL_RANK="1", SUBMITIT_EXECUTOR="slurm")  # torchrun within a job counts
    assert find_rank() == (5, 8, 1)
    del environment["WORLD_SIZE"], environment["SUBMITIT_EXECUTOR"]
    assert find_rank() == (0, 1, 0), "half of them is not torchrun's"


@pytest.mark.parametrize(("job", "port"), [({"SLURM_JOB_ID": "12769"}, "20001"), ({}, "4321")])
def test_submitits_job_names_the_place_and_where_to_meet(
    job: dict[str, str], port: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    found = SimpleNamespace(rank=5, world_size=8, local_rank=1, master_addr="node7", master_port=4321)
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", lambda: found)
    environment.update(SUBMITIT_EXECUTOR="slurm", **job)
    assert find_rank() == (5, 8, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node7", port)


class MixedExamples(Exception):
    """Raised in place of joining a process group."""


def joined(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Return how `world` would join the process group."""

    def join(backend: str, **given: Any) -> None:
        raise MixedExamples({"backend": backend, **given})

    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(MixedExamples) as found, world(**options):
        pass
    return dict(found.value.args[0])


def test_how_a_world_of_several_is_joined(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.update(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = {"backend": "gloo", "rank": 2, "world_size": 3, "store": None, "timeout": timedelta(minutes=30)}
    assert joined(monkeypatch) == expected
    assert joined(monkeypatch, timeout_min=0.5)["timeout"] == timedelta(seconds=30)
    assert "GLOO_SOCKET_IFNAME" not in environment, "ranks on other nodes are not behind loopback"


def test_a_world_of_one_needs_no_network(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "eth0"), (2, "lo7"), (3, "lo8")])
    found = joined(monkeypatch)
    assert (found["rank"], found["world_size"]) == (0, 1) and isinstance(found["store"], dist.HashStore)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo7"
    environment["GLOO_SOCKET_IFNAME"] = "eth1"
    joined(monkeypatch)
    assert environment["GLOO_SOCKET_IFNAME"] == "eth1", "what somebody has set stays"
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "eth0")])
    assert loopback() == "lo"


def test_ranks_of_a_node_take_its_devices_in_turn(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for local_rank in ("3", "5"):
        environment.update(RANK="8", WORLD_SIZE="16", LOCAL_RANK=local_rank)
        assert joined(monkeypatch)["backend"] == "cpu:gloo,cuda:nccl"
    assert taken == [torch.device("cuda", 3), torch.device("cuda", 1)]


def test_a_world_is_left_in_good_order_and_waits_for_others_only_if_nothing_was_raised(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[World] = []
    monkeypatch.setattr(World, "barrier", lambda self: waited.append(self))
    with world() as here:
        assert dist.is_initialized() and not waited
        assert (here.rank, here.size, here.local_rank, here.is_main) == (0, 1, 0, True)
        assert here.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert waited == [here] and not dist.is_initialized()
    with pytest.raises(ValueError, match="mine"), world():
        raise ValueError("mine")
    assert waited == [here] and not dist.is_initialized()
