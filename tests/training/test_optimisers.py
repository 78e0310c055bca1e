"""Each optimiser beside AdamW against its source, sharded against whole, and resumed."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.fsdp2_tp import fsdp2_tp
from sftlab.parallel.hsdp import hsdp
from sftlab.parallel.world import local_part, own_slices
from sftlab.training.adamw_8bit import adamw_8bit
from sftlab.training.adamw_bf16 import adamw_bf16
from sftlab.training.muon import muon
from sftlab.training.optim import adamw
from tests.support import TORCHAO, run_distributed, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is an Enum subclass")
LR = 2e-2
SAVED, STEPS = 2, 4
Make = Callable[..., Any]
BF16 = torch.bfloat16


def whole(width: int = 512) -> Any:
    """Return a model whose matrices have rows of two blocks of 256 values, also if two ranks split them."""
    return tiny_llama(hidden_size=width, intermediate_size=width, layers=1, num_key_value_heads=4, vocab=384)


def scorer_of(world: Any, spread: Make, dtype: torch.dtype = torch.float32, width: int = 512, **options: Any) -> Scorer:
    made = partial(whole, width)
    config = made().config
    config._attn_implementation = "sdpa"
    scorer = spread(Scorer(skeleton(config, dtype)), world, param_dtype="float32", **options)
    broadcast_weights(scorer, made, world)
    return scorer


def gradient_of(p: nn.Parameter, step: int, number: int) -> torch.Tensor:
    """Return the whole gradient of a parameter in a step: the same on any ranks."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(p.shape, generator=generator).to(p.dtype) * (0.1 + number)


def steps(scorer: Scorer, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for number, p in enumerate(scorer.parameters()):
            p.grad = torch.zeros_like(p)
            local_part(p.grad).copy_(gradient_of(p, step, number)[own_slices(p)])
        optimizer.step()
        optimizer.zero_grad()


def weights(scorer: Scorer) -> dict[str, torch.Tensor]:
    return {n: getattr(p, "full_tensor", p.detach)().detach().clone() for n, p in scorer.named_parameters()}


SPREADS: dict[str, tuple[Make, dict[str, Any]]] = {
    "fsdp2": (fsdp2, {}),
    "hsdp": (hsdp, {"replicate": 2}),
    "tensor": (fsdp2_tp, {"tensor": 2}),
}
KINDS: dict[str, tuple[Make, torch.dtype, int]] = {  # how wide: only the blocks of 8 bits ask for 512
    "adamw_8bit": (adamw_8bit, torch.float32, 512),
    "adamw_bf16": (adamw_bf16, BF16, 64),
    "muon": (muon, torch.float32, 64),
}


def everything(world: Any, folder: Path, others: tuple[str, ...]) -> dict[str, Any]:
    """Return the weights after STEPS straight and resumed steps, by optimiser and parallelism, and what is refused."""
    sys.path.append(str(TORCHAO))
    found: dict[str, Any] = {}
    if world.size > 1:
        config = tiny_llama(hidden_size=256).config
        with pytest.raises(ValueError) as refused:
            adamw_8bit(fsdp2_tp(Scorer(skeleton(config)), world, tensor=2), lr=LR)
        found["refused"] = str(refused.value)
    for kind, (make, dtype, width) in KINDS.items():
        for name, (spread, options) in SPREADS.items():
            if world.size == 1 and name != "fsdp2":
                continue
            scorer = scorer_of(world, spread, dtype, width, **options)
            optimizer = make(scorer, lr=LR)
            here = folder / f"{kind} {name} {world.size}"
            steps(scorer, optimizer, 1, SAVED)
            checkpoints = Checkpoints(here, 1, world, str)
            checkpoints.save(SAVED, scorer, optimizer, {})
            checkpoints.wait()
            checkpoints.check("stop")
            steps(scorer, optimizer, SAVED + 1, STEPS)
            found[kind, name] = weights(scorer)
            for source in (f"{name} {world.size}", *others):
                again = scorer_of(world, spread, dtype, width, **options)
                new = make(again, lr=LR)
                resumed = Checkpoints(here / "none", 1, world, str, source=folder / f"{kind} {source}/step_{SAVED:08d}")
                assert resumed.restore(again, new) is not None
                steps(again, new, SAVED + 1, STEPS)
                found[kind, name, source] = weights(again)
    return found


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory, one: Any) -> dict[int, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("optimisers")
    alone = everything(one, folder, ())
    several = run_distributed(everything, 4, folder, ("fsdp2 1",))
    return {1: [alone], 4: several, -1: [everything(one, folder, ("fsdp2 4",))]}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[n], theirs[n]) for n in theirs) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_is_not_sharded_and_resumed_is_straight_to_the_last_bit(kind: str, on: Any) -> None:
    expected = on[1][0][kind, "fsdp2"]
    for found in on[4]:
        for name in SPREADS:
            assert equal(found[kind, name], expected), name
            assert equal(found[kind, name, f"{name} 4"], expected), f"{name}, resumed"
            assert equal(found[kind, name, "fsdp2 1"], expected), f"{name}, resumed from one rank's"
    assert equal(on[1][0][kind, "fsdp2", "fsdp2 1"], expected)
    assert equal(on[-1][0][kind, "fsdp2", "fsdp2 4"], expected), "from four ranks'"


