"""Sweeps to answers: states of points, ranking over seeds, importance, report and best.yaml, retry."""

import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sftlab.common import owner
from sftlab.common.process import birth, machine
from sftlab.common.squeue import Job
from sftlab.config.grid import planned
from sftlab.sweeps import again, best_yaml, points, ranking, report
from sftlab.sweeps.answer import about, choices
from sftlab.sweeps.record import Sweep
from sftlab.sweeps.tables import failures, status
from sftlab.sweeps.watch import look
from tests.support import make_squad_file, read_jsonl


def make_point(folder: Path, num: int, overrides: list[str], losses: list[float], finished: bool = True) -> Path:
    """Write a run directory as a run does: a validation loss every second step, a training loss each."""
    run_dir = folder / str(num)
    run_dir.mkdir(parents=True)
    lines = []
    for step, loss in enumerate(losses):
        if step:
            lines.append({"step": step, "time_s": step * 0.5, "train/loss": loss + 0.1234567890123, "train/lr": 0.1})
        if step % 2 == 0:
            lines.append({"step": step, "time_s": step * 0.5, "val/loss": loss, "val/f1": 1 / (1 + loss)})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": 1}, "model": {"x": 1}}))
    (run_dir / "train.log").write_text(f"2026-01-01 00:00:00 step 1/{len(losses) - 1}  loss 1\n")
    if finished:
        last: dict[str, Any] = {}
        best: dict[str, float] = {}
        for line in lines:
            last |= line
            for name in line:
                choose = max if name == "val/f1" else min
                best[name] = choose(best.get(name, line[name]), line[name])
        summary = {"status": "finished", "steps": len(losses) - 1, "last": last, "best": best}
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def make_grid(folder: Path, seeds: int = 3) -> Path:
    """Write a sweep of 3 learning rates x 2 batch sizes x seeds: 0.001 with 32 wins; seed 1 is the best of each."""
    num = 0
    for i, lr in enumerate(("0.0003", "0.001", "0.003")):
        for j, batch in enumerate(("16", "32")):
            for seed in range(seeds):
                final = 2 + 0.3 * (i != 1) + 0.01 * i - 0.1 * j + 0.02 * abs(seed - 1)
                losses = [8.0, 5.0, 4.0, 3.0, final - 0.05 * i, final + 0.02, final]
                make_point(folder, num, [f"optim.lr={lr}", f"trainer.batch_size={batch}", f"seed={seed}"], losses)
                num += 1
    return folder


def last_in_metrics(run_dir: Path, metric: str) -> float:
    return float([line[metric] for line in read_jsonl(run_dir / "metrics.jsonl") if metric in line][-1])


def test_states_without_a_record(tmp_path: Path) -> None:
    make_point(tmp_path, 0, ["optim.lr=1"], [3.0, 2.0, 1.5])
    make_point(tmp_path, 1, ["optim.lr=2"], [3.0, 2.5, 1.0, 1.1, 1.2], finished=False)
    dead = make_point(tmp_path, 2, ["optim.lr=3"], [3.0, 2.5], finished=False)
    failed = make_point(tmp_path, 3, ["optim.lr=4"], [3.0, 2.5], finished=False)
    (failed / "summary.json").write_text(json.dumps({"status": "failed", "error": "ValueError: no"}))
    (failed / "train.log").write_text("step 1/4\nTraceback (most recent call last):\n  File x\nValueError: no\n")
    for file in dead.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    (tmp_path / "multirun.yaml").write_text(
        yaml.safe_dump({"hydra": {"overrides": {"task": ["optim.lr=1,2,3,4,5", "name=x"]}}})
    )
    found = look(tmp_path, planned=planned(tmp_path))
    assert [p.state for p in found.points] == ["finished", "running", "silent", "failed", "missing"]
    assert found.points[4].overrides == ("optim.lr=5", "name=x")
    assert found.swept == ["optim.lr"]
    running = found.points[1]
    assert (running.step, running.max_steps, running.left_s) == (4, 4, 0.0)
    assert (running.value("val/loss"), running.value("val/loss", "best")) == (1.2, 1.0)
    assert points.tracebacks(tmp_path, found.points[3]) == [
        ("3/train.log", "Traceback (most recent call last):\n  File x\nValueError: no")
    ]
    text = "\n".join(failures(found))
    assert "point 2  silent" in text and "ValueError: no" in text and "point 4  missing" in text
    assert "retry=failed" in text


