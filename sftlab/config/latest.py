"""`run=latest`: the newest run under runs/ that has what a command needs; `run=latest:NAME` among those of a name.

A run that died before it left a model is passed over, and counted where nothing is left.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sftlab.common.run_directory import CONFIG, read_summary
from sftlab.common.words import plain

RUNS = Path("runs")
WORD = re.compile(r"run=latest(?::(?P<name>.*))?")
NEEDED = {name: "model/config.json" for name in ("evaluate", "generate", "serve", "publish")}
NEEDED |= {"export": "checkpoints/step_*/checkpoint.json"}  # written last: the checkpoint is complete


def settle(arguments: Sequence[str], command: str) -> list[str]:
    """Return a command's words with `run=latest` replaced by the run's folder, which is said on standard error."""
    made = []
    for word in arguments:
        match = WORD.fullmatch(word) if command in NEEDED else None
        if match:
            folder = newest(match["name"], NEEDED[command])
            print(f"{word}: {plain(str(folder))}", file=sys.stderr, flush=True)
            word = f"run={folder}"
        made.append(word)
    return made


def newest(name: str | None, needed: str) -> Path:
    """Return the run that was started last, of those with a file like `needed`. Raises: ValueError if there is none."""
    word = "run=latest" if name is None else f"run=latest:{name}"
    found = sorted(RUNS.glob(f"*/*/{CONFIG}"), key=lambda file: file.stat().st_mtime, reverse=True)
    folders = [file.parent for file in found if name is None or file.parent.parent.name == name]
    usable = next((folder for folder in folders if any(folder.glob(needed))), None)
    if usable is not None:
        return usable
    if not folders:
        names = sorted({file.parent.parent.name for file in found})
        there = f"; there are {', '.join(f'run=latest:{n}' for n in names)}" if names else ""
        raise ValueError(f"{word}: there is no such run in {RUNS.absolute()}{there}")
    states = [f"  {folder}: {state(folder)}" for folder in folders[:3]]
    raise ValueError(
        f"{word}: none of {len(folders)} runs has {'a finished model' if 'model' in needed else 'a checkpoint'}; the "
        "newest are\n" + "\n".join(states)
    )


def state(folder: Path) -> str:
    """Return how a run ended, on one line."""
    summary = read_summary(folder)
    error = " ".join(str(summary.get("error", "")).split())[:100]
    return plain(f"{summary.get('status', 'not ended')}{': ' if error else ''}{error}")
