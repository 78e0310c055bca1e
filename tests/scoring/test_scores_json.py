"""What an evaluation leaves behind and shows."""

import json
from pathlib import Path

import pytest

from sftlab.scoring.scores_json import write_report

OURS = [{"scores": {"f1": v}} for v in (0.5, 0.5, 0.5, 1.0)]
BASE = [{"scores": {"f1": v}} for v in (0.25, 0.25, 0.25, 0.25)]


def test_a_comparison_goes_by_groups_where_there_are_some() -> None:
    """Over two passages the ends are each passage's own gap; over four questions they lie as far apart by chance."""
    report = compare_scores(OURS, BASE, [5, 5, 5, 9])
    assert report["examples"] == 4
    assert report["scores"] == {"f1": 0.625} and report["baseline"] == {"f1": 0.25}
    assert report["difference"] == {"f1": {"value": 0.375, "low": 0.25, "high": 0.75}}
    alone = compare_scores(OURS, BASE)["difference"]["f1"]
    assert alone["low"] == 0.25 and 0.5 <= alone["high"] < 0.75


def test_scores_that_are_given_stand_for_the_lines_means() -> None:
    report = compare_scores(OURS, BASE, scores={"acc": 0.9}, base_scores={"acc": 0.1})
    assert (report["scores"], report["baseline"]) == ({"acc": 0.9}, {"acc": 0.1})
    assert compare_scores(OURS, None) == {"examples": 4, "scores": {"f1": 0.625}}


def test_the_table_shows_each_number_in_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "scores": {"loss": 1.25, "f1": 0.5, "own": 0.75},
        "baseline": {"loss": 2.5, "f1": 0.25},
        "difference": {"loss": {"value": -1.25, "low": -1.5, "high": -1.0}},
    }
    show_scores("rye on demo", report)
    title, head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title == ["rye", "on", "demo"]
    assert head == ["score", "base", "this", "model", "difference", "95", "%", "interval"]
    assert rows == [
        ["loss", "2.5000", "1.2500", "-1.2500", "-1.5000", "to", "-1.0000"],
        ["f1", "0.2500", "0.5000"],
        ["own", "0.7500"],
    ]
    show_scores("rye", {"scores": {"loss": 1.25}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1:] == [
        ["score", "value"],
        ["loss", "1.2500"],
    ]


def test_a_report_is_written_whole_and_may_hold_any_letter(tmp_path: Path) -> None:
    write_report(tmp_path / "scores.json", {"data": "Zürich"})
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == {"data": "Zürich"}
    assert "Zürich" in (tmp_path / "scores.json").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
