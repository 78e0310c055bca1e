"""How ranks are divided, and what is refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftlab.parallel.division import divide, mesh_of, require_rows
from sftlab.parallel.world import World
from tests.runs import compose, run_here

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rank", "tensor", "data"), [(0, 1, (0, 12)), (7, 1, (7, 12)), (7, 2, (3, 6)), (11, 4, (2, 3))]
)
def test_neighbours_of_a_tensor_group_have_one_share_of_the_rows(rank: int, tensor: int, data: tuple[int, int]) -> None:
    world = divide(World(rank, 12, 0, CPU), tensor=tensor)
    assert (world.data_rank, world.data_size) == data
    assert (world.rank, world.size) == (rank, 12)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 5}, "parallel.tensor=5 must divide the number of processes, 12: use 1, 2, 3, 4, 6, 12"),
        ({"tensor": 0}, "parallel.tensor=0 must"),
        ({"tensor": "2"}, "parallel.tensor=2 must"),
        ({"replicate": 8}, "parallel.replicate=8 must divide the number of processes, 12: use 1, 2, 3, 4, 6, 12"),
        ({"replicate": 4, "tensor": 2},
         "parallel.replicate=4 must divide the number of processes, 6 (12 / 2 of parallel.tensor): use 1, 2, 3, 6"),
        ({"replicate": -1}, "parallel.replicate=-1 must"),
    ],
)  # fmt: skip
def test_sizes_divide_the_ranks(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        divide(World(0, 12, 0, CPU), **sizes)
    assert str(refused.value).startswith(message)


def test_no_more_shares_than_rows() -> None:
    world = World(0, 12, 0, CPU)
    require_rows(12, world)
    require_rows(6, replace(world, tensor=2))
    with pytest.raises(
        ValueError, match=r"^trainer\.batch_size=11 .* 12 ranks .*batch_size=12 or more, or at most 11 p"
    ):
        require_rows(11, world)
    with pytest.raises(ValueError, match=r"batch_size=5 .* 6 ranks .*parallel\.tensor=2.*=6 or more, or at most 10 pr"):
        require_rows(5, replace(world, tensor=2))


@pytest.mark.parametrize(
    ("ranks", "replicate", "tensor", "names", "sizes"),
    [
        (1, 1, 1, ("dp_shard",), (1,)),
        (12, 1, 1, ("dp_shard",), (12,)),
        (12, 12, 1, ("dp_replicate",), (12,)),
        (12, 3, 1, ("dp_replicate", "dp_shard"), (3, 4)),
        (12, 1, 4, ("dp_shard", "tp"), (3, 4)),
        (12, 1, 12, ("dp_shard", "tp"), (1, 12)),
        (12, 3, 4, ("dp_replicate", "tp"), (3, 4)),
        (12, 3, 2, ("dp_replicate", "dp_shard", "tp"), (3, 2, 2)),
    ],
)
def test_a_mesh_has_copies_outside_and_tensor_groups_inside(
    ranks: int, replicate: int, tensor: int, names: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = mesh_of(divide(World(0, ranks, 0, CPU), replicate=replicate, tensor=tensor), replicate)
        assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (names, sizes)
        assert mesh.mesh.flatten().tolist() == list(range(ranks)), "ranks of a tensor group are neighbours"
    finally:
        dist.destroy_process_group()


def test_bad_sizes_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """There is neither a model nor data: what is said first is the size."""
    nowhere = tmp_path / "nowhere"
    said = {
        "hsdp": ("parallel=hsdp",),
        "replicate": ("parallel.replicate=3",),
        "tensor": ("parallel=fsdp2_tp",),
        "rows": ("parallel=ddp", "trainer.batch_size=1"),
    }
    ends = {
        name: run_here(compose(tmp_path / "run", nowhere, (nowhere, nowhere), *typed)) for name, typed in said.items()
    }
    assert ends["hsdp"].startswith("ValueError: parallel.replicate=2 must divide the number of processes, 1: use 1")
    assert ends["replicate"].startswith(
        "ValueError: parallel.replicate=3 must divide the number of processes, 1: use 1"
    )
    assert ends["tensor"].startswith("ValueError: parallel.tensor=2 must divide the number of processes, 1: use 1")
    assert "nowhere" in ends["rows"], "one process has rows enough, and no model"


def test_an_optimiser_that_cannot_run_is_refused_before_data_and_weights(tmp_path: Path, model_folder: Path) -> None:
    nowhere = tmp_path / "nowhere"
    end = run_here(compose(tmp_path / "run", model_folder, (nowhere, nowhere), "optim=adamw_8bit"))
    assert end.startswith("ValueError: optim=adamw_8bit needs torchao")
