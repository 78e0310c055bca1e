"""Where ranks meet."""

from pathlib import Path

import pytest

from sftlab.distributed import job_port

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_jobs_that_follow_each_other_meet_at_other_ports() -> None:
    ports = [job_port(str(job)) for job in range(4_000_000, 4_010_000)]
    assert len(set(ports)) == len(ports)


@pytest.mark.skipif(not EPHEMERAL.exists(), reason="Linux says which ports connections take")
def test_no_job_meets_at_a_port_that_a_connection_may_have() -> None:
    first, last = (int(n) for n in EPHEMERAL.read_text().split())
    assert not {job_port(str(job)) for job in range(100_000)} & set(range(first, last + 1))
