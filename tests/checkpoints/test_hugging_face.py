"""What an export writes: every weight once in the dtype asked for, and all that lies beside the weights."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftlab.checkpoints import hugging_face, manifest
from sftlab.checkpoints.hugging_face import export, parameter_count, weights_of, write_all_but_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from tests.asymmetric import record_syncs
from tests.support import byte_tokenizer, tiny_llama

Left = tuple[Path, Any, Any]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def left(request: pytest.FixtureRequest, one: Any, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A checkpoint, the model that it is of, and its tokenizer; with settings of which none is a default."""
    model = tiny_llama(seed=6, tied=request.param, rope_theta=4321.0, eos_token_id=[1, 7])
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 7, 9], bos_token_id=0, pad_token_id=2, do_sample=True, temperature=0.25, top_p=0.5
    )
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{{ messages[0].content }}<turn>"
    tokenizer.model_max_length = 77
    scorer = fsdp2(Scorer(model), one, param_dtype="float32")
    scorer.model.register_buffer("counts", torch.tensor([2**24 + 1, 3]))  # no float32 holds the first
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(
        folder, 1, one, lambda text: None, sidecar=partial(write_all_but_weights, scorer, tokenizer)
    )
    checkpoints.save(3, scorer, adamw(scorer, lr=1e-3), {"score": None})
    checkpoints.wait()
    return folder / "step_00000003", tiny_llama(seed=6, tied=request.param), tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_point_weights_are_in_the_dtype_asked_for_and_no_others(left: Left, dtype: torch.dtype) -> None:
    path, model, _ = left
    found = weights_of(path, dtype)
    expected = {name: value.to(dtype) for name, value in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    assert found.keys() == {*expected, "counts"} - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() & expected.keys())
    assert found["counts"].tolist() == [2**24 + 1, 3]
    assert {v.dtype for name, v in found.items() if name != "counts"} == {dtype}


def test_an_export_in_small_groups_is_the_same(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = left
    whole = weights_of(path, torch.float32)
    monkeypatch.setattr(hugging_face, "GROUP_BYTES", 1)
    parts = weights_of(path, torch.float32)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_loads_as_the_model_that_was_trained(left: Left, tmp_path: Path, dtype: torch.dtype) -> None:
    path, model, tokenizer = left
    export(path, tmp_path / "model", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    tied = model.config.tie_word_embeddings
    assert again.dtype == dtype and again.config.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    written = load_file(tmp_path / "model/model.safetensors")
    assert ("lm_head.weight" in written) != tied and "model.embed_tokens.weight" in written
    assert {value.dtype for value in written.values() if value.is_floating_point()} == {dtype}
    theirs = {name: value.to(dtype) for name, value in model.state_dict().items()}
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())

    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.rope_parameters["rope_theta"] == 4321.0 and config.eos_token_id == [1, 7]
    own = again.generation_config
    assert own.eos_token_id == [1, 7, 9] and own.do_sample and (own.temperature, own.top_p) == (0.25, 0.5)

    restored = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "The keeper<turn>counts."
    assert restored(text).input_ids == tokenizer(text).input_ids
    assert restored.chat_template == tokenizer.chat_template and restored.model_max_length == 77
    assert (restored.bos_token, restored.eos_token, restored.pad_token) == ("<s>", "</s>", "<pad>")
    beside = {p.name: p.read_bytes() for p in (path / "hf").iterdir() if "config.json" not in p.name}
    assert beside and {name: (tmp_path / "model" / name).read_bytes() for name in beside} == beside


def test_a_model_larger_than_a_shard_is_split_with_an_index(left: Left, tmp_path: Path) -> None:
    path, model, _ = left
    export(path, tmp_path / "model", torch.float32, shard_size="50KB")
    shards = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_an_export_replaces_an_older_one_and_leaves_nothing_beside_it(left: Left, tmp_path: Path) -> None:
    path, _, _ = left
    (tmp_path / "model").mkdir()
    (tmp_path / "model/of_before.txt").touch()
    for name in (".model.partial", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of_before.txt").touch()
    export(path, tmp_path / "model", torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model/of_before.txt").exists() and (tmp_path / "model/model.safetensors").exists()


def test_every_file_of_an_export_is_on_the_disk_before_its_folder_has_its_name(
    left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = record_syncs(monkeypatch)
    export(left[0], tmp_path / "model", torch.float32)
    partial = tmp_path / ".model.partial"
    assert sorted(synced[:-2]) == sorted(str(partial / p.name) for p in (tmp_path / "model").iterdir())
    assert synced[-2:] == [str(partial), str(tmp_path)]


def test_a_damaged_checkpoint_is_not_exported(left: Left, tmp_path: Path) -> None:
    path, _, _ = left
    file = path / "hf/tokenizer_config.json"
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(manifest.Damaged, match=r"step_00000003 is damaged:\n.*tokenizer_config\.json is missing"):
        export(path, tmp_path / "model", torch.float32)
    file.write_bytes(before)
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_without_a_generation_config_is_exported_too(left: Left, tmp_path: Path) -> None:
    path = tmp_path / "step_00000003"
    shutil.copytree(left[0], path)
    (path / "hf/generation_config.json").unlink()
    progress = manifest.read_manifest(path)
    files = progress.pop("files")
    del files["hf/generation_config.json"]
    manifest.write_manifest(path, progress, files)
    export(path, tmp_path / "model", torch.float32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.temperature != 0.25


def test_parameters_are_counted_once_where_they_are_shared() -> None:
    tied, untied = (tiny_llama(tied=t, layers=1) for t in (True, False))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert parameter_count(tied) == 320 * 32 + layer + 32
    assert parameter_count(untied) == 2 * 320 * 32 + layer + 32
