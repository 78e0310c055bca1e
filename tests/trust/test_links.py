"""A folder with links, pipes and planted names in it: nothing is read or written through them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sftlab.checkpoints.hugging_face import export
from sftlab.common import checksums, run_directory
from sftlab.common.files import (
    LinkRefused,
    copy_plain,
    make_folder,
    open_plain,
    plain_files,
    read_json,
    read_jsonl,
    read_yaml,
    refuse_links,
    remove,
    write_whole,
)  # fmt: skip
from sftlab.common.metrics import Metrics
from sftlab.common.run_directory import RunDirError
from sftlab.inference.trained_model import resolve
from sftlab.scoring.on_data import results_folder
from sftlab.sweeps.points import read_point, tail
from sftlab.training.console import Console
from tests.commands import Typed

PRIVATE = "what nobody else may see, and nothing may overwrite\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's, which a link points to."""
    (tmp_path / "mine.txt").write_text(PRIVATE)
    return tmp_path / "mine.txt"


@pytest.fixture
def run(rye_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, into which links are planted."""
    shutil.copytree(rye_run, tmp_path / "run")
    return tmp_path / "run"


PLANTED: dict[str, Callable[[Path, Path], Any]] = {
    "a link": lambda path, to: path.symlink_to(to),
    "a relative link": lambda path, to: path.symlink_to(os.path.relpath(to, path.parent)),
    "a hard link": lambda path, to: path.hardlink_to(to),
    "a pipe": lambda path, to: os.mkfifo(path),
    "a folder": lambda path, to: path.mkdir(),
}
READERS = (read_json, read_jsonl, read_yaml, lambda path: open_plain(path).read(), lambda path: open_plain(path, "rb"))


@pytest.mark.parametrize("how", [how for how in PLANTED if how != "a hard link"])
@pytest.mark.parametrize("reader", range(len(READERS)))
def test_a_reader_opens_plain_files_only(how: str, reader: int, mine: Path) -> None:
    PLANTED[how](mine.with_name("named"), mine)
    with pytest.raises((LinkRefused, IsADirectoryError)):
        READERS[reader](mine.with_name("named"))


@pytest.mark.parametrize("how", PLANTED)
@pytest.mark.parametrize("mode", ["w", "a", "ab"])
def test_a_writer_writes_through_nothing(how: str, mode: str, mine: Path) -> None:
    PLANTED[how](mine.with_name("named"), mine)
    with pytest.raises(OSError):
        open_plain(mine.with_name("named"), mode)
    assert mine.read_text() == PRIVATE


def test_a_file_that_is_written_whole_replaces_a_link_and_its_planted_partial_name(mine: Path) -> None:
    final = mine.with_name("config.yaml")
    final.symlink_to(mine)
    mine.with_name(f".config.yaml.{os.getpid()}").symlink_to(mine)
    write_whole(final, "new")
    assert final.read_text() == "new" and not final.is_symlink() and mine.read_text() == PRIVATE


def test_a_folder_is_made_removed_and_listed_without_following(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/keep").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluate").symlink_to(tmp_path / "theirs")
    for refused in (refuse_links, make_folder):
        with pytest.raises(LinkRefused, match=r"run/evaluate is a link to"):
            refused(tmp_path / "run", "evaluate", "demo")
    with pytest.raises(LinkRefused):
        list(plain_files(tmp_path / "run"))
    remove(tmp_path / "run/evaluate")
    assert (tmp_path / "theirs/keep").exists() and not list((tmp_path / "run").iterdir())
    with pytest.raises(FileExistsError):
        copy_plain(mine, tmp_path / "theirs/keep")


# ---- publish -----------------------------------------------------------------------------------------------

PUBLISHED = {
    "a file that publish writes": ("model/loss.svg", "a link"),
    "a config": ("model/sftlab_config.yaml", "a link"),
    "the card by a hard link": ("model/README.md", "a link"),
    "weights": ("model/model-00002.safetensors", "a link"),
    "a text": ("model/notes.txt", "a relative link"),
    "a pipe": ("model/merges.txt", "a pipe"),
    "the folder to be written": ("publish", "a link"),
    "the losses": ("metrics.jsonl", "a link"),
    "the environment": ("environment.json", "a link"),
}


@pytest.mark.parametrize("how", PUBLISHED)
def test_publish_follows_no_link(how: str, run: Path, mine: Path, refused: Typed) -> None:
    name, kind = PUBLISHED[how]
    remove(run / name)
    PLANTED[kind](run / name, mine)
    error = refused("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    assert "is a link to" in error or "is no plain file" in error
    assert mine.read_text() == PRIVATE and not (run / "publish").is_dir() and not (run / ".publish.partial").exists()


def test_a_model_folder_that_is_a_link_is_not_published(run: Path, tmp_path: Path, refused: Typed) -> None:
    (run / "model").rename(tmp_path / "my_own_model")
    (run / "model").symlink_to(tmp_path / "my_own_model")
    assert "is a link to" in refused("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")


def test_what_is_published_is_a_copy_of_files_known_by_name(run: Path, mine: Path, typed: Typed) -> None:
    (run / "model/loss.svg").hardlink_to(mine)
    (run / "model/private_notes.csv").write_text("a,b\n")
    (run / "model/deeper").mkdir()
    (run / "model/deeper/config.json").write_text("{}")
    out = typed("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    names = set(plain_files(run / "publish"))
    assert not names & {"private_notes.csv", "deeper/config.json"} and {"config.json", "model.safetensors"} < names
    assert "left here" in out and "private_notes.csv" in out and "deeper/config.json" in out
    assert mine.read_text() == PRIVATE and (run / "publish/loss.svg").read_text().startswith("<svg")
    assert all((run / "publish" / name).stat().st_nlink == 1 for name in names)


def test_a_model_that_is_not_what_was_exported_is_not_published(run: Path, typed: Typed, refused: Typed) -> None:
    checksums.write(run / "model")
    typed("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    sums = {line.split("  ")[1]: line[:64] for line in (run / "publish" / checksums.NAME).read_text().splitlines()}
    weights = run / "model/model.safetensors"
    assert sums["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    (run / "model/vocab.json").write_text("{}")  # not listed, so that nobody exported it
    typed("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    assert not (run / "publish/vocab.json").exists()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    error = refused("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    assert "model.safetensors has changed" in error
    (run / "model/config.json").unlink()
    with pytest.raises(checksums.Changed, match=r"config\.json is missing"):
        checksums.verify(run / "model")


@pytest.mark.parametrize("line", ["0" * 64 + "  ../../x", "0" * 64 + "  /etc/hostname", "no checksum", "0" * 64 + " x"])
def test_a_list_of_checksums_names_files_of_its_folder(line: str, tmp_path: Path) -> None:
    (tmp_path / checksums.NAME).write_text(line + "\n")
    with pytest.raises(checksums.Changed, match="no list of checksums"):
        checksums.read(tmp_path)


# ---- export, evaluate, claim -------------------------------------------------------------------------------


def test_an_export_holds_what_the_manifest_lists_and_carries_checksums(tmp_path: Path, one: Any, mine: Path) -> None:
    from functools import partial

    from sftlab.checkpoints.hugging_face import write_all_but_weights
    from sftlab.checkpoints.save_and_restore import Checkpoints
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.fsdp2 import fsdp2
    from sftlab.training.optim import adamw
    from tests.support import byte_tokenizer, tiny_llama

    scorer = fsdp2(Scorer(tiny_llama(layers=1)), one, param_dtype="float32")
    sidecar = partial(write_all_but_weights, scorer, byte_tokenizer())
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9, one, lambda text: None, sidecar=sidecar)
    checkpoints.save(1, scorer, adamw(scorer, lr=1e-3), {"score": None})
    checkpoints.wait()
    step = tmp_path / "checkpoints/step_00000001"
    (step / "hf/private.txt").symlink_to(mine)
    (step / "hf/modeling_own.py").write_text("raise SystemExit\n")
    (tmp_path / ".out.partial").symlink_to(mine.parent)
    export(step, tmp_path / "out", torch.float32)
    assert not {"private.txt", "modeling_own.py"} & set(os.listdir(tmp_path / "out")) and mine.read_text() == PRIVATE
    sums = checksums.read(tmp_path / "out")
    assert set(sums) == set(os.listdir(tmp_path / "out")) - {checksums.NAME}
    checksums.verify(tmp_path / "out")
    listed = step / "hf/config.json"
    listed.rename(tmp_path / "config.json")
    listed.symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"hf/config\.json.*is a link to"):
        export(step, tmp_path / "again", torch.float32)


@pytest.mark.parametrize("link", ["evaluate", "evaluate/demo"])
def test_an_evaluation_writes_into_the_run_itself(link: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    remove(run / link)  # of an evaluation in another test
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(tmp_path / "theirs")
    with pytest.raises(LinkRefused, match="is a link to"):
        results_folder(resolve(str(run)), {"output_dir": None}, "demo")
    assert not list((tmp_path / "theirs").iterdir())


CLAIMED = ("metrics.jsonl", "train.log", "samples.jsonl", "checkpoints", "tensorboard", "model", "checkpoints/step_1")


@pytest.mark.parametrize("name", CLAIMED)
def test_a_run_directory_with_a_link_in_it_is_not_claimed(name: str, run: Path, tmp_path: Path, mine: Path) -> None:
    config = run_directory.read_config(run)
    remove(run / name)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(mine)
    before = (run / "config.yaml").read_text()
    with pytest.raises(RunDirError, match=rf"{name} is a link to"):
        run_directory.claim(run, config, [])
    assert mine.read_text() == PRIVATE and (run / "config.yaml").read_text() == before


def test_the_link_to_the_newest_checkpoint_is_ours(run: Path) -> None:
    (run / "checkpoints/step_00000008").mkdir(parents=True)
    (run / "checkpoints/latest").symlink_to("step_00000008")
    run_directory.claim(run, run_directory.read_config(run), [])


def test_logs_and_numbers_are_not_appended_through_a_link(tmp_path: Path, mine: Path) -> None:
    for name, write in (("train.log", lambda p: Console(1, p, quiet=True)), ("metrics.jsonl", Metrics)):
        (tmp_path / name).symlink_to(mine)
        with pytest.raises(LinkRefused):
            write(tmp_path / name)
    assert tail(tmp_path / "train.log") == "" and mine.read_text() == PRIVATE


def test_a_point_that_is_a_link_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "my_run").mkdir()
    (tmp_path / "my_run/summary.json").write_text(json.dumps({"status": "failed", "error": PRIVATE}))
    (tmp_path / "s").mkdir()
    (tmp_path / "s/0").symlink_to(tmp_path / "my_run")
    with pytest.raises(LinkRefused):
        read_point(tmp_path / "s", 0, {}, {})


def test_a_config_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: " + "[" * 900 + "]" * 900)
    with pytest.raises(ValueError, match=r"config\.yaml is n"):
        run_directory.read_config(tmp_path)


def test_aliases_that_stand_for_billions_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="aliases repeat"):
        run_directory.read_config(tmp_path)
    assert yaml  # PyYAML itself reads it in no time: only whoever walks the tree would never end
