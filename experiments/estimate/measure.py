"""Measured peaks beside estimated ones: `python -m experiments.estimate.measure [NAME ...] [--json FILE]`.

A peak is measured by torch.profiler, which notes every block that torch's allocator gives out and takes back, also
those inside an operation, which the estimate's own tracker cannot see. What lived before (parameters and buffers) is
added. Resident memory would count Python, libraries and what malloc keeps. On CUDA the allocator itself knows its peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

TINY = (
    "model=llama3_2_1b", "model.init=random", "model.architecture.hidden_size=192",
    "model.architecture.intermediate_size=512", "model.architecture.num_hidden_layers=6",
    "model.architecture.num_attention_heads=6", "model.architecture.num_key_value_heads=2",
    "model.architecture.head_dim=32", "model.architecture.vocab_size=4096", "data=demo", "data.limit=160",
    "evaluation.num_answers=0", "tracker=none", "trainer.compile=false",
)  # fmt: skip
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, overrides
    "full": (1, ()),
    "checkpointing": (1, ("trainer.activation_checkpointing=full",)),
    "selective": (1, ("trainer.activation_checkpointing=selective",)),
    "bfloat16": (1, ("parallel.param_dtype=bfloat16",)),
    "two ranks": (2, ()),
    "long rows": (1, ("data.layout=packed", "data.row_length=2048", "trainer.batch_size=64")),
    "accumulated": (2, ("data.layout=packed", "data.row_length=512", "trainer.rows_per_microbatch=1")),
    "padded": (1, ("data.layout=padded", "model.architecture.tie_word_embeddings=false")),
}


def composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config of `train` or `estimate` with these overrides."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sftlab.config import groups, start
    from sftlab.config.overrides import inside

    OmegaConf.register_new_resolver("inside", inside, replace=True)
    os.environ.setdefault(start.START_TIME, "now")
    with initialize_config_dir(str(groups.CONF), version_base="1.3"):
        found = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def estimated(overrides: Sequence[str], ranks: int, device: str = "cpu") -> dict[str, Any]:
    """Return the numbers of the estimate; needs a process without a process group."""
    from sftlab.estimating.estimate import estimate_run

    config = composed("estimate", [*overrides, f"launcher.processes_per_node={ranks}", f"estimate.device={device}"])
    return estimate_run(config, config.pop("estimate")).numbers()


def measured(here: Any, overrides: Sequence[str], folder: str) -> int:
    """Return this rank's peak over an epoch's steps in bytes, the optimiser's state being there. Collective."""
    import torch

    from sftlab.common.run_directory import Claim
    from sftlab.parallel.world import local_part
    from sftlab.training.build import build
    from sftlab.training.preempt import StopSignal

    config = composed("train", [*overrides, f"run_dir={folder}"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    trainer = build(config, here, Path(folder), Claim(), StopSignal(here, "")).trainer
    try:
        steps = list(trainer.loader.steps(1, trainer.loader.plan.steps_per_epoch))
        if here.device.type == "cuda":
            trainer.warm_up()
            trainer.train_step(1, steps[0])
            torch.cuda.reset_peak_memory_stats(here.device)
            for step, data in enumerate(steps, 1):
                trainer.train_step(step, data)
            return int(torch.cuda.max_memory_allocated(here.device))
        before = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in map(local_part, tensors(trainer.scorer))
        }
        # A step takes 100,000 events and more. The first makes the optimiser's state, the others have it.
        largest = max(steps, key=lambda s: max(b.tokens.numel() for b in s.microbatches))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for step, data in enumerate((steps[0], largest), 1):
                trainer.train_step(step, data)
        return sum(before.values()) + peak(profile)
    finally:
        trainer.checkpoints.close()
        trainer.console.close()
        trainer.metrics.close()


def tensors(scorer: Any) -> list[Any]:
    """Return the parameters and buffers of a scorer."""
    return [*scorer.parameters(), *scorer.buffers()]


def peak(profile: Any) -> int:
    """Return the greatest sum of what was allocated on the host since the profile began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if "CPU" in str(e.device_type())]
    return max(accumulate(sizes), default=0)


def compare(name: str, device: str) -> dict[str, Any]:
    """Return one setting's estimate and measurement."""
    ranks, overrides = SETTINGS[name]
    estimate = estimated([*TINY, *overrides], ranks, device)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    done = subprocess.run([*launch, __spec__.name, "--rank", name], capture_output=True, text=True, check=False)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    if done.returncode or not peaks:
        raise SystemExit(done.stderr)
    return {"estimated": estimate["peak_bytes"], "measured": max(peaks), "phase": estimate["peak_phase"]}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("names", nargs="*", metavar="NAME")
    given.add_argument("--device", default="cpu")
    given.add_argument("--json", type=Path)
    given.add_argument("--rank", help=argparse.SUPPRESS)
    asked = given.parse_args()
    if asked.rank:
        from sftlab.parallel.world import world

        with world() as here, tempfile.TemporaryDirectory() as folder:
            print("peak", measured(here, [*TINY, *SETTINGS[asked.rank][1]], here.broadcast(folder)), flush=True)
        return
    found = {}
    for name in asked.names or SETTINGS:
        found[name] = compare(name, asked.device)
        values = found[name]
        print(
            f"{name:<14} estimated {values['estimated'] / 2**20:8.2f} MiB  measured {values['measured'] / 2**20:8.2f} "
            f"MiB  {values['estimated'] / values['measured'] - 1:+.1%}  peak in the {values['phase']}",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
