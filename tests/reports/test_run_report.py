"""report.html of a run: its data against the run's files, and what its own script draws where Node.js is there."""

import json
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sftlab.common.files import write_json, write_jsonl
from sftlab.common.tracker import About
from sftlab.reports import run_report
from sftlab.reports.command import command, commit
from sftlab.reports.curves import Curves
from sftlab.reports.run_report import Answers, RunReport, data, write_page
from tests.runs import compose, run_here
from tests.support import read_jsonl

DOM = Path(__file__).parents[1] / "sweeps" / "page_dom.js"
BAD = "</script><script>alert(1)</script><img src=http://evil>"


def drawn(page: Path) -> dict[str, Any]:
    """Return what the page shows: the text of each element with an id, the rows of tables, what is hidden."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: the page's script is not run")
    done = subprocess.run(["node", str(DOM), str(page)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def embedded(page: Path) -> dict[str, Any]:
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, squad_files: Any) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    settings = ("trainer.max_steps=4", "trainer.eval_every=2", "evaluation.num_answers=6")
    assert run_here(compose(folder, model_folder, squad_files, *settings)).startswith("score ")
    return folder


def test_the_page_of_a_run_shows_what_its_files_hold(run: Path) -> None:
    found, lines = embedded(run / "report.html"), read_jsonl(run / "metrics.jsonl")
    assert (found["status"], found["max_steps"], found["name"]) == ("finished", 4, "first")
    losses = [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]
    assert [s for s, _ in losses] == [0, 2, 4]
    assert found["curves"]["val/loss"] == [[s, pytest.approx(v, rel=1e-5)] for s, v in losses]
    assert found["first"]["val/loss"] == losses[0][1] and found["last"]["train/loss"] == lines[-2]["train/loss"]
    assert ["trainer.max_steps", "null", "4"] in found["differences"]
    samples = read_jsonl(run / "samples.jsonl")
    assert len(found["answers"]) == 6
    for question in found["answers"]:
        told = [(s["step"], s["answer"]) for s in samples if s["id"] == question["id"]]
        assert [tuple(a) for a in question["answers"]] == told and len(told) == 3
    parts = {name for name in found["time"] if found["time"][name] > 0}
    assert parts >= {f"time/{part}_s" for part in ("data", "forward", "backward", "optimizer", "between", "evaluation")}
    # `between` and `data` fill what the other parts of the steps leave: together no more than the wall time.
    spent = sum(found["time"][p] for p in parts)
    assert 0.2 * lines[-2]["time_s"] < spent <= lines[-2]["time_s"] + 0.5
    assert found["row"]["examples"] > 1 and found["data"]["accounts"]["training"][""]["kept"] == 36
    assert {"host", "processor", "memory"} <= found["machine"].keys() and "torch" in found["versions"]


def test_the_page_draws_it(run: Path) -> None:
    page = drawn(run / "report.html")
    text = page["text"]
    assert "finished" in text["name"] and "4 of 4 steps" in text["tiles"] and "\u2192" in text["tiles"]
    assert ["trainer.max_steps", "null", "4"] in page["tables"]["differences"]
    assert "before" in text["answers"] and "step 4" in text["answers"] and "expected" in text["answers"]
    assert "forward" in text["time"] and "backward" in text["time"] and "tokens per example" in text["histograms"]
    assert "examples in" in text["row-note"] and "Question" in text["stretches"]
    assert "training" in page["tables"]["accounts"][1][0] and "torch" in text["machine"]
    assert page["hidden"] == ["s-error", "s-profile", "profile"], "nothing else is empty"


def test_a_run_that_is_resumed_or_read_again_has_the_same_page(run: Path) -> None:
    again = data(run, Curves.read(run), Answers.read(run), "finished")
    kept = embedded(run / "report.html")
    again, kept = (json.loads(json.dumps({**d, "written": 0, "written_s": 0})) for d in (again, kept))
    assert again == kept
    tracker = RunReport(About(run, "first"))
    tracker.cut(4)
    assert tracker.curves.last == kept["last"] and tracker.answers.shown()[0]["answers"][-1][0] == 4


def test_a_failed_run_says_why_and_texts_are_text(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"status": "failed", "error": f"ValueError: {BAD}"})
    write_json(tmp_path / "facts.json", {"steps": 10, "facts": {BAD: BAD}, "machine": {"host": BAD}})
    (tmp_path / "config.yaml").write_text(f"name: x\noptim: {{lr: '{BAD}'}}\n")
    (tmp_path / "overrides.yaml").write_text("[1, 2]\n")
    (tmp_path / "data.json").write_text('{"lengths": NaN}')
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 2.0, BAD: 1.0, "val/x": None}])
    write_jsonl(tmp_path / "samples.jsonl", [{"step": 1, "id": BAD, "prompt": BAD, "answer": BAD, "references": [BAD]}])
    file = write_page(tmp_path, Curves.read(tmp_path), Answers.read(tmp_path), "failed")
    text = file.read_text()
    assert text.count("</script>") == 3 and BAD not in text and "default-src 'none'" in text.split("<style>")[0]
    page = drawn(file)
    assert page["text"]["error"] == f"ValueError: {BAD}" and "s-error" not in page["hidden"]
    assert BAD in page["text"]["answers"] and BAD in page["text"]["machine"]


def test_secrets_are_struck(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 12
    write_json(tmp_path / "summary.json", {"status": "failed", "error": token})
    text = write_page(tmp_path, Curves(), Answers(), "failed").read_text()
    assert token not in text and "[secret]" in text


def test_pages_that_take_long_are_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 1 s of a clock of its own: at 1 % of the time, one in 100 s, whatever is evaluated meanwhile."""
    now_s, written = [0.0], list[tuple[float, str]]()
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])

    def write(run_dir: Path, curves: Curves, answers: Answers, status: str) -> None:
        written.append((now_s[0], status))
        now_s[0] += 1.0

    monkeypatch.setattr(run_report, "write_page", write)
    made = RunReport(About(tmp_path, ""))
    for step in range(500):
        now_s[0] += 1.0
        made.write_numbers(step, 0.0, {"train/loss": 1.0})
        if step % 10 == 0:
            made.write_answers(step, [])
    made.close("stopped")
    running = [s for s, status in written if status == "running"]
    assert len(running) == 5 and all(b - a >= 100 for a, b in pairwise(running))
    assert written[-1][1] == "stopped"


