"""What the sweep command shows on a terminal, cell by cell."""

from pathlib import Path

import pytest
from rich.table import Table

from sftlab.common.squeue import Job
from sftlab.sweeps import ranking, tables
from sftlab.sweeps.points import Point
from sftlab.sweeps.ranking import Importance, Share
from sftlab.sweeps.record import Sweep
from tests.asymmetric import unequal_sweep, write_point


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep.read(unequal_sweep(tmp_path_factory.mktemp("sweep"))).observed({})


def cells(table: Table) -> list[list[str]]:
    """Return a table's headings and rows as they are printed."""
    columns = [[str(c.header), *map(str, c._cells)] for c in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_the_status_shows_every_points_figures(unequal: Sweep) -> None:
    made = tables.status(unequal, "val/loss")
    assert str(made.title) == f"{unequal.folder}: 1 failed, 6 finished, 1 running"
    rows = cells(made)
    assert rows[0] == ["point", "lr", "seed", "state", "step", "train/loss", "val/loss", "best val/loss", "left"]
    assert rows[1] == ["0", "0.01", "0", "finished", "10/10", "2", "2", "0.5", ""]
    assert rows[2] == ["1", "1", "1", "failed", "4/10", "0.2", "0.2", "0.2", ""]
    assert rows[8] == ["7", "10", "0", "running", "4/10", "0.1", "0.1", "0.1", "9 s"]
    f1 = cells(tables.status(unequal, "val/f1"))
    assert f1[0][5:8] == ["train/loss", "val/f1", "best val/f1"] and f1[4][5:8] == ["2.4", "0.9", "0.9"]


def test_a_status_without_anything_swept_shows_the_overrides(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["optim.lr=1", "a=[b]"], [{"step": 2, "time_s": 1.0, "train/loss": 123456.7}], "running")
    (tmp_path / "0" / "train.log").unlink()
    rows = cells(tables.status(Sweep.read(tmp_path).observed({}), "val/loss"))
    assert rows == [
        ["point", "overrides", "state", "step", "train/loss", "val/loss", "best val/loss", "left"],
        ["0", "optim.lr=1 a=[b]", "running", "2", "1.2346e+05", "", "", ""],
    ]


def test_the_ranking_shows_means_deviations_and_the_seeds_that_are_missing(unequal: Sweep) -> None:
    made = tables.ranking(unequal, ranking.ranked(unequal, "val/loss"), "val/loss", "last")
    assert str(made.title) == "ranked by last val/loss"
    assert cells(made) == [
        ["rank", "lr", "mean", "deviation", "seeds", "points"],
        ["1", "0.1", "1.5", "0.5", "3", "2 4 6"],
        ["2", "1", "1.9", "", "1 of 2", "1 5"],
        ["3", "0.01", "2.2", "0.28284", "2", "0 3"],
        ["-", "10", "", "", "0 of 1", "7"],
    ]
    by_f1 = cells(tables.ranking(unequal, ranking.ranked(unequal, "val/f1"), "val/f1", "last"))
    assert [row[:3] for row in by_f1[1:4]] == [["1", "0.01", "0.8"], ["2", "1", "0.5"], ["3", "0.1", "0.3"]]


def test_what_mattered_is_shown_beside_chance_and_the_seeds(unequal: Sweep) -> None:
    found = Importance([Share("optim.lr", 0.5084, 0.4, []), Share("b", 0.1, 0.2, [])], 0.4916, 6)
    assert tables.importance(found, unequal) == [
        "\nshare of the variance of 6 scores between a setting's values (by chance alone)",
        "  optim.lr   50.8%  (40.0%)",
        "  b          10.0%  (20.0%)",
        "  seeds      49.2%  (between runs that differ in nothing else)",
    ]
    assert len(tables.importance(Importance(found.shares, None, 6), unequal)) == 3
    assert tables.importance(Importance([], 0.5, 6), unequal) == []


def test_failures_say_which_point_why_and_what_to_type(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["optim.lr=1", "seed=1"], [])
    write_point(tmp_path, 1, ["optim.lr=2", "seed=1"], [], "failed", error="ValueError:  two\n  lines " + "x" * 500)
    write_point(tmp_path, 2, ["optim.lr=3", "seed=1"], [], "stopped")
    write_point(tmp_path, 3, ["optim.lr=4", "seed=1"], [], "running")
    (tmp_path / "2" / "train.log").unlink()
    entries = [{"num": 3, "job_id": "7"}, {"num": 4, "overrides": ["optim.lr=5", "seed=1"]}]
    found = Sweep(tmp_path, entries=entries).observed({"7": Job("UNKNOWN")})
    lines = tables.failures(found)
    assert lines == [
        "",
        "point 1  failed  optim.lr=2",
        "    " + ("ValueError: two lines " + "x" * 500)[:400],
        f"    {tmp_path}/1/train.log",
        "point 2  stopped  optim.lr=3",
        "point 3  silent  optim.lr=4",
        "    it wrote nothing for 5 min",
        f"    {tmp_path}/3/train.log",
        "point 4  missing  optim.lr=5",
        "    it has no folder",
        f"run them again with\n  python -m sftlab.sweep dir={tmp_path} retry=failed",
    ]
    (tmp_path / "optuna.jsonl").touch()
    assert tables.failures(found)[-1] == f"continue the search with its own command and\n  hydra.sweep.dir={tmp_path}"
    assert tables.failures(found.only([0])) == []


def test_without_anything_swept_failures_name_all_overrides(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["optim.lr=1", "seed=2"], [], "failed")
    assert tables.failures(Sweep.read(tmp_path).observed({}))[1] == "point 0  failed  optim.lr=1 seed=2"


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        *((s, True) for s in ("finished", "pruned", "failed", "stopped", "silent", "missing", "timeout", "cancelled")),
        *((s, True) for s in ("out_of_memory", "node_fail", "deadline", "boot_fail", "completed")),
        *((s, False) for s in ("running", "pending", "requeued", "completing", "suspended", "preempted")),
    ],
)
def test_a_point_has_ended_if_nothing_will_change_it(state: str, ended: bool) -> None:
    assert Point(0, (), Path("x"), state=state).ended is ended


def test_states_have_colours_and_what_is_wrong_is_red(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["a=1"], [])
    write_point(tmp_path, 1, ["a=2"], [], "running")
    write_point(tmp_path, 2, ["a=3"], [], "failed")
    column = next(
        c for c in tables.status(Sweep.read(tmp_path).observed({}), "val/loss").columns if c.header == "state"
    )
    assert [(str(t), t.style) for t in column._cells] == [  # type: ignore[union-attr]
        ("finished", "green"),
        ("running", "cyan"),
        ("failed", "red"),
    ]


def test_names_are_short_where_that_is_clear() -> None:
    assert tables.short(["optim.lr", "a.rate", "b.rate", "seed"]) == ["lr", "a.rate", "b.rate", "seed"]
    assert (tables.figure(None), tables.figure(0.0), tables.figure(1.234567)) == ("", "0", "1.2346")
