"""A run from start to end on this rank: check, join the world, claim the directory, build, fit, leave the model behind.

What every launcher calls, with a plain resolved config, in every process.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab import rundir
from sftlab.build import Run, build, check
from sftlab.console import duration
from sftlab.distributed import World, world
from sftlab.models.weights import export, parameter_count
from sftlab.parallel import compute_dtype

log = logging.getLogger(__name__)


def run(config: Mapping[str, Any], overrides: Sequence[str]) -> float:
    """Return the final validation loss (nats per target), or the training loss where there is no validation.

    Raises: what went wrong, on every rank that met it.
    """
    check(config)
    run_dir = Path(config["run_dir"])
    with world() as here:
        quiet_libraries(here)
        claim(run_dir, config, overrides, here)
        began_s, made = time.time(), None
        try:
            made = build(config, here, run_dir)
            if here.is_main:
                made.trainer.console.facts(f"sftlab: {config['name']}", facts(config, made))
            score = made.trainer.fit()
            dtype = compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)
            export(made.trainer.scorer, made.tokenizer, run_dir / "model", dtype, here)
            if here.is_main:
                finish(made, score, time.time() - began_s)
        except BaseException as error:
            if here.is_main:
                with (run_dir / "train.log").open("a") as file:
                    file.write("".join(traceback.format_exception(error)))
                rundir.write_summary(run_dir, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
            raise
        finally:
            if made is not None:
                made.trainer.console.close()
                made.trainer.metrics.close()
    return score


def claim(run_dir: Path, config: Mapping[str, Any], overrides: Sequence[str], here: World) -> None:
    """Claim the run directory on rank 0; a refusal is raised on every rank."""
    refusal = None
    if here.is_main:
        try:
            rundir.claim(run_dir, config, overrides)
        except (OSError, rundir.RunDirError) as error:
            refusal = error
    refusal = here.broadcast(refusal)
    if refusal is not None:
        raise refusal


def quiet_libraries(here: World) -> None:
    """Warnings of libraries on rank 0, errors elsewhere; progress bars on rank 0's terminal only."""
    import datasets

    quiet_transformers(logging.WARNING if here.is_main else logging.ERROR)
    if not here.is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def quiet_transformers(level: int = logging.WARNING) -> None:
    """Log from `level` on, and let transformers draw no progress bars."""
    import transformers

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.disable_progress_bar()


def facts(config: Mapping[str, Any], made: Run) -> dict[str, str]:
    """Return what will run, in words."""
    trainer = made.trainer
    plan, here = trainer.loader.plan, trainer.world
    model = trainer.scorer.model
    dtype = str(compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)).removeprefix("torch.")
    kept = f"{len(made.train):,} training" + (
        f", {len(made.val):,} validation" if made.val is not None else ", no validation"
    )
    gone = "".join(
        f", {n:,} {what}"
        for part in (made.train, made.val)
        if part is not None
        for n, what in ((part.num_dropped, "dropped"), (part.num_truncated, "truncated"))
        if n
    )
    where = f"{here.size} x {here.device.type}" if here.size > 1 else here.device.type
    return {
        "model": f"{config['model']['name_or_path']} ({type(model).__name__}, {config['model']['init']})",
        "parameters": f"{parameter_count(model):,}, compute in {dtype}, attention {model.config._attn_implementation}",
        "data": f"{config['data']['path']}: {kept} examples{gone}",
        "tokens": f"{int(made.train.lengths.sum()):,} an epoch before sharing, layout {config['data']['layout']}",
        "steps": f"{trainer.max_steps:,} of {plan.batch_size} examples ({plan.steps_per_epoch:,} an epoch)",
        "device": where,
        "run directory": str(made.run_dir),
    }


def finish(made: Run, score: float, wall_s: float) -> None:
    """Write the summary and show what came of the run."""
    trainer = made.trainer
    summary = {
        "status": "finished",
        "score": score,
        "steps": trainer.max_steps,
        "wall_s": wall_s,
        "last": trainer.metrics.last,
        "best": trainer.metrics.best,
    }
    rundir.write_summary(made.run_dir, json.loads(json.dumps(summary)))
    trainer.console.answers()
    trainer.console.say(f"finished in {duration(wall_s)}; the model is {made.run_dir / 'model'}")
