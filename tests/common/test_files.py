"""Files that are written whole, and readers of what may be torn."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sftlab.common.files import (
    read_json,
    read_jsonl,
    read_yaml,
    spared_by_a_full_disk,
    to_yaml,
    write_json,
    write_jsonl,
    write_whole,
)


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

    def killed_before(self: Path, target: Path) -> Path:
        assert target == path and self.read_text()
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", killed_before)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() != "old" and os.listdir(tmp_path) == ["file"]


def test_only_a_full_disk_is_forgiven() -> None:
    """A run that could not note that it was stopped left with a traceback, and SLURM did not requeue it."""
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.warns(UserWarning, match="the disk is full"), spared_by_a_full_disk():
            raise OSError(number, "full")
    with pytest.raises(PermissionError), spared_by_a_full_disk():
        raise OSError(errno.EACCES, "not yours")
