"""slurm/local-cluster does what a site's cluster does, where the launcher depends on it: states, arrays, requeue."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LOCAL_CLUSTER = Path(__file__).parents[2] / "slurm/local-cluster"


@pytest.fixture(autouse=True)
def no_jobs_left(slurm_cluster) -> Iterator[None]:
    yield
    if jobs := slurm_cluster.run("squeue", "-h", "-o", "%A").split():
        slurm_cluster.run("scancel", *jobs)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {limit_s} s"
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the running processes that work in the folder or name it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in command or (process / "cwd").readlink() == folder:
                found.append(command)
        except OSError:  # ended meanwhile, a zombie, or another user's
            continue
    return found


def test_both_nodes_are_idle(slurm_cluster):
    assert slurm_cluster.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T %G").splitlines() == [
        "node1 idle gpu:2",
        "node2 idle gpu:2",
    ]


def test_start_again_keeps_the_running_cluster(slurm_cluster):
    before = (slurm_cluster.dir / "cluster.json").read_text()
    slurm_cluster.run(str(LOCAL_CLUSTER), "start", f"--dir={slurm_cluster.dir}")
    slurm_cluster.run(str(LOCAL_CLUSTER), "status", f"--dir={slurm_cluster.dir}")
    assert (slurm_cluster.dir / "cluster.json").read_text() == before


def test_srun_reaches_both_nodes_through_the_printed_environment(slurm_cluster):
    command = 'srun -N 2 --gpus-per-node=2 bash -c "echo \\$SLURMD_NODENAME \\$SLURM_PROCID \\$CUDA_VISIBLE_DEVICES"'
    script = f'eval "$({LOCAL_CLUSTER} env --dir={slurm_cluster.dir})" && which sacct && {command}'
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert sorted(done.stdout.splitlines()) == [f"{slurm_cluster.dir}/bin/sacct", "node1 0 0,1", "node2 1 0,1"]


def test_a_job_that_exits_with_3_is_failed(slurm_cluster, tmp_path):
    job = slurm_cluster.sbatch(tmp_path, "exit 3")
    slurm_cluster.wait_for(job, "FAILED")
    header, row = slurm_cluster.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job).splitlines()
    assert header == "JobID|State|NodeList"
    assert row in (f"{job}|FAILED|node1", f"{job}|FAILED|node2")
    assert "ExitCode=3:0" in slurm_cluster.run("scontrol", "show", "job", job)


def test_array_elements_have_states_of_their_own(slurm_cluster, tmp_path):
    submitit = pytest.importorskip("submitit")
    job = slurm_cluster.sbatch(tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    late = slurm_cluster.sbatch(tmp_path, "true", "--array=0-4:2%2", "--begin=now+1hour")
    slurm_cluster.wait_for(job, "COMPLETED", "FAILED")
    output = slurm_cluster.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job, "-j", late)
    states = {key: row["State"] for key, row in submitit.SlurmJob.watcher.read_info(output).items()}
    expected = {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED", f"{late}_0": "PENDING", f"{late}_2": "PENDING"}
    assert states == expected | {f"{late}_4": "PENDING"}
    assert slurm_cluster.run("sacct", "--noheader", "-j", f"{job}_1").startswith(f"{job}_1|FAILED|node")
    slurm_cluster.run("scancel", late)
    slurm_cluster.wait_for(late, "CANCELLED", "CANCELLED", "CANCELLED")


def test_requeue_starts_the_same_job_again(slurm_cluster, tmp_path):
    job = slurm_cluster.sbatch(
        tmp_path, "echo restart=${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 300"
    )
    wait_until((tmp_path / "job.out").exists, "the job's output")
    slurm_cluster.run("scontrol", "requeue", job)
    slurm_cluster.wait_for(job, "COMPLETED")
    restarts = [line for line in (tmp_path / "job.out").read_text().splitlines() if line.startswith("restart=")]
    assert restarts == ["restart=0", "restart=1"]


def test_preemption_signals_the_job_and_it_comes_back(slurm_cluster, tmp_path):
    # As Submitit does, the step requeues its job on USR2. SLURM would do it too, but only 20 to 30 s later.
    step = """
        echo restart=${SLURM_RESTART_COUNT:-0} >> step.out
        [ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 0
        trap "echo USR2 >> step.out; scontrol requeue $SLURM_JOB_ID; sleep 300" USR2
        while true; do sleep 0.1; done"""
    job = slurm_cluster.sbatch(
        tmp_path, f"srun bash -c '{step}'", "--exclusive", "--nodelist=node1", "--signal=USR2@60"
    )
    wait_until((tmp_path / "step.out").exists, "the step's output")
    (tmp_path / "high").mkdir()
    options = ("--partition=high", "--exclusive", "--nodelist=node1")
    high = slurm_cluster.sbatch(tmp_path / "high", f"cat {tmp_path}/step.out", *options)
    slurm_cluster.wait_for(high, "COMPLETED")
    assert (tmp_path / "high/job.out").read_text().split() == ["restart=0", "USR2"]
    slurm_cluster.wait_for(job, "COMPLETED")
    assert (tmp_path / "step.out").read_text().split() == ["restart=0", "USR2", "restart=1"]


def test_two_clusters_run_side_by_side_and_stop_leaves_no_process(slurm_cluster, tmp_path_factory):
    folder = slurm_cluster.dir / "b"
    work = tmp_path_factory.mktemp("work")
    try:
        slurm_cluster.run(str(LOCAL_CLUSTER), "start", "--nodes=1", "--gpus=0", f"--dir={folder}")
        other = type(slurm_cluster)(folder, slurm_cluster.env | {"SLURM_CONF": f"{folder}/etc/slurm.conf"})
        other.sbatch(work, "trap '' TERM; touch runs; while true; do sleep 0.1; done")
        wait_until((work / "runs").exists, "the job that ignores SIGTERM")
        assert any("slurmctld" in command for command in processes_of(folder))
        assert any("job" in command for command in processes_of(work))
    finally:
        slurm_cluster.run(str(LOCAL_CLUSTER), "stop", f"--dir={folder}")
    assert processes_of(folder) == processes_of(work) == []
    slurm_cluster.run(str(LOCAL_CLUSTER), "stop", f"--dir={folder}")  # a second stop is no error
    assert slurm_cluster.run("srun", "hostname")  # and the first cluster is none the worse


def test_the_daemons_listen_on_loopback_alone(slurm_cluster):
    """Where this machine's name is a loopback address; else `start` says that they do not."""
    import socket

    try:
        name = socket.gethostbyname(socket.gethostname())
    except OSError:
        name = ""
    if not name.startswith("127."):
        pytest.skip(f"{socket.gethostname()} is {name or 'unknown'} here")
    ports = [json.loads((slurm_cluster.dir / "cluster.json").read_text())["port"] + i for i in range(3)]
    listening: dict[int, list[str]] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state = line.split()[:4]
        address, port = local.split(":")
        if state == "0A":
            listening.setdefault(int(port, 16), []).append(address)
    for port in ports:
        assert [address[-2:] for address in listening[port]] == ["7F"], "127.x.x.x, the bytes in reverse"


def test_a_folder_that_somebody_else_may_have_planted_is_refused(slurm_cluster):
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        folder = Path(made)
        (folder / "victim").mkdir(mode=0o700)
        (folder / "link").symlink_to(folder / "victim")
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        for name, said in (("link", "is a link"), ("open", "others may write to")):
            for command in ("start", "stop"):
                typed = [str(LOCAL_CLUSTER), command, f"--dir={folder / name}"]
                done = subprocess.run(typed, capture_output=True, text=True, timeout=60)
                assert done.returncode == 1 and said in done.stderr, done.stderr
        assert not list((folder / "victim").iterdir()) and not list((folder / "open").iterdir())
