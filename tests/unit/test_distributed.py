"""Where ranks meet."""

from sftlab.parallel.world import job_port


def test_jobs_that_follow_each_other_meet_at_other_ports() -> None:
    ports = [job_port(str(job)) for job in range(4_000_000, 4_010_000)]
    assert len(set(ports)) == len(ports)


def test_no_job_meets_at_a_port_that_a_connection_may_have() -> None:
    """Linux gives connections 32768 to 60999, and keeps those below 1024 for the system."""
    ports = {job_port(str(job)) for job in range(100_000)}
    assert min(ports) >= 1024 and max(ports) < 32_768
