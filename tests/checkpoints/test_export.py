"""python -m sftlab.export: each of its keys, from the command line's words to the folder that is written."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from sftlab.checkpoints.hugging_face import write_all_but_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.config import groups, overrides
from sftlab.export import export
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from tests.support import byte_tokenizer, tiny_llama

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def run_dir(one: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 9 and 10, which computed in bfloat16; a weight is its step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    scorer = fsdp2(Scorer(tiny_llama(layers=1)), one, param_dtype="float32")
    optimizer = adamw(scorer, lr=1e-3)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        9,
        one,
        lambda text: None,
        sidecar=partial(write_all_but_weights, scorer, byte_tokenizer()),
    )
    for step in (2, 9, 10):
        with torch.no_grad():
            scorer.model.model.norm.weight.fill_(step + 2**-9)  # bfloat16 cannot hold what follows the point
        checkpoints.save(step, scorer, optimizer, {"score": None})
    checkpoints.wait()
    config = {"parallel": {"param_dtype": "bfloat16"}, "model": {"trust_remote_code": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def exported(run_dir: Path, folder: Path, *typed: str) -> dict[str, torch.Tensor]:
    """Export by the words of a command line; return the weights in `folder`."""
    with initialize_config_dir(str(groups.CONF), version_base="1.3"):
        config = compose("export", [overrides.quote(word, False) for word in (f"run={run_dir}", *typed)])
    export(config)
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_the_newest_step_in_the_runs_dtype_without_any_key(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "export/step_00000010"
    found = exported(run_dir, folder)
    assert found[NORM].dtype == torch.bfloat16 and found[NORM][0] == 10
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert capsys.readouterr().out == f"step 10, bfloat16: {folder}\n"
    assert (folder / "tokenizer.json").is_file()
    shutil.rmtree(run_dir / "export")


def test_step_dtype_output_and_shard_size(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "there" / "model"
    found = exported(run_dir, folder, "step=9", "dtype=float32", "output=~/there/model", "shard_size=30KB")
    assert found[NORM].dtype == torch.float32 and found[NORM][0] == 9 + 2**-9
    assert len(list(folder.glob("*.safetensors"))) > 1 and not (run_dir / "export").exists()
    assert capsys.readouterr().out == f"step 9, float32: {folder}\n"
    assert exported(run_dir, folder, "step=2", "output=~/there/model")[NORM][0] == 2, "a model may be written over"
    assert os.listdir(folder.parent) == ["model"]


def test_what_cannot_be_exported_is_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^step=3: this run has checkpoints of steps 2, 9, 10$"):
        exported(run_dir, tmp_path, "step=3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a run's directory; there is no checkpoint in .*empty/checkpoints"):
        exported(tmp_path / "empty", tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis exists and is no model folder: it would be overwritten"):
        exported(run_dir, tmp_path, f"output={tmp_path / 'thesis'}")
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"float8"):
        exported(run_dir, tmp_path, "dtype=float8", f"output={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()
