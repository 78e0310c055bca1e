"""Every option of every group composes and binds; the named models have the shapes of their namesakes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sftlab.config.binding import check, check_node
from sftlab.config.groups import CONF, options
from sftlab.config.overrides import inside
from sftlab.data.loader import RowLayout
from sftlab.data.plan import Plan
from sftlab.models.load import Model, skeleton
from tests.support import random_examples

# Groups that describe a run; experiment/ and sweeper/ options change others and are composed whole.
OPTIONS = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml")) if p.stem != "base"]
PARAMETERS = {  # as published; a tied head counts once
    "deepseek_v2_lite": 15_706_484_224,
    "gemma2_27b": 27_227_128_320,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gemma3_270m": 268_098_176,
    "gpt_oss_20b": 20_914_757_184,
    "granite3_3_2b": 2_533_539_840,
    "granite3_3_8b": 8_170_864_640,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "mixtral_8x22b": 140_620_634_112,
    "mixtral_8x7b": 46_702_792_704,
    "olmo2_13b": 13_716_198_400,
    "olmo2_1b": 1_484_916_736,
    "olmo2_32b": 32_234_279_936,
    "olmo2_7b": 7_298_617_344,
    "olmo3_32b": 32_233_522_176,
    "olmo3_7b": 7_298_011_136,
    "phi4": 14_659_507_200,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_72b": 72_706_203_648,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_14b": 14_768_307_200,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_32b": 32_762_123_264,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_1_7b": 1_711_376_384,
    "smollm2_360m": 361_821_120,
    "smollm3_3b": 3_075_098_624,
}


@pytest.fixture(autouse=True)
def hydra_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SFTLAB_START_TIME", "now")
    OmegaConf.register_new_resolver("inside", inside, replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> dict[str, Any]:
    """Return the resolved config of `train`, as the command hands it to a run."""
    made = compose("train", list(overrides))
    for key in OmegaConf.missing_keys(made):
        OmegaConf.update(made, key, "somebody/something")
    config = OmegaConf.to_container(made, resolve=True)
    assert isinstance(config, dict)
    return {str(k): v for k, v in config.items()}


def test_there_are_options() -> None:
    assert {"model", "peft", "data", "optim", "schedule", "parallel", "launcher", "tracker", "experiment"} <= {
        group for group, _ in OPTIONS
    }
    assert set(PARAMETERS) | {"demo", "hf"} == {option for group, option in OPTIONS if group == "model"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group: str, option: str) -> None:
    words = ("data.format.prompt='{a}'", "data.format.completion='{b}'") if option == "template" else ()
    check(composed(f"{group}={option}", *words))


def test_the_binding_sees_what_does_not_fit() -> None:
    node = composed()["optim"]
    check_node("optim", node)
    with pytest.raises(ValueError, match=r"optim\.weight_decy: .*did you mean weight_decay\?"):
        check_node("optim", {**node, "weight_decy": 0.1})
    data = composed()["data"]
    with pytest.raises(ValueError, match=r"data\.format is missing: give it a value"):
        check_node("data", {k: v for k, v in data.items() if k != "format"})
    with pytest.raises(ValueError, match=r"data\.format\.lower: "):
        check_node("data", {**data, "format": {**data["format"], "lower": True}})


def test_what_options_build_on_is_no_option() -> None:
    assert (CONF / "data" / "base.yaml").is_file() and (CONF / "model" / "base.yaml").is_file()
    for group in sorted({group for group, _ in OPTIONS}):
        assert options(group) and "base" not in options(group)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_model_is_built_from_its_yaml_alone(name: str) -> None:
    node = composed(f"model={name}", "model.init=random")["model"]
    node.pop("_target_")
    model = skeleton(Model(**node).load_config(torch.device("cpu")))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_the_guides_recipe(tmp_path: Path) -> None:
    config = composed("experiment=llama3_2_1b_squad")
    check(config)
    trainer, data = config["trainer"], config["data"]
    assert (trainer["batch_size"], trainer["rows_per_microbatch"], trainer["max_steps"]) == (80, 1, 100)
    assert (trainer["clip_grad_norm"], config["optim"]["lr"]) == (1.0, 1e-5)
    assert (config["parallel"]["param_dtype"], config["parallel"]["_target_"]) == (
        "bfloat16",
        "sftlab.parallel.fsdp2.fsdp2",
    )
    assert config["model"]["name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert config["schedule"]["_target_"] == "sftlab.training.schedule.constant"

    examples = random_examples(200, groups=40)
    plan = Plan(
        np.array([e.group for e in examples]),
        trainer["batch_size"],
        config["seed"],
        group_by_prefix=data["group_by_prefix"],
    )
    seen: list[int] = []
    for rank in range(8):
        row_layout = RowLayout(data["layout"], 128, trainer["rows_per_microbatch"], rank, 8, pad_token=2)
        step = row_layout.arrange([examples[int(i)] for i in plan.examples(1)], plan.examples(1))
        assert [b.num_examples for b in step.microbatches] == [1] * 10
        assert [len(b.tokens) for b in step.microbatches] == [1] * 10
        seen += [b.num_tokens for b in step.microbatches]
    assert sorted(seen) == sorted(len(examples[int(i)]) for i in plan.examples(1))
