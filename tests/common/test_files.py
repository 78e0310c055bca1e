"""Files that are written whole, and readers of what may be torn."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftlab.common.files import read_json, read_jsonl, read_yaml, to_yaml, write_json, write_jsonl, write_whole


def test_reading_skips_a_torn_last_line_and_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3}')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_an_object_that_is_torn_or_missing_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert read_json(path) == {} == read_json(tmp_path / "no folder" / "x")
    write_json(path, {"a": "é", "b": [1]})
    assert read_json(path) == {"a": "é", "b": [1]} and "é" in path.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8")[:-1], encoding="utf-8")
    assert read_json(path) == {}


def test_lines_and_yaml_come_back_in_their_order(tmp_path: Path) -> None:
    lines = [{"b": 1, "a": "é\n"}, {"c": None}]
    write_jsonl(tmp_path / "lines", lines)
    assert read_jsonl(tmp_path / "lines") == lines and (tmp_path / "lines").read_text(encoding="utf-8").count("\n") == 2
    write_whole(tmp_path / "yaml", to_yaml({"b": 1, "a": ["x", None]}))
    assert list(read_yaml(tmp_path / "yaml").items()) == [("b", 1), ("a", ["x", None])]
    assert read_yaml(tmp_path / "none") is None


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, "new"),
        lambda path: write_json(path, {"a": 1}),
        lambda path: write_jsonl(path, [{"a": 1}]),
    ],
    ids=["text", "json", "jsonl"],
)
def test_a_kill_before_the_end_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    original = Path.write_text

    def half(self: Path, text: str, **settings: Any) -> int:
        original(self, text[:1], **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() != "old" and os.listdir(tmp_path) == ["file"]