def test_without_evaluation_it_is_written_about_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, written = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(run_report, "write_page", lambda *_: written.append(now_s[0]))
    made = RunReport(About(tmp_path, ""))
    for step in range(300):
        now_s[0] += 1.0
        made.write_numbers(step, 0.0, {})
    assert written == [1.0, 61.0, 121.0, 181.0, 241.0]


def test_a_run_of_100_000_steps_is_small_and_quick(tmp_path: Path) -> None:
    names = ("train/loss", "train/grad_norm", "train/lr", "perf/examples_per_s", "perf/tokens_per_s", "mem/peak_gib")
    values = ", ".join(f'"{name}": %.17g' for name in names)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            numbers = tuple(1 / (step + i) + (step * 7919 % 101) / 1e3 for i in range(len(names)))
            file.write(f'{{"step": {step}, "time_s": {step}, {values % numbers}}}\n')
    began_s = time.process_time()
    file_ = write_page(tmp_path, Curves.read(tmp_path), Answers.read(tmp_path), "finished")
    assert time.process_time() - began_s < 5
    assert file_.stat().st_size < 1_000_000


COMMANDS = {
    "python -m sftlab.train 'run_dir=out dir'": ["/usr/bin/python", "/x/sftlab/train.py", "run_dir='out dir'"],
    """python -m sftlab.train 'data.path=it'"'"'s'""": ["python", "-m", "sftlab.train", "data.path='it\\'s'"],
    "python -m sftlab.train optim.betas=[0.9,0.95]": ["sftlab-train", "optim.betas=[0.9,0.95]"],
    "python -m sftlab.train seed=1": ["python", "launchers/job.py", "sweeps/a/3"],
}


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_command_as_it_would_be_typed(typed: str) -> None:
    assert command(COMMANDS[typed], ["seed=1"]) == typed


def test_a_commit_is_short_with_a_plus_where_files_differed() -> None:
    assert commit({"git_commit": "a" * 40, "git_diff": "x"}) == "a" * 10 + "+"
    assert commit({"git_commit": None}) == ""
