"""The trainer. `fit` is the cadence: what happens at which step. `train_step` is the arithmetic of one of them.

`step` counts optimiser updates, the first being 1; step 0 is before training. A microbatch is one forward; a batch
is all examples of a step, on all ranks. The objective, over all microbatches and ranks of a step:

    loss = sum(weight * nll) / sum(weight)
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sftlab.checkpoint import Checkpoints
from sftlab.console import Console
from sftlab.data.loader import Loader, Step
from sftlab.distributed import World
from sftlab.evaluation import Evaluator, Sample, markdown
from sftlab.metrics import Metrics
from sftlab.models.scorer import Scorer
from sftlab.settings import TrainerSettings
from sftlab.throughput import Throughput


@dataclass(kw_only=True)
class Trainer:
    """Train a sharded scorer on a loader's steps. Every collaborator is given; the trainer only calls them."""

    scorer: Scorer
    optimizer: Optimizer
    schedule: Callable[[int], float]
    loader: Loader
    evaluators: Sequence[Evaluator]
    checkpoints: Checkpoints
    metrics: Metrics
    console: Console
    throughput: Throughput
    world: World
    settings: TrainerSettings
    max_steps: int
    base_lr: float = field(init=False)
    spent_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.base_lr = self.optimizer.param_groups[0]["lr"]

    def fit(self) -> float:
        """Train from the newest checkpoint, or step 0, to `max_steps`; return the validation (or training) loss."""
        progress = self.checkpoints.restore(self.scorer, self.optimizer) or {"step": 0, "time_s": 0.0}
        first, self.spent_s = progress["step"] + 1, progress["time_s"]
        self.began_s = time.perf_counter()
        score = self.evaluate(0) if first == 1 else math.nan
        for step, data in enumerate(self.loader.steps(first, self.max_steps), first):
            if step == 1:
                self.began_s = time.perf_counter()
            values = self.train_step(step, data)
            last = step == self.max_steps
            if last or step % self.settings.log_every == 0:
                self.metrics.write(step, self.time_s, {**values, **self.throughput.read()})
                self.console.step(step, self.metrics.last)
            if last or (self.settings.eval_every and step % self.settings.eval_every == 0):
                score = self.evaluate(step)
            if last or (self.settings.save_every and step % self.settings.save_every == 0):
                self.checkpoints.save(step, self.scorer, self.optimizer, {"time_s": self.time_s})
        return self.metrics.last.get("train/loss", math.nan) if math.isnan(score) else score

    def train_step(self, step: int, data: Step) -> dict[str, float]:
        """Make one optimiser update.

        FSDP averages gradients over ranks, so the local sum is scaled by the number of ranks to make that a sum
        (`set_gradient_divide_factor(1.0)` would too, but fails on gloo).
        """
        nll = torch.zeros((), device=self.world.device)
        scale = self.world.size / max(data.num_targets, 1.0)
        for i, batch in enumerate(data.microbatches):
            self.scorer.set_requires_gradient_sync(i == len(data.microbatches) - 1)  # type: ignore[operator]
            score = self.scorer(batch.to(self.world.device))
            (score.nll * scale).backward()
            nll += score.nll.detach()
        norm = clip_gradients(self.scorer, self.settings.clip_grad_norm, self.world)
        loss = (self.world.sum(nll) / max(data.num_targets, 1.0)).item()
        if not math.isfinite(loss + norm):
            raise NonFinite(step, loss, norm, [self.loader.examples[int(i)].id for i in data.indices])
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.throughput.add(data)
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": self.base_lr * factor,
            "train/examples": data.num_examples,
            "train/targets": data.num_targets,
        }

    def evaluate(self, step: int) -> float:
        """Run every evaluator, record what they found, and return the validation loss (nan without validation)."""
        scores: dict[str, float] = {}
        samples: list[Sample] = []
        with self.throughput.paused():
            for evaluator in self.evaluators:
                found = evaluator()
                scores |= {f"val/{name}": value for name, value in found.scores.items()}
                samples += found.samples
        if scores:
            self.metrics.write(step, self.time_s if step else 0.0, scores)
            self.metrics.samples(step, samples)
            self.console.evaluation(step, scores, samples)
        if samples:
            self.metrics.text(step, "val/answers", markdown(samples))
        return scores.get("val/loss", math.nan)

    @property
    def time_s(self) -> float:
        """Wall seconds since the first step began, over resumes."""
        return self.spent_s + time.perf_counter() - self.began_s


class NonFinite(ArithmeticError):
    """A loss or gradient that is not a number. Raised on every rank, since both are sums over all."""

    def __init__(self, step: int, loss: float, norm: float, ids: Sequence[str]) -> None:
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        super().__init__(
            f"step {step}: the loss is {loss} and the gradient norm {norm}; the update was not made. Examples of this "
            f"step: {shown}. Lower optim.lr, or look at these rows; the last checkpoint is as it was"
        )


def clip_gradients(scorer: Scorer, max_norm: float | None, world: World) -> float:
    """Return the global norm of all gradients, over all ranks, and scale them down to `max_norm` if it is given.

    Squares are summed pairwise over each rank's own shards, then over ranks. `torch.linalg.vector_norm` adds up naively
    on CPU: 7e-5 too small for 2 million elements and 1.5e-3 for 20 million, so that the norm depended on the sharding.
    """
    parameters = [p for p in scorer.parameters() if p.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    for p in parameters:
        squares += local(p.grad).float().square().sum() / num_copies(p.grad)
    norm = world.sum(squares).sqrt()
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm.float(), foreach=True)
    return float(norm.item())


def local(gradient: Tensor | None) -> Tensor:
    """Return this rank's shard of a gradient."""
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def num_copies(gradient: Tensor | None) -> int:
    """Return how many ranks hold the same shard (more than one where parameters are replicated)."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_replicate())
