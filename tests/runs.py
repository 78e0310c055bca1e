"""Runs inside tests: composed configs, run one after the other on fresh ranks, crashed where a test wants it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.asymmetric import draws, seed_generators
from tests.ranks import on_ranks
from tests.support import free_port, join, read_jsonl


def compose(run_dir: Path, model: Path, data: tuple[Path, Path], *overrides: str) -> dict[str, Any]:
    """Return the config of a run of a few small steps on a tiny model."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sftlab.config import groups, start
    from sftlab.config.overrides import inside

    OmegaConf.register_new_resolver("inside", inside, replace=True)
    os.environ.setdefault(start.START_TIME, "now")
    with initialize_config_dir(str(groups.CONF), version_base="1.3"):
        config = compose(
            "train",
            [
                f"run_dir={run_dir}",
                f"model.name_or_path={model}",
                "data=squad",
                f"data.path={data[0]}",
                f"data.val_path={data[1]}",
                "trainer.batch_size=12",
                "optim.lr=0.01",
                "evaluation.num_answers=2",
                "evaluation.max_new_tokens=3",
                "tracker=none",
                *overrides,
            ],
        )
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def run_all(configs: Sequence[dict[str, Any]], ranks: int = 1) -> list[list[str]]:
    """Run these configs one after the other on `ranks` processes; return how each ended, on each rank.

    A key `crash_at` raises in place of that step; `stop_at` sends this process SIGTERM in it, on the last rank;
    `nan_at` lists steps whose loss is not a number. `indices` names a file that gets each step's examples. `fill_at`
    fills the disk of the file `fill` up to 64 KiB in that step; `looks_free`: the system does not say so beforehand.
    `witness` names a file that gets each step's state on each rank: the next draw of every generator, which are seeded
    by rank at step 1 and spoiled before a resume, and the optimiser's options and counts.
    """
    found = on_ranks(_run_in_turn, ranks, ranks, [free_port() for _ in configs], list(configs))
    return [list(ends) for ends in zip(*found, strict=True)]


EXTRAS = ("crash_at", "stop_at", "nan_at", "indices", "fill_at", "fill", "looks_free", "witness")


class Crash(Exception):
    pass


def _run_in_turn(rank: int, ranks: int, ports: list[int], configs: list[dict[str, Any]]) -> list[str]:
    from sftlab.training.run import run

    ends = []
    for port, config in zip(ports, configs, strict=True):
        join(rank, ranks, port)
        extra = {k: config.pop(k) for k in EXTRAS if k in config}
        restore = _patch(extra, rank, ranks)
        try:
            ends.append(f"score {run(config, [])!r}")
        except SystemExit as left:
            ends.append(f"exit {left.code}")
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
        restore()
    return ends


def _patch(extra: dict[str, Any], rank: int, ranks: int) -> Any:
    import json
    import signal

    from sftlab.training.trainer import Trainer

    original = Trainer.train_step
    backward = Trainer.backward

    def train_step(self: Trainer, step: int, data: Any) -> Any:
        if step == extra.get("crash_at"):
            self.checkpoints.wait()  # so that a test knows what there is to resume from
            raise Crash
        if step == extra.get("stop_at") and rank == ranks - 1:
            signal.raise_signal(signal.SIGTERM)
        if step == extra.get("fill_at"):
            self.checkpoints.wait()
            fill(Path(extra["fill"]))
        if "indices" in extra and rank == 0:
            with open(extra["indices"], "a") as file:
                file.write(json.dumps({"step": step, "indices": data.indices.tolist()}) + "\n")
        spoiled = step in extra.get("nan_at", ())
        Trainer.backward = (lambda s, b, scale: backward(s, b, scale) * float("nan")) if spoiled else backward
        values = original(self, step, data)
        if "witness" in extra:
            bear_witness(self, step, f"{extra['witness']}.{rank}", rank)
        return values

    if "witness" in extra:
        seed_generators(1000 + rank)  # a resume must not depend on what this process drew before
    usage = shutil.disk_usage
    if extra.get("looks_free"):
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)

    def restore() -> None:
        shutil.disk_usage = usage
        if "fill" in extra:
            Path(extra["fill"]).unlink(missing_ok=True)
        Trainer.train_step, Trainer.backward = original, backward

    Trainer.train_step = train_step
    return restore


def bear_witness(trainer: Any, step: int, path: str, rank: int) -> None:
    """Add to a file what training itself never reads back: generators, options, counts and clocks of this rank."""
    import json

    if step == 1:
        seed_generators(rank)
    state = trainer.optimizer.state
    line = {
        "step": step,
        "draws": draws(),
        "options": [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups],
        "updates": sorted({float(state[p]["step"]) for p in trainer.scorer.parameters()}),
        "skipped": trainer.skipped,
        "time_s": trainer.time_s,
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def fill(path: Path, leave: int = 1 << 16) -> None:
    """Write a file that leaves `leave` bytes of its disk."""
    with path.open("wb") as file:
        while (free := os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize) > leave:
            file.write(bytes(min(free - leave, 1 << 16)))
            file.flush()


def run_here(config: dict[str, Any]) -> str:
    """Run a config in this process, a world of one, with the keys that `run_all` takes; return how it ended."""
    from sftlab.training.run import run

    extra = {k: config[k] for k in EXTRAS if k in config}
    restore = _patch(extra, 0, 1)
    try:
        return f"score {run({k: v for k, v in config.items() if k not in EXTRAS}, [])!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        restore()


def measured(run_dir: Path, *prefixes: str) -> dict[tuple[int, str], Any]:
    """Return {(step, metric): value} of a run's train/ and val/ metrics; a step that is there twice is an error."""
    found: dict[tuple[int, str], Any] = {}
    for line in read_jsonl(run_dir / "metrics.jsonl"):
        for name, value in line.items():
            if name.startswith(prefixes or ("train/", "val/")):
                assert (line["step"], name) not in found, f"step {line['step']} is there twice"
                found[line["step"], name] = value
    return found
