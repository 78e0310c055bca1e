"""launcher=slurm on a real SLURM: failures fail alone, preempted points go on, and the driver does not matter."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import REPO, make_model_folder, make_squad_file, read_jsonl


class Site:
    """A folder to work in, with a tiny model and data, and the cluster's environment."""

    def __init__(self, folder: Path, env: dict[str, str], python: str = sys.executable) -> None:
        self.dir = folder
        self.python = python
        self.env = env | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        make_model_folder(folder / "model")
        make_squad_file(folder / "train.jsonl")
        self.cause = folder / "cause"
        self.cause.touch()

    def command(self, *overrides: str, launcher: str = "slurm") -> list[str]:
        settings = {
            "model": "hf",
            "model.name_or_path": str(self.dir / "model"),
            "data": "squad",
            "data.path": str(self.dir / "train.jsonl"),
            "data.split": "train",
            "data.val_path": "null",
            "tracker": "none",
            "optim.lr": "1e-3",
            "trainer.batch_size": "8",
            "trainer.max_steps": "6",
            "hydra.sweep.dir": str(self.dir / "sweep"),
            "launcher": launcher,
        }
        if launcher == "slurm":
            settings["launcher.python"] = self.python
        given = [
            f"{key}={value}" for key, value in settings.items() if not any(o.startswith(f"{key}=") for o in overrides)
        ]
        return [self.python, "-m", "sftlab.train", *given, *overrides]

    def train(self, *overrides: str, launcher: str = "slurm") -> "subprocess.CompletedProcess[str]":
        command = self.command(*overrides, launcher=launcher)
        return subprocess.run(command, cwd=self.dir, env=self.env, capture_output=True, text=True, timeout=590)

    def sweep(self, *overrides: str, sweep: str = "sweep") -> str:
        """What sftlab.sweep says from another folder."""
        command = [self.python, "-m", "sftlab.sweep", f"dir={self.dir / sweep}", "report=false", *overrides]
        done = subprocess.run(command, env=self.env, cwd="/", capture_output=True, text=True, timeout=590)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def faulty(self, fault: str, **settings: Any) -> list[str]:
        """Overrides that put the schedule of tests/slurm/faults.py in."""
        keys = {"fault": fault, "at": 3, "cause": self.cause, **settings}
        target = ["schedule=constant", "schedule._target_=tests.slurm.faults.cosine", "~schedule.warmup_steps"]
        return target + [f"+schedule.{key}={value}" for key, value in keys.items()]

    def record(self, sweep: str = "sweep") -> dict[str, Any]:
        return json.loads((self.dir / sweep / "sweep.json").read_text())

    def summary(self, num: int, sweep: str = "sweep") -> dict[str, Any]:
        return json.loads((self.dir / sweep / str(num) / "summary.json").read_text())

    def summary_or_nothing(self, num: int) -> dict[str, Any]:
        file = self.dir / "sweep" / str(num) / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def losses(self, num: int, sweep: str = "sweep") -> list[float]:
        """Training losses in order of step; of a step that was made again after an end without a save, the last."""
        by_step = {m["step"]: m["train/loss"] for m in self.metrics(num, sweep) if "train/loss" in m}
        assert list(by_step) == list(range(1, len(by_step) + 1))
        return list(by_step.values())

    def metrics(self, num: int, sweep: str = "sweep") -> list[dict[str, Any]]:
        file = self.dir / sweep / str(num) / "metrics.jsonl"
        return read_jsonl(file) if file.exists() else []

    def attempts(self, num: int) -> list[dict[str, Any]]:
        file = self.dir / "sweep" / str(num) / "attempts.jsonl"
        return read_jsonl(file) if file.exists() else []

    def log(self, num: int, rank: int, sweep: str = "sweep") -> str:
        job = self.record(sweep)["points"][num]["job_id"]
        return (self.dir / sweep / ".submitit" / job / f"{job}_{rank}_log.err").read_text()


