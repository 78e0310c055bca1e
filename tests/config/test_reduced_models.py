"""Every named model, made small by its sizes alone, trains in tree rows, is exported, loads elsewhere and answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sftlab.config.groups import CONF
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.trained_model import resolve
from tests.config.test_options import PARAMETERS
from tests.runs import compose, measured, run_here
from tests.support import byte_tokenizer

SMALL = {
    "vocab_size": 384,  # Qwen's tokenizer class adds a token of its own to the 320
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# One of each kind; the others are of the same kind in other sizes.
TRAINED = (
    "deepseek_v2_lite",
    "gemma2_2b",
    "gemma2_27b",
    "gemma3_1b",
    "gpt_oss_20b",
    "granite3_3_2b",
    "llama3_1_8b",
    "llama3_2_1b",
    "mistral_7b",
    "mixtral_8x7b",
    "olmo2_1b",
    "olmo2_32b",
    "olmo3_7b",
    "olmo3_32b",
    "phi4",
    "qwen2_5_0_5b",
    "qwen2_5_7b",
    "qwen3_0_6b",
    "qwen3_8b",
    "qwen3_30b_a3b",
    "smollm2_135m",
    "smollm2_1_7b",
    "smollm3_3b",
)
LAYERS = {"gemma3_text": 6, "olmo3": 4, "smollm3": 4}  # as many as it takes to have one of each kind; elsewhere 2


def architecture(name: str) -> dict[str, Any]:
    """Return a named model's architecture with that of the option it builds on; composing all with Hydra takes 10 s."""
    option = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    bases = [base for base in option.get("defaults", ()) if base != "_self_"]
    found = {key: value for base in bases for key, value in architecture(base).items()}
    return found | (option.get("architecture") or {})


def reduced(name: str) -> dict[str, Any]:
    """Return a named model's architecture with small sizes; what is no size stays."""
    shape = architecture(name)
    small = {key: SMALL[key] if key in SMALL and value is not None else value for key, value in shape.items()}
    small["num_hidden_layers"] = LAYERS.get(shape["model_type"], 2)
    if shape["num_key_value_heads"] == shape["num_attention_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


def kind(name: str) -> str:
    """Return what a named model is reduced to, without what its arithmetic alone depends on."""
    left_out = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps")
    shape = {
        k: v for k, v in reduced(name).items() if k not in left_out and not k.endswith(("_multiplier", "_scaling"))
    }
    return json.dumps(shape, sort_keys=True)


def test_every_named_model_is_of_a_kind_that_is_trained_below() -> None:
    kinds = {kind(name): name for name in TRAINED}
    assert len(kinds) == len(TRAINED), "two are of one kind"
    assert [name for name in PARAMETERS if kind(name) not in kinds] == []


@pytest.mark.parametrize("name", TRAINED)
def test_a_reduced_model_trains_in_tree_rows_and_answers_as_plain_transformers_does(
    name: str, tmp_path: Path, squad_files: tuple[Path, Path], tokenizer_folder: Path
) -> None:
    typed = ("data.val_path=null", "data.limit=12", "trainer.max_steps=3", "trainer.batch_size=4")
    config = compose(
        tmp_path / "run", tokenizer_folder, squad_files, f"model={name}", "model.init=random", "optim.lr=0.003", *typed
    )
    assert config["model"]["architecture"] == architecture(name)
    config["model"]["architecture"] = reduced(name)
    assert run_here(config).startswith("score ")
    losses = [value for (_, key), value in measured(tmp_path / "run").items() if key == "train/loss"]
    assert len(losses) == 3 and losses[-1] < losses[0]

    loaded = LoadedModel.load(resolve(str(tmp_path / "run")), torch.device("cpu"))
    prompts = [loaded.encode("Question: Who counts the steps?"), loaded.encode("The keeper of the lighthouse")]
    found = dict(decode(loaded.scorer, prompts, DecodingSettings(max_new_tokens=6), frozenset()))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(info.values())
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt[None].astype("int64"))
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert out[0, len(prompt) :].tolist() == list(found[i])
