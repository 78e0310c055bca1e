"""What people read of a run: numbers worked out by hand, lines that fit, and the same in train.log."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
import rich.console

from sftlab.config.errors import complain
from sftlab.training.console import Console
from sftlab.training.validation import Sample

VALUES = {
    "train/loss": 1.23456, "train/lr": 0.000123, "train/grad_norm": 2.345, "perf/examples_per_s": 12.34,
    "perf/tokens_per_s": 12345.6,
}  # fmt: skip


def logged(path: Path) -> list[str]:
    """Return the lines of a train.log without their times, which are checked."""
    lines = path.read_text().splitlines()
    for line in lines:
        time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
        assert line[19] == " "
    return [line[20:] for line in lines]


def test_a_step_in_a_line_and_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged every 5 steps from step 5, as after a resume: 10 steps took 40 s, so 25 more take 100."""
    now_s = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    console = Console(40, tmp_path / "train.log")
    console.step(5, VALUES)
    now_s[0] += 30
    console.step(10, VALUES)
    now_s[0] += 10
    console.step(15, {**VALUES, "perf/mfu": 0.3456})
    console.close()
    words = "loss 1.2346  lr 1.23e-04  norm 2.35  12.3 examples/s  12,346 tokens/s"
    expected = [
        f"step 5/40  {words}  0 s left",
        f"step 10/40  {words}  3 min left",  # 30 steps at 6 s
        f"step 15/40  {words}  MFU 34.6%  2 min left",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    assert logged(tmp_path / "train.log") == expected


def test_on_a_terminal_steps_are_one_live_line_and_the_last_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    console = Console(2, tmp_path / "train.log")
    assert console.live.is_started
    shown: list[str] = []
    update = console.live.update
    monkeypatch.setattr(console.live, "update", lambda part: (shown.append(drawn(part)), update(part)))
    console.step(1, VALUES)
    console.step(2, VALUES)
    console.facts("title", {"model": "[bold]tiny[/bold]", "data": "x" * 300})
    console.close()
    assert not console.live.is_started
    out = capsys.readouterr().out
    assert shown[0].startswith("0 s left  ━━━━━━━━────────  step 1/2"), "what is left is never cut off"
    assert shown[-1] == "", "the live line gives way to the last"
    assert "step 2/2  loss 1.2346" in out.rsplit("step 1/2", 1)[-1]
    assert "[bold]tiny[/bold]" in out and out.count("x") >= 300, "nothing is taken for markup, nothing is cut"
    lines = logged_loosely(tmp_path / "train.log")
    assert [line.split("  ")[0] for line in lines[:2]] == ["step 1/2", "step 2/2"]
    assert lines[2:4] == ["title", "  model  [bold]tiny[/bold]"]


def drawn(part: Any) -> str:
    """Return what is shown at 80 columns."""
    console = rich.console.Console(width=80, file=io.StringIO(), no_color=True, force_terminal=False)
    console.print(part, end="")
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_long_run_prints_a_line_every_ten_seconds_and_after_an_hour_every_thirty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    console = Console(10_000, tmp_path / "train.log")
    for step in range(1, 10_001):
        console.step(step, VALUES)
        now_s[0] += 1
    console.close()
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [*range(1, 3601, 10), *range(3621, 10_000, 30), 10_000]
    assert logged(tmp_path / "train.log") == lines


def test_a_resumed_run_shows_what_the_first_start_scored(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(9, None)
    console.recall({"val/loss": 3.0}, [sample(0, "at the start")])
    console.evaluation(9, {"val/loss": 1.0}, [sample(0, "now")])
    console.answers()
    said = capsys.readouterr().out
    assert "3.0000" in said and "before  at the start" in said and "after  now" in said


def logged_loosely(path: Path) -> list[str]:
    """Return the lines of a train.log; the first of several that were written together has the time."""
    return [line[20:] if line[:4].isdigit() else line for line in path.read_text().splitlines()]


def test_a_rank_that_is_not_the_first_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(2, None, quiet=True)
    assert not console.live.is_started, "or its cursor movements would be seen"
    console.say("nothing")
    console.step(2, VALUES)
    console.facts("title", {"a": "b"})
    console.evaluation(0, {"val/loss": 1.0}, [])
    console.close()
    assert capsys.readouterr().out == ""


def test_facts_are_a_line_each_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(2, tmp_path / "train.log")
    console.facts("sftlab: sft", {"model": "tiny", "run directory": "here " * 40})
    console.close()
    expected = ["sftlab: sft", "  model          tiny", f"  run directory  {'here ' * 40}"]
    assert capsys.readouterr().out.splitlines() == expected
    assert logged_loosely(tmp_path / "train.log") == expected


def test_a_long_line_stays_whole_in_a_file_and_is_wrapped_at_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Console(2, None).say("[red]word[/red] " * 20)
    assert capsys.readouterr().out.splitlines() == ["[red]word[/red] " * 20]
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(2, None)
    console.say("word " * 20)
    console.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "word" in line]
    assert len(lines) > 2 and all(set(line.split("\x1b")[0].split()) <= {"word"} for line in lines)


def test_later_evaluations_are_shown_beside_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(9, tmp_path / "train.log")
    console.evaluation(0, {"val/loss": 3.25, "val/f1": 0.125}, [])
    first = capsys.readouterr().out.split()
    assert first == ["step", "0", "validation", "value", "val/loss", "3.2500", "val/f1", "0.1250"]
    console.evaluation(4, {"val/loss": 2.0, "val/f1": 0.5}, [])
    console.evaluation(9, {"val/loss": 1.5, "val/f1": 0.75, "val/new": 7.0}, [])
    console.close()
    rest = capsys.readouterr().out.split()
    assert rest == [
        "step",
        "4",
        "validation",
        "before",
        "now",
        "val/loss",
        "3.2500",
        "2.0000",
        "val/f1",
        "0.1250",
        "0.5000",
        "step",
        "9",
        "validation",
        "before",
        "now",
        "val/loss",
        "3.2500",
        "1.5000",
        "val/f1",
        "0.1250",
        "0.7500",
        "val/new",
        "nan",
        "7.0000",
    ]
    assert logged(tmp_path / "train.log") == [
        "step 0  val/loss 3.2500  val/f1 0.1250",
        "step 4  val/loss 2.0000  val/f1 0.5000",
        "step 9  val/loss 1.5000  val/f1 0.7500  val/new 7.0000",
    ]


def sample(i: int, answer: str) -> Sample:
    return Sample(f"e{i}", f"question\n {i}", answer, (f"expected {i}", "or this"))


@pytest.mark.parametrize(("num", "chosen"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 2, 4]), (9, [0, 3, 6])])
def test_three_answers_spread_over_all_are_shown_before_and_after(
    num: int, chosen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(9, None)
    for step, when in ((0, "first"), (4, "middle"), (9, "last")):
        console.evaluation(step, {"val/f1": step / 10}, [sample(i, f"{when} {i}") for i in range(num)])
    capsys.readouterr()
    console.answers()
    expected: list[str] = []
    for i in chosen:
        expected += ["", f"question {i}"]
        expected += [f"    before  first {i}", f"     after  last {i}", f"  expected  expected {i}"]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_log_is_added_to_and_closed_for_good(tmp_path: Path) -> None:
    for text in ("first", "second"):
        console = Console(1, tmp_path / "train.log")
        console.say(text)
        assert logged(tmp_path / "train.log")[-1] == text, "at once: a run may be killed"
        log: Any = console.log
        console.close()
        assert log.closed
        console.say("after the end")
    assert logged(tmp_path / "train.log") == ["first", "second"]


def test_a_complaint_goes_to_standard_error_with_the_rank_where_there_are_several(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "[no] such " + "key " * 40
    for ranks, prefix in (("1", "error: "), ("2", "error on rank 1: ")):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        monkeypatch.setenv("RANK", "1")
        complain(said)
        heard = capsys.readouterr()
        assert heard.err == f"{prefix}{said}\n" and heard.out == ""
