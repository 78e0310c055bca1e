"""The doctor on a real SLURM: it runs on every node of the job that the launcher's options ask for."""

import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import SlurmCluster
from tests.support import REPO


def test_the_doctor_answers_from_every_node(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    env = slurm_cluster.env | {"PYTHONPATH": str(REPO)}

    def doctor(*words: str) -> str:
        command = [sys.executable, "-m", "sftlab.doctor", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    options = ("launcher=slurm", "launcher.nodes=2", "launcher.mem_gb=1", "launcher.setup=['echo set up']")
    rows = doctor(*options, "only=[python,disk,tensorboard]", "folder=mine").splitlines()
    assert [row for row in rows if row.endswith(":")] == ["node1:", "node2:"]
    assert [row.split()[0] for row in rows if not row.endswith(":")] == ["python", "disk", "tensorboard"] * 2
    assert (tmp_path / "mine").is_dir() and list((tmp_path / "mine").iterdir()) == []
    assert "ok    partitions debug*, high; a test job ran on" in doctor("only=[slurm]")
