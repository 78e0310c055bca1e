"""Files written whole and read with care: every atomic write of the project, every reader of what may be torn.

A process may be killed at any moment, so a file is written beside its final name and then renamed over it. A reader
sees the old content or the new content, never half of either.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

# libyaml is 10 times faster than PyYAML's own parser, but not every wheel has it.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """Write a JSON object in one step."""
    write_whole(path, json.dumps(dict(value), indent=indent, ensure_ascii=False))


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, all lines in one step."""
    write_whole(path, "".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or not whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; none where it is missing. A torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; None where it is missing."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except FileNotFoundError:
        return None


def to_yaml(value: Any) -> str:
    """Return a value as YAML, its keys in the order in which they are."""
    return str(yaml.dump(value, Dumper=DUMPER, sort_keys=False))


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
