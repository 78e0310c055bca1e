"""Ranks of one run run one code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sftlab.common.code as module
from sftlab.common.code import code_version, require_same_code


def test_a_changed_line_or_a_renamed_file_is_another_version(tmp_path: Path) -> None:
    shutil.copytree(Path(module.__file__).parents[1], tmp_path / "sftlab", ignore=shutil.ignore_patterns("assets"))
    told = "from sftlab.common.code import code_version; print(code_version())"

    def version() -> str:
        return subprocess.run([sys.executable, "-c", told], cwd=tmp_path, capture_output=True, text=True).stdout

    first = version()
    assert first.startswith("sftlab ") and ", torch " in first and version() == first
    plan = tmp_path / "sftlab/data/plan.py"
    source = plan.read_text()
    plan.write_text(source + "\n")
    assert version() != first
    plan.write_text(source)
    assert version() == first
    plan.rename(plan.with_name("plans.py"))
    assert version() != first


def test_a_rank_with_other_code_is_named_with_its_host() -> None:
    ours = code_version()
    require_same_code([("a", ours)] * 4)
    with pytest.raises(ValueError, match=r"^rank 2 on b runs sftlab old, and 1 more ranks; rank 0 on a runs sftlab .*"):
        require_same_code([("a", ours), ("a", ours), ("b", "sftlab old"), ("b", "sftlab old")])
