"""Adapters: which layers they lie beside, what is refused, where their learning rate comes from."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt2 import GPT2Config

from sftlab.config.binding import refuse_together
from sftlab.config.overrides import quote
from sftlab.models.adapters import Adapter, NoAdapter, has_adapter
from sftlab.models.load import skeleton
from sftlab.models.nf4 import NF4Linear, decode, encode, num_weights
from tests.config.test_options import composed, hydra_here  # noqa: F401  hydra_here is an automatic fixture
from tests.support import tiny_llama


def adapted(adapter: Any, config: Any = None) -> Any:
    model = skeleton(config or tiny_llama(hidden_size=64, tied=False).config)
    adapter.adapt(model, "base", None, torch.float32)
    return model


def beside(model: Any) -> set[str]:
    """Return the names of the layers that an adapter lies beside."""
    return {name.partition(".lora_")[0] for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rank": 0}, r"^peft\.rank=0: expected a whole number of at least 1, such as 16$"),
        ({"rank": 4.0}, r"^peft\.rank=4\.0: expected a whole number"),
        ({"alpha": 0}, r"^peft\.alpha=0: expected a whole number of at least 1, such as 32$"),
        ({"dropout": 0.1}, r"^peft\.dropout=0\.1: only 0 is possible\. Dropout would make the loss depend on how"),
        ({"quantize": "int3"}, r"^peft\.quantize=int3: expected none or nf4$"),
        ({"targets": []}, r"^peft\.targets=\[\]: name at least one layer, or use peft\.targets=all-linear$"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_one_that_can(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Adapter(**given)
    with pytest.raises(ValueError, match="dropout"):
        Adapter(dropout=0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"targets": ["q_proj", "qproj"]},
            r"^peft\.targets=qproj: no such layer in LlamaForCausalLM\. There are: down_proj, embed_tokens, gate_proj, "
            r"k_proj, lm_head, o_proj, q_proj, up_proj, v_proj$",
        ),
        ({"targets": "q_(proj"}, r"^peft\.targets=q_\(proj is no name and no pattern"),
        ({"modules_to_save": ["head"]}, r"^peft\.modules_to_save=head: no such layer .*input_layernorm, .*norm, "),
        (
            {"targets": "lm_head", "modules_to_save": ["lm_head"]},
            r"^lm_head is in peft\.targets and in peft\.modules_to_save: an adapter lies beside frozen weights\.",
        ),
    ],
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adapted(Adapter(**given))


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("all-linear", ("_proj",)),
        ("q_proj", ("q_proj",)),
        (["q_proj", "mlp.up_proj"], ("q_proj", "up_proj")),
        (r"layers\.1\..*(k|v)_proj", ("1.self_attn.k_proj", "1.self_attn.v_proj")),
        (r"model\.layers\.0\.mlp\..*", ("0.mlp.down_proj", "0.mlp.up_proj", "0.mlp.gate_proj")),
        (["lm_head", "embed_tokens"], ("lm_head", "embed_tokens")),
    ],
)  # fmt: skip
def test_targets_are_names_ends_of_names_and_patterns(targets: Any, ends: tuple[str, ...]) -> None:
    model = adapted(Adapter(targets=targets))
    layers = {n for n, m in skeleton(model.config).named_modules() if n.endswith(ends)}
    assert beside(model) == layers and layers
    assert has_adapter(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n}


def test_without_an_adapter_every_weight_is_trained() -> None:
    model = adapted(NoAdapter())
    assert not has_adapter(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_that_freezes_weights_of_its_own_has_no_adapter() -> None:
    """AFMoE's biases of experts are such: `peft=none` ended in a traceback."""
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    assert not has_adapter(model)
    Adapter(rank=2).adapt(model, "base", None, torch.float32)
    assert has_adapter(model)


