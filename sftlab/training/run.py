"""A run from start to end on this rank: check, join the world, claim the directory, build, fit, export the model.

Every launcher calls this in every process, with a plain resolved config.
"""

import json
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.checkpoints.hugging_face import export, parameter_count
from sftlab.common import run_directory, secrets
from sftlab.common.words import duration
from sftlab.config.binding import check
from sftlab.data.report import Report, report, short, write_skipped
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.parallel.world import World, world
from sftlab.training.build import Run, build
from sftlab.training.faults import lost_ranks
from sftlab.training.preempt import StopSignal

REPORTED_STEPS = 8  # laid out for the report at start. All of SQuAD's take 10 s, so only preview does that


def run(config: Mapping[str, Any], overrides: Sequence[str]) -> float:
    """Return the final validation loss (nats per target), or the training loss if there is no validation.

    Raises: the error, on every rank that met it; SystemExit if the run was told to stop.
    """
    check(config)
    run_dir = Path(config["run_dir"])
    with world() as here, StopSignal(here, command_again(overrides, run_dir)) as stop:
        quiet_libraries(here)
        claimed = claim(run_dir, config, overrides, here)
        if claimed.finished:
            return finished_already(run_dir, claimed.finished, here)
        began_s = time.time()
        made: Run | None = None
        try:
            with lost_ranks():
                made = build(config, here, run_dir, claimed, stop)
                if here.is_main:
                    described = facts(config, made, leave_data_report(made))
                    made.trainer.console.facts(f"sftlab: {config['name']}", described)
                score = made.trainer.fit()
                leave_model(config, made, here)
            if here.is_main:
                finish(made, score, time.time() - began_s)
        except SystemExit:
            if here.is_main:
                run_directory.write_summary(run_dir, {"status": "stopped"})
            raise
        except BaseException as error:
            if here.is_main:
                with (run_dir / "train.log").open("a") as file:
                    file.write(secrets.strike("".join(traceback.format_exception(error))))
                run_directory.note_failure(run_dir, here.rank, error)
            raise
        finally:
            if made is not None:
                made.trainer.checkpoints.close()
                made.trainer.console.close()
                made.trainer.metrics.close()
    return score


def command_again(overrides: Sequence[str], run_dir: Path) -> str:
    """Return the command that resumes a run."""
    kept = [o for o in overrides if not o.startswith("run_dir=")]
    return f"python -m sftlab.train {shlex.join([*kept, f'run_dir={run_dir}'])}"


def claim(run_dir: Path, config: Mapping[str, Any], overrides: Sequence[str], here: World) -> run_directory.Claim:
    """Claim the run directory on rank 0; a refusal is raised on every rank."""
    found: run_directory.Claim | Exception = run_directory.Claim()
    if here.is_main:
        try:
            found = run_directory.claim(run_dir, config, overrides)
        except (OSError, run_directory.RunDirError) as error:
            found = error
    found = here.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return found


def finished_already(run_dir: Path, summary: Mapping[str, Any], here: World) -> float:
    """Say that the run is finished, and return its score."""
    if here.is_main:
        print(
            f"run_dir={run_dir} is finished: {summary['steps']:,} steps, score {summary['score']:.4f}; nothing to do. "
            f"The model is {run_dir / 'model'}"
        )
    return float(summary["score"])


def leave_model(config: Mapping[str, Any], made: Run, here: World) -> None:
    """Export the last checkpoint on rank 0; a failure is raised on every rank."""
    failure: Exception | None = None
    if here.is_main:
        dtype = compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)
        trusted = bool(config["model"].get("trust_remote_code"))
        try:
            last = made.trainer.checkpoints.complete()[-1]
            export(last, made.run_dir / "model", dtype, trust_remote_code=trusted)
        except Exception as error:
            failure = error
    failure = here.broadcast(failure)
    if failure is not None:
        raise failure


def quiet_libraries(here: World) -> None:
    """Show warnings of libraries on rank 0 and errors elsewhere; progress bars only on rank 0's terminal."""
    import datasets

    quiet_transformers(logging.WARNING if here.is_main else logging.ERROR)
    if not here.is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def quiet_transformers(level: int = logging.WARNING) -> None:
    """Log messages of at least `level`; turn off transformers' progress bars."""
    import transformers

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.disable_progress_bar()


def leave_data_report(made: Run) -> Report:
    """Write the report on the data and the rows that were skipped into the run directory; return the report."""
    loader = made.trainer.loader
    found = report(made.train, made.val, loader.plan, loader.row_layout, REPORTED_STEPS)
    found.write_json(made.run_dir / "data.json")
    write_skipped(made.run_dir / "skipped.jsonl", [made.train, made.val])
    return found


def facts(config: Mapping[str, Any], made: Run, found: Report) -> dict[str, str]:
    """Return a description of what will run, by name."""
    trainer = made.trainer
    plan, here = trainer.loader.plan, trainer.world
    model = trainer.scorer.model
    dtype = str(compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)).removeprefix("torch.")
    data = {"data": made.data_path, **short(found)}
    if made.val is None:
        data["validation"] = "none (data.val_path, data.val_examples)"
    where = f"{here.size} x {here.device.type}" if here.size > 1 else here.device.type
    return {
        "model": f"{config['model']['name_or_path']} ({type(model).__name__}, {config['model']['init']})",
        "parameters": f"{parameter_count(model):,}, compute in {dtype}, attention {model.config._attn_implementation}",
        **data,
        "steps": f"{trainer.max_steps:,} of {plan.batch_size} examples ({plan.steps_per_epoch:,} per epoch)",
        "device": where,
        "run directory": str(made.run_dir),
    }


def finish(made: Run, score: float, wall_s: float) -> None:
    """Write the summary and show the result of the run."""
    trainer = made.trainer
    summary = {
        "status": "finished",
        "score": score,
        "steps": trainer.max_steps,
        "wall_s": wall_s,
        "skipped": trainer.skipped,
        "last": trainer.metrics.last,
        "best": trainer.metrics.best,
    }
    run_directory.write_summary(made.run_dir, json.loads(json.dumps(summary)))
    trainer.console.answers()
    trainer.console.say(f"finished in {duration(wall_s)}; the model is {made.run_dir / 'model'}")
