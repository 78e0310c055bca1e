"""Adapters in training: every kind against peft in a plain loop of transformers, step by step, on one and two ranks.

The plain loop knows nothing of us: it loads the base by `from_pretrained`, makes the adapter by `get_peft_model`, takes
one row at a time, and updates with torch's AdamW. Only the adapter's first values are ours.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sftlab.checkpoints.pretrained import WRAPPER, fill
from sftlab.common.metrics import Metrics
from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.models.adapters import Adapter, peft_name
from sftlab.models.load import Model, skeleton
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.world import local_part
from sftlab.training.console import Console
from sftlab.training.ending import Ending
from sftlab.training.laps import Laps
from sftlab.training.optim import adamw
from sftlab.training.settings import TrainerSettings
from sftlab.training.throughput import Throughput
from sftlab.training.trainer import Trainer
from tests.support import random_examples, run_distributed, tiny_llama

pytestmark = [  # of peft, in the plain loop
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
STEPS, LR, DECAY, CLIP = 5, 0.01, 0.1, 0.5
# The adapter, what its plain twin is made with, and how our blocks run.
KINDS: dict[str, tuple[Adapter, dict[str, Any], dict[str, Any]]] = {
    "lora": (Adapter(rank=4, alpha=8), {"target_modules": "all-linear"}, {}),
    "rslora": (
        Adapter(rslora=True, rank=4, alpha=8),
        {"target_modules": "all-linear", "use_rslora": True},
        {"activation_checkpointing": "full"},
    ),
    "dora": (
        Adapter(dora=True, rank=4, alpha=8),
        {"target_modules": "all-linear", "use_dora": True},
        {"activation_checkpointing": "selective"},
    ),
    "qlora": (Adapter(quantize="nf4", rank=4, alpha=8), {"target_modules": "all-linear"}, {}),
    "qdora": (
        Adapter(quantize="nf4", dora=True, targets=["o_proj"], rank=4, alpha=8),
        {"target_modules": ["o_proj"], "use_dora": True},
        {"activation_checkpointing": "full"},
    ),
    "head": (
        Adapter(targets=["q_proj", "lm_head", "embed_tokens"], rank=4, alpha=8),
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {},
    ),
    "dora on the head": (
        Adapter(dora=True, targets="lm_head|embed_tokens", rank=4, alpha=8),
        {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
        {},
    ),
    "whole": (
        Adapter(targets=["v_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"], rank=4, alpha=8),
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
        {},
    ),
    "one block": (
        Adapter(targets=r"model\.layers\.1\..*", rank=4, alpha=8),
        {"target_modules": r"model\.layers\.1\..*_proj"},
        {"activation_checkpointing": "full"},
    ),
}
TIES = {"lora": True, "head": True, "whole": True}  # whether the head is tied, where both ways are tried
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in TIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A model with an untied and one with a tied head."""
    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        tiny_llama(seed=2, tied=tied, hidden_size=64).save_pretrained(folder / str(tied))
    return {tied: str(folder / str(tied)) for tied in (False, True)}


def examples() -> list[Any]:
    return random_examples(8 * STEPS, seed=3)


def adapted(
    world: Any, folder: str, adapter: Adapter, seed: int = 7, param_dtype: str = "float32", **how: Any
) -> Scorer:
    """Return a filled scorer with an adapter, as a run builds it."""
    option = Model(folder)
    config = option.load_config(world.device)
    model = skeleton(config)
    adapter.adapt(model, folder, None, getattr(torch, param_dtype))
    scorer = fsdp2(Scorer(model), world, param_dtype=param_dtype, **how)
    fill(scorer, option, config, seed, world)
    probe(scorer, "tree", world.device)
    return scorer


def trained(scorer: Scorer) -> dict[str, torch.Tensor]:
    """Return whole copies of what is trained, by peft's names."""
    found = {}
    for name, p in scorer.model.named_parameters():
        if p.requires_grad:
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            found[peft_name(name.replace(WRAPPER, ""))] = whole.detach().clone()
    return found


