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
OPTIONS = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml"))]
PARAMETERS = {
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen3_0_6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "gemma3_1b": 999_885_952,
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
    assert {"model", "data", "optim", "schedule", "parallel", "launcher", "tracker", "experiment"} <= {
        group for group, _ in OPTIONS
    }
    assert set(PARAMETERS) | {"demo", "hf"} <= set(options("model"))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group: str, option: str) -> None:
    check(composed(f"{group}={option}"))


def test_the_binding_sees_what_does_not_fit() -> None:
    node = composed()["optim"]
    check_node("optim", node)
    with pytest.raises(ValueError, match=r"optim\.weight_decy: .*did you mean weight_decay\?"):
        check_node("optim", {**node, "weight_decy": 0.1})
    data = composed()["data"]
    with pytest.raises(ValueError, match=r"data: .*missing a required .*argument: 'format'"):
        check_node("data", {k: v for k, v in data.items() if k != "format"})
    with pytest.raises(ValueError, match=r"data\.format\.lower: "):
        check_node("data", {**data, "format": {**data["format"], "lower": True}})


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_model_is_built_from_its_yaml_alone(name: str) -> None:
    node = composed(f"model={name}", "model.init=random")["model"]
    node.pop("_target_")
    model = skeleton(Model(**node).load_config(torch.device("cpu")))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]  # a tied head counts once


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
