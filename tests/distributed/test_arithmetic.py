"""What is numerically wrong in silence when it is wrong: dtypes, rotary tables, the norm, on several ranks."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch.distributed.tensor import DTensor

from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.data.batch import collate
from sftlab.data.forest import assign_to_ranks, lay_out
from sftlab.inference.sharded import Generator, gathered
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from sftlab.training.trainer import scale_down, squared_norm
from sftlab.training.validation import AnswerEvaluator
from tests.asymmetric import MESHES, for_ranks_that_get_unequal_shares
from tests.support import byte_tokenizer, random_examples, run_distributed, tiny_llama

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


ENDS = frozenset({1, 15, 16})  # two of the five answers begin with one


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
    norm = world.sum(squared_norm(scorer)).sqrt()
    scale_down(scorer, 0.5, norm)
    held = sum(p.grad.to_local().numel() for p in scorer.parameters() if isinstance(p.grad, DTensor))
    return (
        norm.item(),
        world.sum(squared_norm(scorer)).sqrt().item(),
        held / sum(p.numel() for p in scorer.parameters()),
    )


def bfloat16_gradients(world: Any, replicate: int) -> tuple[float, float]:
    """Return how far the gradients are from a float32 sum over ranks of theirs, and how many bfloat16 cannot hold."""
    scorer = sharded(world, "bfloat16", replicate)
    backward(world, scorer)
    alone = tiny_llama()
    alone.config._attn_implementation = "sdpa"
    for p in alone.parameters():
        p.data = p.data.bfloat16()
    backward(world, Scorer(alone))
    off, fine, total = 0.0, 0, 0
    for ours, theirs in zip(scorer.model.parameters(), alone.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor) and theirs.grad is not None
        gradient = ours.grad.full_tensor()
        mean = world.sum(theirs.grad.float()) / world.size
        off = max(off, float((gradient - mean).norm() / mean.norm()))
        fine += int((gradient != gradient.bfloat16().float()).sum())
        total += gradient.numel()
    return off, fine / total


def gathered_after_forward(world: Any, replicate: int) -> tuple[bool, bool]:
    """Return whether a block's parameters are whole after a forward: before and after answers were generated."""
    scorer = sharded(world, replicate=replicate)
    batch = collate(lay_out(random_examples(2, longest=24), "packed", 64), 1, 64)
    block = scorer.model.model.layers[0]
    found = []
    for _ in range(2):
        scorer(batch).nll.backward()  # and the backward leaves them in shards
        scorer(batch)
        found.append(not any(isinstance(p, DTensor) for p in block.parameters()))
        with gathered(scorer):
            assert not any(isinstance(p, DTensor) for p in scorer.parameters())
        assert all(isinstance(p, DTensor) for p in scorer.parameters())
    return found[0], found[1]


class Told(NamedTuple):
    """A generator that answers with the tokens it was given, and the rank that it ran on."""

    rank: int

    def answers(self, prompts: Any) -> list[str]:
        return [f"{self.rank}:{','.join(map(str, p))}" for p in prompts]

    def decode_text(self, tokens: Any) -> str:
        return f"prompt of {len(tokens)}"


def answered(world: Any) -> tuple[dict[str, float], list[Any]]:
    """Return the scores and samples of seven examples, where an answer scores its prompt's length."""
    evaluator = AnswerEvaluator(
        cast(Any, Told(world.rank)),
        for_ranks_that_get_unequal_shares(),
        lambda answer, references: {"tokens": answer.count(",") + 1, "right": float(references == ("answer 6",))},
        world,
        "source",
    )
    found = evaluator()
    return dict(found.scores), list(found.samples)


def really_answered(world: Any, gather: bool) -> list[str]:
    """Return what the model answers, sharded, where ranks have unequal numbers of prompts; a step goes on after it.

    Prompts are answered one by one and some end early, so that no two ranks make as many forwards.
    """
    scorer = sharded(world)
    backward(world, scorer)
    generator = Generator(scorer, byte_tokenizer(), ENDS, world, max_new_tokens=9, batch_size=1, gather=gather)
    evaluator = AnswerEvaluator(generator, for_ranks_that_get_unequal_shares()[:5], lambda a, r: {}, world)
    whole: list[bool] = []
    block = scorer.model.model.layers[1]
    watch = block.register_forward_pre_hook(
        lambda *_: whole.append(not any(isinstance(p, DTensor) for p in scorer.model.model.layers[0].parameters()))
    )
    found = [s.answer for s in evaluator().samples]
    watch.remove()
    assert set(whole) == {gather}, "the first block is whole while the second computes, or it is not"
    assert all(isinstance(p, DTensor) for p in scorer.parameters())
    backward(world, scorer)
    return found


def collectives(world: Any) -> dict[str, Any]:
    value = torch.tensor(float(world.rank))
    return {
        "place": (world.rank, world.size, world.local_rank, world.is_main),
        "sum": (float(world.sum(value)), float(value)),
        "max": world.max(10 - world.rank),
        "any": (world.any(False), world.any(world.rank == 1)),
        "gather": world.gather(f"from {world.rank}"),
        "broadcast": world.broadcast(f"from {world.rank}"),
    }


