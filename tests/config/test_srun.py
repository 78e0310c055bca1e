"""srun as torchrun: the tasks of a step are one world."""

import os
from typing import Any

import pytest

from sftlab.config import srun
from sftlab.config.srun import first_node, is_task, rank_variables

STEP = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip


def test_a_task_of_several_is_ranked_and_nothing_else() -> None:
    assert is_task(STEP)
    assert not is_task({**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert not is_task({**STEP, "RANK": "0"}), "torchrun inside srun"
    assert not is_task({**STEP, "SUBMITIT_EXECUTOR": "slurm"}), "launcher=slurm"
    batch = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert not is_task(batch), "a batch script that asked for eight tasks is one process"
    assert not is_task({})


def test_the_variables_are_torchruns() -> None:
    made = rank_variables(STEP)
    assert (made["RANK"], made["WORLD_SIZE"], made["LOCAL_RANK"], made["MASTER_ADDR"]) == ("3", "4", "1", "gpu08")
    assert "GLOO_SOCKET_IFNAME" not in made
    one_node = rank_variables({**STEP, "SLURM_STEP_NUM_NODES": "1"})
    assert one_node["MASTER_ADDR"] == "127.0.0.1" and one_node["GLOO_SOCKET_IFNAME"].startswith("lo")
    other_step = rank_variables({**STEP, "SLURM_STEP_ID": "3"})
    assert made["MASTER_PORT"] == one_node["MASTER_PORT"] != other_step["MASTER_PORT"]


@pytest.mark.parametrize(("nodes", "first"), [("node1", "node1"), ("gpu[03-05,9],login", "gpu03"), ("a,b[1-2]", "a")])
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_rank_0_keeps_a_store_on_loopback_at_which_all_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    given: dict[str, Any] = {**os.environ, **STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    for name in ("RANK", "WORLD_SIZE", "SUBMITIT_EXECUTOR"):
        given.pop(name, None)
    monkeypatch.setattr(os, "environ", given)
    srun.adopt_srun()
    store = TCPStore(given["MASTER_ADDR"], int(given["MASTER_PORT"]), is_master=False)
    store.set("key", "value")
    assert srun._stores.pop().get("key") == b"value" and given["RANK"] == "0"
    del store
