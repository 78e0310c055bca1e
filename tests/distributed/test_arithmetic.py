"""What is numerically wrong in silence when it is wrong: dtypes, rotary tables, the norm, on several ranks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sftlab.checkpoints.hugging_face import broadcast_weights
from sftlab.data.batch import collate
from sftlab.data.forest import assign_to_ranks, lay_out
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from sftlab.training.trainer import clip_gradients
from tests.support import random_examples, run_distributed, tiny_llama

LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 256,
    }
}


def sharded(world: Any, param_dtype: str = "float32", replicate: int = 1, **config: Any) -> Scorer:
    """Return a scorer made as `build` makes it: without memory, sharded, then filled from rank 0's."""
    whole = partial(tiny_llama, **config)
    model = whole().config
    model._attn_implementation = "sdpa"
    scorer = fsdp2(Scorer(skeleton(model)), world, param_dtype=param_dtype, replicate=replicate)
    broadcast_weights(scorer, whole, world)
    return scorer


def backward(world: Any, scorer: Scorer) -> None:
    """Leave the gradients of one step over all ranks, as train_step does."""
    rows = lay_out(random_examples(8, longest=24), "packed", 64)
    share = assign_to_ranks([len(r) for r in rows], world.size)[world.rank]
    batch = collate([rows[i] for i in share], max(1, len(share)), 64)
    (scorer(batch).nll * world.size / sum(float(r.weight.sum()) for r in rows)).backward()


def test_gauntlet_18_master_weights_and_optimiser_state_are_float32(one: Any) -> None:
    scorer = sharded(one, "bfloat16")
    optimizer = adamw(scorer, lr=1e-5)
    computed: list[torch.dtype] = []
    scorer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: computed.append(out.dtype))
    before = {n: p.to_local().clone() for n, p in scorer.named_parameters() if isinstance(p, DTensor)}
    backward(one, scorer)
    assert {p.grad.dtype for p in scorer.parameters() if p.grad is not None} == {torch.float32}
    optimizer.step()
    assert computed == [torch.bfloat16]  # and only the computation is
    assert before.keys() == {n for n, _ in scorer.named_parameters()}
    assert {p.dtype for p in scorer.parameters()} == {torch.float32}
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert len(state) == 3 * len(before) and {v.dtype for v in state} == {torch.float32}
    # An update of 1e-5 is 1/200 of a weight's last bfloat16 digit (0.02): it must not be rounded away.
    moved = [(p.to_local() != before[n]).float().mean() for n, p in scorer.named_parameters() if "proj" in n]
    assert min(moved) > 0.9


@pytest.mark.parametrize("rope", [{}, LLAMA3_ROPE], ids=["default", "llama3"])
def test_gauntlet_19_rotary_tables_survive_meta_init_and_bfloat16(one: Any, rope: dict[str, Any]) -> None:
    scorer = sharded(one, "bfloat16", **rope)
    fresh = dict(tiny_llama(**rope).named_buffers())
    seen: list[torch.Tensor] = []
    rotary = scorer.model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda module, _: seen.append(module.inv_freq.clone()))
    backward(one, scorer)
    ours = dict(scorer.model.named_buffers())
    assert fresh.keys() == ours.keys() and "model.rotary_emb.inv_freq" in ours
    for name, buffer in fresh.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], buffer), name
    assert torch.equal(seen[0], fresh["model.rotary_emb.inv_freq"])  # what the forward used, in bfloat16's presence


def norms(world: Any, replicate: int) -> tuple[float, float, float]:
    """Return the norm reported, that of the gradients after clipping to 0.5, and the share of elements held here."""
    scorer = sharded(world, replicate=replicate, vocab=70_000)  # 2.2 million elements in the embedding
    backward(world, scorer)
    norm = clip_gradients(scorer, 0.5, world)
    held = sum(p.grad.to_local().numel() for p in scorer.parameters() if isinstance(p.grad, DTensor))
    return norm, clip_gradients(scorer, None, world), held / sum(p.numel() for p in scorer.parameters())


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), (4, 2)])
def test_gauntlet_20_the_gradient_norm_is_the_global_one(ranks: int, replicate: int) -> None:
    model = Scorer(tiny_llama(vocab=70_000))
    rows = lay_out(random_examples(8, longest=24), "packed", 64)
    model.model.config._attn_implementation = "sdpa"
    (model(collate(rows, len(rows), 64)).nll / sum(float(r.weight.sum()) for r in rows)).backward()
    expected = float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    assert expected > 0.6
    for norm, clipped, held in run_distributed(norms, ranks, replicate):
        assert norm == pytest.approx(expected, rel=3e-6)
        assert clipped == pytest.approx(0.5, rel=1e-5)
        assert held == pytest.approx(replicate / ranks, rel=0.05)
