"""The Python interface: five names, light to import, used in the notebook that ships, which runs here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sftlab
from sftlab.common.words import plain
from sftlab.inference.trained_model import TrainedModel  # noqa: F401  imported so that the notebook's time is its own
from tests.commands import Typed
from tests.support import REPO

NAMES = ["Answerer", "compose", "load", "run", "sweep"]


def test_there_are_five_names_and_importing_them_is_free() -> None:
    probe = (
        "import sys, time\nbegan = time.process_time()\nimport sftlab\ntook = time.process_time() - began\n"
        "heavy = [m for m in ('torch', 'hydra', 'yaml', 'numpy') if m in sys.modules]\n"
        "sftlab.compose\nassert 'torch' not in sys.modules\nprint(took, heavy, sftlab.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True)
    took_s, rest = done.stdout.split(" ", 1)
    assert float(took_s) < 0.1 and rest.strip() == f"[] {NAMES}", done.stderr
    assert all(callable(getattr(sftlab, name)) for name in NAMES) and set(NAMES) <= set(dir(sftlab))
    with pytest.raises(AttributeError, match="its names are Answerer, compose, load, run, sweep"):
        sftlab.nothing  # noqa: B018


def test_the_page_and_the_notebook_use_every_name() -> None:
    page = (REPO / "docs" / "api.md").read_text()
    cells = json.loads((REPO / "docs" / "notebook.ipynb").read_text())["cells"]
    code = "".join(line for cell in cells if cell["cell_type"] == "code" for line in cell["source"])
    for name in NAMES:
        assert f"sftlab.{name}" in page and (f"sftlab.{name}(" in code or name == "Answerer")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Its cells one after the other, in an empty folder; the last expression of a cell is what it would show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    space: dict[str, Any] = {}
    for cell in json.loads((REPO / "docs" / "notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec"), space)
    config, loss = space["config"], space["loss"]
    summary = json.loads((tmp_path / config["run_dir"] / "summary.json").read_text())
    assert summary["status"] == "finished" and loss == summary["score"] < 4
    assert "learning_rate=fast: optim.lr=fast" in capfd.readouterr().out
    model = space["model"]
    assert isinstance(model, sftlab.Answerer)
    both = model.answers(
        ["Context: Tea is sold on Monday. Question: What is sold? Answer:", space["row"]], max_new_tokens=16
    )
    assert both[1] == model.answer(space["row"], max_new_tokens=16) and all(both)
    points = space["points"]
    assert {p["state"] for p in points} == {"finished"} and [p["optim.lr"] for p in points] == ["0.003", "0.0003"]
    assert points[0]["val/loss"] < points[1]["val/loss"]
    assert sftlab.sweep(dir="two_rates") == points
    assert sftlab.load(f"latest:{config['name']}").loaded.ends == model.loaded.ends
    with pytest.raises(ValueError, match=r"the sweep did not start: .*optim\.lr=abc: expected a number above 0"):
        sftlab.sweep("optim.lr=1e-3,abc", dir="wrong")


def test_an_answer_is_that_of_the_command(listening_run: Path, typed: Typed) -> None:
    model = sftlab.load(str(listening_run))
    said = typed("generate", f"run={listening_run}", "prompt=Tea?", "max_new_tokens=5").strip()
    assert plain(model.answer("Tea?", max_new_tokens=5)) == said
    chat = typed("generate", f"run={listening_run}", "prompt=Tea?", "chat=true", "max_new_tokens=5").strip()
    assert plain(model.answer([{"role": "user", "content": "Tea?"}], max_new_tokens=5)) == chat
    assert model.answers([], max_new_tokens=5) == []
