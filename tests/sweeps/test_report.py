"""The report's data against values worked out by hand, and the page's own script run on them where Node.js is there."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sftlab.reports.page import SHARED
from sftlab.sweeps import ranking, report
from sftlab.sweeps.record import Sweep
from tests.asymmetric import unequal_sweep, write_point

DOM = Path(__file__).parent / "page_dom.js"


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep.read(unequal_sweep(tmp_path_factory.mktemp("sweep"))).observed({})


def data(sweep: Sweep, metric: str = "val/loss", score: str = "last") -> dict[str, Any]:
    return report.data(sweep, ranking.ranked(sweep, metric, score), metric, score)


def drawn(sweep: Sweep, folder: Path, metric: str, score: str = "last") -> dict[str, Any]:
    """Return what the page shows: the text of each element with an id, and the rows of each table."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: the page's script is not run")
    page = folder / "page.html"
    page.write_text(report.page(data(sweep, metric, score)))
    done = subprocess.run(["node", str(DOM), str(page)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("metric", "score", "lower", "order", "winner"),
    [
        ("val/loss", "last", True, ["0.1", "1", "0.01", "10"], 2),
        ("val/loss", "best", True, ["0.01", "0.1", "1", "10"], 0),
        ("val/f1", "last", False, ["0.01", "1", "0.1", "10"], 3),
        ("val/perplexity", "last", True, ["0.1", "1", "0.01", "10"], 2),
    ],
)
def test_the_data_says_each_metrics_direction(
    unequal: Sweep, metric: str, score: str, lower: bool, order: list[str], winner: int
) -> None:
    found = data(unequal, metric, score)
    assert (found["lower"], found["metric"], found["score"], found["winner"]) == (lower, metric, score, winner)
    assert [g["settings"]["optim.lr"] for g in found["groups"]] == order
    by_point = {p["num"]: p["score"] for p in found["points"]}
    group = found["groups"][0]
    assert group["mean"] == pytest.approx(sum(by_point[n] for n in group["scored"]) / len(group["scored"]))
    assert next(iter(found["points"][0]["curves"])) == metric


def test_the_data_says_which_points_make_each_mean(unequal: Sweep) -> None:
    found = data(unequal)
    assert [(g["points"], g["scored"], g["mean"], g["best"]) for g in found["groups"]] == [
        ([2, 4, 6], [2, 4, 6], 1.5, 2),
        ([1, 5], [5], 1.9, 5),
        ([0, 3], [0, 3], pytest.approx(2.2), 0),
        ([7], [], None, None),
    ]
    assert [g["deviation"] for g in found["groups"]] == [0.5, None, pytest.approx(0.08**0.5), None]
    assert [p["group"] for p in found["points"]] == [2, 1, 0, 2, 0, 1, 0, 3]
    assert found["verdict"] == ranking.verdict(ranking.ranked(unequal, "val/loss"))
    assert found["importance"]["num_scores"] == 6
    assert found["importance"]["shares"][0]["share"] == pytest.approx(1 - 0.58 / 1.18)
    assert found["importance"]["noise"] == pytest.approx(0.58 / 1.18)
    assert (found["params"], found["seeds"], found["search"]) == (["optim.lr", "seed"], ["seed"], False)


def test_the_data_says_of_each_point_how_far_it_came(unequal: Sweep) -> None:
    by_num = {p["num"]: p for p in data(unequal)["points"]}
    p = by_num[0]
    assert (p["state"], p["step"], p["max_steps"], p["time_s"], p["score"]) == ("finished", 10, 10, 5.0, 2.0)
    assert p["settings"] == {"optim.lr": "0.01", "seed": "0"}
    assert p["last"] == {"val/loss": 2.0, "val/f1": 0.7, "val/perplexity": 7.0, "train/loss": 2.0}
    assert p["curves"]["val/loss"] == [(0, 9.0), (6, 0.5), (10, 2.0)]
    assert [step for step, _ in p["curves"]["train/loss"]] == list(range(1, 11))
    assert (by_num[1]["state"], by_num[1]["error"]) == ("failed", "ValueError: it broke")
    assert (by_num[7]["state"], by_num[7]["step"], by_num[7]["time_s"]) == ("running", 4, 6.0)


def test_tracebacks_are_shown_of_unfinished_points_only(tmp_path: Path) -> None:
    for num, status in enumerate(("finished", "stopped")):
        write_point(tmp_path, num, [f"seed={num}"], [{"step": 10, "time_s": 1.0, "val/loss": 1.0}], status)
        (tmp_path / str(num) / "train.log").write_text("Traceback (most recent call last)\nx\n")
    assert [len(p["tracebacks"]) for p in data(Sweep.read(tmp_path).observed({}))["points"]] == [0, 1]


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    line = {"step": 10, "time_s": 1.0, "val/loss": 1.0, "val/f1": float("nan"), "perf/mfu": 0.3, "train/lr": 1.0}
    write_point(tmp_path, 0, ["seed=0"], [line])
    made = Sweep.read(tmp_path).observed({})
    assert data(made)["points"][0]["last"] == {"val/loss": 1.0}
    assert "NaN" not in report.page(data(made))


def test_the_name_is_that_of_the_sweep_whether_it_lies_in_a_folder_of_its_time_or_not(tmp_path: Path) -> None:
    for folder in (tmp_path / "sweeps" / "tuned" / "2026-01-01", tmp_path / "sweeps" / "tuned2"):
        write_point(folder, 0, [], [])
    assert data(Sweep.read(tmp_path / "sweeps/tuned/2026-01-01").observed({}))["name"] == "tuned"
    found = data(Sweep(tmp_path / "sweeps/tuned2", created="then").observed({}))
    assert (found["name"], found["created"]) == ("tuned2", "then")
    assert found["folder"] == str(tmp_path / "sweeps/tuned2")


def test_commits_are_shown_short_once_and_with_a_plus_where_files_differed(tmp_path: Path) -> None:
    for num, (commit, diff) in enumerate([("a" * 40, ""), ("b" * 40, "x"), ("a" * 40, ""), (None, None)]):
        write_point(tmp_path, num, [], [])
        (tmp_path / str(num) / "environment.json").write_text(json.dumps({"git_commit": commit, "git_diff": diff}))
    write_point(tmp_path, 4, [], [])
    assert report.commit(Sweep.read(tmp_path).observed({})) == f"{'a' * 10}, {'b' * 10}+"


def test_the_command_is_shown_as_it_would_be_typed(tmp_path: Path) -> None:
    write_point(tmp_path, 0, [], [])
    assert report.command(Sweep.read(tmp_path).observed({})) == ""
    ours = {"command": ["/usr/bin/python", "/x/sftlab/train.py", "-m", "seed=1,2"]}
    (tmp_path / "0" / "environment.json").write_text(json.dumps(ours))
    assert report.command(Sweep.read(tmp_path).observed({})) == "python -m sftlab.train -m seed=1,2"
    theirs = ["/usr/bin/python", "-m", "sftlab.train", "launcher=slurm"]
    assert report.command(Sweep(tmp_path, command=theirs).observed({})) == "python -m sftlab.train launcher=slurm"
    assert report.command(Sweep(tmp_path, command=["python", "own.py", "a=1"]).observed({})) == "python own.py a=1"


def test_best_yaml_is_shown_only_beside_a_winner(tmp_path: Path) -> None:
    line = {"step": 10, "time_s": 1.0, "val/loss": 1.0}
    write_point(tmp_path, 0, ["seed=0"], [line], "running")
    (tmp_path / "best.yaml").write_text("of an earlier ranking")
    assert data(Sweep.read(tmp_path).observed({}))["best_yaml"] == ""
    write_point(tmp_path, 1, ["seed=1"], [line])
    assert data(Sweep.read(tmp_path).observed({}))["best_yaml"] == "of an earlier ranking"


def test_a_curve_keeps_every_nth_step_and_the_last(tmp_path: Path) -> None:
    lines = [{"step": s, "train/loss": s + 0.123456789} for s in range(1, 603)]
    write_point(tmp_path, 0, [], lines)
    curve = report.curve(tmp_path / "0", "train/loss")
    assert [step for step, _ in curve] == [*range(1, 603, 3), 602]  # 602 of at most 300: every third, and the last
    assert curve[0] == (1, 1.12346) and curve[-1] == (602, 602.123)
    write_point(tmp_path, 1, [], lines[:300])
    assert len(report.curve(tmp_path / "1", "train/loss")) == 300
    assert report.curve(tmp_path / "1", "val/loss") == []


def test_answers_are_spread_over_the_last_evaluation_beside_those_of_the_first(tmp_path: Path) -> None:
    run_dir = write_point(tmp_path, 0, [], [])
    samples = [{"step": s, "id": f"q{i}", "answer": f"{s}-{i}"} for s in (0, 5) for i in range(30) if s or i]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    shown = report.answers(Sweep.read(tmp_path).observed({}).points[0])
    assert [s["id"] for s in shown] == [f"q{i}" for i in range(0, 24, 2)]  # 30 of at most 12: every second
    assert [(s["answer"], s["before"]) for s in shown[:2]] == [("5-0", None), ("5-2", "0-2")]


def test_the_page_holds_its_style_its_scripts_and_its_data_once(unequal: Sweep, tmp_path: Path) -> None:
    page = report.page(data(unequal))
    for name in ("STYLE", "CHARTS", "SCRIPT", "DATA"):
        assert f"/*{name}*/" not in page
    for file in (SHARED / "style.css", SHARED / "charts.js", report.HERE / "sweep.js"):
        assert page.count(file.read_text()) == 1
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert embedded and json.loads(embedded.group(1))["winner"] == 2
    assert len(re.findall("</script>", report.page({"x": "</script><b>"}))) == len(re.findall("</script>", page))
    write_point(tmp_path, 0, ["a=1"], [{"step": 10, "time_s": 1.0, "val/loss": 1.0, "val/f1": 2.0}])
    made = Sweep.read(tmp_path).observed({})
    file = report.write_page(made, ranking.ranked(made, "val/f1", "best"), "val/f1", "best")
    assert file == tmp_path / "report.html" and '"metric":"val/f1","score":"best"' in file.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "report.html"]


