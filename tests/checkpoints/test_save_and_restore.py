"""What a save keeps, deletes and leaves running; what a resume begins from, refuses and sets aside."""

import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftlab.checkpoints import manifest, save_and_restore
from sftlab.checkpoints.save_and_restore import Checkpoints, SaveFailed
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import local_part
from sftlab.training.optim import adamw
from tests.asymmetric import record_syncs
from tests.support import tiny_llama


class SlowToEnd(Future[None]):
    """A result that is known a quarter of a second before its thread is over."""

    def set_result(self, result: None) -> None:
        super().set_result(result)
        time.sleep(0.25)


def quiet(text: str) -> None:
    pass


def parts(world: Any, seed: int, vocab: int = 320, **options: Any) -> tuple[Scorer, torch.optim.Optimizer]:
    """Return a tiny scorer and its optimiser after two updates by unequal gradients."""
    scorer = fsdp2(Scorer(tiny_llama(seed=seed, layers=1, vocab=vocab)), world, param_dtype="float32")
    optimizer = adamw(scorer, **{"lr": 1e-3, **options})
    for size in (0.1, -0.3):
        for i, p in enumerate(scorer.parameters()):
            p.grad = torch.full_like(p, size * (seed + i + 1))
        optimizer.step()
    optimizer.zero_grad()
    return scorer, optimizer


def tensors(scorer: Scorer, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of the weights, and of what the optimiser keeps for each."""
    found = []
    for p in scorer.parameters():
        kept = optimizer.state[p]
        found += [local_part(t).detach().clone() for t in (p, kept["exp_avg"], kept["exp_avg_sq"], kept["step"])]
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def pair(one: Any) -> tuple[Scorer, torch.optim.Optimizer]:
    """A scorer and an optimiser for tests that only look at folders."""
    return parts(one, seed=0)


@pytest.fixture
def make(one: Any, pair: Any, tmp_path: Path) -> Callable[..., Path]:
    """Write whole checkpoints of these steps into a folder, and return it."""

    def made(folder: Path, *steps: int, **settings: Any) -> Path:
        checkpoints = Checkpoints(folder, 100, one, quiet, **settings)
        for step in steps:
            checkpoints.save(step, *pair, {"score": None, "time_s": step * 1.5})
        checkpoints.wait()
        assert names(folder) == [f"step_{step:08d}" for step in steps]
        return folder

    return made


def names(folder: Path) -> list[str]:
    return [p.name for p in manifest.complete_checkpoints(folder)]


def test_a_save_that_was_waited_for_leaves_no_thread(
    one: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that outlives its save may be the last to let go of the process groups: SIGABRT in a rank's exit."""
    monkeypatch.setattr(save_and_restore, "Future", SlowToEnd)
    checkpoints = Checkpoints(tmp_path, 1, one, quiet)
    checkpoints.save(1, *pair, {"score": None})
    assert "checkpoint" in [t.name for t in threading.enumerate()]
    checkpoints.wait()
    assert "checkpoint" not in [t.name for t in threading.enumerate()]
    assert names(tmp_path) == ["step_00000001"]


def test_the_newest_are_kept_and_an_older_best(one: Any, pair: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, one, quiet)
    kept = []
    for step, score in enumerate([math.nan, 0.5, -math.inf, None, 0.75, 0.25, 0.25], 1):
        checkpoints.save(step, *pair, {"score": score})
        checkpoints.wait()
        kept.append([int(name[5:]) for name in names(tmp_path)])
        assert (tmp_path / "latest").readlink() == Path(f"step_{step:08d}"), "relative: a run may be moved"
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000006", "step_00000007", "latest"}


def test_with_one_to_keep_the_best_is_kept_beside_it(one: Any, pair: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, one, quiet)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        checkpoints.save(step, *pair, {"score": score})
    checkpoints.wait()
    assert [p.name for p in checkpoints.complete()] == ["step_00000002", "step_00000004"]


def test_one_that_is_being_deleted_is_no_checkpoint_any_more(
    one: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 1, one, quiet)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill before the first file of it is gone
    for step in (1, 2):
        checkpoints.save(step, *pair, {"score": None})
    checkpoints.wait()
    assert (tmp_path / "step_00000001/__0_0.distcp").exists() and names(tmp_path) == ["step_00000002"]


def test_a_checkpoint_says_what_it_is_and_answers_for_every_file(one: Any, pair: Any, tmp_path: Path) -> None:
    def sidecar(folder: Path) -> None:
        (folder / "inner").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "inner" / "words.txt").write_text("a b")

    checkpoints = Checkpoints(tmp_path, 1, one, quiet, identity={"data": "abc"}, sidecar=sidecar)
    checkpoints.save(7, *pair, {"score": 0.5, "time_s": 2.5, "skipped": [{"step": 3}]})
    checkpoints.wait()
    path = tmp_path / "step_00000007"
    found = manifest.read_manifest(path)
    assert set(found.pop("files")) == {".metadata", "__0_0.distcp", "hf/config.json", "hf/inner/words.txt"}
    expected = {"step": 7, "num_ranks": 1, "data": "abc", "score": 0.5, "time_s": 2.5, "skipped": [{"step": 3}]}
    assert found == expected
    (path / "hf/inner/words.txt").write_text("a c")
    assert manifest.damage(path) == [f"{path / 'hf/inner/words.txt'} is corrupted: its checksum differs"]
    progress = Checkpoints(tmp_path, 1, one, quiet, identity={"data": "abc"})
    (path / "hf/inner/words.txt").write_text("a b")
    assert {k: v for k, v in (progress.restore(*pair) or {}).items() if k != "files"} == expected


