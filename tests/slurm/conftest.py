"""A SLURM cluster of two nodes for the tests in this folder, started once a session and stopped at its end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import APT, SlurmCluster, local_cluster, missing_programs
from tests.support import warmed


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Two nodes, each with 2 pretended GPUs; a job that exceeds its memory is killed."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found, so SLURM is not tested; as root: {APT}")
    with local_cluster(nodes=2, gpus=2, memory_kill=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def warm_python() -> Path:
    """A Python that has imported torch, for commands and for ranks: both nodes are this machine."""
    return warmed().python
