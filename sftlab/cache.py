"""sftlab cache: the tokenised data that is kept, what it is of and how large; remove= removes it, after a question."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sftlab.config import start

if TYPE_CHECKING:
    from sftlab.data.kept import Entry


def cache(cfg: DictConfig) -> None:
    """List what is kept, or clear it."""
    from sftlab.common.words import plain, size
    from sftlab.data.kept import cache_folder, clear, entries

    folder = cache_folder()
    every = entries(folder)
    chosen = every if cfg.remove is None else select(every, str(cfg.remove))
    for entry in chosen:
        print(plain(f"{entry.key[:8]}  {size(entry.num_bytes):>9}  used {entry.days:.0f} days ago  {entry.about}"))
    total = size(sum(entry.num_bytes for entry in chosen))
    print(f"{len(chosen)} of {len(every)} entries, {total}, in {folder}")
    if cfg.remove is None or not chosen:
        return
    if not cfg.confirmed and not agreed(f"remove {'them' if len(chosen) > 1 else 'it'}? They can be made again [y/N] "):
        print(f"nothing was removed; sftlab cache remove={cfg.remove} confirmed=true removes without a question")
        return
    removed = [entry for entry in chosen if clear(folder, entry)]
    print(f"removed {len(removed)} of {len(chosen)}, {size(sum(e.num_bytes for e in removed))}")
    if len(removed) < len(chosen):
        raise ValueError("the others are being made by a run just now: remove them when it trains")


def select(every: Sequence["Entry"], word: str) -> list["Entry"]:
    """Return the entries that a word names: all, the beginning of a key, or those unused for DAYS days (30d)."""
    if word == "all":
        return list(every)
    days = re.fullmatch(r"(\d+)d", word)
    if days:
        return [entry for entry in every if entry.days >= int(days[1])]
    found = [entry for entry in every if entry.key.startswith(word)]
    if not found or len(word) < 4:
        raise ValueError(f"remove={word}: expected all, DAYS as in 30d (unused for so long), or a key's first letters")
    return found


def agreed(question: str) -> bool:
    """Ask on a terminal; without one the answer is no."""
    if not sys.stdin.isatty():
        return False
    return input(question).strip().lower() in ("y", "yes")


def main() -> None:
    """Entry point."""
    start.main(cache, "cache")


if __name__ == "__main__":
    main()
