"""Overrides as people type them: paths and free text are quoted before Hydra parses them, names are checked."""

import re
from collections.abc import Iterable
from pathlib import Path

FREE_TEXT = re.compile(
    r"^(\+{0,2})((?:\S*\.)?(?:\w*path|\w*dir|vllm_python|run|resume|tokenizer|prompts|output|file))=(.*)$", re.DOTALL
)


LITERAL = re.compile(r"^(prompt|system|fields\.\w+)=(.*)$", re.DOTALL)


GIVEN: dict[str, str] = {}  # free texts of the command line by key, kept away from Hydra's parser


def quote(argument: str, multirun: bool) -> str:
    """Quote the value of a free-text or path override, so that Hydra does not interpret commas, brackets and the like.

    In a multirun a path that does not exist is not quoted, because `data.path=a.jsonl,b.jsonl` is a sweep.
    A prompt may hold anything, quotes and `${...}` too: Hydra only gets a reference to it.
    """
    literal = LITERAL.match(argument)
    if literal:
        key, text = literal.groups()
        GIVEN[key] = text
        return f"{'+' if key.startswith('fields.') else ''}{key}='${{given:{key}}}'"
    match = FREE_TEXT.match(argument)
    if not match:
        return argument
    plus, key, value = match.groups()
    if value in ("", "null") or value[0] + value[-1] in ("''", '""') or "${" in value:
        return argument
    if multirun and not Path(value).expanduser().exists():
        return argument
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    return f"{plus}{key}='{escaped}'"


def refuse_point_keys(overrides: Iterable[str]) -> None:
    """Raise ValueError for an override that would move a point out of its sweep's directory."""
    for key in ("run_dir", "name"):
        if any(o.startswith(f"{key}=") and (key == "run_dir" or "," in o) for o in overrides):
            raise ValueError(f"{key}= cannot be set in a sweep: each point has its own folder in hydra.sweep.dir")


def point_dir(folder: Path) -> str:
    """Return the directory of a point as its config names it: relative if it lies below the working directory."""
    folder, here = folder.absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def inside(name: str) -> str:
    """Return the name of a run. Raises: ValueError if a folder of that name would lie outside of its parent."""
    name = str(name)
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or name != name.strip():
        raise ValueError(f"name={name!r} would leave its folder: give the name of one folder, without slashes")
    return name