@pytest.mark.parametrize(
    ("job", "summary", "state"),
    [
        ("PENDING", None, "pending"),
        ("RUNNING", {"status": "stopped"}, "running"),
        ("REQUEUED", {"status": "stopped"}, "requeued"),
        ("TIMEOUT", None, "timeout"),
        ("CANCELLED", None, "cancelled"),
        ("COMPLETED", "finished", "finished"),
        ("COMPLETED", None, "failed"),
        ("FAILED", "finished", "failed"),  # another rank raised after rank 0 was done
        ("FAILED", {"status": "failed", "error": "x"}, "failed"),
        ("UNKNOWN", "finished", "finished"),
        ("UNKNOWN", None, "silent"),
    ],
)
def test_state_with_a_job(tmp_path: Path, job: str, summary: Any, state: str) -> None:
    run_dir = make_point(tmp_path, 0, ["optim.lr=1"], [3.0, 2.0], finished=summary == "finished")
    if isinstance(summary, dict):
        (run_dir / "summary.json").write_text(json.dumps(summary))
    entry = {"num": 0, "overrides": ["optim.lr=1"], "job_id": "12_0", "run_dir": "0"}
    found = Sweep(tmp_path, entries=[entry]).observed({"12_0": Job(job)})
    assert found.points[0].state == state


def test_no_sweep_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Sweep.read(tmp_path / "x")
    with pytest.raises(ValueError, match=r"neither sweep\.json nor points"):
        Sweep.read(tmp_path)


def test_ranking_groups_seeds(tmp_path: Path) -> None:
    found = look(make_grid(tmp_path))
    groups = ranking.ranked(found, "val/loss")
    assert len(groups) == 6 and groups[0].settings == {"optim.lr": "0.001", "trainer.batch_size": "32"}
    for g in groups:
        scores = [last_in_metrics(tmp_path / str(p.num), "val/loss") for p in g.points]
        assert (g.mean, g.deviation) == (
            pytest.approx(statistics.mean(scores)),
            pytest.approx(statistics.stdev(scores)),
        )
    assert [g.mean for g in groups] == sorted(g.mean for g in groups if g.mean is not None)
    assert groups[0].best is not None and groups[0].best.settings["seed"] == "1"


def test_ranking_higher_is_better_and_best_of_run(tmp_path: Path) -> None:
    found = look(make_grid(tmp_path))
    assert ranking.ranked(found, "val/f1")[0].settings["optim.lr"] == "0.001"
    by_best = ranking.ranked(found, "val/loss", "best")
    seen = [line["val/loss"] for line in read_jsonl(tmp_path / "12" / "metrics.jsonl") if "val/loss" in line]
    group = next(g for g in by_best if 12 in [p.num for p in g.points])
    assert dict((p.num, s) for p, s in group.scored)[12] == min(seen) < seen[-1]


def test_unfinished_and_pruned_points_have_no_score(tmp_path: Path) -> None:
    make_grid(tmp_path)
    (tmp_path / "10" / "summary.json").unlink()  # the winner's best seed
    pruned = {"num": 9, "overrides": ["optim.lr=0.001", "seed=0"], "run_dir": "9", "pruned": True}
    found = Sweep(tmp_path, entries=[pruned]).observed({})
    group = next(g for g in ranking.ranked(found, "val/loss") if 10 in [p.num for p in g.points])
    assert [p.num for p, _ in group.scored] == [11] and not group.complete
    assert found.points[9].state == "pruned"


def test_importance_adds_up_on_a_grid(tmp_path: Path) -> None:
    found = look(make_grid(tmp_path))
    result = ranking.importance(ranking.ranked(found, "val/loss"))
    shares = {s.name: s.share for s in result.shares}
    assert result.num_scores == 18 and result.noise is not None
    assert sum(shares.values()) + result.noise == pytest.approx(1)  # additive by construction: no interaction
    scores = {p.num: p.value("val/loss") or 0 for p in found.points}
    mean = statistics.mean(scores.values())
    by_lr = [statistics.mean(list(scores.values())[i : i + 6]) for i in (0, 6, 12)]
    between = sum(6 * (m - mean) ** 2 for m in by_lr) / sum((s - mean) ** 2 for s in scores.values())
    assert shares["optim.lr"] == pytest.approx(between)
    assert {s.name: s.chance for s in result.shares} == {"optim.lr": 2 / 17, "trainer.batch_size": 1 / 17}


