"""Every parallelism makes the same run: losses, norms, weights, answers, and checkpoints that any other resumes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from sftlab.checkpoints.hugging_face import weights_of
from sftlab.checkpoints.pretrained import broadcast_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.inference.sharded import Generator
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.ddp import ddp
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.fsdp2_tp import fsdp2_tp
from sftlab.parallel.hsdp import hsdp
from sftlab.training.optim import adamw
from sftlab.training.settings import TrainerSettings
from sftlab.training.validation import AnswerEvaluator, LossEvaluator
from tests.asymmetric import for_ranks_that_get_unequal_shares
from tests.distributed.test_objective import trainer
from tests.support import byte_tokenizer, random_examples, run_distributed, tiny_llama

SAVED, STEPS, LR = 4, 10, 3e-3


@dataclass(frozen=True)
class Spread:
    """A parallelism and its sizes; `held` is the share of all elements that a rank keeps."""

    make: Callable[..., Scorer]
    held: float
    options: dict[str, Any] = field(default_factory=dict)


COPIES = {"tensor": 2, "replicate": 2}
ON = {
    1: {"one": Spread(fsdp2, 1)},
    2: {
        "fsdp2 x2": Spread(fsdp2, 1 / 2, {"cpu_offload": True}),
        "ddp x2": Spread(ddp, 1),
        "tensor 2": Spread(fsdp2_tp, 1 / 2, {"tensor": 2}),
    },
    4: {
        "fsdp2 x4": Spread(fsdp2, 1 / 4, {"prefetch": 1, "reshard_after_forward": False}),
        "hsdp 2x2": Spread(hsdp, 1 / 2, {"replicate": 2, "prefetch": 2}),
        "tensor 2 x fsdp2 2": Spread(fsdp2_tp, 1 / 4, {"tensor": 2, "activation_checkpointing": "full"}),
        "tensor 2 x ddp 2": Spread(fsdp2_tp, 1 / 2, {**COPIES, "activation_checkpointing": "selective"}),
    },
}
NAMES = [name for spreads in ON.values() for name in spreads]


def quiet(text: str) -> None:
    pass


def llama() -> Any:
    """Return a model whose head is its embedding, with biases."""
    return tiny_llama(attention_bias=True)


def qwen3() -> Any:
    """Return a model with a head of its own, and norms that each rank of a tensor group runs on its own heads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    return Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    )


class Run:
    """A small model in training on this world, spread as one of ON."""

    def __init__(self, world: Any, spread: Spread, whole: Callable[[], Any], folder: Path) -> None:
        config = whole().config
        config._attn_implementation = "sdpa"
        scorer = spread.make(Scorer(skeleton(config)), world, param_dtype="float32", **spread.options)
        broadcast_weights(scorer, whole, world)
        self.world = replace(world, tensor=spread.options.get("tensor", 1))
        self.examples = random_examples(40, seed=3)
        plan = Plan(np.array([e.group for e in self.examples]), 8, seed=0, shuffle=True, group_by_prefix=False)
        rows = RowLayout("tree", 128, 1, self.world.data_rank, self.world.data_size, pad_token=2)
        self.loader = Loader(self.examples, plan, rows)
        self.trainer = trainer(self.world, scorer, {})
        self.scorer, self.trainer.optimizer = scorer, adamw(scorer, lr=LR)
        self.trainer.base_lrs = [LR] * 2
        self.trainer.settings = TrainerSettings(batch_size=8, clip_grad_norm=0.5)
        self.folder = folder

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        found = []
        for step in range(first, last + 1):
            values = self.trainer.train_step(step, self.loader.step(step)).read()
            found.append((values["train/loss"], values["train/grad_norm"]))
        return found

    def save(self) -> None:
        checkpoints = Checkpoints(self.folder, 1, self.world, quiet)
        checkpoints.save(SAVED, self.scorer, self.trainer.optimizer, {})
        checkpoints.wait()
        checkpoints.check("stop")

    def resume(self, source: Path) -> None:
        checkpoints = Checkpoints(self.folder / "unused", 1, self.world, quiet, source=source)
        assert checkpoints.restore(self.scorer, self.trainer.optimizer) is not None

    def scores(self) -> dict[str, float]:
        plan, rows = self.loader.plan, self.loader.row_layout
        return dict(LossEvaluator(self.scorer, self.examples, plan, rows, self.world)().scores)

    def answers(self) -> list[Any]:
        generator = Generator(self.scorer, byte_tokenizer(), frozenset(), self.world, max_new_tokens=4)
        asked = for_ranks_that_get_unequal_shares()[:3]
        return list(AnswerEvaluator(generator, asked, lambda a, r: {"long": len(a)}, self.world)().samples)

    def held(self) -> float:
        parameters = [p for p in self.scorer.parameters() if isinstance(p, DTensor)]
        return sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in self.scorer.parameters())


