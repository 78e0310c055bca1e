"""The SLURM launcher up to sbatch, whose script is kept, the job that a rank runs, and which jobs are alive."""

import json
import os
import pickle
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.common import run_directory
from sftlab.config.groups import CONF
from sftlab.launchers import job, slurm
from sftlab.launchers.job import Job, Stalled
from sftlab.launchers.launcher import LaunchError, Points, make_launcher
from sftlab.launchers.slurm import Slurm, clean_environment
from sftlab.launchers.snapshot import files, own_packages, snapshot
from sftlab.sweeps.launch import launch
from sftlab.sweeps.record import Sweep
from sftlab.training import run as runs
from tests.pretend import Clients, without_slurm_variables


@pytest.fixture(autouse=True)
def no_job_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in without_slurm_variables():
        monkeypatch.delenv(name)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    clients = Clients(tmp_path / "bin")
    clients.answer("srun")
    clients.answer("sbatch", "Submitted batch job 50\n")
    monkeypatch.setenv("PATH", str(clients.dir), prepend=":")
    return clients


def options(**changes: Any) -> dict[str, Any]:
    defaults = yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"]
    return {**defaults, **changes}


def make_sweep(folder: Path, num: int = 3, **changes: Any) -> Sweep:
    folder.mkdir(exist_ok=True)
    record = Sweep(folder, str(folder), ["train"], name="tuned")
    config = {"resume": "never", "run_dir": "x", "optim": {"lr": 1}}
    record = record.with_points([(n, [f"optim.lr={n}"], config) for n in range(num)])
    record.write()
    return record


def script(folder: Path, num: int = 1, cwd: str = "", **changes: Any) -> list[str]:
    run_dirs = {n: folder / str(n) for n in range(num)}
    points = Points(folder, "tuned", cwd or str(folder), folder / "code", run_dirs)
    return make_launcher(options(**changes)).script(points).splitlines()


# An option, a value that is not its default, and the line of the script that says so.
IN_SCRIPT: Mapping[str, tuple[Any, str]] = {
    "nodes": (3, "#SBATCH --nodes=3"),
    "processes_per_node": (7, "#SBATCH --ntasks-per-node=7"),
    "timeout_min": (61, "#SBATCH --time=61"),
    "signal_delay_s": (77, "#SBATCH --signal=USR2@77"),
    "gpus_per_node": (5, "#SBATCH --gpus-per-node=5"),
    "cpus_per_task": (6, "#SBATCH --cpus-per-task=6"),
    "mem_gb": (1.5, "#SBATCH --mem=1536M"),
    "partition": ("night", "#SBATCH --partition=night"),
    "account": ("us", "#SBATCH --account=us"),
    "qos": ("long", "#SBATCH --qos=long"),
    "constraint": ("a100", "#SBATCH --constraint=a100"),
    "array_parallelism": (2, "#SBATCH --array=0-2%2"),
    "setup": (["module load x"], "module load x"),
    "sbatch": ({"mail_type": "END"}, "#SBATCH --mail-type=END"),
}
# Each has a test of its own.
ELSEWHERE = {"_target_", "python", "max_stalled", "wait", "dry_run", "fail_fast", "device", "check_memory"}


def test_every_key_of_the_slurm_options_has_a_test() -> None:
    assert set(options()) == set(IN_SCRIPT) | ELSEWHERE
    assert {f.name for f in fields(Slurm) if f.init} == set(options()) - {"_target_"}


@pytest.mark.parametrize("name", IN_SCRIPT)
def test_each_option_alone_puts_its_own_line_into_the_script(tmp_path: Path, name: str) -> None:
    value, line = IN_SCRIPT[name]
    assert line not in script(tmp_path, 3)
    assert line in script(tmp_path, 3, **{name: value})


def test_the_name_the_logs_and_the_python_are_in_the_script(tmp_path: Path) -> None:
    lines = script(tmp_path)
    assert "#SBATCH --job-name=tuned" in lines and "#SBATCH --open-mode=append" in lines
    assert f"#SBATCH --output={tmp_path}/.submitit/%j/%j_0_log.out" in lines
    assert f"#SBATCH --chdir={tmp_path}" in lines  # submitted from elsewhere: paths in configs are meant against it
    assert any(f" {shlex.quote(sys.executable)} -u -m sftlab.launchers.submitted" in line for line in lines)
    assert any(" singularity run x python -u -m" in s for s in script(tmp_path, python="singularity run x python"))
    assert not [s for s in lines if s.startswith("#SBATCH --array")]  # one point is one job
    here = script(tmp_path, cwd=os.getcwd())
    assert not [s for s in here if "chdir" in s]


