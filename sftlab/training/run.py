"""A run from start to end on this rank: check, join the world, claim the directory, build, fit, export the model.

Every launcher calls this in every process, with a plain resolved config.
"""

import json
import logging
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.checkpoints.hugging_face import export
from sftlab.checkpoints.manifest import complete_checkpoints, read_manifest
from sftlab.common import revisions, run_directory, secrets
from sftlab.common.code import code_version, require_same_code
from sftlab.common.files import open_plain, read_jsonl, spared_by_a_full_disk, write_json
from sftlab.common.hangup import hangups
from sftlab.common.hub import quiet_transformers
from sftlab.common.owner import Held, Hold, this_process
from sftlab.common.secrets import strike_values
from sftlab.common.words import duration
from sftlab.config.binding import check
from sftlab.data.picture import Picture
from sftlab.data.report import report, write_skipped
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.parallel.machine import machine
from sftlab.parallel.world import World, world
from sftlab.reports.command import command
from sftlab.reports.run_report import FACTS
from sftlab.training.build import Run, build
from sftlab.training.draft import Draft, facts
from sftlab.training.faults import lost_ranks
from sftlab.training.preempt import StopSignal

LONGEST_PROMPT = 200  # characters of a question that is printed to be typed again
REPORTED_STEPS = 8  # laid out for the report at start. All of SQuAD's take 10 s, so only preview does that


