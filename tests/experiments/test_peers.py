"""The peers' comparison: sides whose losses are ours, rows in the plan's order, and sides that fail or are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPO, make_squad_file

FOLDER = REPO / "experiments" / "peers"


def compare(*typed: str) -> Any:
    command = [sys.executable, str(FOLDER / "compare.py"), *typed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The comparison as a module; its sides import each other by bare names, as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import importlib

    return importlib.import_module("compare")


def test_every_sides_losses_are_ours_on_the_same_steps(tmp_path: Path) -> None:
    data = make_squad_file(tmp_path / "train.jsonl", num_passages=8)
    typed = ["--data", str(data), "--order", "given", "--rounds", "1", "--steps", "4", "--batch", "5", "--size", "tiny"]
    done = compare(*typed, "--sides", "tree,expert,trl", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: TRL, defaults (experiments/peers/build.sh FOLDER trl, then --peers FOLDER)" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["settings"]["batch"] == 5 and list(found["sides"]) == ["tree", "expert"]
    for side in found["sides"].values():
        assert len(side["losses"]) == 4 and side["examples_per_s"] > 0 and side["difference"] < 1e-5
        assert side["losses"][0] > side["losses"][-1] > 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[0].endswith("| largest difference from ours |") and len(rows) == 4
    assert rows[2].startswith("| sftlab tree | ") and rows[3].startswith("| expert's loop | ")


def test_a_side_that_fails_is_told_and_the_others_go_on(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_squad_file(tmp_path / "train.jsonl", num_passages=2)
    (tmp_path / "peers" / "trl").mkdir(parents=True)
    result = {"examples_per_s": 10.0, "step_s_median": 0.1, "losses": [3.0, 2.0], "peak_gib": None, "versions": {}}

    def execute(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
        if "trl_side.py" in command[1]:
            assert environment["PYTHONPATH"].startswith(str(tmp_path / "peers" / "trl"))
            if "--best" in command:
                raise module.Failed("a line\nout of memory")
            return "noise\nRESULT " + json.dumps(result | {"examples_per_s": 5.0, "losses": [3.0, 2.5]})
        return "RESULT " + json.dumps(result)

    monkeypatch.setattr(module, "execute", execute)
    monkeypatch.setattr(module, "ours", lambda *_: result)
    monkeypatch.setattr(module, "ordered", lambda *_: data)
    sides = "tree,plain,trl,trl_best,automodel"
    typed = [
        "compare.py",
        "--data",
        str(data),
        "--peers",
        str(tmp_path / "peers"),
        "--sides",
        sides,
        "--order",
        "given",
    ]
    monkeypatch.setattr(sys, "argv", typed)
    assert module.main() == 1
    shown = capsys.readouterr().out
    assert "left out: NeMo AutoModel" in shown
    assert "| TRL, best | failed: out of memory |" in shown and shown.count("round 3: plain loop") == 1
    assert shown.count("TRL, best failed") == 1  # it is not tried again in the later rounds
    assert "| sftlab tree | 10.00 | 10.00, 10.00, 10.00 | 2.0 | 3.0000 | 2.0000 | 0.0e+00 |" in shown
    assert "losses of TRL, defaults differ from ours by more than 0.001 nats" in shown
    for sides, code in (("tree,plain", 0), ("tree,plain,trl", 1), ("tree,plain,trl_best", 1)):
        monkeypatch.setattr(sys, "argv", [sides if word.startswith("tree,") else word for word in typed])
        assert module.main() == code


def test_rows_are_put_in_the_order_of_the_plan(module: Any, tmp_path: Path, model_folder: Path) -> None:
    """Step by step the rows that train deals: questions on one passage together."""
    import torch

    from sftlab.training.rows import preview_parts
    from tests.runs import compose

    data = make_squad_file(tmp_path / "train.jsonl")
    lines = data.read_text().splitlines()
    found = module.ordered(str(data), model_folder, tmp_path, 6, 9).read_text().splitlines()
    config = compose(tmp_path / "run", model_folder, (data, data), "trainer.batch_size=6")
    plan = preview_parts(config, torch.device("cpu"))[3]
    assert found == [lines[i] for step in range(1, 10) for i in plan.examples(step)] and len(found) == 54
    titles = [json.loads(line)["title"] for line in found[:6]]
    assert len(set(titles)) == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--sides", "tree,tlr"], "--sides tlr: expected some of tree,packed,plain,expert,trl,trl_best,lora,trl_lora,"),
        (["--steps", "3"], "--steps 3: 2 are warm-up, so expected at least 4"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: there is no such file"),
    ],
)
def test_wrong_calls_are_refused(
    typed: list[str], said: str, module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--data", __file__, *typed])
    with pytest.raises(SystemExit):
        module.main()
    assert said in capsys.readouterr().err


def test_build_refuses_a_peer_that_it_does_not_know_and_wheels_that_are_not_there(tmp_path: Path) -> None:
    def build(*typed: str, **environment: str) -> Any:
        return subprocess.run(
            [str(FOLDER / "build.sh"), *typed], env={**os.environ, **environment}, capture_output=True, text=True
        )

    done = build(str(tmp_path), "tlr")
    assert (
        done.returncode == 1 and "tlr: no such peer; the peers with an environment are trl and automodel" in done.stderr
    )
    done = build(str(tmp_path), "trl", WHEELS=str(tmp_path / "none"))
    assert done.returncode == 1 and "there is no folder trl in it; build.sh --wheels makes it" in done.stderr
    assert build().returncode == 1
