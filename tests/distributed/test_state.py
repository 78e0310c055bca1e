"""What a resume gives back on every rank: generators, moments, options, counters; and weights in, from rank 0 alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sftlab.checkpoints import manifest
from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import local_part
from sftlab.training.optim import adamw
from tests.asymmetric import draws, seed_generators
from tests.support import run_distributed, tiny_llama

PROGRESS = {"score": None, "time_s": 12.5, "skipped": [{"step": 2, "examples": ["a"]}]}


def quiet(text: str) -> None:
    pass


def whole_model(seed: int) -> Any:
    """Return a model whose rotary table is not the one that its config gives."""
    model = tiny_llama(seed=seed, layers=1)
    model.model.rotary_emb.inv_freq.add_(0.125)
    return model


def sharded(world: Any, seed: int, made: list[int]) -> Scorer:
    """Return a scorer filled from the whole model that rank 0 makes; each that is made here is noted in `made`."""

    def load() -> Any:
        made.append(seed)
        return whole_model(seed)

    config = tiny_llama(layers=1).config
    config._attn_implementation = "sdpa"
    scorer = fsdp2(Scorer(skeleton(config)), world, param_dtype="float32")
    broadcast_weights(scorer, load, world)
    return scorer


def parts(world: Any, seed: int, **options: Any) -> tuple[Scorer, torch.optim.Optimizer]:
    """Return a scorer and its optimiser after two updates by unequal gradients."""
    scorer = sharded(world, seed, [])
    optimizer = adamw(scorer, **{"lr": 1e-3, **options})
    for size in (0.1, -0.3):
        for i, p in enumerate(scorer.parameters()):
            p.grad = torch.full_like(p, size * (seed + i + 1))
        optimizer.step()
    optimizer.zero_grad()
    return scorer, optimizer


def held(scorer: Scorer, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return this rank's parts of the weights and of what the optimiser keeps for each."""
    found = []
    for p in scorer.parameters():
        kept = optimizer.state[p]
        found += [local_part(t).detach().clone() for t in (p, kept["exp_avg"], kept["exp_avg_sq"], kept["step"])]
    return found


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def filled_rightly(world: Any) -> dict[str, Any]:
    """Return what came of `fill` on this rank, against a whole model made here."""
    made: list[int] = []
    scorer = sharded(world, 4, made)
    theirs = whole_model(4)
    ours = {name: whole(value) for name, value in scorer.model.state_dict().items()}
    buffers = dict(scorer.model.named_buffers())
    return {
        "made": len(made),
        "wrong": [k for k, v in theirs.state_dict().items() if not torch.equal(ours[k], v)],
        "wrong buffers": [k for k, v in theirs.named_buffers() if not torch.equal(buffers[k], v)],
        "buffers": len(buffers),
        "tied": scorer.model.lm_head.weight is scorer.model.model.embed_tokens.weight,
    }


