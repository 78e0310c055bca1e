"""Which models tensor parallel takes, and what is said of the others. That its numbers are right: distributed/."""

from typing import Any

import pytest

from sftlab.parallel.tensor import require_plan, style_of
from tests.support import tiny_llama


def config(**changes: Any) -> Any:
    found = tiny_llama(num_attention_heads=8, num_key_value_heads=4).config
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def test_the_plan_is_transformers_own() -> None:
    plan = require_plan(config(), 2)
    assert plan["layers.*.self_attn.q_proj"] == "colwise" and plan["layers.*.mlp.down_proj"] == "rowwise"
    assert style_of("layers.17.self_attn.q_proj", plan) == "colwise"
    assert style_of("layers.17.input_layernorm", plan) is None


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"base_model_tp_plan": None}, 2, "parallel.tensor=2: transformers has no tensor parallel plan for models of "
         "type llama. Use parallel=fsdp2, or parallel=hsdp"),
        ({"base_model_tp_plan": {"layers.*.mlp": "moe_tp_experts", "layers.*.x": "packed_colwise"}}, 2,
         "parallel.tensor=2: the plan of llama splits modules in ways that are not supported here (moe_tp_experts, "
         "packed_colwise). Use parallel=fsdp2"),
        ({}, 8, "parallel.tensor=8 does not divide num_key_value_heads 4 of llama: use 1 or 2 or 4"),
        ({"vocab_size": 321}, 2, "parallel.tensor=2 does not divide vocab_size 321 of llama: use 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_what_can(changes: dict[str, Any], tensor: int, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        require_plan(config(**changes), tensor)
    assert str(refused.value).startswith(message)
