"""The trainer. `fit` is the cadence: what happens at which step. `train_step` is the arithmetic of one of them.

`step` counts optimiser updates from 1; step 0 is before training. A microbatch is one forward; a batch
is all examples of a step, on all ranks. The objective, over all microbatches and ranks of a step:

    loss = sum(weight * nll) / sum(weight)
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common.metrics import Metrics
from sftlab.common.progress import listeners
from sftlab.data.batch import Batch, on_device
from sftlab.data.loader import Loader, Step
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World, local_part
from sftlab.training.arriving import Arriving, send
from sftlab.training.console import Console
from sftlab.training.ending import Ending
from sftlab.training.faults import NonFinite, memory_for, shown
from sftlab.training.garbage import collected_between_steps
from sftlab.training.optim import set_lr
from sftlab.training.preempt import StopSignal
from sftlab.training.settings import TrainerSettings
from sftlab.training.throughput import Throughput
from sftlab.training.validation import VALIDATION, Evaluator, Sample


class Launched(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    data: Step
    values: Arriving


class CutShort(Exception):
    """An evaluation was left before its end, because the run was told to stop."""


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
    ending: Ending
    stop: StopSignal
    warm_up: Callable[[], None]
    around: Callable[[Iterator[Step]], Iterator[Step]]  # looks at a run from around its steps: where time goes
    base_lrs: list[float] = field(init=False)  # of each parameter group; the schedule is a factor on them
    spent_s: float = field(init=False, default=0.0)
    began_s: float = field(init=False, default=0.0)
    scored: tuple[int, float] = field(init=False, default=(-1, math.nan))  # step and loss of the last evaluation
    cut_short: bool = field(init=False, default=False)  # the evaluation of the last step is still to be made
    skipped: list[dict[str, Any]] = field(
        init=False, default_factory=list
    )  # steps that trainer.skip_nonfinite left out
    launched: deque[Launched] = field(init=False, default_factory=deque)  # steps whose numbers nobody has read yet
    lag: int = field(init=False)  # steps that the host may launch before it reads the numbers of an earlier one

    def __post_init__(self) -> None:
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.lag = 1 if self.world.device.type == "cuda" else 0

    def fit(self) -> float:
        """Train from the newest checkpoint, or step 0, to the end; return the validation (or training) loss."""
        first = 1 + self.resume()
        if not self.ending.reached(first - 1):
            self.warm_up()
        if first == 1:
            self.evaluate(0)
            self.began_s = time.perf_counter()
        elif self.cut_short:
            self.evaluate(first - 1)
        with self.stop.steps(), collected_between_steps() as garbage:
            for step, data in enumerate(self.around(self.loader.steps(first, self.ending.last_step)), first):
                self.launched.append(Launched(step, data, self.train_step(step, data)))
                stopping = self.stop.agreed()
                self.ending.look_at_clock(step, self.time_s, self.checkpoints.took_s)
                evaluating = self.due(step, self.settings.eval_every)
                reading = stopping or evaluating or self.due(step, self.settings.save_every)
                self.read_steps(leave=0 if reading else self.lag)
                if evaluating:
                    stopping = not self.evaluate_unless_stopped(step) or stopping  # it may make this step the last
                if stopping or self.due(step, self.settings.save_every) or self.ending.saves(step):
                    self.checkpoints.save(step, self.scorer, self.optimizer, self.progress(step))
                if stopping:
                    self.wait_for_save()
                    self.stop.leave(self.console.say)
                self.checkpoints.check(self.settings.on_failed_save)
                garbage.between_steps(step)
                if self.ending.reached(step):
                    break
        with self.stop.steps():  # a Ctrl-C now must not throw away what was trained
            self.wait_for_save()
        self.checkpoints.check("stop")  # without the last checkpoint there is no model to export
        if self.stop.interrupted():
            self.stop.leave(self.console.say)
        last = self.metrics.last
        return self.world.broadcast(last.get("val/loss", last.get("train/loss", math.nan)))

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        self.console.working("writing the checkpoint ...")
        self.checkpoints.wait()
        self.console.working("")

    def train_step(self, step: int, data: Step) -> Arriving:
        """Make one optimiser update; return its loss and gradient norm. Nothing here waits for the device.

        FSDP averages gradients over ranks, so the local sum is scaled by the number of ranks to make that a sum
        (`set_gradient_divide_factor(1.0)` would too, but fails on gloo). The ranks of a tensor group have the same sum.
        """
        nll = torch.zeros((), device=self.world.device)
        targets = max(data.num_targets, 1.0)
        for i, batch in enumerate(on_device(data.microbatches, self.world.device), 1):
            self.scorer.set_requires_gradient_sync(i == len(data.microbatches))  # type: ignore[operator]
            nll += self.backward(batch, self.world.data_size / targets)
        squares = squared_norm(self.scorer).to(self.world.device)  # offloaded gradients lie on the host
        nll, squares = self.world.sum(torch.stack([nll.double() / self.world.tensor, squares])).unbind()
        loss, norm = nll / targets, squares.sqrt()
        if self.settings.clip_grad_norm is not None:
            scale_down(self.scorer, self.settings.clip_grad_norm, norm)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            set_lr(group, base_lr * self.schedule(step))
        update(self.optimizer, finite=torch.isfinite(loss + norm))
        self.optimizer.zero_grad(set_to_none=True)
        return send(("train/loss", "train/grad_norm"), (loss, norm))

    def backward(self, batch: Batch, scale: float) -> Tensor:
        """Add the gradients of one microbatch; return its sum of weight * nll."""
        with memory_for(batch):
            score = self.scorer(batch)
            (score.nll * scale).backward()
        return score.nll.detach()  # type: ignore[no-any-return]

    def read_steps(self, leave: int) -> None:
        """Record the steps that were launched, all but the newest `leave`: reading waits until the device is there."""
        while len(self.launched) > leave:
            step, data, arriving = self.launched.popleft()
            values = arriving.read()
            if not math.isfinite(values["train/loss"] + values["train/grad_norm"]):
                self.skip(step, values["train/loss"], values["train/grad_norm"], data)
            self.throughput.add(data)
            if self.due(step, self.settings.log_every):
                values["train/lr"] = self.base_lrs[0] * self.schedule(step)
                values |= {"train/examples": data.num_examples, "train/targets": data.num_targets}
                self.metrics.write_numbers(step, self.time_s, {**values, **self.throughput.take_rates()})
                self.console.step(step, self.metrics.last)

    def skip(self, step: int, loss: float, norm: float, data: Step) -> None:
        """Record a step whose update was left out. Raises: NonFinite if no more may be."""
        ids = [self.loader.examples[int(i)].id for i in data.indices]
        if len(self.skipped) >= self.settings.skip_nonfinite:
            raise NonFinite(step, loss, norm, ids, len(self.skipped))
        self.skipped.append({"step": step, "examples": ids})
        self.console.say(f"step {step}: skipped, loss {loss}, gradient norm {norm}; examples: {shown(ids)}")

    def resume(self) -> int:
        """Resume from the newest checkpoint; return its step, or 0 where there is none. Later metrics are deleted."""
        found = self.checkpoints.restore(self.scorer, self.optimizer)
        progress = found or {"step": 0, "time_s": 0.0, "skipped": []}
        self.spent_s, self.skipped = progress["time_s"], progress["skipped"]
        self.cut_short = progress.get("cut_short", False)
        self.ending.restore(progress)
        self.began_s = time.perf_counter()
        self.metrics.cut(progress["step"])
        self.console.recall(*self.metrics.at_start(Sample))
        return int(progress["step"])

    def progress(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps beside tensors; `score` is the validation loss if this step was evaluated."""
        scored, score = self.scored
        epoch, window = divmod(step, self.loader.plan.steps_per_epoch)
        return {
            "time_s": self.time_s,
            "score": score if scored == step and math.isfinite(score) else None,
            "skipped": list(self.skipped),
            "cut_short": self.cut_short,
            "ending": self.ending.state(),
            "next": {"epoch": epoch, "step_in_epoch": window},  # for people: the plan is a function of the step
        }

    def due(self, step: int, every: int) -> bool:
        """Return whether something is due after this step: every `every` steps (0: never), and after the last."""
        return self.ending.reached(step) or (every > 0 and step % every == 0)

    def evaluate_unless_stopped(self, step: int) -> bool:
        """Evaluate; return False if a signal cut that short. The run then saves, and evaluates when it is resumed."""

        def look(name: str, done: int, total: int) -> None:
            # Ranks make equally many validation steps, and may answer unequally many batches of prompts.
            if (self.world.size == 1 or name == VALIDATION) and self.stop.agreed():
                raise CutShort

        listeners.append(look)
        try:
            self.evaluate(step)
        except CutShort:
            self.cut_short = True
        finally:
            listeners.remove(look)
        return not self.cut_short

    def evaluate(self, step: int) -> None:
        """Run every evaluator and record what they found."""
        scores: dict[str, float] = {}
        samples: list[Sample] = []
        began_s = time.perf_counter()
        with self.throughput.paused():
            for evaluator in self.evaluators:
                found = evaluator()
                scores |= {f"val/{name}": value for name, value in found.scores.items()}
                samples += found.samples
        if scores:
            self.metrics.write_numbers(step, self.time_s if step else 0.0, scores)
            self.console.evaluation(step, scores, samples)
        self.metrics.write_answers(step, samples)
        self.scored, self.cut_short = (step, scores.get("val/loss", math.nan)), False
        self.ending.note_score(*self.scored, took_s=time.perf_counter() - began_s)

    @property
    def time_s(self) -> float:
        """Wall seconds since the first step began, over resumes."""
        return self.spent_s + time.perf_counter() - self.began_s


