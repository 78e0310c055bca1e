"""A SLURM cluster of two nodes for the tests in this folder, started once a session and stopped at its end."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import APT, SlurmCluster, local_cluster, missing_programs


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Two nodes, each with 2 pretended GPUs."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found, so SLURM is not tested; as root: {APT}")
    with local_cluster(nodes=2, gpus=2) as cluster:
        yield cluster