def test_an_array_runs_as_many_points_as_slurm_lets_unless_told_otherwise(tmp_path: Path) -> None:
    assert "#SBATCH --array=0-2%3" in script(tmp_path, 3) and "#SBATCH --array=0-1%2" in script(tmp_path, 2)
    assert "#SBATCH --array=0-2%1" in script(tmp_path, 3, array_parallelism=1)


def test_options_of_sbatch_are_spelled_as_it_spells_them(tmp_path: Path) -> None:
    given = {"mail_type": "END", "exclusive": True, "requeue": False, "hold": None, "nice": 0}
    lines = script(tmp_path, sbatch=given)
    assert "#SBATCH --mail-type=END" in lines and "#SBATCH --exclusive" in lines and "#SBATCH --nice=0" in lines
    assert not [s for s in lines if "requeue" in s or "hold" in s]


def shell(lines: Sequence[str]) -> list[str]:
    return [s for s in lines if s.startswith(("export ", "unset ", "module ", "srun "))]


@pytest.mark.parametrize(
    ("changes", "threads", "cpus"),
    [
        ({}, None, None),
        ({"processes_per_node": 2}, "${OMP_NUM_THREADS:-1}", None),
        ({"cpus_per_task": 6}, "${OMP_NUM_THREADS:-6}", "6"),
        ({"cpus_per_task": 6, "processes_per_node": 2}, "${OMP_NUM_THREADS:-6}", "6"),
    ],
)
def test_the_shell_lines_run_the_copied_code_with_threads_that_fit(
    tmp_path: Path, changes: dict[str, Any], threads: str | None, cpus: str | None
) -> None:
    lines = shell(script(tmp_path, setup=["module load x"], **changes))
    expected = [
        "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT",
        "module load x",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={tmp_path}/code${{PYTHONPATH:+:$PYTHONPATH}}",
        *([f"export SRUN_CPUS_PER_TASK={cpus}"] if cpus else []),
        *([f"export OMP_NUM_THREADS={threads}"] if threads else []),
    ]
    assert [s for s in lines if s != "export SUBMITIT_EXECUTOR=slurm" and not s.startswith("srun")] == expected
    (command,) = [s for s in lines if s.startswith("srun")]
    assert "--kill-on-bad-exit=1" in command


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"nodes": 0}, "launcher.nodes=0: expected at least 1"),
        ({"processes_per_node": 0}, "launcher.processes_per_node=0"),
        ({"timeout_min": 0}, "launcher.timeout_min=0"),
        ({"max_stalled": 0}, "launcher.max_stalled=0"),
        ({"timeout_min": 3, "signal_delay_s": 180}, "launcher.signal_delay_s=180 is no shorter than the time limit"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(wrong: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_launcher(options(**wrong))
    make_launcher(options(timeout_min=3, signal_delay_s=179, nodes=1, processes_per_node=1, max_stalled=1))


def submitted(sweep: Sweep, job_id: str) -> Any:
    """Return what Submitit will run as a job, and how often it lets it be requeued."""
    with (sweep.folder / ".submitit" / job_id / f"{job_id}_submitted.pkl").open("rb") as file:
        return pickle.load(file)


def test_points_are_queued_as_one_array_in_the_order_of_their_numbers(tmp_path: Path, programs: Clients) -> None:
    sweep = make_sweep(tmp_path / "s")
    queued = launch(sweep, [2, 0], options(max_stalled=9, qos="long"))
    assert [(e["num"], e["job_id"]) for e in queued.entries] == [(0, "50_1"), (1, None), (2, "50_0")]
    assert Sweep.read(sweep.folder) == queued
    assert queued.launcher == options(max_stalled=9, qos="long")
    assert "#SBATCH --array=0-1%2" in programs.script() and "#SBATCH --qos=long" in programs.script()
    assert f"PYTHONPATH={sweep.folder}/code$" in programs.script()
    for job_id, num in (("50_0", 2), ("50_1", 0)):
        delayed = submitted(sweep, job_id)
        assert (delayed.function.run_dir, delayed.function.max_stalled) == (str(sweep.folder / str(num)), 9)
        assert delayed._timeout_countdown == 1_000_000  # a requeue costs nothing: our own count ends it


def test_one_point_is_queued_as_a_job(tmp_path: Path, programs: Clients) -> None:
    sweep = make_sweep(tmp_path / "s")
    assert launch(sweep, [1], options()).job_id(1) == "50" and "--array" not in programs.script()
    assert submitted(sweep, "50").function.run_dir == str(sweep.folder / "1")


def test_a_refusal_of_sbatch_queues_nothing_and_says_why(tmp_path: Path, programs: Clients) -> None:
    programs.answer("sbatch", error="sbatch: error: invalid partition", code=1)
    sweep = make_sweep(tmp_path / "s")
    with pytest.raises(LaunchError, match=r"(?s)sbatch refused the jobs, nothing is queued: .*invalid partition"):
        launch(sweep, [0, 1], options())
    assert [e["job_id"] for e in Sweep.read(sweep.folder).entries] == [None] * 3


def test_a_job_that_submits_hides_its_own_variables_from_sbatch(
    tmp_path: Path, programs: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path / "s")
    hidden = ("SLURM_JOB_ID", "SBATCH_QOS", "SRUN_CPUS_PER_TASK", "SUBMITIT_EXECUTOR")
    kept = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
    for name in (*hidden, *kept):
        monkeypatch.setenv(name, "7")
    launch(sweep, [0], options())
    assert set(programs.environment()) & {*hidden, *kept} == set(kept)
    assert all(os.environ[name] == "7" for name in hidden)
    monkeypatch.delenv("SLURM_JOB_ID")  # on a login node the user's own defaults for sbatch stand
    with clean_environment():
        assert os.environ["SBATCH_QOS"] == "7"


@pytest.mark.parametrize(("most", "sizes"), [(3, [3, 3, 1]), (4, [4, 3]), (7, [7]), (1001, [7])])
def test_an_array_longer_than_slurm_takes_is_split(
    tmp_path: Path, programs: Clients, most: int, sizes: list[int]
) -> None:
    programs.answer("scontrol", f"MaxArraySize            = {most}\n")
    programs.answer("sbatch", *(f"Submitted batch job {50 + i}\n" for i in range(3)))
    sweep = launch(make_sweep(tmp_path / "s", num=7), list(range(7)), options(array_parallelism=6))
    ids = [f"{50 + i}_{k}" if size > 1 else f"{50 + i}" for i, size in enumerate(sizes) for k in range(size)]
    assert [sweep.job_id(num) for num in range(7)] == ids
    for i, size in enumerate(sizes, 1):
        arrays = [line for line in programs.script(i).splitlines() if line.startswith("#SBATCH --array")]
        assert arrays == ([f"#SBATCH --array=0-{size - 1}%{6 // len(sizes)}"] if size > 1 else [])


def test_of_several_arrays_none_stays_queued_if_one_is_refused(tmp_path: Path, programs: Clients) -> None:
    programs.answer("scontrol", "MaxArraySize = 2\n")
    programs.answer("scancel")
    sbatch = (programs.dir / "sbatch").read_text().replace("exit $(", "[ $(wc -l < {0}) -lt 2 ] && exit 0\nexit 1 # $(")
    programs.answer("sbatch", "Submitted batch job 50\n")
    sbatch = sbatch.format(programs.dir / ".sbatch.calls") if "{0}" in sbatch else sbatch
    (programs.dir / "sbatch").write_text(sbatch)
    with pytest.raises(LaunchError, match="nothing is queued"):
        launch(make_sweep(tmp_path / "s", num=4), list(range(4)), options())
    assert programs.calls("scancel") == [["50"]]


def test_arrays_that_cannot_share_their_parallelism_are_refused(tmp_path: Path, programs: Clients) -> None:
    programs.answer("scontrol", "MaxArraySize = 2\n")
    with pytest.raises(LaunchError, match=r"4 points are 2 arrays here \(MaxArraySize=2\).*raise it to 2"):
        launch(make_sweep(tmp_path / "s", num=4), list(range(4)), options(array_parallelism=1))
    assert not programs.calls("sbatch")


def test_variables_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(KeyError), clean_environment():
        raise KeyError
    assert os.environ["SLURM_JOB_ID"] == "7"


Ran = list[tuple[dict[str, Any], list[str]]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What the job hands to the run, in place of running it; a config with `fails` raises."""
    seen: Ran = []

    def run(config: dict[str, Any], overrides: list[str]) -> float:
        seen.append((config, overrides))
        if config.get("fails"):
            raise ValueError("as told")
        return 0.25

    monkeypatch.setattr(runs, "run", run)
    return seen


def make_run_dir(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"resume": "auto", "run_dir": str(folder), **config}))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(["optim.lr=1"]))
    return folder


def attempts(folder: Path) -> list[dict[str, Any]]:
    file = folder / "attempts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_job_runs_the_config_in_its_directory_and_takes_up_what_is_there(tmp_path: Path, ran: Ran) -> None:
    folder = make_run_dir(tmp_path / "0", resume="never", seed=5)
    assert job.run(folder, "7_1", 0, 5) == 0.25
    assert ran == [({"resume": "auto", "run_dir": str(folder), "seed": 5}, ["optim.lr=1"])]
    (only,) = attempts(folder)
    assert (only["job_id"], only["step"]) == ("7_1", 0)
    moved = tmp_path / "moved"
    folder.rename(moved)
    job.run(moved, "7_1", 0, 5)
    assert ran[1][0]["run_dir"] == str(moved)
    other = make_run_dir(tmp_path / "1", resume="/old/run", run_dir=os.path.relpath(tmp_path / "1"))
    job.run(other, "7_1", 0, 5)
    assert (ran[2][0]["resume"], ran[2][0]["run_dir"]) == ("/old/run", os.path.relpath(other))


def test_only_rank_0_counts_attempts_and_any_rank_says_why_it_failed(tmp_path: Path, ran: Ran) -> None:
    folder = make_run_dir(tmp_path / "0", fails=True)
    with pytest.raises(ValueError, match="as told"):
        job.run(folder, "7", 3, 5)
    assert attempts(folder) == []
    assert json.loads((folder / "summary.json").read_text()) == {
        "status": "failed", "rank": 3, "error": "ValueError: as told",
    }  # fmt: skip


def step(folder: Path, *steps: int) -> None:
    for number in steps:
        (folder / "checkpoints" / f"step_{number:08d}").mkdir(parents=True)


def test_a_job_that_gets_no_further_is_given_up_after_as_many_starts_as_told(tmp_path: Path, ran: Ran) -> None:
    folder = make_run_dir(tmp_path / "0")
    step(folder, 9, 20, 10)
    for _ in range(3):
        job.run(folder, "7", 0, 3)
    with pytest.raises(Stalled, match="started 3 times from step 20 and got no further"):
        job.run(folder, "7", 0, 3)
    assert len(ran) == 3 and [a["step"] for a in attempts(folder)] == [20] * 3
    said = json.loads((folder / "summary.json").read_text())
    assert said["status"] == "failed" and "launcher.max_stalled" in said["error"]
    job.run(folder, "8", 0, 3)  # another job's starts do not count
    step(folder, 30)
    job.run(folder, "7", 0, 3)
    assert len(ran) == 5


def test_a_new_start_forgets_the_last_ones_summary_unless_it_finished(tmp_path: Path, ran: Ran) -> None:
    folder = make_run_dir(tmp_path / "0")
    for status, stays in (("stopped", False), ("failed", False), ("finished", True)):
        run_directory.write_summary(folder, {"status": status})
        job.run(folder, status, 0, 5)
        assert (folder / "summary.json").exists() is stays


def test_a_submitted_job_knows_its_id_and_rank_from_slurm(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run_dir(tmp_path / "0")
    result = tmp_path / "7_2" / "7_2_1_result.pkl"
    result.parent.mkdir()
    result.write_text("of the attempt before")
    around = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9", "SLURM_PROCID": "1"}
    around |= {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path / "%j")}
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    made = Job(str(folder), max_stalled=2)
    assert made() == 0.25 and not result.exists() and attempts(folder) == []
    monkeypatch.setenv("SLURM_PROCID", "0")
    made()
    made()
    assert [a["job_id"] for a in attempts(folder)] == ["7_2"] * 2
    with pytest.raises(Stalled):
        made()
    again: Any = made.checkpoint()
    assert again.function is made and again.args == ()


def test_files_of_a_package_leave_out_what_no_job_needs(tmp_path: Path) -> None:
    kept = ["a.py", "sub/b.yaml", "sub/deep/c.js"]
    left = ["__pycache__/a.pyc", ".git/x", ".hidden", "x.pyc", "node_modules/y.js", "sweeps/z", "runs/z", ".venv/q"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(f.relative_to(tmp_path)) for f in files(tmp_path)] == kept
    assert list(files(tmp_path / "a.py")) == [tmp_path / "a.py"]


def test_modules_of_ones_own_are_copied_and_installed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lone_module.py").write_text("x = 1\n")
    (tmp_path / "spaced" / "inner").mkdir(parents=True)
    (tmp_path / "spaced" / "inner" / "m.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    targets = [
        "lone_module.f",
        "spaced.inner.m.f",
        "json.loads",
        "sftlab.training.optim.adamw",
        "sys.exit",
        "no_such.f",
    ]
    config = {"parts": [{"_target_": t} for t in targets], "text": "_target_", "deep": {"a": ({"_target_": 3},)}}
    found = own_packages([config], tmp_path)
    assert found == {"lone_module": tmp_path / "lone_module.py", "spaced": tmp_path / "spaced"}
    (tmp_path / "sweep").mkdir()
    copy = snapshot(tmp_path / "sweep", [{}, config], tmp_path)
    assert copy == tmp_path / "sweep" / "code"
    assert (copy / "lone_module.py").read_text() == "x = 1\n" and (copy / "spaced/inner/m.py").is_file()
    assert not list(copy.rglob("*.pyc")) and not (copy / "json").exists()
    assert [p.name for p in (tmp_path / "sweep").iterdir()] == ["code"]


def test_the_newest_copy_is_the_one_that_a_new_one_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "changing.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    own.write_text("0")
    config, sweep = {"_target_": "changing.f"}, tmp_path / "sweep"
    sweep.mkdir()
    first = snapshot(sweep, [config], tmp_path)
    for number in range(2, 10):
        (sweep / f"code.{number}").mkdir()
        (sweep / f"code.{number}" / "git.json").write_text('{"digest": "another"}')
    tenth = snapshot(sweep, [config], tmp_path)  # the newest differs, though the first does not
    assert (first.name, tenth.name) == ("code", "code.10")
    assert snapshot(sweep, [config], tmp_path) == tenth
    own.rename(tmp_path / "renamed.py")
    renamed = snapshot(sweep, [{"_target_": "renamed.f"}], tmp_path)
    assert renamed.name == "code.11"  # the same bytes under another name


def test_a_record_keeps_what_is_told_of_points(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", 2)
    assert (sweep.folder / "1" / "config.yaml").exists() and sweep.run_dir(1) == sweep.folder / "1"
    config = {**sweep.config(1), "resume": "auto"}
    more = sweep.with_points([(10, ["optim.lr=1", "x=1"], config), (1, ["optim.lr=7"], config)])
    assert [(e["num"], e["overrides"]) for e in more.entries] == [
        (0, ["optim.lr=0"]), (1, ["optim.lr=7"]), (10, ["optim.lr=1", "x=1"]),
    ]  # fmt: skip
    assert more.observed({}).swept == ["optim.lr", "x"]
    launched = more.with_jobs({"nodes": 2}, {1: "7", 10: "8"})
    assert [e["job_id"] for e in launched.with_jobs({}, {10: None}).entries] == [None, "7", None]
    launched.write()
    read = Sweep.read(sweep.folder)
    assert read == launched and read.name == "tuned" and read.launcher == {"nodes": 2}
    assert sorted(p.name for p in sweep.folder.iterdir()) == ["0", "1", "10", "sweep.json"]


@pytest.fixture
def jobs(programs: Clients, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """SLURM's programs, which are asked about jobs at every look."""
    programs.answer("sacct", error="no accounts", code=1)
    programs.answer("scancel")
    programs.answer("sbatch", *(f"Submitted batch job {50 + n}\n" for n in range(3)))
    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    return programs


class Queue:
    """A launcher, and points of its by their numbers."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.launcher = make_launcher(options(**changes))
        assert isinstance(self.launcher, Slurm)
        self.sweep = make_sweep(folder)

    def start(self, num: int) -> None:
        job_ids = self.launcher.start(self.sweep.to_run([num], self.sweep.folder / "code"))
        self.sweep = self.sweep.with_jobs(options(), job_ids)

    def alive(self, num: int) -> bool:
        return self.launcher.alive(self.sweep.run_dir(num), self.sweep.job_id(num))


def test_points_that_are_started_one_by_one_are_jobs_of_their_own(tmp_path: Path, jobs: Clients) -> None:
    made = Queue(tmp_path / "s", partition="night")
    assert not made.alive(0)  # it has not been started
    made.start(2)
    made.start(0)
    assert [e["job_id"] for e in made.sweep.entries] == ["51", None, "50"]
    assert "#SBATCH --partition=night" in jobs.script(2)
    jobs.answer("squeue", "50|COMPLETED|1:00|None\n51|RUNNING|1:00|None\n")
    assert [made.alive(num) for num in range(3)] == [True, False, False]
    made.launcher.stop(made.sweep.run_dir(0), made.sweep.job_id(0))
    assert jobs.calls("scancel") == [["51"]]
    assert made.launcher.interrupted() == "the jobs carry on" and jobs.num_calls("scancel") == 1
    made.launcher.stop(made.sweep.run_dir(1), None)
    assert jobs.num_calls("scancel") == 1


def test_slurm_is_asked_once_for_all_points_and_not_at_every_look(
    tmp_path: Path, jobs: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Queue(tmp_path / "s")
    monkeypatch.setattr(slurm, "POLL_S", 3600.0)
    made.start(0)
    made.start(1)
    jobs.answer("squeue", "50|RUNNING|1:00|None\n51|FAILED|1:00|None\n")
    assert [made.alive(n) for n in (0, 1, 0, 1)] == [True, False, True, False] and jobs.num_calls("squeue") == 1
    made.start(2)  # a new job makes the last answer old
    made.alive(0)
    assert jobs.num_calls("squeue") == 2


def test_a_job_of_an_earlier_driver_is_asked_about_before_it_is_called_alive(
    tmp_path: Path, jobs: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Queue(tmp_path / "s")
    monkeypatch.setattr(slurm, "POLL_S", 3600.0)
    made.sweep = made.sweep.with_jobs({}, {0: "40", 1: "41", 2: "42"})
    jobs.answer("squeue", "40|RUNNING|1:00|None\n41|CANCELLED|1:00|None\n42|TIMEOUT|1:00|None\n")
    assert [made.alive(num) for num in range(3)] == [True, False, False]


def test_a_controller_that_is_away_leaves_jobs_alive(tmp_path: Path, jobs: Clients) -> None:
    made = Queue(tmp_path / "s")
    made.start(0)
    jobs.answer("squeue", error="cannot contact the controller", code=1)
    assert all(made.alive(0) for _ in range(8))


def test_a_job_out_of_sight_five_times_in_a_row_is_gone(tmp_path: Path, jobs: Clients) -> None:
    made = Queue(tmp_path / "s")
    made.start(0)
    there = "50|RUNNING|1:00|None\n"
    jobs.answer("squeue", "", "", "", "", there, "", "", "", "", "")
    assert [made.alive(0) for _ in range(10)] == [True] * 9 + [False]


def test_a_job_whose_node_failed_is_alive_again_once_it_is_requeued(tmp_path: Path, jobs: Clients) -> None:
    made = Queue(tmp_path / "s")
    made.start(0)
    jobs.answer("squeue", *(f"50|{state}|1:00|None\n" for state in ("NODE_FAIL", "PENDING", "RUNNING", "FAILED")))
    assert [made.alive(0) for _ in range(5)] == [False, True, True, False, False]
    assert jobs.num_calls("squeue") == 4  # a job that failed is not asked about again