def update(optimizer: Optimizer, finite: Tensor) -> None:
    """Make the optimiser's step if `finite`, a boolean on the device. Fused optimisers decide that on the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # the attribute that torch's GradScaler asks for
        # Where the weights are: torch's own copy to the host would not be waited for.
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.found_inf = (~finite).float().to(device)  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


def squared_norm(scorer: Scorer) -> Tensor:
    """Return this rank's part of the squared norm of all gradients, float64; the ranks' parts add up to the whole.

    On a CPU squares are summed pairwise. `torch.linalg.vector_norm` sums naively there: 7e-5 too small for 2 million
    elements and 1.5e-3 for 20 million, so that the norm depended on the sharding. On CUDA it sums as a tree.
    """
    gradients = [p.grad for p in scorer.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    parts = [local_part(g).float() for g in gradients]
    if parts[0].device.type == "cuda":
        squares = [norm.double().square() for norm in torch._foreach_norm(parts)]
    else:
        squares = [part.square().sum().double() for part in parts]
    return torch.stack(list(torch._foreach_div(squares, [float(num_copies(g)) for g in gradients]))).sum()


def scale_down(scorer: Scorer, max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, which is `norm`, is at most `max_norm`."""
    clip_grads_with_norm_([p for p in scorer.parameters() if p.grad is not None], max_norm, norm.float(), foreach=True)


def num_copies(gradient: Tensor) -> int:
    """Return how many ranks hold the same shard (more than one where parameters are replicated)."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_replicate())