def leave_and_resume(world: Any, folder: Path, before: Path | None) -> dict[str, Any]:
    """Save on these ranks and resume on them; then, if another world left a checkpoint `before`, resume that one."""
    found = {"filled": filled_rightly(world)}
    scorer, optimizer = parts(world, seed=1)
    seed_generators(world.rank)
    expected = held(scorer, optimizer)
    said: list[str] = []
    checkpoints = Checkpoints(folder / "checkpoints", 1, world, said.append, identity={"data": "abc"})
    checkpoints.save(5, scorer, optimizer, PROGRESS)
    checkpoints.wait()
    found["draws"] = draws()

    seed_generators(50 + world.rank)
    other, changed = parts(world, seed=2, lr=5e-4, weight_decay=0.3, betas=(0.8, 0.95))
    found["unlike"] = equal(held(other, changed), expected)
    progress = checkpoints.restore(other, changed)
    found["draws again"] = draws()
    found["equal"] = equal(held(other, changed), expected)
    found["options"] = [(g["lr"], g["weight_decay"], tuple(g["betas"])) for g in changed.param_groups]
    found["progress"] = progress
    refusing = Checkpoints(folder / "checkpoints", 1, world, quiet, identity={"data": f"xyz {world.rank}"})
    try:
        refusing.restore(other, changed)
    except ValueError as error:
        found["refused"] = str(error)

    def no_sidecar(path: Path) -> None:
        raise OSError("no space left")

    failing = Checkpoints(folder / "checkpoints", 1, world, quiet, sidecar=no_sidecar)
    failing.save(6, other, changed, PROGRESS)
    failing.wait()
    found["failed"] = str(failing.failed)
    if before is not None:
        seed_generators(70 + world.rank)
        Checkpoints(folder / "new", 1, world, quiet, source=before).restore(other, changed)
        found["draws of the smaller world"] = draws()
    found["whole"] = [whole(p) for p in (scorer if before is None else other).parameters()]
    return found


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """What worlds of two and of three ranks saw; the larger one also resumed what the smaller one left."""
    folder = tmp_path_factory.mktemp("state")
    two = run_distributed(leave_and_resume, 2, folder / "2", None)
    return folder, {2: two, 3: run_distributed(leave_and_resume, 3, folder / "3", folder / "2")}


Left = tuple[Path, dict[int, list[dict[str, Any]]]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_generator_of_every_rank_goes_on_where_it_was(left: Left, ranks: int) -> None:
    found = left[1][ranks]
    for rank, seen in enumerate(found):
        assert seen["draws again"] == seen["draws"], f"rank {rank}"
    for name in ("torch", "numpy", "python"):
        assert len({tuple(seen["draws"][name]) for seen in found}) == ranks, "each rank has its own, or none is proved"


def test_ranks_that_were_not_there_before_keep_their_own_generators(left: Left) -> None:
    smaller, larger = left[1][2], left[1][3]
    assert [seen["draws of the smaller world"] for seen in larger[:2]] == [seen["draws"] for seen in smaller]
    seed_generators(72)
    assert larger[2]["draws of the smaller world"] == draws()


@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_and_moments_come_back_and_the_options_are_the_configs(left: Left, ranks: int) -> None:
    for seen in left[1][ranks]:
        assert seen["equal"] and not seen["unlike"]
        assert seen["options"] == [(5e-4, 0.3, (0.8, 0.95)), (5e-4, 0.0, (0.8, 0.95))]
        assert {k: v for k, v in seen["progress"].items() if k != "files"} == {
            "step": 5,
            "num_ranks": ranks,
            "data": "abc",
            **PROGRESS,
        }


def test_a_larger_world_resumes_the_weights_of_a_smaller_one(left: Left) -> None:
    smaller, larger = left[1][2][0]["whole"], left[1][3]
    for seen in larger:
        assert all(torch.equal(a, b) for a, b in zip(seen["whole"], smaller, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_file_is_answered_for_and_read_by_exactly_one_rank(left: Left, ranks: int) -> None:
    path = left[0] / str(ranks) / "checkpoints/step_00000005"
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert set(files) == {".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks))}
    assert {p.name for p in path.iterdir()} == {*files, "checkpoint.json"}
    assert manifest.damage(path) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_refusal_and_a_failed_save_are_every_ranks(left: Left, ranks: int) -> None:
    for rank, seen in enumerate(left[1][ranks]):
        assert f"other data (abc there, xyz {rank} here)" in seen["refused"]
        assert seen["failed"].startswith("the checkpoint of step 6 could not be written: no space left; step_00000005")


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_holds_the_weights_and_buffers_that_rank_0_alone_read(left: Left, ranks: int) -> None:
    for rank, seen in enumerate(left[1][ranks]):
        expected = {"made": int(rank == 0), "wrong": [], "wrong buffers": [], "buffers": 2, "tied": True}
        assert seen["filled"] == expected, f"rank {rank}"