@pytest.fixture
def site(slurm_cluster, warm_python, tmp_path) -> Iterator[Site]:
    yield Site(tmp_path, slurm_cluster.env, str(warm_python))
    if jobs := slurm_cluster.run("squeue", "-h", "-o", "%A").split():
        slurm_cluster.run("scancel", *jobs)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {limit_s} s"
        time.sleep(0.1)


def test_gauntlet_30_a_failed_point_is_failed_whichever_rank_failed(site, slurm_cluster):
    faults = site.faulty("none,raise,late,kill")
    done = site.train(*faults, "launcher.processes_per_node=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 of 4 points did not finish" in done.stderr
    points = site.record()["points"]
    array = points[0]["job_id"].split("_")[0]
    assert slurm_cluster.states(array) == ["COMPLETED", "FAILED", "FAILED", "FAILED"]
    assert site.summary(0)["status"] == "finished"
    assert "ValueError: a fault on rank 1 at step 3" in site.log(1, rank=1)
    assert "a fault on rank 1 at step 3" in site.summary(1)["error"]
    assert "ValueError: a fault on rank 1 after the last collective" in site.log(2, rank=1)
    assert site.summary(2)["status"] == "failed"
    shown = site.sweep("metric=train/loss")
    assert "3 failed, 1 finished" in shown and "a fault on rank 1 at step 3" in shown
    assert "Killed" in site.log(3, rank=0)  # srun's word, in the log of the script

    site.cause.unlink()  # the cause is gone: what failed, and only that, is run again
    told = site.sweep("retry=failed", "metric=train/loss", "trust=true")  # its schedule is not sftlab's
    assert "3 of 4 points did not finish: again" in told and "4 finished" in told
    retried = site.record()["points"]
    assert retried[0]["job_id"] == points[0]["job_id"]
    assert slurm_cluster.states(retried[1]["job_id"].split("_")[0]) == ["COMPLETED"] * 3
    assert len(site.losses(0)) == 6
    for num in (1, 2, 3):
        assert site.summary(num)["status"] == "finished"
        assert site.losses(num) == site.losses(0)


def test_edits_after_submission_change_nothing(site, slurm_cluster):
    site.dir.joinpath("mine").mkdir()
    own = site.dir / "mine/__init__.py"
    own.write_text("def constant(step, total_steps):\n    return 1.0\n")
    target = ["schedule=constant", "schedule._target_=mine.constant", "~schedule.warmup_steps"]
    waits = ["launcher.wait=false", "launcher.sbatch={hold: true}"]
    done = site.train(*target, *waits, "trainer.max_steps=2", "launcher.python=null")  # a Python that imports it all
    assert done.returncode == 0, done.stderr
    job = site.record()["points"][0]["job_id"]
    assert f"queued as job {job}" in done.stdout and "python -m sftlab.sweep dir=" in done.stdout
    own.write_text("raise ImportError('the edited file')\n")
    slurm_cluster.run("scontrol", "release", job)
    slurm_cluster.wait_for(job, "COMPLETED", limit_s=300)
    config = yaml.safe_load((site.dir / "sweep/0/config.yaml").read_text())
    assert config["schedule"]["_target_"] == "mine.constant"
    environment = json.loads((site.dir / "sweep/0/environment.json").read_text())
    assert environment["git_commit"] == json.loads((site.dir / "sweep/code/git.json").read_text())["git_commit"]


def test_a_driver_that_is_killed_and_ctrl_c_leave_the_jobs_alone(site, slurm_cluster):
    """Both drivers wait for jobs that are held, so that the drivers' ends surely come first."""

    def drive(sweep: str) -> "tuple[subprocess.Popen[str], str]":
        held = ["launcher.sbatch={hold: true}", "optim.lr=1e-3,2e-3", "trainer.max_steps=2"]
        command = site.command(*held, f"hydra.sweep.dir={site.dir / sweep}")
        driver = subprocess.Popen(command, cwd=site.dir, env=site.env, stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        while "  pending" not in (line := driver.stdout.readline()):
            assert line, "the driver ended before its jobs were queued"
        return driver, site.record(sweep)["points"][0]["job_id"].split("_")[0]

    driver, job = drive("sweep")
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert slurm_cluster.states(job) == ["PENDING"] * 2
    slurm_cluster.run("scontrol", "release", job)

    other, held = drive("other")
    other.send_signal(signal.SIGINT)
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 130 and "the jobs carry on" in said and f"dir={site.dir}/other" in said
    assert slurm_cluster.states(held) == ["PENDING"] * 2

    slurm_cluster.wait_for(job, "COMPLETED", "COMPLETED", limit_s=300)
    assert [site.summary(num)["status"] for num in (0, 1)] == ["finished"] * 2
    told = site.sweep("metric=train/loss")
    assert "2 finished" in told and "2/2" in told and "ranked by last train/loss" in told


def test_two_nodes_of_two_processes_are_one_process(site):
    """With the default, a copy per node, and tensor groups inside a node."""
    run = ["trainer.max_steps=5", "schedule=constant"]
    wide = ["launcher.nodes=2", "launcher.processes_per_node=2"]
    alone = site.train(*run, f"run_dir={site.dir}/alone/0", launcher="none")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    for name in ("fsdp2", "hsdp", "fsdp2_tp"):
        done = site.train(*run, *wide, f"parallel={name}", f"hydra.sweep.dir={site.dir / name}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert site.losses(0, name) == pytest.approx(site.losses(0, "alone"), rel=1e-5), name


def test_a_rank_with_other_code_is_refused(site, slurm_cluster):
    """Each task runs the package of a folder of its own, as if a node's copy were old."""
    for task in "01":
        shutil.copytree(REPO / "sftlab", site.dir / task / "sftlab", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(REPO / "conf", site.dir / task / "conf")
    (site.dir / "1/sftlab/data/plan.py").write_text((REPO / "sftlab/data/plan.py").read_text() + "# older\n")
    words = " ".join(f"'{w}'" for w in site.command("run_dir=run", launcher="none") if not w.startswith("hydra.sweep"))
    words = words.replace(site.python, sys.executable, 1)  # one that imports what PYTHONPATH says
    script = f"cd {site.dir}; PYTHONPATH={site.dir}/$SLURM_PROCID exec {words}"
    done = subprocess.run(
        ["srun", "-N2", "-n2", "bash", "-c", script], env=site.env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "rank 1 on " in done.stderr and "Install the same version on every node" in done.stderr
    assert not (site.dir / "run").exists(), "nothing was begun"


def test_a_preempted_point_goes_on_where_it_was(site, slurm_cluster):
    faults = site.faulty("none", slow_s=0.7)
    wide = ["launcher.nodes=2", "launcher.sbatch={exclusive: true}", "launcher.timeout_min=60"]
    done = site.train(*faults, *wide, "launcher.wait=false", "trainer.max_steps=12")
    assert done.returncode == 0, done.stderr
    job = site.record()["points"][0]["job_id"]
    wait_until(lambda: len(site.metrics(0)) >= 3, "the third step")
    high = slurm_cluster.sbatch(site.dir, "sleep 1", "--partition=high", "--exclusive", "--nodes=2")
    slurm_cluster.wait_for(high, "COMPLETED", limit_s=300)
    wait_until(lambda: len(site.attempts(0)) == 2 and len(site.metrics(0)) >= 7, "the job's return")
    slurm_cluster.run("scancel", "--signal=USR2", job)  # what a time limit and a preemption have in common
    wait_until(lambda: len(site.attempts(0)) == 3, "the job's second return")
    site.cause.unlink()  # the last attempt need not be slow
    slurm_cluster.wait_for(job, "COMPLETED", limit_s=300)
    attempts = site.attempts(0)
    assert [a["job_id"] for a in attempts] == [job] * 3 and 0 < attempts[1]["step"] < attempts[2]["step"] < 12
    assert len(site.metrics(0)) == len({m["step"] for m in site.metrics(0)})
    assert site.summary(0)["status"] == "finished"

    straight = site.train(
        *site.faulty("none"), f"hydra.sweep.dir={site.dir}/straight", "launcher.nodes=2", "trainer.max_steps=12"
    )
    assert straight.returncode == 0, straight.stdout + straight.stderr
    assert site.losses(0) == site.losses(0, "straight")


def test_local_points_fail_alone_too(tmp_path):
    site = Site(tmp_path, dict(os.environ))
    done = site.train(*site.faulty("raise,none"), "launcher.processes_per_node=2", launcher="local")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 points did not finish" in done.stderr
    assert [site.summary(num)["status"] for num in range(2)] == ["failed", "finished"]
    assert "step 6/6" in done.stdout
    assert "a fault on rank 1 at step 3" in (site.dir / "sweep/.submitit/local_0/0_1_log.err").read_text()


def test_gauntlet_44_a_job_killed_for_its_memory_says_so_with_its_log(site):
    cold = f"launcher.python={sys.executable}"  # the warm one's memory is not the job's
    done = site.train("optim.lr=1e-3,2e-3", "launcher.mem_gb=0.1", cold)
    assert done.returncode == 1, done.stdout + done.stderr
    shown = site.sweep("metric=train/loss")
    for num, point in enumerate(site.record()["points"]):
        assert site.summary_or_nothing(num) == {}
        assert "killed for its memory" in shown
        assert f"{point['job_id']}/{point['job_id']}_0_log.err" in shown, shown


def test_tasks_of_srun_are_one_world(site, slurm_cluster):
    """Before, each was a world of one: two runs in one directory, both with exit code 0."""
    words = site.command("run_dir=twin", launcher="none")
    words = [w for w in words if not w.startswith("hydra.sweep.dir")]
    for nodes, folder in ((1, "one"), (2, "two")):
        command = ["srun", f"-N{nodes}", "-n2", "--kill-on-bad-exit=1"]
        command += [w if w != "run_dir=twin" else f"run_dir={folder}" for w in words]
        done = subprocess.run(command, cwd=site.dir, env=site.env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 x cpu" in done.stdout and done.stdout.count("finished in") == 1, done.stdout
        steps = [m["step"] for m in read_jsonl(site.dir / folder / "metrics.jsonl") if "train/loss" in m]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_a_twin_of_a_job_on_another_node_is_refused_and_the_first_unharmed(site, slurm_cluster):
    """Both nodes are this machine; what tells them apart is written over, so that SLURM must be asked."""
    words = [w for w in site.command("run_dir=run", *site.faulty("slow_1"), "trainer.max_steps=8", launcher="none")]
    words = [w for w in words if not w.startswith("hydra.sweep.dir")]
    job = slurm_cluster.sbatch(site.dir, " ".join(f"'{w}'" for w in words), "--export=ALL", "--nodelist=node1")
    file = site.dir / "run/.owner.json"
    wait_until(lambda: file.exists() and (site.dir / "run/metrics.jsonl").exists(), "the first run")
    held = json.loads(file.read_text())
    assert held["job"] == job
    file.write_text(json.dumps({**held, "machine": "another"}))
    second = subprocess.run(words, cwd=site.dir, env=site.env, capture_output=True, text=True, timeout=100)
    assert second.returncode == 1 and f"on {held['host']}, job {job}" in second.stderr, second.stderr
    slurm_cluster.wait_for(job, "COMPLETED")
    steps = [m["step"] for m in read_jsonl(site.dir / "run/metrics.jsonl") if "train/loss" in m]
    assert steps == list(range(1, 9))
    file.write_text(json.dumps({**held, "machine": "another"}))  # as if it had died there: SLURM says that it has ended
    third = subprocess.run(words, cwd=site.dir, env=site.env, capture_output=True, text=True, timeout=100)
    assert third.returncode == 0 and "is finished" in third.stdout, third.stderr
