"""The command of a run as it would be typed again, and the commit that it ran."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

FOR_HYDRA = re.compile(r"([+\w.@/]+)='(.*)'", re.DOTALL)  # a path or a free text as config/overrides.py quotes it
STARTS = ("train.py", "sftlab.train", "sftlab-train")


def command(argv: Any, overrides: Sequence[str] = ()) -> str:
    """Return a command line in which sftlab is called as a module. A point of a sweep has only its overrides."""
    words = [str(a) for a in argv] if isinstance(argv, list | tuple) else []
    start = next((i for i, a in enumerate(words) if a.endswith(STARTS)), None)
    if start is not None:
        return " ".join(["python -m sftlab.train", *map(quoted, words[start + 1 :])])
    if overrides:
        return " ".join(["python -m sftlab.train", *map(quoted, overrides)])
    return " ".join(words)


def quoted(word: str) -> str:
    """Return a word as a shell takes it, without the quotes that were put in for Hydra's parser."""
    word = unquoted(word)
    return word if re.fullmatch(r"[\w@%+=:,./~\[\]-]+", word) and not word.startswith("~") else shlex.quote(word)


def unquoted(word: str) -> str:
    """Return an override without the quotes that were put in for Hydra's parser."""
    found = FOR_HYDRA.fullmatch(word)
    if not found:
        return word
    return f"{found[1]}=" + re.sub(r"(\\+)(?='|$)", lambda m: m[0][: len(m[0]) // 2], found[2])


def commit(environment: Mapping[str, Any]) -> str:
    """Return the commit, short, with a + where files differed from it."""
    found = environment.get("git_commit")
    return str(found)[:10] + ("+" if environment.get("git_diff") else "") if found else ""