@pytest.mark.parametrize(
    ("metric", "says", "first", "winner", "best_label", "worst_label"),
    [
        ("val/loss", "Ranked by the last val/loss of finished runs, lower is better.", "0.1", "2", 1.0, 2.25),
        ("val/f1", "Ranked by the last val/f1 of finished runs, higher is better.", "0.01", "3", 0.8, 0.2),
    ],
)
def test_the_drawn_page_says_and_ranks_in_the_metrics_direction(
    unequal: Sweep,
    tmp_path: Path,
    metric: str,
    says: str,
    first: str,
    winner: str,
    best_label: float,
    worst_label: float,
) -> None:
    page = drawn(unequal, tmp_path, metric)
    assert page["text"]["verdict"].startswith(says) and "standard errors" in page["text"]["verdict"]
    ranking = page["tables"]["ranking"]
    assert ranking[0][:3] == ["rank", "lr", f"mean {metric}"] and ranking[1][:2] == ["1", first]
    assert page["better"] < 0  # the script's own order puts the better of the two scores first
    assert page["winner_rows"] == [winner]
    heights = {float(text): y for text, x, y in page["axis"] if x == 839 and text != "10"}  # of the score's axis
    assert heights[best_label] < heights[worst_label]  # better scores are higher; the page counts from its top


