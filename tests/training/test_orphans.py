"""kill -9 in every phase of a run, an answer and a server, and a Ctrl-C: no process is left."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from sftlab.common.process import birth
from tests.support import REPO, make_squad_file, warmed
from tests.warm import Warm

# A command in which one function says that it has been reached, and then never returns.
STALLED = """
import importlib, os, runpy, time
module, _, name = os.environ["PHASE"].partition(":")
owner = importlib.import_module(module)
*path, leaf = name.split(".")
for part in path:
    owner = getattr(owner, part)

def stall(*given, **named):
    open(os.environ["REACHED"], "a").close()
    time.sleep(100)

setattr(owner, leaf, stall)
import datasets
datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
runpy.run_module(os.environ["COMMAND"], run_name="__main__", alter_sys=True)
"""
PHASES = {  # where each phase stalls, and the fewest processes that are at work then
    "tokenising": ("train", "sftlab.data.render:Renderer.render", 3),
    "loading": ("train", "sftlab.checkpoints.pretrained:read_shards", 1),
    "training": ("train", "sftlab.training.trainer:Trainer.backward", 1),
    "saving": ("train", "sftlab.checkpoints.save_and_restore:Checkpoints._write", 1),
    "exporting": ("train", "sftlab.training.run:export", 1),
    "answering": ("train", "sftlab.inference.sharded:decode", 1),
    "generating": ("generate", "sftlab.inference.decoding:grow", 1),
    "serving": ("serve", "sftlab.serving.engine:Engine._pieces", 1),
}


@pytest.fixture(scope="module")
def python() -> Warm:
    return warmed()


def family(pid: int) -> dict[int, str]:
    """Return a process and all below it, each with its birth."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return {p: born for p in found if (born := birth(p))}


@pytest.mark.parametrize(
    ("phase", "number"), [*((phase, signal.SIGKILL) for phase in PHASES), ("tokenising", signal.SIGINT)]
)
def test_a_kill_in_any_phase_and_a_ctrl_c_leave_no_process(
    phase: str, number: signal.Signals, python: Warm, tmp_path: Path, model_folder: Path
) -> None:
    command, function, fewest = PHASES[phase]
    data = make_squad_file(tmp_path / "train.jsonl", num_passages=700 if phase == "tokenising" else 6)
    settings = {
        "train": (
            "model=hf", f"model.name_or_path={model_folder}", "data=squad", f"data.path={data}",
            f"data.val_path={data}", "data.num_workers=2", "tracker=none", "trainer.max_steps=1",
            f"run_dir={tmp_path / 'run'}",
            f"evaluation.num_answers={2 if phase == 'answering' else 0}",
        ),
        "generate": (f"run={model_folder}", "prompt=a"),
        "serve": (f"run={model_folder}", "engine=transformers", "port=0"),
    }[command]  # fmt: skip
    reached = tmp_path / "reached"
    env = os.environ | {
        "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PHASE": function,
        "REACHED": str(reached), "COMMAND": f"sftlab.{command}", "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    process = python.start("-c", STALLED, *settings, cwd=tmp_path, env=env, output=tmp_path / "said")
    deadline_s = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < deadline_s and process.poll() is None:
        time.sleep(0.02)
    assert reached.exists(), (tmp_path / "said").read_text()
    while len(alive := family(process.pid)) < fewest and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert len(alive) >= fewest, json.dumps(alive)
    os.kill(process.pid, number)
    if number == signal.SIGINT:
        assert process.wait(3) == 130 and "nothing was trained yet" in (tmp_path / "said").read_text()
    else:
        assert process.wait(20) == -number
    deadline_s = time.monotonic() + 10
    while (left := [pid for pid, born in alive.items() if birth(pid) == born]) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} of {len(alive)} processes were left"
