"""What `run=` may name, and what is said to what is none of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftlab.inference.trained_model import TrainedModel, export_checkpoint, resolve
from tests.local_hub import LocalHub, Repo


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
        with pytest.raises(
            ConnectionError, match=r"no folder somebody/something here, and run=somebody/something.*no network"
        ):
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


def test_the_base_is_the_model_that_the_run_s_config_names() -> None:
    config = {"model": {"init": "pretrained", "name_or_path": "ada/base", "revision": "v2"}}
    base = TrainedModel("runs/1", "runs/1/model", Path("runs/1"), config).base
    assert (base.model, base.revision, base.config, base.given) == ("ada/base", "v2", config, "runs/1")


def test_a_hub_model_is_loaded_at_its_revision(hub: LocalHub, model_folder: Path) -> None:
    files = {p.name: p.read_bytes() for p in model_folder.iterdir()}
    hub.repos["ada/base"] = Repo(private=False, commits=[files])
    named = TrainedModel("ada/base", "ada/base", revision="v2")
    assert named.load_config().vocab_size == 320
    assert set(hub.revisions) == {"v2"}


@pytest.mark.parametrize("part", ["load_tokenizer", "load_config", "load_model"])
def test_each_part_of_a_model_is_loaded_from_the_same_revision_and_as_trusted(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []

    def from_pretrained(name: str, **settings: object) -> torch.nn.Module:
        seen.append({"name": name, **settings})
        return torch.nn.Linear(1, 1)

    for loader in (AutoTokenizer, AutoConfig, AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    config = {"model": {"trust_remote_code": True}}
    for trust in (False, True):  # the user's word counts, the config's does not
        getattr(TrainedModel("run", "ada/base", None, config, "v2", trust), part)()
        asked = seen.pop()
        assert (asked["name"], asked["revision"], asked["trust_remote_code"]) == ("ada/base", "v2", trust)


def test_a_model_s_own_code_runs_by_the_user_s_word_and_not_by_the_run_s_config(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own_talking_model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_talking", "auto_map": {"AutoConfig": "configuration_talking.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_talking.py").write_text(
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own_talking'\n"
    )
    for allowed in ({}, {"model": {"trust_remote_code": False}}, {"model": {"trust_remote_code": True}}, None):
        with pytest.raises(ValueError, match=r"configuration_talking\.Own.*trust=true"):
            TrainedModel("m", str(folder), config=allowed).load_config()
    assert type(TrainedModel("m", str(folder), trust=True).load_config()).__name__ == "Own"


def test_the_fingerprint_goes_by_revision_and_every_file_that_a_model_is_made_of(tmp_path: Path) -> None:
    def of(revision: str | None = None) -> str:
        return TrainedModel("m", str(tmp_path), revision=revision).fingerprint

    seen = {of(), of("v2")}
    for number, name in enumerate(("a.safetensors", "pytorch_model.bin", "config.json")):
        (tmp_path / name).write_text("1")
        seen.add(of())
        (tmp_path / name).write_text("12")
        seen.add(of())
        assert len(seen) == 4 + 2 * number
    size = (tmp_path / "config.json").stat()
    (tmp_path / "config.json").write_text("34")
    os.utime(tmp_path / "config.json", ns=(size.st_atime_ns, size.st_mtime_ns + 1))
    seen.add(of())
    assert len(seen) == 9
    (tmp_path / "README.md").write_text("a card")
    assert of() in seen


def test_names_of_the_hub_are_told_from_folders_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "ada/base", "ada/base-1.5_x"):
        assert (resolve(name).model, resolve(name).run_dir) == (name, None)
    for name in ("ada/base/x", "./base", ".hidden/base", "/base", "ada/ba se"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            resolve(name)


def test_a_home_and_what_ships_with_the_package_are_found(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_folder, tmp_path / "my model")
    assert resolve("~/my model").load_config().vocab_size == 320
    shipped = resolve("asset://demo/model")
    assert (shipped.model, shipped.run_dir, shipped.config) == ("asset://demo/model", None, None)
    assert shipped.load_config().model_type == "llama"
    assert TrainedModel("..//a b/c:d/", "m").folder == Path("evaluations") / "a--b--c--d"


def test_a_model_knows_its_run_from_two_folders_up_and_no_further(rye_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rye_run, run)
    for under, known in (("model", True), ("export/step_5", True), ("export/old/step_5", False)):
        if not (run / under).exists():
            shutil.copytree(rye_run / "model", run / under)
        found = resolve(str(run / under))
        assert (found.run_dir == run) == known == (found.config is not None)
        assert found.model == str(run / under)


def test_a_folder_that_is_no_run_names_the_last_three_near_it(tmp_path: Path) -> None:
    for name in ("a", "b/1", "b/2", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "d" / "e" / "f").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f" / "config.yaml").touch()
    said = f"Runs near it: {tmp_path}/b/1, {tmp_path}/b/2, {tmp_path}/c$"
    with pytest.raises(ValueError, match=said):
        resolve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=said):
        resolve(f"{tmp_path}/x/y")


def test_a_checkpoint_is_written_in_the_run_s_dtype_or_the_one_that_is_asked_for(
    demo_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo_run, run, symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["parallel"]["param_dtype"] = "bfloat16"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = run / "checkpoints" / "step_00000040"
    written = resolve(str(checkpoint))
    assert written.load_model().dtype == torch.bfloat16 and written.run_dir == run
    assert export_checkpoint(checkpoint, tmp_path / "whole", dtype="float32") == "float32"
    assert export_checkpoint(checkpoint, tmp_path / "parts", shard_size="400KB") == "bfloat16"
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert TrainedModel("m", str(tmp_path / "whole")).load_model().dtype == torch.float32


def test_the_newest_of_several_checkpoints_is_offered(rye_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rye_run, run)
    shutil.rmtree(run / "model")
    for step in (8, 4, 12):
        (run / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
        if step != 12:  # which was not completed
            (run / "checkpoints" / f"step_{step:08}" / "checkpoint.json").touch()
    with pytest.raises(ValueError, match=r"run=.*/step_00000008$"):
        resolve(str(run))
