"""Two gloo ranks of one thread beside one process of two, on the same steps: throughput, and processor time.

    python experiments/parallel/speed.py [--rounds 3] [--steps 4]

Rounds alternate, and the best of each counts. Processor time is printed too, because it says what the second rank costs
on a machine that does other work meanwhile: exchange over gloo is copies and sums, which are processor time.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from sftlab.checkpoints.pretrained import broadcast_weights  # noqa: E402
from sftlab.data.loader import Loader, RowLayout  # noqa: E402
from sftlab.data.plan import Plan  # noqa: E402
from sftlab.models.load import skeleton  # noqa: E402
from sftlab.models.scorer import Scorer  # noqa: E402
from sftlab.parallel.ddp import ddp  # noqa: E402
from sftlab.parallel.fsdp2 import fsdp2  # noqa: E402
from sftlab.training.optim import adamw  # noqa: E402
from tests.distributed.test_objective import trainer  # noqa: E402
from tests.support import random_examples, run_distributed, tiny_llama  # noqa: E402

SPREADS = {"fsdp2": fsdp2, "ddp": ddp}
WHOLE = partial(
    tiny_llama,
    vocab=4096,
    hidden_size=256,
    intermediate_size=768,
    layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
)
BATCH = 96  # examples in a step


def timed(world: Any, name: str, threads: int, steps: int) -> tuple[float, float]:
    """Return the wall seconds of a step, and its processor seconds on this rank."""
    torch.set_num_threads(threads)
    config = WHOLE().config
    config._attn_implementation = "sdpa"
    scorer = SPREADS[name](Scorer(skeleton(config)), world, param_dtype="float32")
    broadcast_weights(scorer, WHOLE, world)
    examples = random_examples(BATCH, seed=1, vocab=4096, longest=120, groups=24)
    plan = Plan(np.array([e.group for e in examples]), BATCH, seed=0, shuffle=False, group_by_prefix=True)
    loader = Loader(examples, plan, RowLayout("tree", 1024, 4, world.rank, world.size, pad_token=2))
    made = trainer(world, scorer, {})
    made.optimizer = adamw(scorer, lr=1e-4)
    made.base_lrs = [1e-4] * 2
    data = loader.step(1)
    made.train_step(1, data).read()
    world.barrier()
    began_s, busy_s = time.perf_counter(), time.process_time()
    for step in range(2, steps + 2):
        made.train_step(step, data).read()
    return (time.perf_counter() - began_s) / steps, (time.process_time() - busy_s) / steps


def main() -> None:
    """Print seconds of a step and what two ranks reach of one process's throughput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    kinds = {"one process of two threads": (1, "fsdp2", 2), "one process of one thread": (1, "fsdp2", 1),
             "fsdp2 x2": (2, "fsdp2", 1), "ddp x2": (2, "ddp", 1)}  # fmt: skip
    best: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for kind, (ranks, name, threads) in kinds.items():
            found = run_distributed(timed, ranks, name, threads, given.steps)
            now = [max(wall for wall, _ in found), sum(busy for _, busy in found)]
            best[kind] = [min(pair) for pair in zip(now, best.get(kind, now), strict=True)]
    wall, busy = best["one process of two threads"]
    print("| | seconds per step | throughput of one process | processor seconds | of one process |")
    print("| --- | --- | --- | --- | --- |")
    for kind, (own_wall, own_busy) in best.items():
        print(f"| {kind} | {own_wall:.2f} | {wall / own_wall:.2f} | {own_busy:.2f} | {own_busy / busy:.2f} |")


if __name__ == "__main__":
    main()