def test_models_of_other_families_get_theirs_too() -> None:
    """GPT-2's layers are no Linear, and its head is tied."""
    model = adapted(Adapter(), GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300))
    assert {n.rpartition(".")[2] for n in beside(model)} == {"c_attn", "c_proj", "c_fc"}
    config = AutoConfig.for_model("qwen3", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=300,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # fmt: skip
    assert {n.rpartition(".")[2] for n in beside(adapted(Adapter(), config))} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_frozen_weights_have_the_dtype_of_the_forward_and_trained_ones_float32() -> None:
    model = skeleton(tiny_llama(hidden_size=64, tied=False).config)
    Adapter(modules_to_save=["lm_head", "norm"]).adapt(model, "base", None, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


# QLoRA


def test_all_linear_layers_but_the_head_are_in_4_bits_whatever_is_adapted() -> None:
    model = adapted(Adapter(quantize="nf4", targets=["q_proj", "lm_head"]))
    quantised = {n.replace(".base_layer", "") for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert quantised == {n for n, m in skeleton(model.config).named_modules() if n.endswith("_proj")}
    packed = sum(p.nbytes for n, p in model.named_parameters() if n.endswith(".codes"))
    numbers = sum(num_weights(p) for n, p in model.named_parameters() if n.endswith(".codes"))
    assert packed * 8 / numbers == 4.5 and numbers == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64)


def test_nf4_is_bitsandbytes_own_and_each_row_stands_alone() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1))
    codes = encode(weight)
    theirs = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(decode(codes, torch.float32), theirs) and not torch.equal(theirs, weight)
    assert torch.equal(encode(weight[7:20]), codes[7:20])
    assert torch.equal(decode(codes[7:20], torch.float32), theirs[7:20])


def test_layers_without_whole_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^peft\.quantize=nf4: model\.layers\.0\S+ has 32 inputs, and a block of NF4 has 64"
    ):
        adapted(Adapter(quantize="nf4"), tiny_llama().config)


@pytest.mark.parametrize(("package", "given"), [("bitsandbytes", {"quantize": "nf4"}), ("peft", {})])
def test_an_adapter_without_its_library_is_refused_with_what_to_install(
    package: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(ValueError, match=rf"needs {package} \(pip install {package}\); peft=(lora|none) "):
        Adapter(**given)


def test_adapters_on_a_quantised_base_are_refused() -> None:
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(
        ValueError, match=r"^model\.name_or_path=base is stored quantised, its head perhaps too: adapters"
    ):
        Adapter(targets=["lm_head"]).adapt(skeleton(tiny_llama().config).__class__(config), "base", None, torch.float32)


# The config


def test_an_adapter_has_a_learning_rate_of_its_own() -> None:
    def rate(*overrides: str) -> Any:
        return composed("model=smollm2_135m", *overrides)["optim"]["lr"]

    assert (rate(), rate("peft=none"), rate("peft=lora")) == (1e-4, 1e-4, 2e-4)
    assert rate("peft=lora", "model.adapter_learning_rate=0.004", "model.learning_rate=7") == 0.004
    assert rate("peft=dora", "peft.learning_rate=0.003") == 0.003 and rate("peft=qlora", "optim.lr=5e-5") == 5e-5
    assert rate("peft.learning_rate=0.006") == 0.006


@pytest.mark.parametrize("kind", ["qlora", "lora"])
def test_an_adapter_with_tensor_parallel_is_refused_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    config = composed(f"peft={kind}")
    config["parallel"]["tensor"] = 2
    with pytest.raises(
        ValueError, match=r"^parallel\.tensor=2 splits the layers .*peft\.rank=16.* Use parallel\.tensor=1"
    ):
        refuse_together(config)
    refuse_together(composed(f"peft={kind}"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("peft=None", "peft=none"), ("peft=None,lora", "peft=none,lora"), ("peft=lora,None", "peft=lora,none")],
)
def test_the_guides_none_is_none(typed: str, meant: str) -> None:
    assert quote(typed, multirun="," in typed) == meant and quote(meant, True) == meant
    assert quote("name=None", False) == "name=None"