def test_importance_of_continuous_values_is_by_quarters() -> None:
    levels = ranking.levels_of([str(10**-i) for i in range(8)])
    assert len(set(levels)) == 4 and levels[7] == levels[6] == "1e-07 to 1e-06"
    assert ranking.levels_of(["1", "2", "1"]) == ["1", "2", "1"]
    assert ranking.levels_of([*"abcdefgh"]) == [*"abcdefgh"]


def test_verdict_measures_by_the_seeds_noise(tmp_path: Path) -> None:
    """Losses 1.93, 1.91, 1.93 of the winner and 2.03, 2.01, 2.03 of the next: 0.1 apart. Every group's variance is
    0.0004 / 3, so one mean against another has an error of 0.02 / sqrt(3) * sqrt(2 / 3)."""
    groups = ranking.ranked(look(make_grid(tmp_path)), "val/loss")
    times = 0.1 / (0.02 / math.sqrt(3) * math.sqrt(2 / 3))
    assert ranking.verdict(groups) == (
        f"The next best is 0.1 behind: {times:.1f} standard errors of the seeds' noise, more than noise explains."
    )
    alone = ranking.ranked(look(make_grid(tmp_path / "b", seeds=1)), "val/loss")
    assert "Without several seeds" in ranking.verdict(alone)
    for num in (0, 1):
        make_point(tmp_path / "c", num, [f"optim.lr={num}"], [3.0, 2.0, 1.0])
    same = look(tmp_path / "c")
    assert ranking.verdict(ranking.ranked(same, "val/loss")) == "The next best has the same score."
    assert [c.header for c in status(same, "train/loss").columns].count("train/loss") == 1


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def make_report(folder: Path, metric: str = "val/loss") -> str:
    found = look(folder)
    return report.write_page(found, ranking.ranked(found, metric), metric).read_text()


def test_every_figure_of_the_report_is_in_metrics(tmp_path: Path) -> None:
    make_grid(tmp_path)
    (tmp_path / "10" / "samples.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "id": "a", "prompt": "Q</script>?", "answer": text, "references": ["A"]}) + "\n"
            for step, text in ((0, "before"), (6, "after"))
        )
    )
    data = embedded(make_report(tmp_path))
    assert len(data["points"]) == 18
    for p in data["points"]:
        lines = read_jsonl(tmp_path / str(p["num"]) / "metrics.jsonl")
        assert p["score"] == last_in_metrics(tmp_path / str(p["num"]), "val/loss")
        assert p["time_s"] == lines[-1]["time_s"] and p["step"] == lines[-1]["step"]
        for name, value in p["last"].items():
            assert value == last_in_metrics(tmp_path / str(p["num"]), name)
        for name, curve in p["curves"].items():
            expected = [[line["step"], float(f"{line[name]:.6g}")] for line in lines if name in line]
            assert curve == expected and curve
    for g in data["groups"]:
        scores = [last_in_metrics(tmp_path / str(num), "val/loss") for num in g["scored"]]
        assert g["mean"] == pytest.approx(statistics.mean(scores))
        assert g["deviation"] == pytest.approx(statistics.stdev(scores))
    assert data["winner"] == 10
    assert [(s["answer"], s["before"], s["prompt"]) for s in data["samples"]] == [("after", "before", "Q</script>?")]


def test_report_before_any_point_has_finished(tmp_path: Path) -> None:
    make_point(tmp_path, 0, ["optim.lr=1"], [3.0, 2.0], finished=False)
    make_point(tmp_path, 1, ["optim.lr=2"], [], finished=False)
    data = embedded(make_report(tmp_path))
    assert [p["score"] for p in data["points"]] == [3.0, None] and data["winner"] is None
    assert data["importance"] == {"shares": [], "noise": None, "num_scores": 0}


