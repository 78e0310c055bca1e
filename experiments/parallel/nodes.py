"""Two and four SLURM nodes of two ranks, as copies per node and as tensor groups, beside one process.

    python experiments/parallel/nodes.py [--nodes 2,4]

Starts a SLURM cluster of its own (slurm/local-cluster), whose nodes are names of this machine. It exits with 1 if a
loss is off by more than 1e-5 of itself.
"""

import argparse
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.slurm.cluster import local_cluster  # noqa: E402
from tests.slurm.test_launcher import Site  # noqa: E402

MOST = 1e-5
RUN = ("trainer.max_steps=10", "schedule=constant")


def main() -> int:
    """Print one row per run; return 1 if anything is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="2,4", help="numbers of nodes, separated by commas")
    counts = [int(n) for n in parser.parse_args().nodes.split(",")]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, local_cluster(nodes=max(counts)) as cluster:
        site = Site(Path(folder), cluster.env)
        done = site.train(*RUN, f"run_dir={folder}/alone/0", launcher="none")
        assert done.returncode == 0, done.stdout + done.stderr
        expected = site.losses(0, "alone")
        print(f"| nodes of two ranks | parallel | largest relative loss difference in {len(expected)} steps |")
        print("| --- | --- | --- |")
        for nodes in counts:
            for parallel in (
                ["parallel=hsdp", f"parallel.replicate={nodes}"],
                ["parallel=fsdp2_tp"],
                ["parallel=fsdp2_tp", f"parallel.replicate={nodes}"],
            ):
                sweep = f"{nodes}-{'-'.join(parallel)}".replace("=", "_")
                wide = [f"launcher.nodes={nodes}", "launcher.processes_per_node=2", f"hydra.sweep.dir={folder}/{sweep}"]
                done = site.train(*RUN, *parallel, *wide)
                assert done.returncode == 0, done.stdout + done.stderr
                off = max(abs(a / b - 1) for a, b in zip(site.losses(0, sweep), expected, strict=True))
                worst = max(worst, off)
                print(f"| {nodes} | {' '.join(parallel)} | {off:.1e} |", flush=True)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
