"""Tied weights through sharding, checkpoint and export; an exported folder that is whole or absent."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sftlab.checkpoints import hugging_face, manifest
from sftlab.checkpoints.hugging_face import export, write_all_but_weights
from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common import checksums
from sftlab.data.batch import collate
from sftlab.data.example import Example
from sftlab.data.forest import lay_out
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from tests.support import byte_tokenizer, random_examples, run_distributed, tiny_llama

Left = dict[str, Any]


def all_scored() -> list[Example]:
    """Return examples whose every token but the first is a target."""
    return [Example(e.tokens, e.supervised | True, e.id, e.group) for e in random_examples(4, longest=24)]


def sharded(world: Any, tied: bool, seed: int) -> Scorer:
    whole = partial(tiny_llama, seed=seed, tied=tied)
    config = whole().config
    config._attn_implementation = "sdpa"
    scorer = fsdp2(Scorer(skeleton(config)), world, param_dtype="float32")
    broadcast_weights(scorer, whole, world)
    return scorer


def train_and_leave(world: Any, folder: Path, tied: bool) -> Left:
    """Train three steps, save, restore into another model, train both a step more; return what was seen."""
    examples = all_scored()
    for example in examples:
        example.supervised[0] = False
    rows = lay_out(examples, "padded", 64)
    batch = collate(rows, len(rows), 64)
    scorer, other = sharded(world, tied, seed=1), sharded(world, tied, seed=2)
    optimizers = [adamw(s, lr=3e-3) for s in (scorer, other)]

    def step(of: Scorer, optimizer: Any) -> float:
        score = of(batch)
        score.nll.backward()
        optimizer.step()
        optimizer.zero_grad()
        return score.nll.item()

    def is_tied(of: Scorer) -> bool:
        return of.model.lm_head.weight is of.model.model.embed_tokens.weight

    seen: Left = {"losses": [step(scorer, optimizers[0]) for _ in range(3)], "tied": [is_tied(scorer), is_tied(other)]}
    seen["num_parameters"] = sum(1 for _ in scorer.parameters())
    sidecar = partial(write_all_but_weights, scorer, byte_tokenizer())
    for name, of, optimizer in (("first", scorer, optimizers[0]), ("other", other, optimizers[1])):
        checkpoints = Checkpoints(folder / "checkpoints", 2, world, lambda text: None, sidecar=sidecar)
        if name == "first":
            checkpoints.save(3, of, optimizer, {"score": None})
            checkpoints.wait()
            assert checkpoints.failed is None
        else:
            assert checkpoints.restore(of, optimizer) is not None
    seen["tied"].append(is_tied(other))

    logits: list[torch.Tensor] = []
    hook = scorer.model.lm_head.register_forward_hook(lambda module, inputs, out: logits.append(out.detach().clone()))
    with torch.no_grad():
        seen["loss"], seen["restored_loss"] = scorer(batch).nll.item(), other(batch).nll.item()
    hook.remove()
    torch.save(torch.cat(logits), folder / f"logits_{world.rank}.pt")  # too large for the pipe of the results
    seen["next"] = [step(scorer, optimizers[0]), step(other, optimizers[1])]
    seen["after"] = [scorer(batch).nll.item(), other(batch).nll.item()]
    if world.is_main:
        export(folder / "checkpoints/step_00000003", folder / "model", torch.float32)
    world.barrier()
    return seen


def leave_both(world: Any, folder: Path) -> dict[bool, Left]:
    return {tied: train_and_leave(world, folder / str(tied), tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bool, Left]]:
    folder = tmp_path_factory.mktemp("left")
    return folder, run_distributed(leave_both, 2, folder)[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gauntlet_24_tied_embeddings_stay_tied_and_are_saved_once(
    left: tuple[Path, dict[bool, Left]], tied: bool
) -> None:
    folder, seen = left[0] / str(tied), left[1][tied]
    assert seen["tied"] == [tied] * 3, "after sharding, of both models, and after the restore"
    assert seen["num_parameters"] == 2 * 9 + 2 + (not tied)
    assert seen["losses"][2] < seen["losses"][0] - 1
    assert seen["restored_loss"] == seen["loss"] and seen["next"][0] == seen["next"][1]
    assert seen["next"][0] == pytest.approx(seen["loss"], rel=1e-6), "with gradients the head is another code path"
    assert seen["after"][0] == seen["after"][1] < seen["loss"], (
        "the optimiser's state of the shared weight came back too"
    )

    entries = manifest.Reader(folder / "checkpoints/step_00000003").read_metadata().state_dict_metadata
    ends = ("embed_tokens.weight", "lm_head.weight")
    in_checkpoint = [name for name in entries if name.startswith("model.") and name.endswith(ends)]
    with safe_open(folder / "model/model.safetensors", "pt") as file:
        in_export = [name for name in file.keys() if name.endswith(ends)]  # noqa: SIM118  it is no dict
    assert len(in_checkpoint) == len(in_export) == 2 - tied

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    nll = torch.nn.functional.cross_entropy(plain_logits(model), targets(), reduction="sum")
    assert float(nll) == pytest.approx(seen["loss"], rel=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gauntlet_25_the_exports_logits_are_the_trainers(left: tuple[Path, dict[bool, Left]], tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = left[0] / str(tied)
    theirs = plain_logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    ours = torch.load(folder / "logits_0.pt")
    assert ours.shape == theirs.shape and theirs.dtype == torch.float32
    assert float((ours - theirs).abs().max()) < 1e-6
    assert float(theirs.abs().max()) > 0.1


@torch.no_grad()
def plain_logits(model: Any) -> torch.Tensor:
    """Return the logits at every scored position, a row an example."""
    rows = [model(input_ids=torch.tensor(e.tokens[None].astype("int64"))).logits[0, :-1] for e in all_scored()]
    return torch.cat(rows)


def targets() -> torch.Tensor:
    return torch.cat([torch.tensor(e.tokens[1:].astype("int64")) for e in all_scored()])


class Stop(BaseException):
    """A kill: nothing may catch it."""


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Stop at the n-th change of the disk that an export makes: `left` counts down; a deletion stops in its middle."""
    counter = {"left": -1}

    def patch(owner: Any, name: str, halfway: Any = None) -> None:
        original = getattr(owner, name)

        def changed(*arguments: Any, **named: Any) -> Any:
            counter["left"] -= 1
            if counter["left"] == 0:
                if halfway is not None:
                    halfway(*arguments)
                raise Stop
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, changed)

    def delete_half(folder: Path, *_: Any, **__: Any) -> None:
        for path in sorted(Path(folder).glob("*"))[1:]:
            path.unlink()

    patch(shutil, "rmtree", delete_half)
    patch(hugging_face, "copy_plain")
    patch(checksums, "write")
    patch(hugging_face, "sync_tree")
    patch(hugging_face, "sync")
    patch(Path, "rename")
    yield counter


@pytest.mark.parametrize("existing", [False, True], ids=["new", "again"])
def test_gauntlet_25_an_export_is_complete_or_absent_wherever_it_is_stopped(
    left: tuple[Path, dict[bool, Left]], tmp_path: Path, stopping: dict[str, int], existing: bool
) -> None:
    checkpoint = left[0] / "True/checkpoints/step_00000003"
    whole = {p.name: p.read_bytes() for p in (left[0] / "True/model").iterdir()}
    assert "model.safetensors" in whole and "config.json" in whole and "tokenizer.json" in whole
    stops = 0
    for num in range(1, 100):
        folder = tmp_path / f"{num}" / "model"
        folder.parent.mkdir()
        if existing:
            export(checkpoint, folder, torch.float32)
        stopping["left"] = num
        try:
            export(checkpoint, folder, torch.float32)
        except Stop:
            stops += 1
        stopping["left"] = -1
        found = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None
        assert found in (None, whole), f"half of it was there after change {num}"
        export(checkpoint, folder, torch.float32)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
        assert [p.name for p in folder.parent.iterdir()] == ["model"], "what a stop left behind is cleared away"
        if stops < num:
            break
    assert stops >= 8
