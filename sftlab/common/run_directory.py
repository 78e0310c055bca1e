"""The run directory: claimed before anything is written into it, and holding everything that repeats the run.

It holds the resolved config, overrides, git commit and diff, package versions, metrics, checkpoints and the model.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.common import owner, secrets
from sftlab.common.files import read_json, read_yaml, to_yaml, write_whole
from sftlab.common.owner import Hold
from sftlab.common.renamed import ADDED, in_todays_names

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
SUMMARY = "summary.json"
GIT = "git.json"  # lies beside a copied package: the commit and the diff of the code that was copied
PACKAGES = (
    "sftlab",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "numpy",
    "submitit",
)
# What may change when a run resumes: where and how it runs, what is recorded and kept. Never the mathematics.
FREE = (
    "run_dir", "name", "launcher", "sweeper", "tracker", "resume", "resume_despite_changes", "evaluation",
    "parallel._target_", "parallel.replicate", "parallel.tensor", "parallel.reshard_after_forward", "parallel.prefetch",
    "parallel.cpu_offload", "peft.learning_rate", "model.adapter_learning_rate",
    "model.attention", "model.trust_remote_code", "data.layout", "data.row_length", "data.num_workers", "data.unknown",
    "trainer.rows_per_microbatch", "trainer.log_every", "trainer.eval_every", "trainer.save_every",
    "trainer.keep_checkpoints", "trainer.patience", "trainer.max_hours", "trainer.export",
    "trainer.on_failed_save", "trainer.skip_nonfinite", "trainer.compile",
    "trainer.activation_checkpointing", "trainer.deterministic", "trainer.profile",
)  # fmt: skip
# Of these, what may give a finished run something left to do: more steps, or another model.
ENDING = ("trainer.patience", "trainer.max_hours", "trainer.export")


class RunDirError(ValueError):
    """A directory that must not be written to, or that a run must not begin from."""


@dataclass(frozen=True)
class Claim:
    """What a directory holds when its run starts.

    `finished` is the summary of a run that has nothing left to do. `source` is where checkpoints come from if the
    directory has none of its own; with `rewind` it goes before those that the directory has.
    """

    finished: dict[str, Any] | None = None
    source: Path | None = None
    rewind: bool = False


def claim(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], hold: Hold | None = None) -> Claim:
    """Make `folder` this run's, and return how it begins. `hold` keeps others out while the run lives.

    Raises: RunDirError if it holds anything but a run of the same mathematics (`resume_despite_changes` allows any); or
    any run at all, with resume=never; owner.Held if a live run has it. Nothing of the run in it is touched then.
    """
    source = source_of(config)
    if source is not None:
        origin = source if (source / CONFIG).is_file() else source.resolve().parents[1]
        if (origin / CONFIG).is_file():
            refuse_other_mathematics(origin, read_config(origin), config)
    theirs = reserve(folder, config, overrides, hold)
    put(folder / "environment.json", environment())
    summary = read_summary(folder)
    if summary.get("status") == "finished" and theirs is not None and not differences(theirs, config, compared=ENDING):
        return Claim(finished=summary)
    (folder / SUMMARY).unlink(missing_ok=True)
    # Repeating a command resumes its run; a new `resume=` rewinds it to the checkpoint that it names.
    again = theirs is not None and theirs.get("resume") == config.get("resume")
    rewind = source is not None and not again and source.resolve().parent == (folder / "checkpoints").resolve()
    return Claim(source=source, rewind=rewind)


def reserve(
    folder: Path, config: Mapping[str, Any], overrides: Sequence[str], hold: Hold | None = None
) -> dict[str, Any] | None:
    """Write a run's config into its directory; return the one that was there. Raises: as `claim`."""
    examine(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    if hold is None:
        owner.refuse_held(folder, owner.living(folder))
    else:
        hold.take()
    theirs = examine(folder, config)  # again: another run may have come and gone before this one took the directory
    put(folder / CONFIG, dict(config))
    put(folder / OVERRIDES, list(overrides))
    return theirs


def examine(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the run that a directory holds, None if it holds none. Raises: RunDirError, as `claim`."""
    theirs = None
    if folder.exists() and not folder.is_dir():
        raise RunDirError(f"run_dir={folder} is a file")
    if folder.is_dir() and any(not p.name.startswith((f".{CONFIG}.", owner.FILE)) for p in folder.iterdir()):
        if not (folder / CONFIG).is_file():
            raise RunDirError(
                f"run_dir={folder} is not empty and not a run (it has no {CONFIG}); name another directory"
            )
        if config.get("resume") == "never" and not idle(folder):
            raise RunDirError(f"run_dir={folder} holds a run and resume=never; name another, or leave resume=auto")
        refuse_planted(folder)
        theirs = read_config(folder)
        if not idle(folder):
            refuse_other_mathematics(folder, theirs, config)
    return theirs


def refuse_planted(folder: Path) -> None:
    """Raise RunDirError if a run would write through a link: in a run directory only `latest` is one."""
    checkpoints = folder / "checkpoints"
    inside = checkpoints.iterdir() if checkpoints.is_dir() and not checkpoints.is_symlink() else ()
    for path in (*folder.iterdir(), *(p for p in inside if p.name not in ("latest", ".latest"))):
        if path.is_symlink():
            raise RunDirError(
                f"{path} is a link to {os.readlink(path)}: a run writes through no links. Move what it points to here, "
                "or name another run_dir"
            )


def idle(folder: Path) -> bool:
    """Return whether the run in a directory failed before its first step, so that there is nothing to lose."""
    metrics = folder / "metrics.jsonl"
    begun = any((folder / "checkpoints").glob("*")) or (metrics.exists() and metrics.stat().st_size > 0)
    return not begun and read_summary(folder).get("status") == "failed"


def source_of(config: Mapping[str, Any]) -> Path | None:
    """Return the run or checkpoint that `resume` names. Raises: RunDirError if it is neither."""
    resume = config.get("resume", "auto")
    if resume in ("auto", "never"):
        return None
    source = Path(str(resume)).expanduser()
    if not (source / "checkpoints").is_dir() and not (source / "checkpoint.json").is_file():
        raise RunDirError(
            f"resume={resume}: expected auto, never, a run's directory or a checkpoint in it "
            "(<run>/checkpoints/step_00000100)"
        )
    return source


def refuse_other_mathematics(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise RunDirError with a table if a resume would change the mathematics of a run without being told to."""
    differing = differences(theirs, ours)
    if not differing or ours.get("resume_despite_changes"):
        return
    rows = [("key", "there", "here"), *((k, shown(old), shown(new)) for k, (old, new) in differing.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"  {k:<{widths[0]}}  {old:<{widths[1]}}  {new}" for k, old, new in rows)
    raise RunDirError(
        f"{folder} holds a run of another config, so that a resume would change the mathematics:\n{table}\n"
        "name another run_dir, or accept the changes with resume_despite_changes=true"
    )


def shown(value: Any, most: int = 40) -> str:
    """Return a value of a config for a table."""
    text = "null" if value is None else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def differences(old: Any, new: Any, prefix: str = "", compared: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return {key: (old, new)} for the keys in which two configs differ; keys in FREE only if `compared`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            if f"{prefix}{key}" not in FREE or f"{prefix}{key}" in compared:
                before = old[key] if key in old else ADDED.get(f"{prefix}{key}")
                found |= differences(before, new.get(key), f"{prefix}{key}.", compared)
        return found
    return {} if old == new else {prefix.rstrip("."): (old, new)}


def names(run_dir: Path) -> tuple[str, str | None]:
    """Return the name of a run and of the sweep that it is a point of, as their folders say: NAME/TIME, NAME/TIME/3."""
    folder = run_dir.absolute()
    is_point = any((folder.parent / file).is_file() for file in ("sweep.json", "multirun.yaml"))
    group = names(folder.parent)[0] if is_point else None
    if group is not None:
        return f"{group}/{folder.name}", group
    timed = folder.parent.parent.name in ("runs", "sweeps")  # runs/NAME/TIME
    return (f"{folder.parent.name}/{folder.name}" if timed else folder.name), None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run, in today's names."""
    config = read_yaml(folder / CONFIG)
    if not isinstance(config, dict):
        raise RunDirError(f"{folder / CONFIG} is not the config of a run")
    try:
        return {str(key): value for key, value in in_todays_names(config).items()}
    except RecursionError:
        raise RunDirError(f"{folder / CONFIG} is nested deeper than any config of a run") from None


def environment() -> dict[str, Any]:
    """Return what the run ran with: command, code, packages, machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": [sys.executable, *sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        **commit(),
    }


def commit() -> dict[str, str | None]:
    """Return the commit of the running code and the diff against it. A copied package gives those of its original."""
    copied = Path(__file__).parents[2] / GIT
    if copied.is_file():
        record = read_json(copied)
        return {key: record.get(key) for key in ("git_commit", "git_diff")}
    found: dict[str, str | None] = {"git_commit": git("rev-parse", "HEAD"), "git_diff": git("diff", "HEAD")}
    return {key: value and secrets.strike(value) for key, value in found.items()}


def git(*arguments: str) -> str | None:
    """Return what git prints in the folder of this code; None where that is no checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def note_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Record that a rank failed and why. The first failure is kept, unless it only says that another rank was lost."""
    summary = read_summary(folder)
    only_lost_a_peer = any(words in summary.get("error", "") for words in ("by peer", "RankLost"))
    if summary.get("status") != "failed" or only_lost_a_peer:
        failure = {"status": "failed", "rank": rank, "error": f"{type(error).__name__}: {error}"}
        write_summary(folder, {**summary, **failure})


def put(path: Path, value: Any) -> None:
    """Write a value as JSON or YAML in one step, with secrets struck out of the texts in it."""
    struck = secrets.strike_values(value)
    write_whole(path, json.dumps(struck, indent=2) if path.suffix == ".json" else to_yaml(struck))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json whole."""
    put(folder / SUMMARY, dict(summary))


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a run that has ended; an empty one where it has not."""
    return read_json(folder / SUMMARY)