def everything(world: Any) -> dict[str, Any]:
    meshes = MESHES[world.size]
    return {
        "norms": {r: norms(world, r) for r in meshes},
        "bfloat16": {r: bfloat16_gradients(world, r) for r in meshes},
        "gathered": {r: gathered_after_forward(world, r) for r in meshes},
        "answered": answered(world),
        "really answered": {gather: really_answered(world, gather) for gather in (True, False)},
        "collectives": collectives(world),
    }


@pytest.fixture(scope="module")
def on() -> dict[int, list[dict[str, Any]]]:
    """What every rank found, by the number of ranks."""
    return {ranks: run_distributed(everything, ranks) for ranks in MESHES}


MESH = [(ranks, replicate) for ranks, replicates in MESHES.items() for replicate in replicates]


@pytest.mark.parametrize(("ranks", "replicate"), MESH)
def test_gauntlet_20_the_gradient_norm_is_the_global_one(ranks: int, replicate: int, on: Any) -> None:
    model = Scorer(tiny_llama(vocab=70_000))
    rows = lay_out(random_examples(8, longest=24), "packed", 64)
    model.model.config._attn_implementation = "sdpa"
    (model(collate(rows, len(rows), 64)).nll / sum(float(r.weight.sum()) for r in rows)).backward()
    expected = float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    assert expected > 0.6
    for found in on[ranks]:
        norm, clipped, held = found["norms"][replicate]
        assert norm == pytest.approx(expected, rel=3e-6)
        assert clipped == pytest.approx(0.5, rel=1e-5)
        assert held == pytest.approx(replicate / ranks, rel=0.05)


@pytest.mark.parametrize(("ranks", "replicate"), MESH)
def test_gradients_computed_in_bfloat16_are_summed_over_ranks_in_float32(ranks: int, replicate: int, on: Any) -> None:
    for found in on[ranks]:
        off, fine = found["bfloat16"][replicate]
        assert off < 1e-5, "2e-3 where the sum is made in bfloat16"
        assert fine > 0.3, "of the sums have digits that bfloat16 has not"


@pytest.mark.parametrize(("ranks", "replicate"), MESH)
def test_blocks_stay_whole_after_a_forward_only_where_every_rank_holds_them(
    ranks: int, replicate: int, on: Any
) -> None:
    """Also after answers were generated, for which all are gathered."""
    for found in on[ranks]:
        assert found["gathered"][replicate] == (ranks == replicate, ranks == replicate)


@pytest.mark.parametrize("ranks", MESHES)
def test_answers_are_shared_out_over_ranks_and_every_example_counts_once(ranks: int, on: Any) -> None:
    examples = for_ranks_that_get_unequal_shares()
    for found in on[ranks]:
        scores, samples = found["answered"]
        assert scores == {"source/tokens": pytest.approx((3 + 3 + 4 + 4 + 5 + 5 + 6) / 7), "source/right": 1 / 7}
        assert [s.id for s in samples] == ["e3", "e4", "e5", "e6", "e7", "e8", "e9"]
        for sample, (i, e) in zip(samples, reversed(list(enumerate(examples))), strict=True):
            rank, _, tokens = sample.answer.partition(":")
            assert int(rank) == i % ranks
            assert tokens == ",".join(map(str, e.tokens[: e.num_prompt]))
            assert sample.prompt == f"prompt of {e.num_prompt}" and sample.references == e.references


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("ranks", MESHES)
def test_a_sharded_model_answers_as_a_whole_one_does(ranks: int, gather: bool, on: Any) -> None:
    """Also where it is never whole, and the ranks must run as many forwards though they have unequal prompts."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected, lengths = [], set()
    for e in for_ranks_that_get_unequal_shares()[4::-1]:  # in the order of their ids
        prompt = torch.from_numpy(e.tokens[: e.num_prompt].astype("int64"))[None]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=sorted(ENDS),
        )
        new = [t for t in out[0, e.num_prompt :].tolist() if t not in ENDS]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        lengths.add(len(new))
    assert len(set(expected)) > 2 and len(lengths) > 1
    for found in on[ranks]:
        assert found["really answered"][gather] == expected


@pytest.mark.parametrize("ranks", MESHES)
def test_a_world_adds_up_compares_gathers_and_tells(ranks: int, on: Any) -> None:
    for rank, found in enumerate(on[ranks]):
        assert found["collectives"] == {
            "place": (rank, ranks, rank, rank == 0),
            "sum": (ranks * (ranks - 1) / 2, rank),  # the second is what it was given, unchanged
            "max": 10,
            "any": (False, True),
            "gather": [f"from {r}" for r in range(ranks)],
            "broadcast": "from 0",
        }


def test_what_is_computed_in_bfloat16_does_not_round_the_batch(one: Any) -> None:
    """A prediction's weight of 1001 would be 1000."""
    scorer = sharded(one, "bfloat16")
    batch = collate(lay_out(random_examples(2, longest=24), "packed", 64), 1, 64)
    heavy = replace(batch, weight=torch.full_like(batch.weight, 1001.0))
    seen = scorer(heavy, inside=lambda scorer, batch: batch)
    assert seen.weight.dtype == torch.float32 and set(seen.weight.tolist()) == {1001.0}
    light = scorer(replace(batch, weight=torch.ones_like(batch.weight)))
    assert float((scorer(heavy).nll / light.nll).detach()) == pytest.approx(1001, rel=1e-5)
