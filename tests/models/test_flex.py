"""FlexAttention's blocks from reach, beside torch's own create_block_mask and the boolean rule."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sftlab.data.batch import Batch, collate
from sftlab.data.forest import lay_out
from sftlab.models.attention import boolean_mask
from sftlab.models.flex import BLOCK, NAME, attend, block_mask
from sftlab.models.scorer import Scorer
from tests.support import random_examples

WINDOWS = (None, 1, 40, 200)


def forests(length: int, seed: int) -> Batch:
    """Return rows of prefix trees of many sizes: some shorter than a block, some over several."""
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(60, 400))
    rows = lay_out(random_examples(40, seed, longest=longest, groups=int(rng.integers(1, 20))), "tree", length)
    return collate(rows, len(rows) + 1, length)  # and one row of padding


def every_block(rule: torch.Tensor, what: str) -> torch.Tensor:
    """Return for each block of a dense rule (R, 1, T, T) whether `any` or `all` of its pairs are seen, (R, 1, Q, K)."""
    rows, _, length, _ = rule.shape
    num = -(-length // BLOCK)
    fill = what == "all"  # pairs beyond the end of the row neither make a block seen nor keep it from being whole
    grown = torch.full((rows, 1, num * BLOCK, num * BLOCK), fill)
    grown[:, :, :length, :length] = rule
    blocks = grown.view(rows, 1, num, BLOCK, num, BLOCK)
    return blocks.any(5).any(3) if what == "any" else blocks.all(5).all(3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [1024, 1000])
def test_gauntlet_45_no_visible_block_is_missing_and_none_called_whole_that_is_not(length: int) -> None:
    for seed in range(6):
        batch = forests(length, seed)
        rows = len(batch.tokens)
        for window in WINDOWS:
            rule = boolean_mask(batch.reach, batch.position, window)
            made = block_mask(batch.reach, batch.position, window)
            asked, whole = blocks_of(made)
            seen, all_seen = every_block(rule, "any"), every_block(rule, "all")
            assert not (seen & ~(asked | whole)).any(), "a block that is seen is missing"
            assert not (whole & ~all_seen).any(), "a block is called whole that is not"
            assert not (asked & whole).any(), "a block is listed twice"
            if window is None:
                assert torch.equal(asked | whole, seen | torch.eye(seen.shape[-1], dtype=torch.bool)), (
                    "a block too many"
                )
                below = torch.ones_like(all_seen[0, 0]).tril(-1)
                assert torch.equal(whole, all_seen & below), "a whole block is asked pair by pair"
            r, i, j = torch.arange(rows)[:, None, None], torch.arange(length)[None, :, None], torch.arange(length)
            assert torch.equal(made.mask_mod(r, 0, i, j)[:, None], rule), "pair by pair, another rule"
            if seed == 0:  # without a compiler torch reads nothing of a mask but its rule and its sizes
                q = torch.randn(rows, 2, length, 16, generator=torch.Generator().manual_seed(seed))
                reference = create_block_mask(made.mask_mod, rows, None, length, length, device="cpu")
                torch.testing.assert_close(
                    flex_attention(q, q, q, block_mask=made),
                    flex_attention(q, q, q, block_mask=reference),
                    rtol=0,
                    atol=1e-6,
                )


def blocks_of(mask: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which blocks a BlockMask asks pair by pair and which it takes whole, (R, 1, Q, K) each."""
    made = []
    for kind in ("kv", "full_kv"):
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        made.append(torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed))
    return made[0], made[1]


class Largest(TorchDispatchMode):
    """Note the most elements of any tensor that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_the_mask_compiles_nothing_and_holds_no_pair_of_tokens() -> None:
    batch = forests(4096, 0)
    rows = len(batch.tokens)
    torch._dynamo.utils.counters.clear()
    with Largest() as seen:
        block_mask(batch.reach, batch.position, 64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert rows * 4096 <= seen.elements < 2 * rows * 4096


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ("gemma2", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attn_logit_softcapping": 0.5}),
        ("gpt_oss", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside Dynamo
def test_heads_of_any_number_caps_and_sinks_are_those_of_the_models_own_attention(
    kind: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftlab.models.flex.kernel", lambda: flex_attention)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # gradients on a CPU
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **shape), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    rows = lay_out(random_examples(12, 3, longest=60, groups=3), "tree", 256)
    batch = collate(rows[:1], 1, 256)
    scorer, found = Scorer(model).train(), {}
    for attention in ("eager", NAME):
        model.config._attn_implementation = attention
        scorer.zero_grad()
        states = scorer.hidden(batch)[batch.at]
        (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
        found[attention] = [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for ours, theirs in zip(found[NAME], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_the_kernel_is_told_that_a_length_is_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def kernel(query: Any, *_: Any, kernel_options: Any, **others: Any) -> Any:
        told.append(kernel_options["IS_DIVISIBLE"])
        return query

    monkeypatch.setattr("sftlab.models.flex.kernel", lambda: kernel)
    for length in (256, 300, 384):
        q = torch.zeros(1, 2, length, 16)
        mask = block_mask(torch.full((1, length), length, dtype=torch.int32), torch.arange(length)[None])
        out, _ = attend(torch.nn.Identity(), q, q, q, mask)
        assert out.shape == (1, length, 2, 16)
    assert told == [True, False, True]
