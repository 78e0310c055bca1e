"""Launching without SLURM: what is written, what is refused, what is copied, when a job has had its chances."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftlab.common.files import read_jsonl
from sftlab.common.run_directory import note_failure
from sftlab.launchers.job import Stalled, note_attempt
from sftlab.launchers.launcher import Points, make_launcher
from sftlab.launchers.slurm import clean_environment
from sftlab.launchers.snapshot import own_packages, snapshot
from sftlab.sweeps.record import Sweep
from tests.support import command


def options(**changes: object) -> dict[str, object]:
    import yaml

    from sftlab.config.groups import CONF

    defaults = yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"]
    return {**defaults, **changes}


def sbatch_lines(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def script(folder: Path, given: dict[str, object], num: int) -> str:
    run_dirs = {n: folder / str(n) for n in range(num)}
    return make_launcher(given).script(Points(folder, "sft", str(Path.cwd()), folder / "code", run_dirs))


def test_null_options_write_no_line(tmp_path):
    lines = sbatch_lines(script(tmp_path, options(), 1))
    asked = set(lines) - {"job-name", "output", "error", "open-mode"}  # names and logs
    assert asked == {"nodes", "ntasks-per-node", "time", "signal"}
    assert (lines["time"], lines["signal"]) == ("60", "USR2@120")


def test_every_option_reaches_the_script(tmp_path):
    given = options(
        nodes=3, processes_per_node=8, gpus_per_node=8, cpus_per_task=12, mem_gb=0, partition="gpu", account="a b",
        qos="long", constraint="a100", timeout_min=90, signal_delay_s=300, array_parallelism=2,
        setup=["module load cuda"], python="apptainer exec x.sif python",
        sbatch={"reservation": "spring", "exclusive": True, "mail_type": "END", "requeue": None, "contiguous": False},
    )  # fmt: skip
    made = script(tmp_path, given, 3)
    lines = sbatch_lines(made)
    expected = {
        "nodes": "3", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12", "mem": "0M",
        "partition": "gpu", "account": "'a b'", "qos": "long", "constraint": "a100", "time": "90",
        "signal": "USR2@300", "array": "0-2%2", "reservation": "spring", "exclusive": "", "mail-type": "END",
    }  # fmt: skip
    assert {k: v for k, v in lines.items() if k not in ("job-name", "output", "error", "open-mode")} == expected
    shell = made.split("# setup")[1]
    assert shell.index("module load cuda") < shell.index(f"PYTHONPATH={tmp_path}/code")
    assert (
        "export SRUN_CPUS_PER_TASK=12" in shell
        and "apptainer exec x.sif python -u -m sftlab.launchers.submitted" in shell
    )
    assert "--kill-on-bad-exit=1" in shell


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"nodes": 0}, "launcher.nodes=0"), ({"timeout_min": 2, "signal_delay_s": 120}, "launcher.signal_delay_s=120")],
)
def test_options_that_cannot_work_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        make_launcher(options(**wrong))


def test_dry_run_needs_no_slurm_and_leaves_nothing(tmp_path):
    overrides = ("launcher=slurm", "launcher.dry_run=true", "optim.lr=1e-5,2e-5", "seed=1,2")
    done = command("train", *overrides, cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-3%4" in done.stdout and "# point 3: " in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim=adamw,adamm", "optim=adamm: no such option; did you mean adamw?"),
        ("schedule.final_ratio=0,1 +optim.momentum=0.9", "takes no such key"),
        ("trainer.batch_size=8,0", "point 1"),
        ("name=a,b", "name= cannot be set in a sweep"),
        ("run_dir=here", "run_dir= cannot be set in a sweep"),
        ("launcher.nodes=1,2", "launcher.* cannot be swept"),
        ("launcher.node=2", "did you mean launcher.nodes?"),
    ],
)
def test_a_point_that_cannot_run_is_refused_before_anything_is_queued(tmp_path, override, says):
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = command("train", "launcher=slurm", *override.split(), cwd=tmp_path, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "called").exists() and not list(tmp_path.rglob("sweep.json"))


def test_without_slurm_the_error_says_where_to_go(tmp_path):
    done = command("train", "launcher=slurm", cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 1 and "launcher=local" in done.stderr and "Traceback" not in done.stderr


def test_a_local_driver_that_is_told_to_end_ends_its_points_which_save_first(tmp_path, model_folder, squad_files):
    made = [f"model.name_or_path={model_folder}", "data=squad", f"data.path={squad_files[0]}", "data.val_path=null"]
    made += ["trainer.max_steps=100000", "trainer.batch_size=4", "tracker=none", f"hydra.sweep.dir={tmp_path}/sweep"]
    typed = ["launcher=local", "launcher.parallel_points=2", *made]
    driver = subprocess.Popen([sys.executable, "-m", "sftlab.train", *typed], cwd=tmp_path)
    points = [tmp_path / "sweep" / "0"]
    try:
        for point in points:
            wait_for(lambda point=point: len(read_jsonl(point / "metrics.jsonl")) > 2)
        driver.terminate()
        assert driver.wait(60) == 128 + signal.SIGTERM
    finally:
        driver.kill()
    for point in points:
        assert not running(str(point))
        assert (point / "checkpoints" / "latest").exists()


def wait_for(condition, limit_s=120.0):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s} s"
        time.sleep(0.1)


def running(argument):
    """Return the command lines of this machine's processes that name `argument`."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
    return [line for line in lines if argument in line]


