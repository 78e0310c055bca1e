"""What changes without a word: bytes behind a kept time, a cache, a branch of the hub, a disk without power."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sftlab.checkpoints import save_and_restore
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common import revisions
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.opening import open_source
from sftlab.data.store import Store, store
from sftlab.inference.trained_model import TrainedModel
from tests.local_hub import LocalHub, Repo
from tests.support import byte_tokenizer

FORMAT = PromptCompletion()


def write_table(path: Path, answers: list[str]) -> None:
    """Write rows of answers of one letter each, so that every version of the file has the same size."""
    rows = [{"prompt": f"p{n}", "completion": answer} for n, answer in enumerate(answers)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text("".join(f"{a}{mark}{b}\n" for a, b in [("prompt", "completion"), *(r.values() for r in rows)]))


def read(path: Path, tokenizer: Any) -> Store:
    return store(open_source(str(path), "train", FORMAT.rows), FORMAT, tokenizer)


def texts(found: Store, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(found[i].tokens, skip_special_tokens=True) for i in range(len(found))]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_a_file_that_changed_with_its_time_kept_is_read_again(suffix: str, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / f"data{suffix}", byte_tokenizer()
    write_table(path, ["a", "b"])
    stat, first = path.stat(), read(path, tokenizer)
    write_table(path, ["a", "c"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    second = read(path, tokenizer)
    assert first.fingerprint != second.fingerprint
    assert texts(first, tokenizer)[1].endswith("b") and texts(second, tokenizer)[1].endswith("c")
    write_table(path, ["a", "b"])
    assert read(path, tokenizer).fingerprint == first.fingerprint


@pytest.mark.parametrize("how", ["a token", "cut short"])
def test_a_cache_of_tokens_that_changed_is_made_anew(
    how: str, tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, tokenizer = tmp_path / "data.jsonl", byte_tokenizer()
    write_table(path, [f"{how}{n}" for n in range(9)])
    first = read(path, tokenizer)
    wanted = texts(first, tokenizer)
    (file,) = [p for p in (own_cache / "sftlab").rglob("*.arrow") if first.fingerprint in str(p)]
    content = bytearray(file.read_bytes())
    at = content.find(first[8].tokens.tobytes())
    assert at > 0
    content[at] ^= 1
    os.chmod(file, 0o644)
    file.unlink()  # what is mapped stays as it is
    file.write_bytes(content if how == "a token" else content[:-8] + bytes(8))
    again = read(path, tokenizer)
    assert "have changed on the disk: made anew" in caplog.text and texts(again, tokenizer) == wanted
    caplog.clear()
    assert texts(read(path, tokenizer), tokenizer) == wanted and not caplog.records


def test_every_file_and_folder_of_a_checkpoint_is_synced_before_its_rename(
    one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.fsdp2 import fsdp2
    from sftlab.training.optim import adamw
    from tests.support import tiny_llama

    happened: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        happened.append(f"rename to {target.name}")
        return rename(self, target)

    def sidecar(folder: Path) -> None:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/config.json").write_text("{}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    scorer = fsdp2(Scorer(tiny_llama(layers=1)), one, param_dtype="float32")
    checkpoints = Checkpoints(tmp_path, 1, one, lambda text: None, sidecar=sidecar)
    checkpoints.save(1, scorer, adamw(scorer, lr=1e-3), {"score": None})
    checkpoints.wait()
    before = happened[: happened.index("rename to step_00000001")]
    step = tmp_path / "step_00000001"
    for path in step.rglob("*"):
        assert path.name in before, f"{path} may be lost in a power cut"
    assert before[-1] == ".step_00000001.partial" and happened[-1] == tmp_path.name
    assert save_and_restore.sync_tree


# ---- revisions ---------------------------------------------------------------------------------------------


def config(**model: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "ada/base", "revision": None, "tokenizer": None, "init": "pretrained"} | model,
        "data": {"path": "x.jsonl", "revision": None},
    }


def test_a_branch_is_recorded_as_the_commit_it_stood_for(hub: LocalHub, tmp_path: Path) -> None:
    hub.repos["ada/base"], hub.repos["ada/words"] = Repo(private=False), Repo(private=False, commits=[{}, {}])
    asked = config(tokenizer="ada/words")
    found = revisions.pin(asked, tmp_path)
    first, second = hub.repos["ada/base"].sha, hub.repos["ada/words"].sha
    assert {key: entry["commit"] for key, entry in found.items()} == {
        "model.revision": first,
        "model.tokenizer_revision": second,
    }
    hub.repos["ada/base"].commits.append({"new": b"x"})  # the branch moves
    assert hub.repos["ada/base"].sha != first
    resumed = revisions.with_commits(asked, revisions.pin(asked, tmp_path))
    assert (resumed["model"]["revision"], resumed["model"]["tokenizer_revision"]) == (first, second)
    assert asked["model"]["revision"] is None  # the config that is stored says what was typed
    (tmp_path / "other").mkdir()
    begun = revisions.pin(asked, tmp_path / "other")
    assert begun["model.revision"]["commit"] != first
    (tmp_path / "third").mkdir()
    assert revisions.pin(asked, tmp_path / "third", source=tmp_path)["model.revision"]["commit"] == first
    typed = revisions.with_commits(config(revision="v2"), found)
    assert typed["model"]["revision"] == "v2"  # something else is asked for: the record does not count


def test_the_base_of_a_run_is_the_commit_it_was_made_from(hub: LocalHub, rye_run: Path, tmp_path: Path) -> None:
    import shutil

    import yaml

    shutil.copytree(rye_run, tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    stored["model"]["name_or_path"], stored["data"]["path"] = "ada/base", "ada/questions"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(stored))
    record = {
        "model.revision": {"name": "ada/base", "asked": None, "commit": "a" * 40},
        "data.revision": {"name": "ada/questions", "asked": None, "commit": "b" * 40},
    }
    (tmp_path / "run/revisions.json").write_text(json.dumps(record))
    from sftlab.inference.trained_model import resolve
    from sftlab.publishing.card import training

    trained = resolve(str(tmp_path / "run"))
    assert trained.base.revision == "a" * 40 and trained.revision is None
    assert trained.config is not None and trained.config["data"]["revision"] == "b" * 40
    rows = dict(training(trained.config, {}, {}))
    assert rows["base model"] == f"ada/base at {'a' * 40}" and rows["dataset"] == f"ada/questions at {'b' * 40}"
    assert isinstance(trained, TrainedModel)


def test_a_revision_leads_to_no_file_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in it would be recorded in the run's directory."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = tmp_path / "hub/models--a--b/refs"
    refs.mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("what nobody else may see")
    (refs / "main").write_text("0f" * 20)
    assert revisions.commit_of("a/b", None, "model") == "0f" * 20
    assert revisions.commit_of("a/b", "../../../mine.txt", "model") is None


@pytest.mark.parametrize("commit", ["main", "../x", "", None, "A" * 40, "a" * 39])
def test_a_record_that_names_no_commit_does_not_count(commit: Any) -> None:
    record = {"model.revision": {"name": "ada/base", "asked": None, "commit": commit}}
    assert revisions.with_commits(config(), record)["model"]["revision"] is None


def test_a_run_of_an_earlier_version_without_a_record_resumes_as_it_was(hub: LocalHub, tmp_path: Path) -> None:
    hub.repos["ada/base"] = Repo(private=False)
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    assert revisions.pin(config(), tmp_path) == {} and not (tmp_path / "revisions.json").exists()


def test_local_folders_random_weights_and_what_nobody_knows_have_no_commit(tmp_path: Path) -> None:
    assert revisions.commit_of(str(tmp_path), None, "model") is None
    assert revisions.commit_of("asset://demo/model", None, "model") is None
    assert revisions.commit_of("ada/unknown", None, "model") is None
    assert revisions.commit_of("ada/unknown", "c" * 40, "model") == "c" * 40
    random = config(init="random", architecture={"model_type": "llama"})
    assert [key for key, *_ in revisions.asked_in(random)] == ["data.revision"]


def test_a_tokenizer_of_another_repository_has_a_revision_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from sftlab.models.load import Model

    seen: list[Any] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **how: seen.append((name, how["revision"])))
    Model("ada/base", revision="v2").load_tokenizer()
    Model("ada/base", revision="v2", tokenizer="ada/words").load_tokenizer()
    Model("ada/base", revision="v2", tokenizer="ada/words", tokenizer_revision="v3").load_tokenizer()
    Model("ada/base", tokenizer_revision="v4").load_tokenizer()
    assert seen == [("ada/base", "v2"), ("ada/words", None), ("ada/words", "v3"), ("ada/base", "v4")]
    assert torch