def test_report_needs_no_network(tmp_path: Path) -> None:
    page = make_report(make_grid(tmp_path))
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(|XMLHttp""", page)
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_long_curves_are_thinned_not_made_up(tmp_path: Path) -> None:
    make_point(tmp_path, 0, ["optim.lr=1"], [math.exp(-i / 500) for i in range(2001)])
    curve = report.curve(tmp_path / "0", "train/loss")
    known = {
        line["step"]: line["train/loss"] for line in read_jsonl(tmp_path / "0/metrics.jsonl") if "train/loss" in line
    }
    assert 100 < len(curve) <= report.MOST_CURVE_POINTS + 1 and curve[-1][0] == 2000
    assert all(value == float(f"{known[step]:.6g}") for step, value in curve)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: the drawn page is not looked at")
def test_drawn_page_shows_the_figures(tmp_path: Path) -> None:
    make_grid(tmp_path / "s")
    failed = make_point(
        tmp_path / "s", 18, ["optim.lr=9", "trainer.batch_size=16", "seed=0"], [3.0, 2.0], finished=False
    )
    (failed / "summary.json").write_text(json.dumps({"status": "failed", "error": "ValueError: <b>no</b>"}))
    make_report(tmp_path / "s")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000"]
    url = (tmp_path / "s" / "report.html").as_uri()
    page = subprocess.run(
        ["chromium", *arguments, f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert 'data-ready="true"' in page
    rows = dict(re.findall(r'<tr[^>]* data-point="(\d+)">(.*?)</tr>', page, re.DOTALL))
    assert len(rows) == 19
    for num, row in rows.items():
        expected = last_in_metrics(tmp_path / "s" / num, "val/loss")
        assert expected in [float(v) for v in re.findall(r'data-value="([^"]+)"', row)]
    ranking = re.findall(r'<tr[^>]* data-group="\d+">(.*?)</tr>', page, re.DOTALL)
    assert len(ranking) == 7 and f">{2.0 + 0.01 - 0.1 + 0.02 * 2 / 3:.4f}<" in ranking[0]
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in page  # text, never markup


def test_the_status_of_200_points_parses_their_last_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 steps of each point two lines are parsed: all of them took 0.7 s, every 2 s while a table is watched."""
    jobs = {f"7_{num}": Job("RUNNING", 60) for num in range(200)}
    make_point(tmp_path, 0, ["optim.lr=1"], [1.0] * 400, finished=False)
    steps = [line for line in read_jsonl(tmp_path / "0" / "metrics.jsonl") if "val/loss" not in line]
    (tmp_path / "0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    for num in range(1, 200):
        shutil.copytree(tmp_path / "0", tmp_path / str(num))
    entries = [
        {"num": num, "overrides": [f"optim.lr={num}"], "job_id": f"7_{num}", "run_dir": str(num)} for num in range(200)
    ]
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    found = Sweep(tmp_path, entries=entries).observed(jobs)
    assert len(parsed) == 200 * 2  # the last two lines of each; there are 399
    status(found, "val/loss")
    assert {p.state for p in found.points} == {"running"} and {p.step for p in found.points} == {399}


def test_best_yaml_writes_groups_and_values(tmp_path: Path) -> None:
    overrides = ["optim=adamw", "+optim.extra=1e-5", "optim.betas=[0.9,0.95]", "data.path='a, b.jsonl'", "seed=3"]
    overrides += [
        "launcher=local",
        "launcher.nodes=2",
        "experiment=llama3_2_1b_squad",
        "model=smollm2_135m",
        "~tracker",
    ]
    make_point(tmp_path, 0, overrides, [3.0, 2.0, 1.0])
    found = look(tmp_path)
    group = ranking.ranked(found, "val/loss")[0]
    text = best_yaml.write_best(tmp_path, choices(found.points[0]), about(group, found, "val/loss", "last")).read_text()
    assert text.startswith("# @package _global_\n") and "point 0, last val/loss 1.0" in text
    assert f"--config-dir {tmp_path} experiment=best '~tracker'" in text
    assert yaml.safe_load(text) == {
        "defaults": [
            {"/experiment": "llama3_2_1b_squad"},
            {"override /optim": "adamw"},
            {"override /model": "smollm2_135m"},
        ],
        "optim": {"extra": 1e-5, "betas": [0.9, 0.95]},
        "data": {"path": "a, b.jsonl"},
        "seed": 3,
    }
    assert (tmp_path / "experiment" / "best.yaml").read_text() == text


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Run a command in an empty folder, in this process; return its exit code, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(module: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        code = 0
        try:
            import_module(f"sftlab.{module}").main()
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capfd.readouterr()

    return run


def test_from_sweep_to_answer_and_back(
    tmp_path: Path, typed: Typed, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    """A sweep in process whose second point fails; once the cause is gone, retry; then the winner again, bit-equal."""
    late = tmp_path / "late.jsonl"
    train, val = squad_files
    fixed = [f"model.name_or_path={model_folder}", "data=squad", f"data.val_path={val}", "trainer.max_steps=2"]
    fixed += ["evaluation.num_answers=2", "evaluation.max_new_tokens=4", "tracker=none", "trainer.batch_size=4"]
    code, _, _ = typed("train", "-m", *fixed, f"data.path={train},{late}", "optim.lr=1e-3", "hydra.sweep.dir=sweeps/s")
    folder = tmp_path / "sweeps" / "s"
    assert code == 1 and [p.state for p in look(folder).points] == ["finished", "failed"]
    code, shown, error = typed("sweep", "dir=sweeps/s")
    assert code == 0 and "point 1  failed" in shown, error
    data = embedded((folder / "report.html").read_text())
    assert [t[0] for t in data["points"][1]["tracebacks"]] == ["1/train.log"] and data["samples"]

    first = (folder / "0" / "summary.json").stat().st_mtime_ns
    code, shown, error = typed("sweep", "dir=sweeps/s", "retry=failed")
    assert code == 1 and "no such" in error.lower() and "point 0" not in shown.split("sweeps/s:")[0]
    make_squad_file(late, 6, seed=5)
    code, _, error = typed("sweep", "dir=sweeps/s", "retry=failed")
    assert code == 0, error
    assert [p.state for p in look(folder).points] == ["finished", "finished"]
    assert (folder / "0" / "summary.json").stat().st_mtime_ns == first  # what had finished was left alone

    winner = ranking.ranked(look(folder), "val/loss")[0].best
    assert winner is not None
    code, _, error = typed("train", "--config-dir", "sweeps/s", "experiment=best", "run_dir=again")
    assert code == 0, error
    assert last_in_metrics(tmp_path / "again", "val/loss") == last_in_metrics(winner.folder, "val/loss")
    assert last_in_metrics(tmp_path / "again", "train/loss") == last_in_metrics(winner.folder, "train/loss")


def test_a_retry_leaves_alone_what_still_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point whose summary or job says that it failed, while a process of it is at work: two would write there."""
    folders = [make_point(tmp_path, num, ["a=1"], [3.0, 2.0], finished=False) for num in range(2)]
    for folder in folders:
        (folder / "summary.json").write_text('{"status": "failed", "error": "rank 1 was lost"}')
    sleeper = subprocess.Popen([sys.executable, "-SEc", "import time; time.sleep(100)"])
    try:
        with owner.locked(folders[0] / owner.FILE) as file:
            owner.put(file, owner.Hold(folders[0], [(machine(), sleeper.pid, birth(sleeper.pid))]).owner)
        again_with: list[int] = []
        monkeypatch.setattr(again, "run_here", lambda unfinished, *_: again_with.extend(p.num for p in unfinished))
        console = Console(record=True, width=200, quiet=False, file=io.StringIO())
        assert again.retry(look(tmp_path), console) == again_with == [1]
        assert f"point 0 is not started again: process {sleeper.pid} on" in console.export_text()
    finally:
        sleeper.kill()
        sleeper.wait()
    assert again.retry(look(tmp_path), Console(quiet=True)) == [0, 1], "once it is dead"


def test_what_a_retry_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point was stopped, one lost its node, one has an error of its own; each has made two steps."""
    errors = ("", "its node failed (SLURM: NODE_FAIL)", "ValueError: it broke")
    for num, error in enumerate(errors):
        folder = make_point(tmp_path, num, [f"a={num}"], [3.0, 2.0], finished=False)
        status = "failed" if error else "stopped"
        (folder / "summary.json").write_text(json.dumps({"status": status, "error": error}))
        (folder / "config.yaml").write_text(f"seed: {num}\nresume: auto\n")
    ran: list[int] = []
    monkeypatch.setattr(again, "run_here", lambda unfinished, *_: ran.extend(p.num for p in unfinished))
    console = Console(quiet=True)
    assert again.retry(look(tmp_path), console, "stopped") == [0, 1] == ran
    assert again.retry(look(tmp_path), console, "failed") == [0, 1, 2]
    assert (tmp_path / "2" / "metrics.jsonl").exists(), "it resumes"
    assert again.retry(look(tmp_path), console, "fresh") == [0, 1, 2]
    for num in range(3):
        left = {p.name for p in (tmp_path / str(num)).iterdir()}
        assert left == {"config.yaml", "overrides.yaml"}, "from step 0"
        assert f"seed: {num}" in (tmp_path / str(num) / "config.yaml").read_text()
        assert (tmp_path / f"{num}.before" / "metrics.jsonl").exists(), "what it had is kept"
    assert [p.num for p in look(tmp_path).points] == [0, 1, 2]
