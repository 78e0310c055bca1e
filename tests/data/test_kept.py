"""The tokenised cache: listed with what it is of, cleared when asked twice, never under a run that is making it."""

import os
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from sftlab.data import kept
from sftlab.data.store import store
from tests.commands import Typed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two entries, as the store leaves them: one used now, one 40 days ago."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder = tmp_path / "sftlab"
    for key, size, days in (("aaaa1111", 3000, 40), ("bbbb2222", 5000, 0)):
        entry = folder / "arrow" / f"default-{key}" / "0.0.0"
        entry.mkdir(parents=True)
        (entry / "arrow-train.arrow").write_bytes(b"x" * size)
        for name in (f"{key}.json", f"{key}.lock", f"_root_arrow_default-{key}_0.0.0.lock"):
            (folder / name).touch()
        kept.note(folder, key, f"{key}.jsonl", 1000)
        used_s = time.time() - days * 86400
        os.utime(folder / f"{key}{kept.ABOUT}", (used_s, used_s))
    return folder


def test_the_store_leaves_what_the_list_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squad_files: tuple[Path, Path]
) -> None:
    import datasets

    from sftlab.config.composing import composed
    from sftlab.training.build import component
    from tests.support import byte_tokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data = component("data", composed(["data=squad", f"data.path={squad_files[0]}", "data.val_path=null"])["data"])
    source = data._source("data")
    made = store(source, data.format, byte_tokenizer(), num_workers=1)
    (entry,) = kept.entries(kept.cache_folder())
    assert entry.key == made.fingerprint and entry.about == f"36 rows of {source.name}"
    assert entry.num_bytes > 1000 and entry.days < 0.1
    assert kept.clear(kept.cache_folder(), entry)
    assert made[0].tokens.size > 0, "what a run reads stays readable"
    assert not kept.entries(kept.cache_folder()) and [p for p in (tmp_path / "sftlab").rglob("*") if p.is_file()] == []
    assert len(store(source, data.format, byte_tokenizer(), num_workers=1)) == 36


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "HOME/.cache/huggingface/datasets/sftlab"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/datasets/sftlab"),
        ({"HF_HOME": "~/hf"}, "HOME/hf/datasets/sftlab"),
        ({"HF_HOME": "/hf", "HF_DATASETS_CACHE": "/d"}, "/d/sftlab"),
    ],
)
def test_the_folder_is_that_of_datasets(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(kept.cache_folder()) == folder.replace("HOME", "/home/me")


def test_a_list_changes_nothing(cache: Path, typed: Typed) -> None:
    before = sorted(p for p in cache.rglob("*"))
    lines = typed("cache").splitlines()
    assert lines[0].split() == [
        "bbbb2222",
        "4.9",
        "KiB",
        "used",
        "0",
        "days",
        "ago",
        "1000",
        "rows",
        "of",
        "bbbb2222.jsonl",
    ]
    assert lines[1].startswith("aaaa1111") and "used 40 days ago" in lines[1]
    assert lines[2] == f"2 of 2 entries, 7.8 KiB, in {cache}" and sorted(cache.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "left"), [("all", []), ("30d", ["bbbb2222"]), ("41d", ["bbbb2222", "aaaa1111"]), ("bbbb", ["aaaa1111"])]
)
def test_what_is_named_is_removed_once_it_is_confirmed(word: str, left: list[str], cache: Path, typed: Typed) -> None:
    before = sorted(cache.rglob("*"))
    said = typed("cache", f"remove={word}")
    assert sorted(cache.rglob("*")) == before and ("nothing was removed" in said) == (len(left) < 2)
    typed("cache", f"remove={word}", "confirmed=true")
    assert [entry.key for entry in kept.entries(cache)] == left
    names = {p.name for p in cache.rglob("*") if p.is_file()} - {"arrow-train.arrow"}
    assert all(any(key in name for key in left) for name in names)


def test_a_terminal_is_asked(cache: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for reply, left in (("n", 2), ("", 2), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, reply=reply: reply)
        typed("cache", "remove=all")
        assert len(kept.entries(cache)) == left


def test_a_run_that_is_making_an_entry_keeps_it(cache: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(cache / "aaaa1111.lock"), pytest.raises(SystemExit):
        typed("cache", "remove=all", "confirmed=true")
    assert [entry.key for entry in kept.entries(cache)] == ["aaaa1111"]


@pytest.mark.parametrize("word", ["zzzz", "aa", "3w", ""])
def test_a_word_that_names_nothing_is_refused(
    word: str, cache: Path, refused: Typed, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "expected all, DAYS as in 30d" in refused("cache", f"remove='{word}'")
    assert len(kept.entries(cache)) == 2
