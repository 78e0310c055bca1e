"""Kept: the tokenised examples that earlier runs left in the cache, what they are of, and their removal.

data/store.py makes them. An entry is a folder of Arrow files with two small files beside it: what the files were
(`.json`), and what they are of (`.about.json`). Imports nothing heavy, so that a list takes no time.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftlab.common.files import read_json, remove, write_json

ABOUT = ".about.json"
PREFIX = "default-"


@dataclass(frozen=True)
class Entry:
    """One tokenised source: its key, its folder, what it is of, its size and when a run last used it."""

    key: str
    folder: Path
    about: str
    num_bytes: int
    used_s: float

    @property
    def days(self) -> float:
        """Return for how many days no run has used it."""
        return (time.time() - self.used_s) / 86400


def cache_folder() -> Path:
    """Return where tokenised examples are kept: in the cache of `datasets`, found as it finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", str(Path(cache, "huggingface")))
    return Path(os.environ.get("HF_DATASETS_CACHE", str(Path(home, "datasets")))).expanduser() / "sftlab"


def note(cache: Path, key: str, name: str, num_rows: int) -> None:
    """Write down what an entry is of; the file's time is that of its last use."""
    write_json(cache / f"{key}{ABOUT}", {"source": name, "rows": num_rows})


def entries(cache: Path) -> list[Entry]:
    """Return what is kept, the largest first."""
    found = []
    for folder in cache.glob(f"*/{PREFIX}*"):
        key = folder.name.removeprefix(PREFIX)
        file = cache / f"{key}{ABOUT}"
        told = read_json(file)
        about = f"{told.get('rows', '?')} rows of {told.get('source', 'what an earlier version read')}"
        used_s = (file if file.exists() else folder).stat().st_mtime
        found.append(Entry(key, folder, about, sum(p.stat().st_size for p in files(folder)), used_s))
    return sorted(found, key=lambda entry: -entry.num_bytes)


def files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder; links are not followed."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if not (path := Path(parent, name)).is_symlink())


def clear(cache: Path, entry: Entry) -> bool:
    """Remove an entry; return whether it was, which it is not while a run is making it.

    A run that reads it goes on: its files are mapped into memory.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(cache / f"{entry.key}.lock", timeout=0)
    try:
        with lock:
            remove(entry.folder)
            for suffix in (".json", ABOUT):
                (cache / f"{entry.key}{suffix}").unlink(missing_ok=True)
    except Timeout:
        return False
    for file in (*cache.glob(f"*{PREFIX}{entry.key}_*.lock"), cache / f"{entry.key}.lock"):
        file.unlink(missing_ok=True)
    return True
