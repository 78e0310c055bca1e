"""What grows with the number of ranks, measured on one machine with up to 1,024 fake ranks.

    OMP_NUM_THREADS=1 python experiments/many_ranks/measure.py [--ranks 1,8,64,512,1024] [--examples-per-rank 8]

The layout and the plan are the run's own code, for one rank of so many. Meshes, sharding and checkpoint plans are made
with torch's fake process group, whose collectives return at once: what is measured is the work of a process, and what
it would send; how long the network takes is not. Gloo's own collectives are measured with real groups of up to 32
members, which are threads here.
"""

import argparse
import json
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from sftlab.common.code import code_version, require_same_code
from sftlab.data.example import Example
from sftlab.data.loader import RowLayout
from sftlab.data.plan import Plan
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.parallel.hsdp import hsdp
from sftlab.parallel.world import World
from sftlab.training.optim import adamw

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 32, "vocab_size": 2048, "head_dim": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
GROUP = 5  # examples on one passage, as in SQuAD


def seconds(act: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Return the least time of some calls, and what the last returned."""
    took = []
    for _ in range(times):
        began_s = time.perf_counter()
        found = act()
        took.append(time.perf_counter() - began_s)
    return min(took), found


def examples_like_squad(num: int) -> list[Example]:
    """Return examples of SQuAD's lengths: passages of 150 tokens with five questions of 40 each."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(num):
        if i % GROUP == 0:
            passage = rng.integers(3, 1000, int(rng.integers(80, 250))).astype(np.int32)
        tokens = np.concatenate([passage, rng.integers(3, 1000, int(rng.integers(20, 60))).astype(np.int32)])
        made.append(Example(tokens, np.arange(len(tokens)) >= len(tokens) - 5, str(i), i // GROUP))
    return made


def layout(ranks: int, per_rank: int) -> dict[str, float]:
    """Return the seconds that a rank takes to plan and lay out one step of `per_rank` examples for each rank."""
    batch = ranks * per_rank
    examples = examples_like_squad(2 * batch)
    groups = np.array([e.group for e in examples])
    plan_s, plan = seconds(lambda: Plan(groups, batch, 0, True, True))
    chosen_s, indices = seconds(lambda: plan.examples(1))
    rows = RowLayout("tree", 4096, 8, ranks // 2, ranks, pad_token=0, joined=True)
    arrange_s, _ = seconds(lambda: rows.arrange([examples[int(i)] for i in indices], indices), 2)
    return {"plan, once": plan_s, "examples of a step": chosen_s, "layout of a step": arrange_s}


def faked(ranks: int, act: Callable[[World], Any]) -> Any:
    """Return what `act` returns as rank 0 of so many ranks that are not there."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        return act(World(0, ranks, 0, CPU))
    finally:
        dist.destroy_process_group()


def start(world: World) -> dict[str, float]:
    """Return the seconds for meshes and sharding, as one group and in copies of 8 ranks."""
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    found = {}
    for name, spread in (("fsdp2", fsdp2), ("hsdp", partial(hsdp, replicate=max(1, world.size // 8)))):
        scorer = Scorer(skeleton(config))
        began_s = time.perf_counter()
        spread(scorer, world, param_dtype="float32")
        found[f"mesh and sharding, {name}"] = time.perf_counter() - began_s
    return found


def checkpoint(world: World) -> dict[str, float]:
    """Return seconds and bytes of a checkpoint's plan, of a model of 291 parameters with AdamW's two moments each."""
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    scorer = fsdp2(Scorer(skeleton(config)), world, param_dtype="float32")
    scorer._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    optimizer = adamw(scorer, lr=1e-3)
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    model, state = get_state_dict(scorer, optimizer)
    planner = DefaultSavePlanner()
    planner.set_up_planner({"model": model, "optimizer": state}, is_coordinator=True)
    writer = FileSystemWriter("/tmp/unused")
    writer.set_up_storage_writer(True)
    local_s, local = seconds(planner.create_local_plan)
    sent = pickle.dumps(local)
    plans = [pickle.loads(sent) for _ in range(world.size)]
    # As if each were another rank's: its chunks begin elsewhere.
    plans = [
        replace(plan, items=[there for item in plan.items if (there := moved(item, rank)) is not None])
        for rank, plan in enumerate(plans)
    ]
    began_s = time.perf_counter()
    received = [pickle.dumps(plan) for plan in plans]
    for part in received:
        pickle.loads(part)
    unpickle_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    plans, metadata = planner.create_global_plan(plans)
    global_s = time.perf_counter() - began_s
    index = len(pickle.dumps(metadata))
    return {
        "checkpoint: plan of a rank": local_s,
        "checkpoint: all plans to rank 0 and back, pickled": unpickle_s,
        "checkpoint: global plan on rank 0": global_s,
        "checkpoint: bytes of a rank's plan": len(sent),
        "checkpoint: bytes of the index": index,
    }


def moved(item: Any, rank: int) -> Any:
    """Return a write item of another rank: its chunk begins so many rows further on. None if no rows are left."""
    if item.tensor_data is None:
        return item
    chunk = item.tensor_data.chunk
    offsets = (
        torch.Size([chunk.offsets[0] + rank * chunk.sizes[0], *chunk.offsets[1:]]) if chunk.offsets else chunk.offsets
    )
    if offsets and offsets[0] >= item.tensor_data.size[0]:
        return None
    index = replace(item.index, offset=offsets)
    return replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=replace(chunk, offsets=offsets)))


def gathers(ranks: int) -> dict[str, float]:
    """Return what the gathers of objects cost beside the network: pickling, and bytes that every rank receives."""
    mine = ("host-000001", code_version())
    everybody = [mine] * ranks
    check_s, _ = seconds(lambda: require_same_code(everybody))
    payload = pickle.dumps(mine)
    unpickle_s, _ = seconds(lambda: [pickle.loads(payload) for _ in range(ranks)])
    code_s, _ = seconds(code_version)
    return {
        "start: hash of the code": code_s,
        "start: comparing all ranks' code": check_s + unpickle_s,
        "start: bytes received for it": len(payload) * ranks,
    }


def gloo(members: int, rounds: int = 50) -> float:
    """Return the seconds of an all-reduce of two numbers over gloo; the members are threads of this process."""
    store, took = dist.HashStore(), [0.0] * members

    def member(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, members)
        value = torch.zeros(2, dtype=torch.float64)
        for _ in range(5):
            group.allreduce([value]).wait()
        began_s = time.perf_counter()
        for _ in range(rounds):
            group.allreduce([value]).wait()
        took[rank] = (time.perf_counter() - began_s) / rounds

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(took)


def main() -> None:
    """Measure, and print one JSON object per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,8,64,512,1024")
    parser.add_argument("--examples-per-rank", type=int, default=8)
    given = parser.parse_args()
    for ranks in map(int, given.ranks.split(",")):
        found: dict[str, Any] = {"ranks": ranks, **layout(ranks, given.examples_per_rank), **gathers(ranks)}
        found |= faked(ranks, start) | faked(ranks, checkpoint)
        print(json.dumps({k: v if isinstance(v, int) else round(v, 5) for k, v in found.items()}), flush=True)
    for members in (2, 4, 8, 16, 32):
        print(json.dumps({"gloo members": members, "all-reduce of two numbers, ms": round(1e3 * gloo(members), 3)}))


if __name__ == "__main__":
    main()
