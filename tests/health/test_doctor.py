"""The doctor: each line is ok or what to do, a broken part is found and ends with 1, and no token is ever shown."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftlab.health import device, nodes, services
from sftlab.health.finding import STATES, Finding, examine, line
from tests.commands import Typed
from tests.local_hub import TOKEN, LocalHub


def test_every_check_answers_on_this_machine(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SLURM, whose client may be here with no cluster behind it; the hub is asked in the tests below."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), "/nowhere"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = typed("doctor", f"folder={tmp_path / 'runs'}").splitlines()
    found = {row.split()[0]: row.split()[1] for row in rows}
    assert list(found) == [*device.CHECKS, *services.checks(tmp_path)] and set(found.values()) <= set(STATES)
    assert {found[name] for name in ("python", "torch", "nccl", "bfloat16", "disk", "tensorboard")} == {"ok"}
    assert found["hub"] == "note" and "HF_HUB_OFFLINE" in next(row for row in rows if row.startswith("hub"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_some_checks_and_json(typed: Typed, refused: Typed) -> None:
    said = typed("doctor", "only=[python,compile]", "json=true")
    told = json.loads(said.partition(nodes.MARK)[2])
    assert [finding["name"] for finding in told["findings"]] == ["python", "compile"] and len(said.splitlines()) == 1
    assert "only=pyton: there is no such check; there are python, torch" in refused("doctor", "only=[pyton]")


def test_a_check_that_fails_or_raises_is_said_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: Typed
) -> None:
    def broken() -> tuple[str, str]:
        raise RuntimeError(f"two\nlines with {TOKEN}")

    shown: list[Finding] = []
    found = examine({"a": lambda: ("ok", "well"), "b": broken}, shown.append)
    assert found == shown == [Finding("a", "ok", "well"), Finding("b", "fail", "RuntimeError: two lines with [secret]")]
    assert line(found[0], 4) == "a     ok    well"
    monkeypatch.setitem(device.CHECKS, "python", broken)
    with pytest.raises(SystemExit) as stop:
        typed("doctor", "only=[python,torch]")
    assert stop.value.code == 1 and capfd.readouterr().out.splitlines()[-1] == "1 to mend: python"


@pytest.mark.parametrize(
    ("available", "built_with", "listed", "state", "words"),
    [
        (False, None, "", "note", "no GPU"),
        (False, None, "NVIDIA H100, 570.1, 81559 MiB", "fail", "built without CUDA: pip install"),
        (False, "12.8", "NVIDIA H100, 570.1, 81559 MiB", "fail", "update the driver, or see CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    available: bool, built_with: str | None, listed: str, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's tool is a shell script here that prints what it prints for such a machine."""
    rows = [[part.strip() for part in listed.split(",")]] if listed else []
    monkeypatch.setattr(device, "smi", lambda: rows)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("torch.version.cuda", built_with)
    assert device.cuda()[0] == state and words in device.cuda()[1]


def test_what_the_driver_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86, 81559 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert device.driver() == ("ok", "570.86; NVIDIA H100 80GB HBM3 81559 MiB")
    tool.write_text("#!/bin/sh\necho 'Driver/library version mismatch'; exit 9\n")
    with pytest.raises(RuntimeError, match="nvidia-smi fails: Driver/library version mismatch"):
        device.driver()
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.driver()[0] == "note"


def test_a_slow_or_full_disk_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "NUM_BLOCKS", 4)
    monkeypatch.setattr(services, "SLOW_MB_S", 0.0)
    assert services.disk(tmp_path)[0] == "ok"
    monkeypatch.setattr(services, "SLOW_MB_S", 1e9)
    assert services.disk(tmp_path)[0] == "note" and "saving 1.2 billion parameters takes" in services.disk(tmp_path)[1]
    monkeypatch.setattr(services, "CHECKPOINT_GB", 1e9)
    assert "name another run_dir" in services.disk(tmp_path)[1] and list(tmp_path.iterdir()) == []


def test_the_hub_and_whose_token_never_the_token(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    state, text = services.hub()
    assert state in ("ok", "fail") and TOKEN not in text
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert services.hub()[0] == "note" and "no token: gated models need HF_TOKEN" in services.hub()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert services.hub()[0] == "note" and "does not answer" in services.hub()[1]


def test_a_tracker_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert services.tracker("nothing_of_that_name")[1] == (
        "not installed: pip install nothing_of_that_name, for tracker=nothing_of_that_name"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(services.util, "find_spec", lambda name: object())
    monkeypatch.setattr(services.metadata, "version", lambda name: "1.2")
    assert services.tracker("wandb") == ("ok", "1.2")
    monkeypatch.delenv("WANDB_API_KEY")
    assert "not logged in (wandb login)" in services.tracker("wandb")[1]


OPTIONS = {
    "nodes": 2,
    "partition": "debug",
    "gpus_per_node": 8,
    "mem_gb": 0,
    "sbatch": {"exclusive": True, "wckey": "x"},
}


def test_the_job_asks_for_what_the_launcher_asks_for() -> None:
    made = nodes.command({**OPTIONS, "setup": ["module load cuda"]}, ["folder=my runs"])
    assert made[:4] == ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=10"]
    assert {"--partition=debug", "--gpus-per-node=8", "--mem=0G", "--exclusive", "--wckey=x"} <= set(made)
    script = made[-1].splitlines()
    assert script[0] == "module load cuda" and script[1].endswith("-m sftlab.doctor json=true 'folder=my runs'")


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an srun on PATH that does this."""

    def write(script: str) -> None:
        (tmp_path / "srun").write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "srun").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


def test_every_node_is_shown_and_one_broken_node_ends_with_1(
    srun: Callable[[str], None], typed: Typed, capfd: pytest.CaptureFixture[str], refused: Typed
) -> None:
    def told(node: str, state: str) -> str:
        return nodes.MARK + json.dumps({"node": node, "findings": [{"name": "cuda", "state": state, "text": "x"}]})

    srun(f"echo noise\necho 'gpu2 {told('gpu2', 'ok')}'\necho '{told('gpu1', 'ok')}'")
    assert typed("doctor", "launcher=slurm", "only=[cuda]").splitlines() == [
        "gpu1:",
        "cuda  ok    x",
        "gpu2:",
        "cuda  ok    x",
    ]
    srun(f"echo '{told('gpu1', 'fail')}'")
    with pytest.raises(SystemExit) as stop:
        typed("doctor", "launcher=slurm", "only=[cuda]")
    assert stop.value.code == 1 and "1 to mend: cuda" in capfd.readouterr().out
    srun("echo 'Requested node configuration is not available' >&2; exit 1")
    assert "the job told nothing: Requested node configuration" in refused("doctor", "launcher=slurm")
    assert "launcher.nodes=0: expected a whole number" in refused("doctor", "launcher=slurm", "launcher.nodes=0")


def test_the_doctor_is_light_without_torch_where_torch_is_not_asked_for(tmp_path: Path) -> None:
    probe = (
        "import sys\nsys.argv = ['doctor', 'only=[python,disk,tensorboard]', 'folder=here']\n"
        "from sftlab import doctor\ndoctor.main()\nprint([m for m in ('torch', 'datasets') if m in sys.modules])"
    )
    done: Any = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
