"""What a sweep's directory tells of its points, where files, jobs and records disagree."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.common import files
from sftlab.common.squeue import Job
from sftlab.sweeps import points
from sftlab.sweeps.points import Point
from sftlab.sweeps.record import Sweep
from tests.asymmetric import unequal_sweep, write_point


def age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def read(folder: Path, **entry: Any) -> Point:
    """Return point 0 as `entry` of sweep.json has it."""
    return observed(folder, [{"num": 0, **entry}], {"5_2": Job("RUNNING")}).points[0]


def observed(folder: Path, entries: Sequence[Mapping[str, Any]] = (), jobs: Mapping[str, Job] | None = None) -> Sweep:
    """Return a sweep whose record has these entries, with its points as they are now."""
    return Sweep(folder, entries=entries).observed(jobs or {})


def test_the_time_left_of_a_running_point_is_the_steps_to_go_at_the_pace_so_far(tmp_path: Path) -> None:
    found = observed(unequal_sweep(tmp_path))
    running = found.points[7]
    assert (running.state, running.step, running.max_steps) == ("running", 4, 10)
    assert running.left_s == 9.0  # 6 of 10 steps to go, at 6 s for 4
    assert all(p.left_s is None for p in found.points[:7])  # a point that has ended has no time left


def test_points_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for num in (10, 9, 2):
        write_point(tmp_path, num, [], [])
    (tmp_path / "code").mkdir()
    (tmp_path / "3").touch()  # a file is no point
    assert points.numbered(tmp_path) == [2, 9, 10]
    entries = [{"num": 11, "overrides": ["a=1"]}, {"num": 0, "overrides": []}]
    assert [p.num for p in observed(tmp_path, entries).points] == [0, 2, 9, 10, 11]


def test_a_points_entry_in_the_record_goes_before_its_files_and_its_plan(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["optim.lr=1"], [{"step": 1, "time_s": 1.0, "train/loss": 5.0}])
    write_point(tmp_path, 1, ["optim.lr=2"], [])
    elsewhere = write_point(tmp_path / "more", 5, ["optim.lr=3"], [{"step": 2, "time_s": 1.0, "train/loss": 4.0}])
    record = Sweep(tmp_path, entries=[{"num": 1, "overrides": ["optim.lr=9"], "run_dir": "more/5"}])
    first, second, third = record.observed({}, [["a=0"], ["a=1"], ["a=2"]]).points
    assert first.overrides == ("a=0",) and first.folder == tmp_path / "0"
    assert second.overrides == ("optim.lr=9",) and second.folder == elsewhere and second.last["train/loss"] == 4.0
    assert third.overrides == ("a=2",) and third.state == "missing"
    assert observed(tmp_path).points[1].overrides == ("optim.lr=2",)  # as its directory says


def test_settings_lose_hydras_signs_and_keep_every_equals_sign() -> None:
    made = Point(0, ("+optim.extra=a=b", "~tracker", "++x.y=1", "seed=3"), Path("x"))
    assert made.settings == {"optim.extra": "a=b", "tracker": "", "x.y": "1", "seed": "3"}


def test_a_score_is_the_last_or_the_best_value_and_never_infinite() -> None:
    made = Point(0, (), Path("x"), last={"val/loss": 2.0, "val/f1": float("nan")}, best={"val/loss": 1.0})
    assert (made.value("val/loss"), made.value("val/loss", "best")) == (2.0, 1.0)
    assert made.value("val/f1") is None and made.value("val/em") is None
    assert Point(0, (), Path("x"), last={"a": float("inf")}).value("a") is None
    assert Point(0, (), Path("x"), last={"a": 0.0}).value("a") == 0.0


def test_only_what_differs_between_points_is_swept(tmp_path: Path) -> None:
    write_point(tmp_path, 0, ["name=x", "optim.lr=1"], [])
    write_point(tmp_path, 1, ["name=x", "optim.lr=1", "seed=2"], [])
    found = observed(tmp_path, [{"num": 2}])  # of point 2 nothing is known, so it tells nothing
    assert found.swept == ["seed"]
    assert [found.chosen(p) for p in found.points] == [{"seed": ""}, {"seed": "2"}, {"seed": ""}]
    assert not found.is_search
    (tmp_path / "optuna.jsonl").touch()
    assert found.is_search


STOPPED, FAILED, FINISHED = {"status": "stopped"}, {"status": "failed"}, {"status": "finished"}


@pytest.mark.parametrize(
    ("job", "summary", "state"),
    [
        ("PENDING", FINISHED, "finished"),  # the requeued job finds nothing left to do
        ("PENDING", FAILED, "pending"),  # a retry that waits
        ("COMPLETING", STOPPED, "completing"),
        ("TIMEOUT", FINISHED, "timeout"),
        ("TIMEOUT", STOPPED, "stopped"),
        ("COMPLETED", STOPPED, "stopped"),
        ("UNKNOWN", FAILED, "failed"),
        ("UNKNOWN", STOPPED, "stopped"),
        (None, FINISHED, "finished"),
        (None, STOPPED, "stopped"),
    ],
)
def test_a_living_job_goes_before_the_summary_and_a_dead_one_after_it(
    tmp_path: Path, job: str | None, summary: dict[str, str], state: str
) -> None:
    made = Job(job) if job else None
    assert points.state_of(summary, made, tmp_path, False) == state
    assert points.state_of(summary, made, tmp_path, True) == "pruned"  # whatever its job and files say
    assert points.state_of(summary, Job("RUNNING"), tmp_path, True) == "pruned"


def test_a_point_without_a_job_is_silent_after_five_minutes_without_a_word(tmp_path: Path) -> None:
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "train.log"
    assert points.state_of({}, None, tmp_path, False) == "missing"
    log.touch()
    age(log, 240)
    assert points.state_of({}, None, tmp_path, False) == "running"
    metrics.touch()
    age(metrics, 360)
    assert points.state_of({}, None, tmp_path, False) == "running"  # the newest of both counts
    age(log, 360)
    assert points.state_of({}, None, tmp_path, False) == "silent"


def test_a_job_that_ended_without_a_summary_is_the_error(tmp_path: Path) -> None:
    write_point(tmp_path, 0, [], [], "running")
    entry = {"num": 0, "job_id": "7"}
    assert observed(tmp_path, [entry], {"7": Job("OUT_OF_MEMORY")}).points[0].error.endswith("(SLURM: OUT_OF_MEMORY)")
    assert observed(tmp_path, [entry], {"7": Job("COMPLETED")}).points[0].error == ""
    write_point(tmp_path, 1, [], [], "failed", error="ValueError: why")
    entry = {"num": 1, "job_id": "7"}
    assert observed(tmp_path, [entry], {"7": Job("FAILED")}).points[1].error == "ValueError: why"
    assert read(tmp_path, job_id="5_2").job_id == "5_2"


def test_the_step_and_the_steps_to_go_come_from_the_last_lines(tmp_path: Path) -> None:
    run_dir = write_point(tmp_path, 0, [], [{"step": 3, "time_s": 6.0, "train/loss": 2.5}], "running")
    (run_dir / "train.log").write_text("x step 1/20  loss 9\nx step 3/60  loss 2\n")  # taken up with more steps
    point = read(tmp_path, job_id="5_2")
    assert (point.state, point.step, point.max_steps, point.left_s) == ("running", 3, 60, 114.0)
    (run_dir / "train.log").write_text("nothing yet\n")
    assert read(tmp_path, job_id="5_2").max_steps is None and read(tmp_path, job_id="5_2").left_s is None
    (run_dir / "metrics.jsonl").unlink()
    assert read(tmp_path, job_id="5_2").step is None


def test_a_summary_that_is_not_finished_leaves_the_figures_to_the_metrics(tmp_path: Path) -> None:
    lines = [{"step": 2, "time_s": 1.0, "val/loss": 3.0}]
    write_point(tmp_path, 0, [], lines, "stopped", last={"val/loss": 99.0}, best={"val/loss": 99.0}, steps=40)
    point = observed(tmp_path).points[0]
    assert (point.last["val/loss"], point.best["val/loss"], point.max_steps) == (3.0, 3.0, 40)


def test_the_best_of_a_growing_file_goes_by_each_metrics_direction(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    val = [
        {"step": 0, "val/loss": float("nan"), "val/perplexity": float("inf"), "val/f1": float("inf")},
        {"step": 1, "val/loss": 4.0, "val/perplexity": 50.0, "val/f1": 0.1},
        {"step": 2, "val/loss": 2.0, "val/perplexity": 7.0, "val/f1": 0.6},
        {"step": 4, "val/loss": float("nan"), "val/perplexity": float("inf"), "val/f1": 0.3},
        {"step": 6, "val/loss": 3.0, "val/perplexity": 20.0, "val/f1": 0.5},
    ]
    lines = [line for v in val for line in ({"step": v["step"], "train/loss": 10.0 - v["step"], "time_s": 1.0}, v)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(whole + '{"step": 8, "val/loss": 0.5')  # its last line is being written
    last, best = points.tail_of_metrics(file)
    assert best == {"val/loss": 2.0, "val/perplexity": 7.0, "val/f1": 0.6}
    assert (last["step"], last["val/loss"], last["val/f1"], last["train/loss"]) == (6, 3.0, 0.5, 4.0)


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("0123456789")
    assert (points.tail(file, 4), points.tail(file, 40)) == ("6789", "0123456789")
    assert points.tail(tmp_path / "none") == ""
    lines = [json.dumps({"step": s, "val/loss": 1.0 + s, "text": "x" * 1000}) for s in range(1000)]
    file.write_text("\n".join(lines) + "\n")
    last, best = points.tail_of_metrics(file)
    assert last["step"] == 999
    assert 700 < best["val/loss"] < 800  # the first of the last 256 KiB, not the first of all


def test_a_series_is_in_order_and_a_step_written_twice_counts_as_written_last(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": s, "val/loss": float(s)} for s in (0, 2, 4)]
    lines += [{"step": 3, "train/loss": 7.0}, {"step": 2, "val/loss": 2.5}, {"step": 6, "val/loss": float("nan")}]
    lines += [{"step": 1, "val/loss": 1.5}]
    write_point(tmp_path, 0, [], lines, "running")
    assert points.series(tmp_path / "0", "val/loss") == [(0, 0.0), (1, 1.5), (2, 2.5), (4, 4.0)]
    assert points.series(tmp_path / "1", "val/loss") == []


def test_samples_are_those_of_the_last_or_the_first_evaluation(tmp_path: Path) -> None:
    assert points.samples(tmp_path) == []
    wanted = [(0, "a", "x"), (4, "a", "y"), (4, "b", "old"), (4, "b", "z"), (2, "a", "w")]
    text = "".join(json.dumps({"step": s, "id": i, "answer": a}) + "\n" for s, i, a in wanted)
    (tmp_path / "samples.jsonl").write_text(text)
    assert [(s["id"], s["answer"]) for s in points.samples(tmp_path)] == [("a", "y"), ("b", "z")]
    assert [(s["id"], s["answer"]) for s in points.samples(tmp_path, newest=False)] == [("a", "x")]


def test_the_last_traceback_of_every_rank_is_found_wherever_its_launcher_logs(tmp_path: Path) -> None:
    def log(path: str, *errors: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        parts = [f"Traceback (most recent call last)\n  {error}\n" for error in errors]
        (tmp_path / path).write_text("words\n" + "".join(parts))

    write_point(tmp_path, 3, [], [], "failed")
    log(".submitit/9_1/9_1_1_log.err", "old", "second rank")
    log(".submitit/9_1/9_1_0_log.err", "first rank")
    log(".submitit/9_10/9_10_0_log.err", "another point")
    log(".submitit/local_3/3_0_log.err", "here")
    log(".submitit/local_4/4_0_log.err", "another point")
    log("3/train.log")
    found = observed(tmp_path, [{"num": 3, "job_id": "9_1"}])
    assert points.tracebacks(tmp_path, found.points[0]) == [
        (".submitit/9_1/9_1_0_log.err", "Traceback (most recent call last)\n  first rank"),
        (".submitit/9_1/9_1_1_log.err", "Traceback (most recent call last)\n  second rank"),
        (".submitit/local_3/3_0_log.err", "Traceback (most recent call last)\n  here"),
    ]


def test_a_folder_is_a_sweep_by_its_record_its_plan_or_its_points(tmp_path: Path) -> None:
    for name in ("record", "plan", "points", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "record" / "sweep.json").write_text('{"name": "x"}')
    (tmp_path / "plan" / "multirun.yaml").touch()
    (tmp_path / "points" / "4").mkdir()
    assert (Sweep.read(tmp_path / "record").name, Sweep.read(tmp_path / "record").entries) == ("x", ())
    for name in ("plan", "points"):
        assert Sweep.read(tmp_path / name) == Sweep(tmp_path / name, created="")
    with pytest.raises(ValueError, match="is no sweep's folder"):
        Sweep.read(tmp_path / "none")


def test_files_that_are_missing_or_torn_are_empty(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": 1')
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(["é"]))
    assert files.read_json(tmp_path / "torn.json") == files.read_json(tmp_path / "none.json") == {}
    assert files.read_yaml(tmp_path / "whole.yaml") == ["é"] and files.read_yaml(tmp_path / "none.yaml") is None
