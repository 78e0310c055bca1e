"""What `run=` may name, and what is said to what is none of it."""

import shutil
from pathlib import Path

import pytest

from sftlab.trained import resolve


def test_a_run_its_model_and_a_folder_from_elsewhere(demo_run: Path, model_folder: Path) -> None:
    run, model = resolve(str(demo_run)), resolve(str(demo_run / "model"))
    assert run.model == model.model == str(demo_run / "model")
    assert run.config == model.config and run.format and run.format["_target_"].endswith("Squad")
    assert run.folder.resolve() == model.folder.resolve() == demo_run.resolve()
    assert run.base.model == "asset://demo/model"
    elsewhere = resolve(str(model_folder))
    assert elsewhere.config is None and elsewhere.folder == Path("evaluations") / str(model_folder)[1:].replace(
        "/", "--"
    )
    with pytest.raises(ValueError, match=r"its base is not known"):
        _ = elsewhere.base


def test_the_fingerprint_changes_with_the_weights(demo_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(demo_run / "model", copy)
    before = resolve(str(copy)).fingerprint
    assert resolve(str(copy)).fingerprint == before
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert resolve(str(copy)).fingerprint != before


def test_an_unfinished_run_offers_its_newest_checkpoint(demo_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo_run, run, symlinks=True)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match=r"not finished.*Its newest checkpoint can be used: run=.*/step_00000040$"):
        resolve(str(run))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"sftlab.export run=.*/run step=40$"):
        patch.setenv("WORLD_SIZE", "2")  # each rank would write the folder of the other
        resolve(str(run / "checkpoints" / "step_00000040"))
    checkpoint = resolve(str(run / "checkpoints" / "step_00000040"))
    assert checkpoint.model == str(run.resolve() / "export" / "step_00000040")
    before, after = demo_run / "model", Path(checkpoint.model)
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    written = (after / "model.safetensors").stat().st_mtime_ns
    resolve(str(run / "checkpoints" / "latest"))
    assert (after / "model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"not finished.*no checkpoint either"):
        resolve(str(run))


def test_what_is_no_run(demo_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run= is missing"):
        resolve(None)
    with pytest.raises(ValueError, match=r"is no run.*Runs near it: .*today"):
        resolve(str(demo_run.parent))
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        resolve(str(tmp_path / "nothing" / "here"))
    with pytest.raises(ValueError, match=r"is a file"):
        resolve(str(demo_run / "config.yaml"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither config.yaml nor a model's config.json"):
        resolve(str(tmp_path / "empty"))


def test_a_hub_id_without_a_network_says_so() -> None:
    named = resolve("somebody/something")
    assert named.model == "somebody/something" and named.config is None
    for load in (named.load_tokenizer, named.load_config, named.load_model):
        with pytest.raises(ConnectionError, match=r"run=somebody/something.*no network.*no folder somebody/something"):
            load()


def test_a_broken_folder_is_not_blamed_on_the_hub(demo_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(demo_run / "model", copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"this folder does not load as a model"):
        resolve(str(copy)).load_model()


def test_the_base_of_random_weights_is_none(demo_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo_run, run, symlinks=True)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("init: pretrained", "init: random"))
    with pytest.raises(ValueError, match=r"started from random weights"):
        _ = resolve(str(run)).base
