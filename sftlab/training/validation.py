"""Evaluation within a run: the loss over a whole split, and answers generated on a sample of it.

An evaluator is a callable that returns named scores; the loop knows nothing else about it. The loss is the training
objective over the whole split, so it does not depend on the evaluation batch size, the layout or the ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from sftlab.common.progress import counted
from sftlab.data.example import Example
from sftlab.data.loader import RowLayout
from sftlab.data.plan import Plan, shuffled
from sftlab.inference.sharded import Generator
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World


@dataclass(frozen=True)
class Sample:
    """One generated answer beside the accepted ones."""

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and sampled generations where there are any."""

    scores: Mapping[str, float]
    samples: Sequence[Sample] = field(default_factory=tuple)


VALIDATION = "validation steps"  # what its progress is called
Evaluator = Callable[[], Evaluation]


@dataclass(frozen=True)
class LossEvaluator:
    """Loss (nats per target), perplexity and token accuracy over all `examples`."""

    scorer: Scorer
    examples: Sequence[Example]
    plan: Plan
    row_layout: RowLayout
    world: World

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Score every example once."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # nll, correct, weight
        steps = self.plan.steps_per_epoch
        for step in counted(VALIDATION, range(1, steps + 1), steps):
            indices = self.plan.examples(step)
            arranged = self.row_layout.arrange([self.examples[int(i)] for i in indices], indices)
            for batch in arranged.microbatches:
                score = self.scorer(batch.to(self.world.device))
                sums += torch.stack([score.nll.double(), score.correct.double(), batch.weight.sum().to(sums)])
        nll, correct, weight = self.world.sum(sums / self.world.tensor).tolist()
        loss, accuracy = (nll / weight, correct / weight) if weight else (math.nan, math.nan)
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy})


@dataclass(frozen=True)
class AnswerEvaluator:
    """The format's own scores (SQuAD: exact match, F1) of greedy answers to `examples`, divided over the ranks.

    In a mixture the names of the scores begin with `source`.
    """

    generator: Generator
    examples: Sequence[Example]
    score: Callable[[str, Sequence[str]], Mapping[str, float]]
    world: World
    source: str = ""

    def __call__(self) -> Evaluation:
        """Answer every example once, each on one rank, or on one tensor group."""
        mine = self.examples[self.world.data_rank :: self.world.data_size]
        # A rank without an example answers one all the same. In the next backward FSDP gathers what ran last before
        # the forward: a rank on which nothing had run did not take part in that, and the others waited for ever.
        prompts = [e.tokens[: e.num_prompt] for e in mine or self.examples[:1]]
        answers = self.generator.answers(prompts)[: len(mine)]
        samples = [
            Sample(e.id, self.generator.decode_text(e.tokens[: e.num_prompt]), answer, e.references)
            for e, answer in zip(mine, answers, strict=True)
        ]
        parts = self.world.gather(samples)[:: self.world.tensor]  # ranks of a tensor group have the same ones
        gathered = sorted((s for part in parts for s in part), key=lambda s: s.id)
        scores = [self.score(s.answer, s.references) for s in gathered]
        prefix = f"{self.source}/" if self.source else ""
        names = dict.fromkeys(name for s in scores for name in s)  # answers in words and tool calls have different ones
        means = {prefix + name: float(np.mean([s[name] for s in scores if name in s])) for name in names}
        return Evaluation(means, gathered)


def sample(examples: Sequence[Example], num: int) -> list[Example]:
    """Return `num` of the examples that have reference answers, the same ones in every run."""
    order = shuffled(len(examples), 0, 0)
    chosen = (examples[int(i)] for i in order)
    return list(islice((e for e in chosen if e.references), num))
