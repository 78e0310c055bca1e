"""Weights on their way in: every rank reads its own part of the files, whatever the family and the mesh."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from sftlab.checkpoints import pretrained
from sftlab.checkpoints.pretrained import WRAPPER, fill
from sftlab.models.load import Model, skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import World, local_part
from tests.support import run_distributed, tiny_llama

SIZE: dict[str, Any] = {
    "vocab_size": 321, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZE, "rope_parameters": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 3.0}},
    "llama tied": {**SIZE, "tie_word_embeddings": True},
    "gemma3_text": {
        **SIZE,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "qwen2": SIZE,  # biases of one dimension
    "phi": {**SIZE, "partial_rotary_factor": 0.5},  # a head with a bias
    "gpt2": {"vocab_size": 321, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "mixtral": {**SIZE, "num_local_experts": 4},  # its files hold experts one by one, the model all in one
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "60KB") -> Model:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind.split()[0], **FAMILIES[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.ndim == 1:  # norms and biases start as ones and zeros, in which nothing can be swapped
            torch.nn.init.normal_(p)
        assert name
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], do_sample=True, top_k=5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return Model(str(folder))


def filled(world: World, model: Model, **how: Any) -> tuple[Scorer, GenerationConfig | None]:
    config = model.load_config(world.device)
    scorer = fsdp2(Scorer(skeleton(config)), world, **how)
    return scorer, fill(scorer, model, config, 5, world)


def same(scorer: Scorer, folder: str, world: World, replicate: int = 1) -> list[str]:
    """Return the names of tensors that are not what plain transformers loads; every copy counts."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict((*whole.named_parameters(remove_duplicate=False), *whole.named_buffers()))
    found = (*scorer.model.named_parameters(remove_duplicate=False), *scorer.model.named_buffers())
    ours = {name.replace(WRAPPER, ""): value for name, value in found}
    assert ours.keys() == expected.keys() and len(ours) > 10
    wrong = []
    for name, value in expected.items():
        parts = world.gather(local_part(ours[name]).detach())
        each = world.size // replicate if isinstance(ours[name], DTensor) else 1
        copies = [torch.cat(parts[i : i + each]) if value.ndim else parts[i] for i in range(0, world.size, each)]
        wrong += [name for copy in copies if not torch.equal(copy, value)]
    return wrong


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_is_what_plain_transformers_loads(kind: str, one: World, tmp_path: Path) -> None:
    scorer, generation = filled(one, saved(kind, tmp_path))
    assert same(scorer, str(tmp_path), one) == []
    assert generation is not None and (generation.eos_token_id, generation.top_k) == ([1, 7], 5)
    tied = scorer.model.config.tie_word_embeddings
    assert (scorer.model.get_output_embeddings().weight is scorer.model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(("kind", "whole"), [(k, k == "mixtral") for k in FAMILIES])
def test_only_files_that_need_conversion_are_loaded_whole(
    kind: str, whole: bool, one: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = Model.load_weights
    monkeypatch.setattr(Model, "load_weights", lambda self, *given: loaded.append(given) or real(self, *given))
    filled(one, saved(kind, tmp_path))
    assert len(loaded) == whole


@pytest.mark.parametrize("how", ["none", "full"])
def test_bfloat16_files_fill_float32_weights_recomputed_blocks_too(how: str, one: World, tmp_path: Path) -> None:
    scorer, _ = filled(one, saved("qwen2", tmp_path, torch.bfloat16), activation_checkpointing=how)
    assert same(scorer, str(tmp_path), one) == []
    assert {p.dtype for p in scorer.parameters()} == {torch.float32}


def test_weights_without_a_generation_config_get_one_made_from_their_config(one: World, tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    _, generation = filled(one, model)
    assert generation is not None and generation.eos_token_id == 1


def on_two_kinds_of_ranks(world: World, folders: dict[str, str], replicate: int) -> dict[str, Any]:
    found = {}
    for kind, folder in folders.items():
        scorer, generation = filled(world, Model(folder), replicate=replicate)
        found[kind] = same(scorer, folder, world, replicate), generation is not None
    return found


@pytest.mark.parametrize(("ranks", "replicate"), [(3, 1), (4, 2)])
def test_every_rank_reads_its_own_part(ranks: int, replicate: int, tmp_path: Path) -> None:
    """321 rows over 3 or 4 ranks are uneven, and a last rank may get none of a short tensor."""
    folders = {kind: str(tmp_path / kind) for kind in ("llama tied", "qwen2", "gpt2")}
    for kind, folder in folders.items():
        saved(kind, Path(folder))
    for rank, found in enumerate(run_distributed(on_two_kinds_of_ranks, ranks, folders, replicate)):
        assert found == {kind: ([], rank == 0) for kind in folders}


def grown_by(world: World, folder: str) -> tuple[int, int]:
    """Return how many bytes of host memory filling took at its peak, and how many the files have."""
    model = Model(folder)
    config = model.load_config(world.device)
    scorer = fsdp2(Scorer(skeleton(config)), world)

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    fill(scorer, model, config, 0, world)
    return status("VmHWM") - before, sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_rank_of_two_holds_little_more_than_its_half(tmp_path: Path) -> None:
    tiny_llama(vocab=20_000, layers=2, hidden_size=512, intermediate_size=2048, tied=False).save_pretrained(tmp_path)
    for grown, size in run_distributed(grown_by, 2, str(tmp_path)):
        assert size > 100e6 and grown < 0.75 * size, (grown, size)


# What is not read by parts --------------------------------------------------------------------------------------------


def files_of(model: Model) -> dict[str, str]:
    return model.weight_files(model.load_config(torch.device("cpu")))


def test_files_are_named_by_the_index_or_are_one(tmp_path: Path) -> None:
    several = files_of(saved("llama", tmp_path / "several"))
    assert len(set(several.values())) > 2
    assert all(name in load_file(file) for name, file in several.items())
    single = files_of(saved("llama", tmp_path / "single", shard_size="5GB"))
    assert single == dict.fromkeys(several, str(tmp_path / "single/model.safetensors"))


def test_where_transformers_must_load_no_file_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    assert files_of(Model(str(tmp_path), init="random")) == {}
    assert files_of(Model(str(tmp_path), trust_remote_code=True)) == {}
    config = Model(str(tmp_path)).load_config(torch.device("cpu"))
    config.quantization_config = {"quant_method": "bitsandbytes"}
    assert Model(str(tmp_path)).weight_files(config) == {}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    assert files_of(Model(str(tmp_path))) == {}


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_files_that_are_not_just_the_models_tensors_are_left_to_transformers(
    change: str, one: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("llama", tmp_path, shard_size="5GB")
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    if change == "missing":
        held.pop("model.norm.weight")
    elif change == "unknown":
        held["model.extra.weight"] = torch.zeros(3)
    else:
        held["model.norm.weight"] = torch.zeros(3)
    save_file(held, file, metadata={"format": "pt"})
    asked: list[str] = []
    monkeypatch.setattr(pretrained, "broadcast_weights", lambda scorer, load, world: asked.append(load.__name__))
    assert filled(one, model)[1] is None and len(asked) == 1


def test_experts_of_four_bits_are_expanded_and_exported_so(one: World, tmp_path: Path) -> None:
    """GPT-OSS is published in MXFP4: 16 values for 4 bits, and a power of two for each 32 of them."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    shape = SIZE | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **shape), dtype=torch.bfloat16)
    tensors, right = model.state_dict(), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, out, width // 32, 32))
        scales = torch.randint(120, 130, (experts, out, width // 32))
        expanded = values[codes] * torch.exp2(scales.float() - 127)[..., None]
        right[name] = expanded.reshape(experts, out, width).transpose(1, 2)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scorer, _ = filled(one, Model(str(tmp_path)))
    found = {n: v.full_tensor() for n, v in scorer.model.named_parameters()}
    assert len(right) == 2 and all(torch.equal(found[n], v) for n, v in right.items())
    assert not hasattr(scorer.model.config, "quantization_config")


def test_an_index_that_is_no_json_is_an_error_that_names_the_model(tmp_path: Path, one: World) -> None:
    model = saved("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3})[:-2])
    with pytest.raises(Exception, match=str(tmp_path)):
        filled(one, model)


def test_a_model_without_memory_has_the_buffers_of_a_real_one() -> None:
    for kind in FAMILIES:
        config = AutoConfig.for_model(kind.split()[0], **FAMILIES[kind])
        made, real = skeleton(config), AutoModelForCausalLM.from_config(config)
        assert all(p.is_meta for p in made.parameters())
        buffers = dict(made.named_buffers())
        assert buffers.keys() == dict(real.named_buffers()).keys()
        assert all(torch.equal(buffers[name], value) for name, value in real.named_buffers())
    assert not torch.nn.Linear(2, 2).weight.is_meta, "and what is made afterwards has memory as ever"


@pytest.mark.parametrize("index", [True, False])
def test_a_head_that_is_not_the_embedding_is_not_thrown_away(index: bool, one: World, tmp_path: Path) -> None:
    """The config ties them, and the files hold both, with other values: plain transformers does not tie them then."""
    config = AutoConfig.for_model("llama", **{**SIZE, "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    filled(one, Model(str(tmp_path)))
    other = same | {"lm_head.weight": same["lm_head.weight"] + 1}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    option = Model(str(tmp_path))
    said = r"the weights have a head of their own: .* differs from .*tie_word_embeddings\": false in config.json"
    with pytest.raises(ValueError, match=said):
        if index:
            filled(one, option)
        else:
            option.load_weights(option.load_config(torch.device("cpu")), 0)
