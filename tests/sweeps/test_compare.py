"""`compare`: any runs as the points of a sweep, from the command line to the page."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.sweeps.compare import comparison
from tests.asymmetric import write_point
from tests.commands import run_here
from tests.reports.test_run_report import embedded

CONFIG: dict[str, Any] = {"name": "sft", "seed": 0, "optim": {"lr": 0.1}, "data": {"path": "x"}, "tracker": {}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two settings, the better one with two seeds; the folders' names hold what a command line could misread."""
    made = []
    for num, (lr, seed, loss) in enumerate([(0.1, 0, 3.0), (0.2, 0, 2.0), (0.2, 1, 2.5)]):
        folder = tmp_path / f"it's, [run]{num}"
        folder.mkdir()
        lines = [{"step": s, "time_s": s * 1.0, "val/loss": loss + 5 - s, "val/f1": s / 10} for s in (0, 5)]
        write_point(folder, 7, [], lines)
        run = folder / "7"
        config = {**CONFIG, "seed": seed, "optim": {"lr": lr}, "run_dir": str(run)}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        made.append(run)
    (made[0] / "report.html").write_text("its own")
    return made


def test_two_runs_typed_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    out = run_here("compare", *map(str, runs), "metric=val/f1", "score=best", f"output={tmp_path / 'it.html'}")
    assert "ranked by best val/f1" in out and str(tmp_path / "it.html") in out
    page = embedded(tmp_path / "it.html")
    assert (page["kind"], page["metric"], page["score"]) == ("comparison", "val/f1", "best")
    assert page["params"] == ["optim.lr", "seed"] and [p["label"] for p in page["points"]] == list(map(str, runs))
    assert [p["report"] for p in page["points"]] == ["it%27s%2C%20%5Brun%5D0/7/report.html", "", ""]
    assert not list(tmp_path.glob("**/best.yaml"))


def test_runs_may_be_typed_as_a_list(runs: list[Path], tmp_path: Path) -> None:
    named = [run.parent.rename(tmp_path / f"run{num}") / "7" for num, run in enumerate(runs)]
    run_here("compare", f"runs=[{named[2]},{named[0]}]", f"output={tmp_path / 'it.html'}")
    assert [p["label"] for p in embedded(tmp_path / "it.html")["points"]] == [str(named[2]), str(named[0])]


def test_runs_that_differ_in_their_seed_alone_are_one_setting(runs: list[Path]) -> None:
    from sftlab.sweeps.ranking import ranked

    found = comparison(runs)
    groups = ranked(found, "val/loss")
    assert [(g.settings, g.mean) for g in groups] == [({"optim.lr": "0.2"}, 2.25), ({"optim.lr": "0.1"}, 3.0)]


def test_what_is_no_run_is_said(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name two runs or more"):
        comparison(runs[:1])
    with pytest.raises(ValueError, match=r"is no run's directory: it has no config.yaml"):
        comparison([runs[0], tmp_path])


def test_what_a_page_links_to_is_escaped(runs: list[Path]) -> None:
    assert json.dumps(comparison(runs).points[0].overrides) == '["optim.lr=0.1", "seed=0"]'