def test_a_save_holds_the_state_of_its_step_while_training_goes_on(one: Any, tmp_path: Path) -> None:
    go = threading.Event()
    scorer, optimizer = parts(one, seed=1)
    expected = tensors(scorer, optimizer)
    checkpoints = Checkpoints(tmp_path, 1, one, quiet, sidecar=lambda folder: go.wait(60) and None)
    checkpoints.save(1, scorer, optimizer, {"score": None})
    assert names(tmp_path) == [] and [t.daemon for t in threading.enumerate() if t.name == "checkpoint"] == [True]
    with torch.no_grad():
        for p in scorer.parameters():
            for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], optimizer.state[p]["step"]):
                t.add_(1.0)
    assert not same(tensors(scorer, optimizer), expected)
    go.set()
    checkpoints.wait()
    assert checkpoints.restore(scorer, optimizer) is not None
    assert same(tensors(scorer, optimizer), expected)


def test_a_save_waits_for_the_one_before_it(one: Any, pair: Any, tmp_path: Path) -> None:
    second_began, seen = threading.Event(), []

    def sidecar(folder: Path) -> None:
        seen.append(second_began.wait(0.3))

    checkpoints = Checkpoints(tmp_path, 2, one, quiet, sidecar=sidecar)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.save(2, *pair, {"score": None})
    second_began.set()
    checkpoints.wait()
    assert seen == [False, True] and names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_hangs_is_not_waited_for_at_the_end(one: Any, pair: Any, tmp_path: Path) -> None:
    go = threading.Event()
    checkpoints = Checkpoints(tmp_path, 1, one, quiet, sidecar=lambda folder: go.wait(5) and None)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.close(0.01)
    (thread,) = [t for t in threading.enumerate() if t.name == "checkpoint"]
    go.set()
    thread.join()
    assert names(tmp_path) == ["step_00000001"]


def test_an_error_that_is_no_failed_write_is_raised_by_wait_and_not_by_close(
    one: Any, pair: Any, tmp_path: Path
) -> None:
    def sidecar(folder: Path) -> None:
        raise RuntimeError("a bug of ours")

    checkpoints = Checkpoints(tmp_path, 1, one, quiet, sidecar=sidecar)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.close()
    checkpoints.save(1, *pair, {"score": None})
    with pytest.raises(RuntimeError, match="a bug of ours"):
        checkpoints.wait()


def test_a_failed_save_is_told_kept_and_forgotten_after_the_next_good_one(one: Any, pair: Any, tmp_path: Path) -> None:
    said: list[str] = []
    failing = {1, 4}

    def sidecar(folder: Path) -> None:
        if int(folder.parent.name.split("_")[1].split(".")[0]) in failing:
            raise OSError("no space left")

    checkpoints = Checkpoints(tmp_path, 5, one, said.append, sidecar=sidecar)
    outcomes = []
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(step, *pair, {"score": None})
        checkpoints.wait()
        checkpoints.check("continue")
        outcomes.append(checkpoints.failed is not None)
        if outcomes[-1]:
            with pytest.raises(SaveFailed, match=f"^the checkpoint of step {step} could not be written: no space left"):
                checkpoints.check("stop")
        else:
            checkpoints.check("stop")
        assert not list(tmp_path.glob(".step*"))
    assert outcomes == [True, False, False, True, False]
    reasons = [line.partition("written: ")[2] for line in said if "could not be written" in line]
    assert reasons == [
        "no space left; no earlier one exists",
        "no space left; step_00000003 is intact",
    ]
    assert said[0].startswith("step 1: the checkpoint") and said[1].startswith("step 2: saved in ")


