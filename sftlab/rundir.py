"""The run directory: claimed before anything is written in it, and holding all that repeats the run.

Resolved config, overrides, git commit and diff, package versions, metrics, checkpoints and the
finished model lie in it.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
GIT = "git.json"  # beside a copied package: the commit and the diff that it was copied from
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 10 times faster, where libyaml is there
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
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
# What may differ when a directory is taken up again: where and how it runs, what is recorded. Never the mathematics.
FREE = ("run_dir", "name", "launcher", "tracker", "parallel", "resume")


class RunDirError(ValueError):
    """A directory that must not be written to."""


def claim(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Make `folder` this run's.

    Raises: RunDirError if it holds anything but a run of the same config; nothing in it is touched then.
    """
    reserve(folder, config, overrides)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2))


def reserve(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Write a run's config into its directory: what was composed is what will run. Raises: as `claim`."""
    if folder.exists() and not folder.is_dir():
        raise RunDirError(f"run_dir={folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        theirs = folder / CONFIG
        if not theirs.is_file():
            raise RunDirError(
                f"run_dir={folder} is not empty and not a run (it has no {CONFIG}); name another directory"
            )
        differing = differences(yaml.load(theirs.read_text(), LOADER), dict(config))
        if differing:
            table = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in differing.items())
            raise RunDirError(f"run_dir={folder} holds a run of another config; name another directory\n{table}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.dump(dict(config), Dumper=DUMPER, sort_keys=False))
    (folder / OVERRIDES).write_text(yaml.dump(list(overrides), Dumper=DUMPER))


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {key: (old, new)} of the keys in which two configs differ, those of FREE left out."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            if prefix or key not in FREE:
                found |= differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return {} if old == new else {prefix.rstrip("."): (old, new)}


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
    """Return the commit of the code that runs and the diff against it; of a copied package, those of its original."""
    copied = Path(__file__).parents[1] / GIT
    if copied.is_file():
        record = json.loads(copied.read_text())
        return {key: record[key] for key in ("git_commit", "git_diff")}
    return {"git_commit": git("rev-parse", "HEAD"), "git_diff": git("diff", "HEAD")}


def git(*arguments: str) -> str | None:
    """Return what git says of the folder that this code lies in; None where it is no checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def note_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Write down that a rank failed, and why; of several the first, unless it only lost a peer to another."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    if summary.get("status") != "failed" or "by peer" in summary.get("error", ""):
        write_summary(
            folder, {**summary, "status": "failed", "rank": rank, "error": f"{type(error).__name__}: {error}"}
        )


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json whole."""
    partial = folder / f".summary.json.{os.getpid()}"
    partial.write_text(json.dumps(dict(summary), indent=2))
    partial.replace(folder / "summary.json")
