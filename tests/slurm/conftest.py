"""A SLURM cluster of two nodes for the tests in this folder, started once a session and stopped at its end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import APT, SlurmCluster, local_cluster, missing_programs
from tests.warm import warm


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Two nodes, each with 2 pretended GPUs."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found, so SLURM is not tested; as root: {APT}")
    with local_cluster(nodes=2, gpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def warm_python(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python that has imported torch, for commands and for ranks: both nodes are this machine."""
    folder = tmp_path_factory.mktemp("warm")
    env = slurm_cluster.env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with warm(folder, env, "submitit", "hydra", "rich.live") as made:
        yield made.python
