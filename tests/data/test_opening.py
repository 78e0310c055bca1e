"""Which rows a path and a split name: folders, globs, saved datasets, odd names."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from sftlab.data.dataset import Data
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.opening import Keys, open_source
from tests.support import byte_tokenizer

TOK = byte_tokenizer()


def put(folder: Path, *names: str) -> Path:
    """Write a file of one row for each name; the row says which file it is of."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": "file", "completion": name}) + "\n")
    return folder


def read(path: Path | str, split: str | None = "train", **more: Any) -> list[str]:
    source = open_source(str(path), split, lambda document: document, **more)
    return [row["completion"] for row in source.read_rows(0, len(source))]  # type: ignore[index]


FOLDERS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "a clone of a hub repository": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
        {"train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
         "test": ["data/test-00000-of-00001.jsonl"]},
    ),
    "splits of one's own": (
        ["data/hard-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"],
        {"train": ["data/train-00000-of-00001.jsonl"], "hard": ["data/hard-00000-of-00001.jsonl"]},
    ),
    "files": (["train.jsonl", "dev.jsonl", "my_eval.jsonl"],
              {"train": ["train.jsonl"], "validation": ["dev.jsonl"], "test": ["my_eval.jsonl"]}),
    "folders": (["train/a.jsonl", "valid/b.jsonl", "testing-2/c.jsonl"],
                {"train": ["train/a.jsonl"], "validation": ["valid/b.jsonl"], "test": ["testing-2/c.jsonl"]}),
    "folders before files": (["train/test.jsonl", "test/train.jsonl"],
                             {"train": ["train/test.jsonl"], "test": ["test/train.jsonl"]}),
    "upper case": (["TRAIN.JSONL", "Test.Jsonl"], {"train": ["TRAIN.JSONL"], "test": ["Test.Jsonl"]}),
    "no split in any name": (["a.jsonl", "trainer.jsonl", "latest.jsonl"],
                             {"train": ["a.jsonl", "latest.jsonl", "trainer.jsonl"]}),
    "numbers and dots": (["train_1.jsonl", "train.2.jsonl", "val 3.jsonl"],
                         {"train": ["train.2.jsonl", "train_1.jsonl"], "validation": ["val 3.jsonl"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_gauntlet_37_the_split_of_a_folder_that_is_named_is_read(name: str, tmp_path: Path) -> None:
    files, splits = FOLDERS[name]
    put(tmp_path, *files)
    for split, expected in splits.items():
        assert read(tmp_path, split) == expected
    assert sorted(read(tmp_path, None)) == sorted(files)
    with pytest.raises(ValueError, match=rf"data.split=other: .* has no split other; it has {', '.join(splits)}"):
        read(tmp_path, "other")


@pytest.mark.parametrize("name", ["a clone of a hub repository", "files", "folders", "no split in any name"])
def test_a_folders_splits_are_those_that_datasets_finds(name: str, tmp_path: Path) -> None:
    files, splits = FOLDERS[name]
    put(tmp_path, *files)
    found = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path.parent / "cache"))
    assert {split: list(rows["completion"]) for split, rows in found.items()} == splits


def test_gauntlet_37_training_data_holds_no_row_of_another_split(tmp_path: Path) -> None:
    put(tmp_path, *FOLDERS["files"][0])

    def texts(**settings: Any) -> list[list[str]]:
        data = Data(PromptCompletion(), str(tmp_path), num_workers=1, **settings)
        return [[TOK.decode(e.tokens, skip_special_tokens=True)[4:] for e in part or ()] for part in data.load(TOK)]

    assert texts() == [["train.jsonl"], []]
    assert texts(val_split="validation") == [["train.jsonl"], ["dev.jsonl"]]
    assert texts(val_split="test?") == [["train.jsonl"], ["my_eval.jsonl"]]
    assert texts(val_split="other?") == [["train.jsonl"], []]
    assert texts(split="validation", val_path=str(tmp_path / "train.jsonl")) == [["dev.jsonl"], ["train.jsonl"]]
    assert texts(val_path=str(tmp_path)) == [["train.jsonl"], ["dev.jsonl"]]
    for settings, key in (({"val_split": "other"}, "data.val_split=other"), ({"split": "dev"}, "data.split=dev")):
        with pytest.raises(ValueError, match=rf"{key}: data.path=.* has no split"):
            texts(**settings)
    with pytest.raises(ValueError, match=r"data.val_split=validation has no effect: data.val_examples"):
        texts(val_split="validation", val_examples=1)


def test_slices_and_sums_of_splits_are_what_datasets_makes_of_them(tmp_path: Path) -> None:
    for split, num in (("train", 10), ("test", 4)):
        rows = [{"prompt": "", "completion": f"{split} {i}"} for i in range(num)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for spec in ("train[:30%]", "train[2:5]", "train[-2:]", "train+test", "test[1:]+train[:1]", "train[50%:]"):
        theirs = datasets.load_dataset(str(tmp_path), split=spec, cache_dir=str(tmp_path.parent / "cache"))
        assert read(tmp_path, spec) == list(theirs["completion"]), spec
    assert read(tmp_path / "train.jsonl", "train[:2]") == ["train 0", "train 1"]
    source = open_source(str(tmp_path), "train[4:]", lambda d: d)
    assert source.where(0).endswith("train.jsonl:5") and len(list(source.read_rows(2, 4))) == 2
    assert source.fingerprint != open_source(str(tmp_path), "train[5:]", lambda d: d).fingerprint
    for spec in ("train[:3%", "train[1:2:3]", "train["):
        with pytest.raises(ValueError, match=r"data.split=train"):
            read(tmp_path, spec)


def test_hidden_files_and_those_that_describe_a_dataset_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "rows.jsonl", "more/rows.jsonl")
    put(tmp_path, ".cache/a.jsonl", ".git/b.json", ".hidden.jsonl", "__pycache__/c.jsonl", "__MACOSX/d.jsonl")
    put(tmp_path, ".ipynb_checkpoints/rows.jsonl", "more/.a/b.jsonl", "._rows.jsonl")
    put(tmp_path, "dataset_info.json", "dataset_infos.json", "config.json", "README.md", "LICENSE", "notes.txt")
    assert read(tmp_path) == ["more/rows.jsonl", "rows.jsonl"]
    assert read(f"{tmp_path}/*.jsonl") == ["rows.jsonl"]


def test_a_file_of_no_split_is_named_in_the_report(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "test.jsonl", "extra.jsonl")
    source = open_source(str(tmp_path), "train", lambda d: d)
    assert source.left_alone == [str(tmp_path / "extra.jsonl")] and len(source) == 1
    assert source.where(0) == f"{tmp_path}/train.jsonl:1"


def test_a_name_that_shows_two_splits_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "train_test.jsonl")
    with pytest.raises(ValueError, match=r"train_test.jsonl: its name shows train and test"):
        read(tmp_path)


