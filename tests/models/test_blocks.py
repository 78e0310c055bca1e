"""Attention by blocks: where rows are cut, and that it is what trains on a CPU. Its exactness: test_equality."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.models import blocks
from sftlab.models.attention import cut_mask, forest_mask
from sftlab.models.scorer import Scorer
from tests.support import random_examples, tiny_llama


def work(position: np.ndarray, bounds: tuple[int, ...]) -> int:
    """Return the pairs that blocks between these bounds compute, and what they cost besides."""
    return sum((b - a) * (b - a + int(position[a])) + blocks.BLOCK_PAIRS for a, b in pairwise(bounds))


@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_cut_where_it_is_the_least_work(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 150)
    (made,) = lay_out(random_examples(4, longest=24, seed=seed), "tree", 512)
    position = np.concatenate([made.position, np.zeros(5, np.int32)])
    begins = [i for i in range(1, len(position)) if position[i] != position[i - 1] + 1 and i <= len(made)]
    every = [c for n in range(len(begins) + 1) for c in combinations(begins, n)]
    least = min(work(position, (0, *c, len(position))) for c in every)
    assert work(position, tuple(blocks.cut(position))) == least < work(position, (0, len(position)))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("pairs", [0, 150])
def test_blocks_leave_out_only_what_the_mask_forbids(
    pairs: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", pairs)
    rows = lay_out(random_examples(12, longest=24), "tree", 128)
    batch = collate(rows, len(rows), 128)
    mask = cut_mask(batch.reach, batch.position, window)
    computed = 0
    for seen, row, position in zip(mask[:, 0], mask.blocks, batch.position, strict=True):  # type: ignore[attr-defined]
        again, end = torch.zeros_like(seen), 0
        for b in row.blocks:
            own = torch.arange(end, end + b.length)
            assert (0 if b.above is None else len(b.above)) == position[end], "its first token's ancestors, no others"
            index = own if b.above is None else torch.cat([row.ancestors[b.above], own])
            again[own[:, None], index] = torch.ones_like(seen[own][:, own]).tril() if b.mask is None else b.mask
            computed += b.length * len(index)
            end += b.length
        assert torch.equal(again, seen)
    assert len(rows) > 1 and computed < mask.numel() / 2


def test_a_plain_text_needs_no_mask() -> None:
    rows = lay_out(random_examples(3, longest=24), "padded", 64)
    batch = collate([rows[0]], 1, len(rows[0]))
    ((made,),) = [row.blocks for row in cut_mask(batch.reach, batch.position).blocks]  # type: ignore[attr-defined]
    assert made == (len(rows[0]), None, None)


def count(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets (queries, keys) of every call of SDPA."""
    calls: list[tuple[int, int]] = []
    attend = F.scaled_dot_product_attention

    def counted(query: Any, key: Any, value: Any, **rest: Any) -> Any:
        calls.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def test_the_models_layers_attend_by_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 150)
    model = tiny_llama()
    model.config._attn_implementation = blocks.NAME
    rows = lay_out(random_examples(12, longest=24), "tree", 512)
    batch = collate(rows, 1, len(rows[0]))
    (made,) = forest_mask(model.config, batch.reach, batch.position).blocks  # type: ignore[union-attr]
    expected = [(b.length, b.length + (0 if b.above is None else len(b.above))) for b in made.blocks]
    calls = count(monkeypatch)
    score = Scorer(model)(batch)
    assert len(expected) > 3 and calls == expected * model.config.num_hidden_layers
    model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(score.nll, Scorer(model)(batch).nll, rtol=1e-6, atol=0)


def test_a_mask_without_blocks_is_transformers_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    ids, own = torch.arange(3, 13)[None], torch.tensor([[1] * 7 + [0] * 3])
    found = []
    for attention in ("sdpa", blocks.NAME):
        model.config._attn_implementation = attention
        found.append(model(input_ids=ids, attention_mask=own).logits[:, :7])
    assert torch.equal(*found)


def heads(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return query, key and value of two rows, four heads on two."""
    torch.manual_seed(seed)
    return torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8), torch.randn(2, 2, 64, 8)


def two_rows(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the mask of two rows that are each cut into several blocks."""
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 0)
    rows = lay_out(random_examples(8, longest=14), "tree", 64)[:2]
    batch = collate(rows, 2, 64)
    return cut_mask(batch.reach, batch.position)


def test_scale_dropout_and_shared_heads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, (q, k, v) = two_rows(monkeypatch), heads()
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    module = torch.nn.Module()
    for scale in (None, 0.9):
        found, none = blocks.attend(module, q, k, v, mask, scaling=scale)
        expected = F.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=scale).transpose(1, 2)
        assert none is None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain, _ = blocks.attend(module, q, *wide, mask)  # as many heads as the query's
    torch.testing.assert_close(plain, blocks.attend(module, q, k, v, mask)[0], rtol=1e-5, atol=1e-6)
    dropped, _ = blocks.attend(module, q, k, v, mask, dropout=0.5)
    assert not torch.allclose(dropped, plain, rtol=1e-2)


@pytest.mark.parametrize("special", ["softcap", "position_bias"])
def test_what_blocks_cannot_do_is_left_to_transformers(special: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, (q, k, v) = two_rows(monkeypatch), heads()
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    calls = count(monkeypatch)
    blocks.attend(module, q, k, v, mask)
    assert len(calls) > 2
    calls.clear()
    blocks.attend(module, q, k, v, mask, **{special: None})
    assert calls == [(64, 64)]


def test_compiled_code_takes_the_whole_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, (q, k, v) = two_rows(monkeypatch), heads()
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    calls = count(monkeypatch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    blocks.attend(module, q, k, v, mask)
    assert calls == [(64, 64)]


def test_padding_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 0)
    assert blocks.cut(np.array([0, 1, 2, 0, 0, 0, 0])) == [0, 3, 7]
    assert blocks.cut(np.array([0, 1, 2, 1, 0, 1])) == [0, 3, 4, 6]