def everything(world: Any, folder: Path, others: list[str]) -> dict[str, Any]:
    """Return what each parallelism of this world came to, and what it made of the checkpoints of others."""
    found: dict[str, Any] = {}
    for name, spread in ON[world.size].items():
        run = Run(world, spread, llama, folder / name)
        if not run.folder.exists():
            steps = run.steps(1, SAVED)
            run.save()
            held, scores, answers = run.held(), run.scores(), run.answers()
            found[name] = {"held": held, "scores": scores, "answers": answers}
            found[name]["steps"] = steps + run.steps(SAVED + 1, STEPS)
            found[name]["qwen3"] = Run(world, spread, qwen3, folder / "unused").steps(1, 3)
        for other in others:
            resumed = Run(world, spread, llama, folder / "unused")
            resumed.resume(folder / other / f"step_{SAVED:08d}")
            found[f"{name} of {other}"] = {"steps": resumed.steps(SAVED + 1, STEPS)}
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, one: Any) -> tuple[Path, list[dict[str, Any]]]:
    """What each rank of each world found. Every kind of checkpoint is resumed by a world of another size."""
    folder = tmp_path_factory.mktemp("parallel")
    before = ["one"]
    found = [everything(one, folder, [])]
    found += run_distributed(everything, 2, folder, before)
    found += run_distributed(everything, 4, folder, ["tensor 2", "ddp x2"])
    found += run_distributed(everything, 2, folder, ["tensor 2 x fsdp2 2", "hsdp 2x2"])
    found.append(everything(one, folder, ["tensor 2 x fsdp2 2", "tensor 2 x ddp 2"]))
    return folder, found


def of(seen: Any, name: str) -> list[dict[str, Any]]:
    return [found[name] for found in seen[1] if name in found]


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_have_the_losses_and_norms_of_one_process(name: str, seen: Any) -> None:
    (expected,) = of(seen, "one")
    ranks = of(seen, name)
    assert len(ranks) == next(n for n, spreads in ON.items() if name in spreads)
    for found in ranks:
        for key in ("steps", "qwen3"):
            for (loss, norm), (theirs, other) in zip(found[key], expected[key], strict=True):
                assert loss == pytest.approx(theirs, abs=1e-5)
                assert norm == pytest.approx(other, rel=1e-5)
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
        assert found["answers"] == expected["answers"] and len(found["answers"]) == 3
    assert expected["steps"][0][0] - expected["steps"][-1][0] > 0.3, "it learns"


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_holds_its_share(name: str, seen: Any) -> None:
    spread = {n: s for spreads in ON.values() for n, s in spreads.items()}[name]
    for found in of(seen, name):
        assert found["held"] == pytest.approx(spread.held, rel=0.03)  # norms and some biases are whole in a group


def test_a_checkpoint_of_any_is_resumed_by_any_other(seen: Any) -> None:
    (expected,) = of(seen, "one")
    pairs = {name for found in seen[1] for name in found if " of " in name}
    assert len(pairs) == 3 + 2 * 4 + 2 * 3 + 2
    for pair in pairs:
        for found in of(seen, pair):
            for ours, theirs in zip(found["steps"], expected["steps"][SAVED:], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), pair


@pytest.mark.parametrize("name", NAMES[1:])
def test_an_export_has_the_weights_of_one_process(name: str, seen: Any) -> None:
    ours, theirs = (weights_of(seen[0] / n / f"step_{SAVED:08d}", torch.float32) for n in (name, "one"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=2e-5)