def test_a_file_and_a_glob_are_what_they_name(tmp_path: Path) -> None:
    put(tmp_path / "test", "test.jsonl", "b.jsonl", "c.csv.jsonl")
    assert read(tmp_path / "test" / "test.jsonl") == ["test.jsonl"] == read(tmp_path / "test" / "test.jsonl", "test")
    assert read(f"{tmp_path}/test/*.jsonl") == ["b.jsonl", "c.csv.jsonl", "test.jsonl"], "one split is shown: all"
    with pytest.raises(ValueError, match=r"data.split=validation: data.path=.*test.jsonl has no split validation"):
        read(tmp_path / "test" / "test.jsonl", "validation")
    put(tmp_path / "test", "train.jsonl")
    assert read(f"{tmp_path}/test/*.jsonl") == ["train.jsonl"], "two are shown: the one that is named"


README = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*.jsonl
  - split: test
    path: ["main/test-*.jsonl"]
- config_name: socratic
  data_files: {train: "socratic/*"}
---
# Words
"""


def test_the_header_of_a_readme_says_which_files_are_which(tmp_path: Path) -> None:
    put(tmp_path, "main/train-1.jsonl", "main/test-1.jsonl", "socratic/train-1.jsonl")
    (tmp_path / "README.md").write_text(README)
    assert read(tmp_path, subset="main") == ["main/train-1.jsonl"] == read(tmp_path, subset="main?")
    assert read(tmp_path, "test", subset="main") == ["main/test-1.jsonl"]
    assert read(tmp_path, subset="socratic") == ["socratic/train-1.jsonl"]
    for subset, said in ((None, "names several subsets; set data.subset to one of main, socratic"),
                         ("other", "data.subset=other: no such subset; README.md names main, socratic")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read(tmp_path, subset=subset)
    (tmp_path / "README.md").write_text(README.replace("- config_name: main", "- config_name: main\n  default: true"))
    assert read(tmp_path) == ["main/train-1.jsonl"]
    (tmp_path / "README.md").write_text(README.replace("main/train-*", "main/gone-*"))
    with pytest.raises(ValueError, match=r"README.md names main/gone-\*.jsonl for train: no file matches"):
        read(tmp_path, subset="main")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its header is not YAML"):
        read(tmp_path)


def test_what_has_no_effect_on_a_local_path_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl")
    for path in (tmp_path, tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(ValueError, match=r"data.subset=easy has no effect: data.path=.* is local"):
            read(path, subset="easy")
        with pytest.raises(ValueError, match=r"data.revision=v2 has no effect: data.path=.* is local"):
            read(path, revision="v2")
        assert read(path, subset="easy?") == ["a.jsonl"]
    keys = Keys("data.sources.x.path", "data.sources.x.split", "data.sources.x")
    with pytest.raises(ValueError, match=r"data.sources.x.revision=v2 has no effect: data.sources.x.path"):
        read(tmp_path, keys=keys, revision="v2")


def test_a_dataset_that_was_saved_to_disk_is_read_split_by_split(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_list([{"prompt": "", "completion": n}]) for n in ("mine", "theirs"))
    both, alone = tmp_path / "both", tmp_path / "alone"
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(both))
    train.save_to_disk(str(alone))
    assert (read(both), read(both, "test"), read(both, None)) == (["mine"], ["theirs"], ["mine", "theirs"])
    assert read(alone) == ["mine"] and open_source(str(both), "test", lambda d: d).where(0) == f"{both} test row 1"
    with pytest.raises(ValueError, match=r"has no split validation; it has train, test"):
        read(both, "validation")
    with pytest.raises(ValueError, match=r"has no split test"):
        read(alone, "test")
    (alone / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"alone: cannot read this dataset"):
        read(alone)


@pytest.mark.parametrize("folder", ["new [2]", "a?b", "[ab]", "#1 50%", "ä 'q' {x}"])
def test_a_name_with_brackets_and_other_signs_is_a_name(folder: str, tmp_path: Path) -> None:
    place = put(tmp_path / folder, "rows[1].jsonl")
    (place / "t[1].csv").write_text("prompt,completion\na,csv\n")
    datasets.Dataset.from_list([{"prompt": "", "completion": "parquet"}]).to_parquet(str(place / "p[1].parquet"))
    assert read(place / "rows[1].jsonl") == ["rows[1].jsonl"]
    assert sorted(read(place)) == ["csv", "parquet", "rows[1].jsonl"]
    assert read(place / "p[1].parquet") == ["parquet"]


def test_suffixes_in_upper_case_and_zstandard(tmp_path: Path) -> None:
    text = "".join(json.dumps({"prompt": f"{i}", "completion": f"c{i}"}) + "\n" for i in range(3000)).encode()
    cells = b"prompt,completion\n" + b"".join(b"%d,c%d\n" % (i, i) for i in range(3000))
    contents = {
        "A.JSONL": text, "b.Jsonl.GZ": gzip.compress(text), "c.jsonl.zst": zstd(text), "D.CSV": cells,
        "e.csv.ZST": zstd(cells), "f.json.zst": zstd(json.dumps([json.loads(x) for x in text.splitlines()]).encode()),
        "two.jsonl.zst": zstd(text[: len(text) // 2]) + zstd(text[len(text) // 2 :]),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        source = open_source(str(tmp_path / name), "train", lambda d: d)
        assert [r["completion"] for r in source.read_rows(0, 9999)] == [f"c{i}" for i in range(3000)], name  # type: ignore[index]
        assert next(iter(source.read_rows(2990, 2991)))["prompt"] == "2990", name  # type: ignore[index]
    (tmp_path / "torn.jsonl.zst").write_bytes(zstd(text)[:-200])
    (tmp_path / "no.jsonl.zst").write_bytes(b"no zstandard")
    for name in ("torn", "no"):
        with pytest.raises(ValueError, match=rf"{name}.jsonl.zst: cannot read this file"):
            read(tmp_path / f"{name}.jsonl.zst")


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def test_a_link_to_a_folder_is_the_folder(tmp_path: Path) -> None:
    place = put(tmp_path / "real", "train.jsonl", "test.jsonl")
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    assert read(tmp_path / "link") == ["train.jsonl"]
    shutil.rmtree(place)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
        read(tmp_path / "link")


def test_no_split_of_a_hub_dataset_is_all_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {n: datasets.Dataset.from_list([{"prompt": "", "completion": n}]) for n in ("train", "test")}
    hub = datasets.DatasetDict(parts)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: hub if split is None else hub[split])
    assert read("some/rows", None) == ["train", "test"] and read("some/rows", "test") == ["test"]
    assert open_source("some/rows", None, lambda d: d).where(1) == "some/rows test row 1"