def test_a_disk_with_too_little_space_is_not_filled(one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, optimizer = parts(one, seed=0, vocab=8192)
    # Weights and two moments of 4 bytes an element, and a count of steps of 4 bytes for each weight.
    needed = sum(3 * 4 * p.numel() + 4 for p in scorer.parameters())
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "new", 1, one, said.append)
    outcomes = []
    for step, free in enumerate((needed - 1, needed, 2 * 2**20), 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        checkpoints.save(step, scorer, optimizer, {"score": None})
        checkpoints.wait()
        outcomes.append(checkpoints.failed is None)
    assert outcomes == [False, True, False]
    assert f"it takes 3 MiB, {tmp_path / 'new'} has 2 MiB left; step_00000002 is intact" in said[-1]
    assert 3 * 2**20 < needed < 3.5 * 2**20


def test_what_a_killed_save_left_is_cleared_away(one: Any, pair: Any, tmp_path: Path) -> None:
    left = tmp_path / ".step_00000099.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_text("half")
    (tmp_path / "notes.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, 1, one, quiet)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.wait()
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000001", "latest", "notes.partial"}


def test_a_step_that_is_saved_again_sets_the_older_one_aside(one: Any, pair: Any, tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 3, one, said.append)
    for score in (1.0, 2.0):
        checkpoints.save(4, *pair, {"score": score})
    checkpoints.wait()
    (aside,) = tmp_path.glob("aside_*_step_00000004")
    assert (
        manifest.read_manifest(aside)["score"] == 1.0
        and manifest.read_manifest(tmp_path / "step_00000004")["score"] == 2.0
    )
    assert names(tmp_path) == ["step_00000004"] and f"step_00000004 is set aside as {aside.name}" in said


def test_no_checkpoint_is_nothing_to_resume(one: Any, pair: Any, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 1, one, quiet).restore(*pair) is None


def test_moments_come_from_the_checkpoint_and_options_from_the_config(one: Any, tmp_path: Path) -> None:
    scorer, optimizer = parts(one, seed=3)
    Checkpoints(tmp_path, 1, one, quiet).save(9, scorer, optimizer, {"score": None})
    expected = tensors(scorer, optimizer)
    said: list[str] = []
    other, changed = parts(one, seed=8, lr=5e-4, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    assert not same(tensors(other, changed), expected)
    for thread in [t for t in threading.enumerate() if t.name == "checkpoint"]:
        thread.join()
    assert Checkpoints(tmp_path, 1, one, said.append).restore(other, changed) is not None
    assert same(tensors(other, changed), expected)
    assert said == [f"resumed from {tmp_path / 'step_00000009'}, step 9"]
    shown = [(g["lr"], g["weight_decay"], tuple(g["betas"]), g["eps"]) for g in changed.param_groups]
    assert shown == [(5e-4, 0.3, (0.8, 0.95), 1e-6), (5e-4, 0.0, (0.8, 0.95), 1e-6)]
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, fused=True).param_groups[0]
    assert all(group.keys() == plain.keys() for group in changed.param_groups)


def step_of(progress: dict[str, Any] | None) -> int | None:
    return progress["step"] if progress else None


def test_after_a_rewind_the_next_resume_follows_the_new_branch(
    one: Any, pair: Any, tmp_path: Path, make: Callable[..., Path]
) -> None:
    folder = make(tmp_path, 1, 2, 3, 10)
    rewound = Checkpoints(folder, 9, one, quiet, source=folder / "step_00000002", rewind=True)
    assert step_of(rewound.restore(*pair)) == 2
    assert names(folder) == ["step_00000001", "step_00000002"]
    assert sorted(p.name.split("_", 2)[2] for p in folder.glob("aside_*")) == ["step_00000003", "step_00000010"]
    assert step_of(Checkpoints(folder, 9, one, quiet).restore(*pair)) == 2, "the same command again"
    rewound.save(3, *pair, {"score": None, "time_s": 77.0})
    rewound.wait()
    again = Checkpoints(folder, 9, one, quiet, source=folder / "step_00000002").restore(*pair)
    assert again is not None and (again["step"], again["time_s"]) == (3, 77.0)


def test_a_run_begins_from_another_only_while_it_has_no_checkpoint(
    one: Any, pair: Any, tmp_path: Path, make: Callable[..., Path]
) -> None:
    other = make(tmp_path / "other/checkpoints", 5, 6)
    mine = tmp_path / "mine/checkpoints"
    for source, expected in ((tmp_path / "other", 6), (other / "step_00000005", 5)):
        assert step_of(Checkpoints(mine, 9, one, quiet, source=source).restore(*pair)) == expected
    make(mine, 1, 2)
    assert step_of(Checkpoints(mine, 9, one, quiet, source=tmp_path / "other").restore(*pair)) == 2
    assert step_of(Checkpoints(mine, 9, one, quiet, source=tmp_path / "other", rewind=True).restore(*pair)) == 6
    assert names(other) == ["step_00000005", "step_00000006"], "nothing of the other run was touched"
    assert names(mine) == ["step_00000001", "step_00000002"]


def spoil(folder: Path) -> None:
    (folder / ".metadata").unlink()


def test_a_damaged_one_is_set_aside_if_it_is_ours_and_not_the_last_hope(
    one: Any, pair: Any, tmp_path: Path, make: Callable[..., Path]
) -> None:
    said: list[str] = []
    folder = make(tmp_path / "mine", 1, 2, 3)
    spoil(folder / "step_00000003")
    assert step_of(Checkpoints(folder, 9, one, said.append).restore(*pair)) == 2
    assert names(folder) == ["step_00000001", "step_00000002"] and len(list(folder.glob("aside_*"))) == 1
    missing = folder / "step_00000003" / ".metadata"
    assert said[0] == f"step_00000003 is damaged and not used:\n{missing} is missing"

    for name in names(folder):
        spoil(folder / name)
    with pytest.raises(
        manifest.Damaged, match=r"no checkpoint in .*mine is whole: .*step_00000001/\.metadata is missi"
    ):
        Checkpoints(folder, 9, one, quiet).restore(*pair)
    assert names(folder) == ["step_00000001"], "an empty folder would begin anew, and silently"

    other = make(tmp_path / "other/checkpoints", 5, 6)
    spoil(other / "step_00000006")
    assert step_of(Checkpoints(tmp_path / "new", 9, one, quiet, source=tmp_path / "other").restore(*pair)) == 5
    assert names(other) == ["step_00000005", "step_00000006"], "another run's is not ours to rename"


def test_other_data_is_refused_before_anything_is_loaded(one: Any, tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path, 1, 2, identity={"data": "abc", "tokenizer": "t"})
    scorer, optimizer = parts(one, seed=5)
    before = tensors(scorer, optimizer)
    refused = Checkpoints(
        folder, 9, one, quiet, source=folder / "step_00000001", rewind=True, identity={"data": "xyz", "tokenizer": "t"}
    )
    with pytest.raises(
        ValueError, match=r"step_00000001 was made with other data \(abc there, xyz here\).*resume_despite_changes=true"
    ):
        refused.restore(scorer, optimizer)
    assert same(tensors(scorer, optimizer), before) and len(names(folder)) == 2
    with pytest.raises(ValueError, match=r"other rows \(None there, 3 here\)"):
        Checkpoints(folder, 9, one, quiet, identity={"rows": 3}).restore(scorer, optimizer)
    anyway = Checkpoints(folder, 9, one, quiet, identity={"data": "xyz"}, anyway=True)
    assert step_of(anyway.restore(scorer, optimizer)) == 2
    same_data = Checkpoints(folder, 9, one, quiet, identity={"data": "abc", "tokenizer": "t"})
    assert step_of(same_data.restore(scorer, optimizer)) == 2


def test_a_save_leaves_torchs_checksums_as_they_were(one: Any, pair: Any, tmp_path: Path) -> None:
    for setting in (True, False):
        torch.serialization.set_crc32_options(setting)
        try:
            with pytest.raises(RuntimeError, match="in the middle"), save_and_restore.one_checksum():
                assert torch.serialization.get_crc32_options() is False
                raise RuntimeError("in the middle")
            assert torch.serialization.get_crc32_options() is setting
        finally:
            torch.serialization.set_crc32_options(True)


def test_what_makes_a_checkpoint_whole_is_on_the_disk_when_it_is_told(
    one: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = record_syncs(monkeypatch)
    checkpoints = Checkpoints(tmp_path, 1, one, quiet)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.wait()
    partial = tmp_path / ".step_00000001.partial"
    inside = {str(partial / p.relative_to(tmp_path / "step_00000001")) for p in (tmp_path / "step_00000001").rglob("*")}
    assert inside < set(synced) and synced[-2:] == [str(partial), str(tmp_path)]  # the folder, and the rename


def test_bytes_are_those_of_every_tensor_however_deep() -> None:
    state = {"a": torch.zeros(3, dtype=torch.float64), "b": {"c": torch.zeros(5, dtype=torch.bfloat16), "d": "text"}}
    assert save_and_restore.local_bytes(state) == 3 * 8 + 5 * 2


def test_a_disk_without_links_does_without_the_link(
    one: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, *_: Any) -> None:
        raise OSError("no links here")

    said: list[str] = []
    monkeypatch.setattr(Path, "symlink_to", no_links)
    checkpoints = Checkpoints(tmp_path, 1, one, said.append)
    checkpoints.save(1, *pair, {"score": None})
    checkpoints.wait()
    assert checkpoints.failed is None and names(tmp_path) == ["step_00000001"]
    assert "checkpoints/latest could not be set: no links here" in said
    assert json.loads((tmp_path / "step_00000001/checkpoint.json").read_text())["step"] == 1
