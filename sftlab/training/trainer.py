"""The trainer. `fit` is the cadence: what happens at which step. `train_step` is the arithmetic of one of them.

`step` counts optimiser updates from 1; step 0 is before training. A microbatch is one forward; a batch
is all examples of a step, on all ranks. The objective, over all microbatches and ranks of a step:

    loss = sum(weight * nll) / sum(weight)
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common.metrics import Metrics
from sftlab.data.batch import Batch
from sftlab.data.loader import Loader, Step
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World, local_part
from sftlab.training.console import Console
from sftlab.training.faults import NonFinite, memory_for, shown
from sftlab.training.preempt import StopSignal
from sftlab.training.settings import TrainerSettings
from sftlab.training.throughput import Throughput
from sftlab.training.validation import Evaluator, Sample, markdown


@dataclass(kw_only=True)
class Trainer:
    """Train a sharded scorer on a loader's steps. It builds none of its collaborators; it only calls them."""

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
    stop: StopSignal
    base_lrs: list[float] = field(init=False)  # of each parameter group; the schedule is a factor on them
    spent_s: float = field(init=False, default=0.0)
    began_s: float = field(init=False, default=0.0)
    scored: tuple[int, float] = field(init=False, default=(-1, math.nan))  # step and loss of the last evaluation
    skipped: list[dict[str, Any]] = field(
        init=False, default_factory=list
    )  # steps that trainer.skip_nonfinite left out

    def __post_init__(self) -> None:
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def fit(self) -> float:
        """Train from the newest checkpoint, or step 0, to `max_steps`; return the validation (or training) loss."""
        first = 1 + self.resume()
        self.warm_up(first)
        if first == 1:
            self.evaluate(0)
            self.began_s = time.perf_counter()
        for step, data in enumerate(self.loader.steps(first, self.max_steps), first):
            values = self.train_step(step, data)
            stopping = self.stop.agreed()
            if self.due(step, self.settings.log_every):
                self.metrics.write_numbers(step, self.time_s, {**values, **self.throughput.take_rates()})
                self.console.step(step, self.metrics.last)
            if self.due(step, self.settings.eval_every):
                self.evaluate(step)
            if stopping or self.due(step, self.settings.save_every):
                self.checkpoints.save(step, self.scorer, self.optimizer, self.progress(step))
            if stopping:
                self.checkpoints.wait()
                self.stop.leave(self.console.say)
            self.checkpoints.check(self.settings.on_failed_save)
        self.checkpoints.wait()
        self.checkpoints.check("stop")  # without the last checkpoint there is no model to export
        last = self.metrics.last
        return self.world.broadcast(last.get("val/loss", last.get("train/loss", math.nan)))

    def train_step(self, step: int, data: Step) -> dict[str, float]:
        """Make one optimiser update.

        FSDP averages gradients over ranks, so the local sum is scaled by the number of ranks to make that a sum
        (`set_gradient_divide_factor(1.0)` would too, but fails on gloo).
        """
        nll = torch.zeros((), device=self.world.device)
        scale = self.world.size / max(data.num_targets, 1.0)
        for i, batch in enumerate(data.microbatches):
            self.scorer.set_requires_gradient_sync(i == len(data.microbatches) - 1)  # type: ignore[operator]
            nll += self.backward(batch, scale)
        norm = clip_gradients(self.scorer, self.settings.clip_grad_norm, self.world)
        loss = (self.world.sum(nll) / max(data.num_targets, 1.0)).item()
        factor = self.schedule(step)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        if math.isfinite(loss + norm):
            self.optimizer.step()
        else:
            self.skip(step, loss, norm, data)
        self.optimizer.zero_grad(set_to_none=True)
        self.throughput.add(data)
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": self.base_lrs[0] * factor,
            "train/examples": data.num_examples,
            "train/targets": data.num_targets,
        }

    def backward(self, batch: Batch, scale: float) -> Tensor:
        """Add the gradients of one microbatch; return its sum of weight * nll."""
        with memory_for(batch):
            score = self.scorer(batch.to(self.world.device))
            (score.nll * scale).backward()
        return score.nll.detach()  # type: ignore[no-any-return]

    def skip(self, step: int, loss: float, norm: float, data: Step) -> None:
        """Record a step whose update is left out. Raises: NonFinite if no more may be."""
        ids = [self.loader.examples[int(i)].id for i in data.indices]
        if len(self.skipped) >= self.settings.skip_nonfinite:
            raise NonFinite(step, loss, norm, ids, len(self.skipped))
        self.skipped.append({"step": step, "examples": ids})
        self.console.say(f"step {step}: skipped, loss {loss}, gradient norm {norm}; examples: {shown(ids)}")

    def warm_up(self, first: int) -> None:
        """Run the largest microbatch once with weights of 0 and discard its gradients: memory runs out now or never.

        Only on CUDA, where the device's memory is the limit. On a CPU this would cost the demo seconds.
        """
        if self.world.device.type == "cuda" and first <= self.max_steps:
            batch = self.loader.largest()
            self.scorer.set_requires_gradient_sync(True)  # type: ignore[operator]
            self.backward(replace(batch, weight=torch.zeros_like(batch.weight)), 1.0)
            self.optimizer.zero_grad(set_to_none=True)

    def resume(self) -> int:
        """Resume from the newest checkpoint; return its step, or 0 where there is none. Later metrics are deleted."""
        found = self.checkpoints.restore(self.scorer, self.optimizer)
        progress = found or {"step": 0, "time_s": 0.0, "skipped": []}
        self.spent_s, self.skipped = progress["time_s"], progress["skipped"]
        self.began_s = time.perf_counter()
        self.metrics.cut(progress["step"])
        return int(progress["step"])

    def progress(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps beside tensors; `score` is the validation loss if this step was evaluated."""
        scored, score = self.scored
        epoch, window = divmod(step, self.loader.plan.steps_per_epoch)
        return {
            "time_s": self.time_s,
            "score": score if scored == step and math.isfinite(score) else None,
            "skipped": list(self.skipped),
            "next": {"epoch": epoch, "step_in_epoch": window},  # for people: the plan is a function of the step
        }

    def due(self, step: int, every: int) -> bool:
        """Return whether something is due after this step: every `every` steps (0: never), and after the last."""
        return step == self.max_steps or (every > 0 and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Run every evaluator and record what they found."""
        scores: dict[str, float] = {}
        samples: list[Sample] = []
        with self.throughput.paused():
            for evaluator in self.evaluators:
                found = evaluator()
                scores |= {f"val/{name}": value for name, value in found.scores.items()}
                samples += found.samples
        if scores:
            self.metrics.write_numbers(step, self.time_s if step else 0.0, scores)
            self.metrics.samples(step, samples)
            self.console.evaluation(step, scores, samples)
        if samples:
            self.metrics.write_text(step, "val/answers", markdown(samples))
        self.scored = (step, scores.get("val/loss", math.nan))

    @property
    def time_s(self) -> float:
        """Wall seconds since the first step began, over resumes."""
        return self.spent_s + time.perf_counter() - self.began_s


def clip_gradients(scorer: Scorer, max_norm: float | None, world: World) -> float:
    """Return the global norm of all gradients, over all ranks, and scale them down to `max_norm` if it is given.

    Squares are summed pairwise over the shards of a rank, then over ranks. `torch.linalg.vector_norm` sums naively on a
    CPU: 7e-5 too small for 2 million elements and 1.5e-3 for 20 million, so that the norm depended on the sharding.
    """
    parameters = [p for p in scorer.parameters() if p.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        squares += local_part(gradient).float().square().sum() / num_copies(gradient)
    norm = world.sum(squares).sqrt()
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm.float(), foreach=True)
    return float(norm.item())


def num_copies(gradient: Tensor) -> int:
    """Return how many ranks hold the same shard (more than one where parameters are replicated)."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_replicate())