def ours(world: Any, folders: dict[bool, str], cases: list[Any] = CASES) -> dict[Any, Any]:
    """Return by case the adapter before and after the steps, their losses and norms, and how much each rank keeps."""
    found = {}
    given = examples()
    plan = Plan(np.array([e.group for e in given]), 8, seed=0, shuffle=False, group_by_prefix=False)
    loader = Loader(given, plan, RowLayout("tree", 128, 1, world.rank, world.size, pad_token=2))
    for kind, tied in cases:
        adapter, _, how = KINDS[kind]
        scorer = adapted(world, folders[tied], adapter, **how)
        unused: Any = None
        optimizer = adamw(scorer, lr=LR, weight_decay=DECAY)
        trainer = Trainer(
            scorer=scorer, optimizer=optimizer, schedule=lambda step: 1.0, loader=unused, evaluators=[],
            checkpoints=unused, metrics=Metrics(None), console=Console(1, None, quiet=True),
            throughput=Throughput(scorer, world, Laps(scorer, optimizer, world.device)), world=world,
                ending=Ending(world=world, last_step=1), stop=unused, warm_up=unused, around=unused,
            settings=TrainerSettings(batch_size=8, clip_grad_norm=CLIP),
        )  # fmt: skip
        before = trained(scorer)
        curve = [trainer.train_step(s, loader.step(s)).read() for s in range(1, STEPS + 1)]
        states = sum(v.numel() for s in optimizer.state.values() for v in s.values())
        idle = [n for n, p in scorer.model.named_parameters() if not p.requires_grad and p in optimizer.state]
        found[kind, tied] = before, trained(scorer), curve, states, idle
    return found


@pytest.fixture(scope="module")
def on(one: Any, folders: dict[bool, str]) -> dict[int, dict[Any, Any]]:
    """What the first rank of one and of two found."""
    return {1: ours(one, folders), 2: run_distributed(ours, 2, folders)[0]}


def plain_model(folder: str, kind: str) -> Any:
    adapter, settings, _ = KINDS[kind]
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = {"quantization_config": nf4, "device_map": "cpu"} if adapter.quantize == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantised)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)).train()


def plain_steps(model: Any) -> list[tuple[float, float]]:
    """Train a plain model; return losses and gradient norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim < 2 or id(p) in tables]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=LR, weight_decay=DECAY
    )
    curve, given = [], examples()
    for step in range(STEPS):
        chosen = given[8 * step : 8 * step + 8]
        targets = sum(int(e.supervised[1:].sum()) for e in chosen)
        total = 0.0
        for e in chosen:
            tokens = torch.from_numpy(e.tokens.astype(np.int64))
            labels = torch.where(torch.from_numpy(e.supervised), tokens, -100)[1:]
            logits = model(input_ids=tokens[None]).logits[0, :-1].float()
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total, norm))
    return curve


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}{' tied' if c[1] else ''}")
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_step_is_that_of_peft_in_a_plain_loop(
    ranks: int, case: Any, on: dict[int, dict[Any, Any]], folders: dict[bool, str]
) -> None:
    kind, tied = case
    before, after, curve, _, _ = on[ranks][case]
    model, expected = reference(
        folders[tied], kind, tuple(before.items()) if ranks == 1 else tuple(on[1][case][0].items())
    )
    within = 1e-3 if KINDS[kind][0].quantize == "nf4" else 1e-5
    losses = [values["train/loss"] for values in curve]
    assert losses == pytest.approx([loss for loss, _ in expected], rel=within)
    assert [values["train/grad_norm"] for values in curve] == pytest.approx([n for _, n in expected], rel=10 * within)
    assert abs(losses[-1] - losses[0]) > 0.05, "it learned"
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert theirs.keys() == after.keys()
    for name, value in theirs.items():
        moved = float((value - before[name]).norm())
        assert moved > 0, f"{name} was trained"
        # By norm: AdamW makes a whole step of the rounding in a number whose gradient is next to nothing.
        assert float((after[name] - value).norm()) <= 100 * within * moved, name


@cache
def reference(folder: str, kind: str, first: tuple[tuple[str, torch.Tensor], ...]) -> tuple[Any, list[Any]]:
    """Return a plain model after its steps, and their losses and norms."""
    model = plain_model(folder, kind)
    left = set_peft_model_state_dict(model, dict(first))
    assert not left.unexpected_keys and not [k for k in left.missing_keys if "lora" in k or "modules_to_save" in k]
    return model, plain_steps(model)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}{' tied' if c[1] else ''}")
def test_a_first_adapter_is_the_same_on_any_number_of_ranks(case: Any, on: dict[int, dict[Any, Any]]) -> None:
    one, two = on[1][case][0], on[2][case][0]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_first_values_are_drawn_as_peft_draws_them(on: dict[int, dict[Any, Any]], folders: dict[bool, str]) -> None:
    """The same spread, by layer, as in a fresh adapter of peft's; what peft sets to zero is zero, magnitudes equal."""
    for case in CASES:
        torch.manual_seed(0)
        theirs = get_peft_model_state_dict(plain_model(folders[case[1]], case[0]), save_embedding_layers=False)
        for name, value in on[1][case][0].items():
            drawn = ".lora_A." in name or name.endswith("lora_embedding_B")
            if drawn:
                assert float(value.abs().max()) == pytest.approx(float(theirs[name].abs().max()), rel=0.5), name
                assert float(value.std()) == pytest.approx(float(theirs[name].std()), rel=0.35), name
            else:
                assert torch.allclose(value, theirs[name], rtol=1e-6, atol=0), name


