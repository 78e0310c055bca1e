"""Stand-ins for what lies outside a sweep: SLURM's clients, which note their calls, and a rank without torch."""

import json
import os
import time
from pathlib import Path
from typing import Any

PROGRAM = """#!/bin/sh
printf '%s\\n' "$*" >> "{stem}.calls"
{extra}
answer="{stem}.out.$(wc -l < "{stem}.calls" | tr -d ' ')"
[ -f "$answer" ] || answer="{stem}.out"
cat "$answer"
cat "{stem}.err" >&2
exit $(cat "{stem}.code")
"""
KEEP_SCRIPT = 'cat "$1" > "{stem}.script.$(wc -l < "{stem}.calls" | tr -d \' \')"; env > "{stem}.env"'


class Clients:
    """Programs in a folder that is put first on PATH. Each answers what it was told to and notes its arguments."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        folder.mkdir()

    def answer(self, name: str, *outputs: str, error: str = "", code: int = 0) -> None:
        """Make a program: its n-th call prints the n-th output, further ones the last."""
        stem = self.dir / f".{name}"
        for number, text in enumerate(outputs, self.num_calls(name) + 1):
            stem.with_name(f"{stem.name}.out.{number}").write_text(text)
        stem.with_name(f"{stem.name}.out").write_text(outputs[-1] if outputs else "")
        stem.with_name(f"{stem.name}.err").write_text(error)
        stem.with_name(f"{stem.name}.code").write_text(str(code))
        extra = KEEP_SCRIPT.format(stem=stem) if name == "sbatch" else ""
        (self.dir / name).write_text(PROGRAM.format(stem=stem, extra=extra))
        (self.dir / name).chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of each call so far."""
        file = self.dir / f".{name}.calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def num_calls(self, name: str) -> int:
        """Return how often a program was called."""
        return len(self.calls(name))

    def script(self, number: int = 1) -> str:
        """Return the script that the n-th call of sbatch was given."""
        return (self.dir / f".sbatch.script.{number}").read_text()

    def environment(self) -> dict[str, str]:
        """Return the environment of sbatch's last call."""
        lines = (self.dir / ".sbatch.env").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)


# A rank as the local launcher starts it. It says what it was given, then does what its point's do.py says.
RANK = """
import json, os, pathlib, signal, sys, time
run_dir, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])


def wait_for(path, limit_s=20):
    until_s = time.monotonic() + limit_s
    while not pathlib.Path(path).exists():
        if time.monotonic() > until_s:
            sys.exit(99)
        time.sleep(0.005)


said = run_dir / f"said_{rank}.json"
partial = run_dir / f".said_{rank}"
partial.write_text(json.dumps({"cwd": os.getcwd(), "path": sys.path, "env": dict(os.environ)}))
partial.replace(said)
if (run_dir / "do.py").exists():
    exec((run_dir / "do.py").read_text())
"""


def make_code(folder: Path) -> Path:
    """Write a package that stands in for the copied code; its job is RANK, which starts in a few milliseconds."""
    job = folder / "sftlab" / "launcher" / "job.py"
    job.parent.mkdir(parents=True)
    (folder / "sftlab" / "__init__.py").touch()
    (job.parent / "__init__.py").touch()
    job.write_text(RANK)
    return folder


def said(run_dir: Path, rank: int = 0) -> dict[str, Any]:
    """Return what a rank said it was given."""
    found: dict[str, Any] = json.loads((run_dir / f"said_{rank}.json").read_text())
    return found


def wait_for(path: Path, limit_s: float = 30) -> None:
    """Return once a file is there."""
    until_s = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < until_s, f"{path} did not come"
        time.sleep(0.005)


def without_slurm_variables() -> list[str]:
    """Return the names of this process's variables of a SLURM job, which tests must not inherit."""
    return [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_"))]