def run(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> float:
    """Return the final validation loss (nats per target), or the training loss if there is no validation.

    Raises: the error, on every rank that met it; SystemExit if the run was told to stop.
    """
    check(config)
    run_dir = Path(config["run_dir"])
    with world() as here, StopSignal(here, command_again(overrides, run_dir)) as stop, hangups(), ExitStack() as stack:
        require_same_code(here.gather((socket.gethostname(), code_version())))
        quiet_libraries(here)
        config = here.broadcast(dated(config) if here.is_main else config)
        hold = Hold(run_dir, here.gather(this_process()))
        stack.callback(hold.give_back)
        claimed = claim(run_dir, config, overrides, here, hold)
        if claimed.finished:
            return finished_already(run_dir, claimed.finished, here)
        began_s = time.time()
        made: Run | None = None
        try:
            with lost_ranks():
                pinned = here.broadcast(revisions.pin(config, run_dir, claimed.source) if here.is_main else {})
                pinned_config = revisions.with_commits(config, pinned)
                made = build(pinned_config, here, run_dir, claimed, stop, partial(describe, config, run_dir))
                score = made.trainer.fit()
                made.trainer.console.working("exporting the model ...")
                exported, score = leave_model(config, made, here, score)
                made.trainer.console.working("")
            if here.is_main:
                finish(made, exported, score, time.time() - began_s)
        except (SystemExit, KeyboardInterrupt) as stopped:
            if here.is_main:
                with spared_by_a_full_disk():
                    run_directory.write_summary(run_dir, {"status": "stopped"})
                if isinstance(stopped, KeyboardInterrupt):  # outside of the steps: what is saved is all that there is
                    say_interrupted(run_dir, stop.go_on)
                    stopped.args = ("said",)  # no second word of it at the end of the command
            raise
        except BaseException as error:
            if here.is_main:
                with open_plain(run_dir / "train.log", "a") as file:
                    file.write(secrets.strike("".join(traceback.format_exception(error))))
                run_directory.note_failure(run_dir, here.rank, error)
            raise
        finally:
            if made is not None:
                made.trainer.checkpoints.close()
                made.trainer.metrics.close(str(run_directory.read_summary(run_dir).get("status", "failed")))
                made.trainer.console.close()
    return score


def dated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that names the date its chat templates write: that of the run which it resumes, else today's.

    Llama 3.2's template writes the date. Without this, a run resumed tomorrow would train on another text.
    """
    folders = [Path(config["run_dir"]), Path(str(config.get("resume"))), *Path(str(config.get("resume"))).parents[:2]]
    earlier = next((run_directory.read_config(f) for f in folders if (f / run_directory.CONFIG).is_file()), {})

    def fixed(node: Any, theirs: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        theirs = theirs if isinstance(theirs, Mapping) else {}
        out = {key: fixed(value, theirs.get(key)) for key, value in node.items()}
        if "date" in out and out["date"] is None and "template_path" in out and out.get("into") != "plain":
            out["date"] = str(theirs.get("date") or date.today())
        return out

    return {**config, "data": fixed(config["data"], earlier.get("data"))}


def command_again(overrides: Sequence[str], run_dir: Path) -> str:
    """Return the command that resumes a run."""
    return command([], [*(o for o in overrides if not o.startswith("run_dir=")), f"run_dir={run_dir}"])


def claim(
    run_dir: Path, config: Mapping[str, Any], overrides: Sequence[str], here: World, hold: Hold
) -> run_directory.Claim:
    """Claim the run directory on rank 0; a refusal is raised on every rank."""
    found: run_directory.Claim | Exception = run_directory.Claim()
    if here.is_main:
        try:
            found = run_directory.claim(run_dir, config, overrides, hold)
        except (OSError, run_directory.RunDirError, Held) as error:
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


def leave_model(config: Mapping[str, Any], made: Run, here: World, score: float) -> tuple[Path, float]:
    """Export the last or the best checkpoint on rank 0; return it and its score. A failure is raised on every rank.

    `score` is that of the run's end. The best is the best that is there: one that could not be written is lost.
    """
    found: tuple[Path, float] | Exception | None = None
    if here.is_main:
        dtype = compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)
        trusted = bool(config["model"].get("trust_remote_code"))
        try:
            checkpoints = made.trainer.checkpoints
            chosen = checkpoints.complete()[-1]
            if made.trainer.settings.export == "best" and (best := checkpoints.best()):
                chosen, score = best, read_manifest(best)["score"]
            export(chosen, made.run_dir / "model", dtype, trust_remote_code=trusted)
            found = chosen, score
        except Exception as error:
            found = error
    found = here.broadcast(found)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found


def quiet_libraries(here: World) -> None:
    """Show warnings of libraries on rank 0 and errors elsewhere; progress bars only on rank 0's terminal."""
    import datasets

    quiet_transformers(logging.WARNING if here.is_main else logging.ERROR)
    if not here.is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def describe(config: Mapping[str, Any], run_dir: Path, drafted: Draft) -> None:
    """Say on rank 0 what will run, and leave that, the report on the data and the rows that were skipped."""
    here = drafted.world
    if not here.is_main:
        return
    found = report(drafted.train, drafted.val, drafted.plan, drafted.row_layout, REPORTED_STEPS)
    found.write_json(run_dir / "data.json")
    write_skipped(run_dir / "skipped.jsonl", [drafted.train, drafted.val])
    write_json(run_dir / "row.json", strike_values(Picture(drafted.tokenizer).of(drafted.rows(), step=1)))
    described = facts(config, drafted, found, run_dir)
    drafted.console.facts(f"sftlab: {config['name']}", described)
    known = {"steps": drafted.max_steps, "ranks": here.size, "device": here.device.type}
    run_directory.put(run_dir / FACTS, known | {"facts": described, "machine": machine(here)})


def finish(made: Run, exported: Path, score: float, wall_s: float) -> None:
    """Write the summary and show the result of the run. `model` in it has the scores of the model that is exported."""
    trainer, ending = made.trainer, made.trainer.ending
    step = read_manifest(exported)["step"]
    lines = [line for line in read_jsonl(made.run_dir / "metrics.jsonl") if line["step"] == step]
    scores = {name: value for line in lines for name, value in line.items() if name.startswith("val/")}
    summary = {
        "status": "finished",
        "score": score,
        "steps": ending.last_step,
        "ended": ending.why or None,
        "model": {"step": step, **scores},
        "wall_s": wall_s,
        "skipped": trainer.skipped,
        "last": trainer.metrics.last,
        "best": trainer.metrics.best,
    }
    run_directory.write_summary(made.run_dir, json.loads(json.dumps(summary)))
    trainer.console.answers()
    if ending.why:
        trainer.console.say(f"ended after step {ending.last_step} of {trainer.console.max_steps}: {ending.why}")
    which = "" if step == ending.last_step else f", of step {step}"
    trainer.console.say(f"finished in {duration(wall_s)}; the model is {made.run_dir / 'model'}{which}")
    trainer.console.say(next_commands(made))


def next_commands(made: Run) -> str:
    """Return what a person may type after a run: to ask the model, to score it beside the base model, to serve it."""
    folder = shlex.quote(str(made.run_dir))
    trained = made.val or made.train
    prompt = made.tokenizer.decode(trained[0].tokens[: trained[0].num_prompt], skip_special_tokens=True)
    lines = ["next", f"  python -m sftlab.generate run={folder} prompt={shlex.quote(prompt)}"]
    if len(prompt) > LONGEST_PROMPT:
        lines[1] = f"  python -m sftlab.generate run={folder} prompt='...'"
    compared = " baseline=true" if made.val is not None else ""
    lines += [f"  python -m sftlab.evaluate run={folder}{compared}", f"  python -m sftlab.serve run={folder}"]
    return "\n".join(lines)


def say_interrupted(run_dir: Path, again: str) -> None:
    """Say what an interrupt outside of the steps leaves."""
    saved = complete_checkpoints(run_dir / "checkpoints")
    kept = f"{saved[-1].name} is kept" if saved else "nothing was trained yet"
    print(f"\nstopped by SIGINT; {kept}; go on with\n  {again}", file=sys.stderr)