def test_nothing_frozen_has_a_gradient_or_a_state(on: dict[int, dict[Any, Any]]) -> None:
    for case in CASES:
        before, _, _, states, idle = on[1][case]
        numbers = sum(v.numel() for v in before.values())
        assert idle == [] and states == 2 * numbers + len(before), "two moments of each number, a count of each tensor"


def test_another_seed_is_another_adapter_and_the_same_seed_the_same(one: Any, folders: dict[bool, str]) -> None:
    first, again, other = (trained(adapted(one, folders[False], KINDS["lora"][0], seed)) for seed in (1, 1, 2))
    name = next(n for n in first if n.endswith("q_proj.lora_A.weight"))
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert len({float(v.flatten()[0]) for n, v in first.items() if n.endswith("lora_A.weight")}) == 14, "by name too"


def test_gauntlet_17_an_adapter_on_the_head_is_trained(on: dict[int, dict[Any, Any]]) -> None:
    """Equality with peft is above. Here: what lies on the head and on the embedding moves on every number of ranks."""
    for ranks, tied in ((1, False), (1, True), (2, False), (2, True)):
        before, after, _, _, _ = on[ranks]["head", tied]
        for part in (
            "lm_head.lora_A",
            "lm_head.lora_B",
            "embed_tokens.lora_embedding_A",
            "embed_tokens.lora_embedding_B",
        ):
            names = [n for n in after if part in n]
            assert len(names) == 1 and not torch.equal(before[names[0]], after[names[0]])
        before, after, _, _, _ = on[ranks]["whole", tied]
        assert not torch.equal(before["base_model.model.lm_head.weight"], after["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("case", [("qlora", False), ("whole", True), ("head", True)], ids=str)
def test_a_base_that_transformers_must_load_is_the_same(
    case: Any, one: Any, folders: dict[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, tied = case
    read = dict(adapted(one, folders[tied], KINDS[kind][0]).model.named_parameters(remove_duplicate=False))
    monkeypatch.setattr(Model, "weight_files", lambda self, config: {})
    loaded = dict(adapted(one, folders[tied], KINDS[kind][0]).model.named_parameters(remove_duplicate=False))
    assert read.keys() == loaded.keys()
    assert [n for n, p in read.items() if not torch.equal(local_part(p), local_part(loaded[n]))] == []


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_in_bfloat16_the_frozen_base_takes_two_bytes_and_the_loss_is_the_same_but_for_rounding(
    kind: str, one: Any, folders: dict[bool, str]
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        scorer = adapted(one, folders[False], KINDS[kind][0], param_dtype=dtype)
        batch = collate(lay_out(examples()[:8], "tree", 128), 8, 128)
        score = scorer(batch)
        score.nll.backward()
        found.append(float(score.nll.detach()) / float(batch.weight.sum()))
        assert {p.dtype for p in scorer.parameters() if not p.requires_grad} <= {getattr(torch, dtype), torch.uint8}
        assert {p.grad.dtype for p in scorer.parameters() if p.requires_grad and p.grad is not None} == {torch.float32}
    assert found[1] == pytest.approx(found[0], rel=0.01) and found[1] != found[0]


def test_dora_on_a_head_with_rows_of_zero_is_refused(one: Any, folders: dict[bool, str], tmp_path: Path) -> None:
    """A padding token's row often is zero, and peft would divide by its length: every logit would be NaN."""
    model = AutoModelForCausalLM.from_pretrained(folders[True])
    with torch.no_grad():
        model.lm_head.weight[:2] = 0  # and that of the padding token, which transformers made so
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft=dora on lm_head: 3 of its rows are zero"):
        adapted(one, str(tmp_path), Adapter(dora=True, targets="lm_head", rank=4))
