"""Throughput: how fast a run is, in numbers that cannot be confused.

`perf/tokens_per_s` counts tokens that go through the model, padding included. `perf/effective_tokens_per_s` counts the
tokens that the same examples would have in rows of their own. `perf/targets_per_s` counts supervised tokens. All are
sums over all ranks. `time/` are this rank's seconds per step (laps.py).
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sftlab.data.loader import Step
from sftlab.models.architecture import in_layers
from sftlab.models.decoder import decoder_blocks
from sftlab.models.nf4 import num_weights
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World
from sftlab.training.laps import Laps

# Dense bfloat16 FLOP/s from the vendors' data sheets, without sparsity.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


class Throughput:
    """Sums over the steps since the last reading, without the time in which training was paused (evaluation)."""

    def __init__(self, scorer: Scorer, world: World, laps: Laps) -> None:
        self.world = world
        self.laps = laps
        self.flops = FlopCount(scorer)
        self.began_s = time.perf_counter()
        self.sums: defaultdict[str, float] = defaultdict(float)  # of the steps since the last reading

    def add(self, step: Step) -> None:
        """Count a finished step."""
        self.sums["steps"] += 1
        self.sums["examples"] += step.num_examples
        self.sums["tokens"] += step.num_tokens
        self.sums["effective_tokens"] += step.num_effective_tokens
        self.sums["targets"] += step.num_targets
        self.sums["flops"] += self.flops.of(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent inside."""
        paused_s = time.perf_counter()
        with self.laps.inside("evaluation"):
            yield
        self.began_s += time.perf_counter() - paused_s

    def take_rates(self) -> dict[str, float]:
        """Return the rates since the last reading, and reset the sums."""
        now_s = time.perf_counter()
        elapsed_s = max(now_s - self.began_s, 1e-9)
        names = ("examples", "tokens", "effective_tokens", "targets")
        rates = {f"perf/{name}_per_s": self.sums[name] / elapsed_s for name in names}
        if self.world.device.type == "cuda":
            name = torch.cuda.get_device_name(self.world.device)
            peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
            if peak:
                rates["perf/mfu"] = self.sums["flops"] / elapsed_s / peak / self.world.size
            rates["mem/peak_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        else:
            rates["mem/peak_gib"] = peak_of_process()
        rates |= self.laps.take(int(self.sums["steps"]))
        self.began_s = now_s
        self.sums.clear()
        return rates


def peak_of_process() -> float:
    """Return the most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class FlopCount:
    """The floating-point operations that forward and backward of a step need, as the step is laid out.

    6 per matmul parameter and token in the decoder blocks; 6 per head parameter and prediction, because the head runs
    only there; 4 for a frozen one, which gets no gradient; 12 * width of all query heads per layer and (token, attended
    token) pair. Recomputation and padding do
    not count. (PaLM's convention counts the head at every token, and attention as if it were not causal.)
    """

    def __init__(self, scorer: Scorer) -> None:
        config = scorer.model.config.get_text_config()
        blocks = [block for _, _, block in decoder_blocks(scorer.model)]
        self.body: int = sum(operations(block) for block in blocks)
        self.head: int = operations(scorer.model.get_output_embeddings())
        heads, width = (in_layers(config, name, len(blocks)) for name in ("num_attention_heads", "head_dim"))
        # Mamba has no heads; a width that is not named is the model's over its heads.
        self.attention: int = sum(n * (w or 0) or config.hidden_size for n, w in zip(heads, width, strict=True) if n)

    def of(self, step: Step) -> float:
        """Return the operations of one step over all ranks."""
        matmuls = self.body * step.num_nodes + self.head * step.num_predictions
        return float(matmuls) + 12.0 * self.attention * step.pairs


def operations(module: nn.Module) -> int:
    """Return the operations of a module's matrices per token: product, gradient of the input, and their own gradient.

    What an adapter trains whole lies beside the base's own, which does not run.
    """
    run = [p for name, p in module.named_parameters() if p.ndim >= 2 and "original_module." not in name]
    return sum(num_weights(p) * (6 if p.requires_grad else 4) for p in run)
