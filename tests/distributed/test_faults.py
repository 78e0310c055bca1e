"""What goes wrong in the middle of a run: a loss that is no number, a rank that is killed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from sftlab.data.plan import Plan
from tests.runs import Trouble, compose, measured, run_all
from tests.support import REPO, free_port, warmed

SETTINGS = ("trainer.max_steps=6", "trainer.save_every=2", "evaluation.num_answers=0")


def test_a_loss_that_is_no_number_stops_every_rank_or_is_skipped(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    def config(name: str, *more: str) -> dict:
        return compose(tmp_path / name, model_folder, squad_files, *SETTINGS, *more)

    ends = run_all(
        [
            config("straight"),
            (config("stopped"), Trouble(nan_at=[3])),
            config("stopped"),
            (config("skipped", "trainer.skip_nonfinite=1"), Trouble(nan_at=[3])),
            (config("too_many", "trainer.skip_nonfinite=1"), Trouble(nan_at=[3, 5])),
            (config("too_many", "trainer.skip_nonfinite=2"), Trouble(nan_at=[5])),
        ],
        ranks=2,
    )
    straight = measured(tmp_path / "straight")
    ids = [f"p{i // 3}q{i % 3}" for i in Plan(np.arange(36) // 3, 12, seed=0, group_by_prefix=True).examples(3)]

    for end in ends[1]:
        assert end.startswith("NonFinite: step 3: the loss is nan and the gradient norm")
        assert "the update was not made" in end
        assert f"Examples of this step: {', '.join(ids[:8])} and 4 more" in end and "trainer.skip_nonfinite=N" in end
    assert "NonFinite: step 3" in (tmp_path / "stopped/train.log").read_text()
    assert "step_00000002, step 2" in (tmp_path / "stopped/train.log").read_text(), "the last good one, resumed"
    assert measured(tmp_path / "stopped") == straight

    assert ends[3] == [ends[3][0]] * 2 and ends[3][0].startswith("score")
    summary = json.loads((tmp_path / "skipped/summary.json").read_text())
    assert summary["skipped"] == [{"step": 3, "examples": ids}]
    skipped = measured(tmp_path / "skipped", "train/loss")
    assert skipped[4, "train/loss"] != straight[4, "train/loss"], "step 3 changed nothing"
    assert [s for (s, _), loss in skipped.items() if loss != loss] == [3]
    assert skipped[6, "train/loss"] < skipped[1, "train/loss"]

    assert "NonFinite: step 5" in ends[4][1] and "1 earlier steps were skipped" in ends[4][1]
    found = json.loads((tmp_path / "too_many/summary.json").read_text())["skipped"]
    assert [entry["step"] for entry in found] == [3, 5], "a resume remembers what was skipped before"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_within_a_minute(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path], victim: int
) -> None:
    """Without torchrun, which would end the others itself: as under srun, each rank is on its own."""
    port = str(free_port())
    typed = [
        *("model=hf", f"model.name_or_path={model_folder}", "data=squad", f"data.path={squad_files[0]}"),
        *("trainer.batch_size=12", "trainer.max_steps=100000", "trainer.save_every=3", "tracker=none"),
        f"run_dir={tmp_path / 'run'}",
    ]
    ranks = []
    for rank in range(2):
        env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SFTLAB_START_TIME": "now"}
        command = [str(warmed().python), "-c", STORE + "main()", *typed]
        with (tmp_path / f"{rank}.err").open("w") as errors:
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors))
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        deadline_s = time.monotonic() + 240
        while not (metrics.exists() and len(read_jsonl_so_far(metrics)) > 5):
            assert time.monotonic() < deadline_s and all(r.poll() is None for r in ranks)
            time.sleep(0.05)
        ranks[victim].send_signal(signal.SIGKILL)
        code = ranks[1 - victim].wait(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = (tmp_path / f"{1 - victim}.err").read_text()
    assert code == 1, said
    assert f"error on rank {1 - victim}: another rank has ended" in said and "the same command resumes" in said
    if victim == 1:
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["status"] == "failed" and "another rank has ended" in summary["error"]


# The start time travels through torchrun's store (start.agree_on_start_time); here rank 0 keeps one.
STORE = """
import os, sys
from sftlab import train
from sftlab.config import start
start.agree_on_start_time = lambda multirun: None
main = train.main
"""


def read_jsonl_so_far(path: Path) -> list:
    """Return the lines, without one that is being written."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
