"""srun as torchrun: `srun -n 2 python -m sftlab.train` is a world of two, never two worlds of one.

The tasks of a step are given torchrun's variables, and rank 0 keeps torchrun's store. All else is the same.
"""

import os
import socket
from collections.abc import Mapping
from typing import Any

from sftlab.common.ports import job_port, keep_store

_stores: list[Any] = []  # rank 0's, for as long as its process lives


def is_task(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several that nothing else has ranked.

    A batch script has SLURM_NTASKS too, and it is not a task: only srun sets SLURM_STEP_NUM_TASKS.
    """
    ranked = "RANK" in env or "SUBMITIT_EXECUTOR" in env
    return not ranked and "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for this task of a step. The ranks of one node meet on loopback."""
    several = int(env.get("SLURM_STEP_NUM_NODES") or 1) > 1
    made = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": first_node(env["SLURM_STEP_NODELIST"]) if several else "127.0.0.1",
        "MASTER_PORT": str(job_port(env["SLURM_JOB_ID"], int(env["SLURM_STEP_ID"]))),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store below is there already
    }
    if not several:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        made["GLOO_SOCKET_IFNAME"] = env.get("GLOO_SOCKET_IFNAME", loopback)
    return made


def first_node(nodes: str) -> str:
    """Return the first host of a list in SLURM's spelling, as gpu[03-05,9],login."""
    from submitit.slurm.slurm import _parse_node_list

    return str(_parse_node_list(nodes)[0])


def adopt_srun() -> None:
    """Rank this process if it is a task of srun; on rank 0 open the store at which all meet."""
    if not is_task(os.environ):
        return
    os.environ.update(rank_variables(os.environ))
    if os.environ["RANK"] == "0":
        _stores.append(keep_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
