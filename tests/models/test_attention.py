"""The attention rule in each form, against the rule written out, and which layers get which window."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.models.attention import (
    added_mask,
    boolean_mask,
    by_layer,
    cut_mask,
    forest_mask,
    require_alone,
)
from sftlab.models.flex import block_mask
from tests.support import random_examples


def batch_of(layout: str = "tree", length: int = 96) -> Any:
    rows = lay_out(random_examples(10, longest=24), layout, length)
    return collate(rows, len(rows), length)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (5, None), (None, 1), (None, 5)])
def test_every_form_of_the_mask_is_the_rule(window: int | None, chunk: int | None) -> None:
    batch = batch_of()
    reach, position = batch.reach, batch.position
    rows, length = reach.shape
    assert rows > 1
    rule = torch.zeros(rows, length, length, dtype=torch.bool)
    for r in range(rows):
        for i in range(length):
            for j in range(i + 1):
                near = window is None or int(position[r, i] - position[r, j]) < window
                near &= chunk is None or int(position[r, i]) // chunk == int(position[r, j]) // chunk
                rule[r, i, j] = bool(i < reach[r, j]) and near
    assert torch.equal(boolean_mask(reach, position, window, chunk)[:, 0], rule)
    assert torch.equal(cut_mask(reach, position, window, chunk)[:, 0], rule)
    eager = added_mask(reach, position, window, chunk)[:, 0]
    assert torch.equal(eager == 0, rule) and (eager[~rule] < -1e38).all() and eager.dtype == torch.float32
    flex = block_mask(reach, position, window, chunk)
    r, i, j = (torch.arange(n) for n in (rows, length, length))
    seen = flex.mask_mod(r[:, None, None], torch.zeros(1, dtype=torch.long), i[None, :, None], j[None, None, :])
    assert torch.equal(seen, rule) and flex.shape == (rows, 1, length, length)


def windows(**config: Any) -> Any:
    def limit(window: int | None, chunk: int | None) -> Any:
        return window if chunk is None else ("chunk", chunk)

    return by_layer(PreTrainedConfig(**config), limit)  # type: ignore[arg-type]


def test_each_kind_of_layer_gets_its_own_window() -> None:
    both = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(sliding_window=8, layer_types=both) == {"sliding_attention": 8, "full_attention": None}
    assert windows(sliding_window=8, layer_types=["full_attention"]) == {"full_attention": None}
    assert windows(sliding_window=8, layer_types=["sliding_attention"]) == {"sliding_attention": 8}
    chunked = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 4, "sliding_window": 8}
    assert windows(**chunked) == {"chunked_attention": ("chunk", 4), "full_attention": None}
    assert windows(sliding_window=8) == 8 and windows(sliding_window=8, layer_types=None) == 8
    assert windows() is None and windows(sliding_window=None) is None
    with pytest.raises(
        ValueError, match="layers of type conv, linear_attention mix tokens by a rule other than attention"
    ):
        windows(layer_types=["linear_attention", "full_attention", "conv"])


def test_the_mask_is_in_the_form_that_the_configs_attention_takes() -> None:
    batch = batch_of()
    for name, kind in (("sdpa", torch.Tensor), ("sdpa_by_blocks", torch.Tensor)):
        config = PreTrainedConfig(attn_implementation=name, sliding_window=5)
        mask = forest_mask(config, batch.reach, batch.position)
        assert isinstance(mask, kind) and hasattr(mask, "blocks") == (name == "sdpa_by_blocks")
        assert torch.equal(mask, boolean_mask(batch.reach, batch.position, 5))
    config = PreTrainedConfig(attn_implementation="flex_by_reach")
    assert type(forest_mask(config, batch.reach, batch.position)).__name__ == "BlockMask"


def test_rows_of_one_example_and_padding_are_told_from_others() -> None:
    require_alone(batch_of("padded").reach)
    require_alone(torch.tensor([[4, 4, 4, 4], [1, 2, 3, 4], [2, 2, 3, 4]], dtype=torch.int32))
    for reach in ([3, 3, 3, 5, 5], [5, 3, 3, 5, 5], [2, 2, 4, 4, 5]):  # two examples, and a tree
        with pytest.raises(ValueError, match=r"use data\.layout=padded, one example per row"):
            require_alone(torch.tensor([[5] * 5, reach], dtype=torch.int32))