def test_the_drawn_page_shows_the_figures_of_the_table(unequal: Sweep, tmp_path: Path) -> None:
    page = drawn(unequal, tmp_path, "val/loss")
    ranking = page["tables"]["ranking"]
    assert [row[:5] for row in ranking[1:]] == [
        ["1", "0.1", "1.5000", "0.5000", "3"],
        ["2", "1", "1.9000", "", "1 of 2"],
        ["3", "0.01", "2.2000", "0.2828", "2"],
        ["-", "10", "", "", "0 of 1"],
    ]
    rows = page["tables"]["points"]
    assert rows[1][:6] == ["0", "0.01", "0", "finished", "10/10", "2"] and rows[8][:6] == [
        "7", "10", "0", "running", "4/10", "0.1",
    ]  # fmt: skip
    tiles = page["text"]["tiles"]
    assert "1.5000 ± 0.5000" in tiles and "best val/loss, mean of 3 seeds" in tiles
    assert "6 of 8" in tiles and "points finished, 1 missing or failed" in tiles
    assert "38 s" in tiles  # six points of 5 s, 2 s of the failed, 6 s of the running
    assert "50.8 %" in page["text"]["importance"] and "49.2 %" in page["text"]["importance"]
    assert "ValueError: it broke" in page["text"]["failed"] and "retry=failed" in page["text"]["failed"]


def test_the_drawn_page_says_what_to_do_and_gives_its_table_as_a_file(unequal: Sweep, tmp_path: Path) -> None:
    page = drawn(unequal, tmp_path, "val/loss")
    assert page["text"]["kind"] == "sweep"
    assert page["text"]["advice"].startswith("1 of 8 points did not finish: 1 because of an error")
    lines = page["csv"].split("\r\n")
    assert lines[0].startswith("point,optim.lr,seed,state,cause,step,time_s,hours,peak_gib,val/loss")
    assert lines[1].startswith("0,0.01,0,finished,,10,5,") and lines[2].startswith("1,1,1,failed,code,")
    assert len(lines) == 10 and lines[9] == ""


def test_a_spreadsheet_computes_nothing_of_a_text(tmp_path: Path) -> None:
    line = {"step": 10, "time_s": 1.0, "val/loss": -1.0}
    for num, text in enumerate(("=1+1", "-1", "@x, 'y'")):
        write_point(tmp_path / "s", num, [f"name={text}"], [line])
    rows = drawn(Sweep.read(tmp_path / "s").observed({}), tmp_path, "val/loss")["csv"].split("\r\n")
    assert [row.partition(",finished")[0] for row in rows[1:4]] == ["0,'=1+1", "1,-1", "2,\"'@x, 'y'\""]
    assert rows[1].endswith(",-1")