def test_8_bits_are_not_split_inside_a_block(on: Any) -> None:
    for found in on[4]:
        assert found["refused"].startswith(
            "optim=adamw_8bit: parallel.tensor splits a matrix of 256 columns into 128 on each rank, which blocks of"
        )


def test_8_bits_are_those_of_torchao(one: Any) -> None:
    sys.path.append(str(TORCHAO))
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    ours, theirs = scorer_of(one, fsdp2), Scorer(whole())
    optimizer = adamw_8bit(ours, lr=LR, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    steps(ours, optimizer, 1, STEPS)
    kept = [local_part(s["exp_avg"]) for s in optimizer.state.values()]
    assert sum(isinstance(t, OptimState8bit) for t in kept) == 8, "all matrices"
    grouped = [[p for p in theirs.parameters() if (p.ndim == 2 and p.shape[0] != 384) == decayed] for decayed in (1, 0)]
    source = AdamW8bit(
        [{"params": grouped[0], "weight_decay": 0.2}, {"params": grouped[1], "weight_decay": 0.0}],
        lr=LR, betas=(0.8, 0.9), eps=1e-6,
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        steps(theirs, source, 1, STEPS)
    assert equal(weights(ours), weights(theirs))
    plain = scorer_of(one, fsdp2)
    steps(plain, adamw(plain, lr=LR, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6), 1, STEPS)
    off = [
        float((a - b).norm() / b.norm()) for a, b in zip(weights(ours).values(), weights(plain).values(), strict=True)
    ]
    assert 1e-5 < max(off) < 0.05, "near to 32 bits, and not the same"


def test_muon_is_torchs_and_the_rest_adamw(one: Any) -> None:
    ours, theirs = scorer_of(one, fsdp2), Scorer(whole())
    steps(ours, muon(ours, lr=LR, weight_decay=0.2, momentum=0.9, betas=(0.8, 0.9), eps=1e-6), 1, STEPS)
    inside = [p for p in theirs.model.model.layers.parameters() if p.ndim == 2]
    outside = [p for p in theirs.parameters() if not any(p is q for q in inside)]
    source = torch.optim.Muon(inside, LR, 0.2, 0.9, adjust_lr_fn="match_rms_adamw")
    beside = torch.optim.AdamW(outside, LR, (0.8, 0.9), 1e-6, weight_decay=0.0, fused=True)
    for step in range(1, STEPS + 1):
        for number, p in enumerate(theirs.parameters()):
            p.grad = gradient_of(p, step, number)
        source.step()
        beside.step()
    assert len(inside) == 7 and equal(weights(ours), weights(theirs))


def test_bfloat16_weights_follow_float32_ones(one: Any) -> None:
    """Steps of 1e-5 are less than half of the last digit of a weight of 0.02: without the rest they would vanish."""
    small = 1e-5
    ours, theirs = scorer_of(one, fsdp2, BF16), scorer_of(one, fsdp2)
    before = weights(ours)
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q.float())
    optimizer = adamw_bf16(ours, lr=small, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    source = adamw(theirs, lr=small, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    for step in range(1, 41):
        for number, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = torch.zeros_like(p)
            local_part(p.grad).copy_(gradient_of(p, 1 + step % 2, number)[own_slices(p)])
            q.grad = p.grad.float()
        optimizer.step()
        source.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        state = optimizer.state[p]
        assert (p.dtype, state["rest"].dtype, state["exp_avg"].dtype) == (BF16, BF16, BF16)
        assert state["exp_avg_sq"].dtype == torch.float32
        moved = (local_part(q) - before[name].float()).abs().mean()
        both = local_part(p).float() + local_part(state["rest"]).float()
        assert moved > 0 and (both - local_part(q)).abs().mean() < 0.05 * moved, name


def test_bfloat16_weights_are_what_the_optimiser_asks_for(one: Any) -> None:
    with pytest.raises(ValueError, match=r"^optim=adamw_bf16 got weights in torch\.float32: for those use optim"):
        adamw_bf16(scorer_of(one, fsdp2), lr=LR)
    with pytest.raises(ValueError, match=r"^optim\.master_dtype=float32: expected bfloat16\."):
        adamw_bf16(scorer_of(one, fsdp2, BF16), lr=LR, master_dtype="float32")


def test_torchao_is_asked_for_by_name(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"^optim=adamw_8bit needs torchao, .* pip install 'sftlab\[torchao\]'"):
        adamw_8bit(scorer_of(one, fsdp2), lr=LR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_rate_is_above_zero(kind: str) -> None:
    make, *_ = KINDS[kind]
    with pytest.raises(ValueError, match=r"^optim\.lr=0: expected a number above 0$"):
        make(nn.Linear(1, 1), lr=0)
