"""A model's own code runs only where it is trusted, and then a warning says so."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from sftlab.checkpoints.manifest import checksum
from sftlab.inference.trained_model import export_checkpoint
from sftlab.models.load import Model
from tests.support import make_model_folder

CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose config is code of its own, which leaves a file behind when it runs."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = make_model_folder(tmp_path / "own_model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_own.py").write_text(CODE.format(marker=str(tmp_path / "it_ran")))
    return model


def test_code_that_is_not_trusted_does_not_run(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name_or_path=.*own_model: .* model\.trust_remote_code=true"):
        Model(str(folder)).load_config(torch.device("cpu"))
    assert not (folder.parent / "it_ran").exists()


def test_code_that_is_trusted_runs_after_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sftlab"):
        config = Model(str(folder), trust_remote_code=True).load_config(torch.device("cpu"))
    assert type(config).__name__ == "OwnConfig" and (folder.parent / "it_ran").exists()
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING" and str(folder) in record.message and "will run on this machine" in record.message
    )


@pytest.mark.parametrize("trusted", [False, True])
def test_an_export_runs_a_models_own_code_only_by_the_user_s_word(folder: Path, trusted: bool) -> None:
    """The code is a config's alone, so that the export ends with an error either way: what counts is whether it ran."""
    run_dir = folder.parent / "run"
    checkpoint = run_dir / "checkpoints/step_00000001"
    shutil.copytree(folder, checkpoint / "hf")
    files = {f"hf/{p.name}": [p.stat().st_size, checksum(p)] for p in (checkpoint / "hf").iterdir()}
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 1, "files": files}))
    config = {"model": {"trust_remote_code": True}, "parallel": {}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="OwnConfig" if trusted else "trust=true"):
        export_checkpoint(checkpoint, run_dir / "export/step_00000001", trust=trusted)
    assert (folder.parent / "it_ran").exists() is trusted