def test_requeues_without_progress_end_and_with_progress_do_not(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in range(10):  # any number of times, as long as each gets further
        (checkpoints / f"step_{step:08d}").mkdir(parents=True)
        note_attempt(tmp_path, "7", max_stalled=2)
    note_attempt(tmp_path, "7", max_stalled=2)
    with pytest.raises(Stalled, match="started 2 times from step 9 and got no further"):
        note_attempt(tmp_path, "7", max_stalled=2)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    note_attempt(tmp_path, "8", max_stalled=2)  # a retry is a new job with new chances
    assert not (tmp_path / "summary.json").exists()


def test_the_first_failure_is_kept_unless_it_only_lost_a_peer(tmp_path):
    def summary() -> dict[str, object]:
        return json.loads((tmp_path / "summary.json").read_text())

    note_failure(tmp_path, 0, RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
    note_failure(tmp_path, 1, ValueError("the cause"))
    note_failure(tmp_path, 2, ValueError("later"))
    assert summary() == {"status": "failed", "rank": 1, "error": "ValueError: the cause"}


def test_a_snapshot_is_made_anew_only_if_the_code_changed(tmp_path, monkeypatch):
    own = tmp_path / "own_package"
    own.mkdir()
    (own / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"optim": {"_target_": "own_package.sgd"}, "tracker": [{"_target_": "torch.optim.SGD"}]}
    assert own_packages([config], tmp_path) == {"own_package": own}
    (tmp_path / "sweep").mkdir()
    first = snapshot(tmp_path / "sweep", [config], tmp_path)
    assert (first / "own_package/__init__.py").read_text() == "x = 1\n"
    assert (first / "sftlab/launchers/job.py").is_file() and (first / "conf/train.yaml").is_file()
    assert set(json.loads((first / "git.json").read_text())) == {"git_commit", "git_diff", "digest"}
    assert snapshot(tmp_path / "sweep", [config], tmp_path) == first
    (own / "__init__.py").write_text("x = 2\n")
    second = snapshot(tmp_path / "sweep", [config], tmp_path)
    assert second.name == "code.2" and (second / "own_package/__init__.py").read_text() == "x = 2\n"
    assert (first / "own_package/__init__.py").read_text() == "x = 1\n"


def test_the_record_keeps_points_and_names_what_differs(tmp_path):
    first = Sweep(tmp_path, "/", ["python"], {"nodes": 1})
    config = {"resume": "auto", "seed": 0}
    first.with_points([(0, ["optim.lr=1", "seed=1"], config), (1, ["optim.lr=2", "seed=1"], config)]).write()
    read = Sweep.read(tmp_path)
    assert read.observed({}).swept == ["optim.lr"] and read.config(1) == config
    read.with_jobs({"nodes": 2}, {1: "5_1"}).write()
    assert [e["job_id"] for e in Sweep.read(tmp_path).entries] == [None, "5_1"]
    overrides = [["+a.b=1", "c=x=1"], ["+a.b=1", "c=x=2"], ["+a.b=1"]]
    entries = [{"num": num, "overrides": given} for num, given in enumerate(overrides)]
    assert Sweep(tmp_path, entries=entries).observed({}).swept == ["c"]
    with pytest.raises(ValueError, match="is no sweep's folder"):
        Sweep.read(tmp_path / "0")


def test_a_surrounding_jobs_variables_do_not_reach_sbatch(monkeypatch):
    import os

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with clean_environment():
        assert "SBATCH_PARTITION" not in os.environ and os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SBATCH_PARTITION"] == "debug"
