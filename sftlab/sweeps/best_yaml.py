"""best.yaml: an experiment file that runs a sweep's winner again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sftlab.common.files import make_folder, write_whole
from sftlab.config.winner import LEFT_OUT


@dataclass(frozen=True)
class Choice:
    """One override of the winner: `key=value`, the value parsed, and whether it chooses an option of a config group."""

    key: str
    value: Any
    is_group: bool
    is_deletion: bool = False


def write_best(folder: Path, choices: Sequence[Choice], about: Sequence[str]) -> Path:
    """Write best.yaml into a sweep's folder, and again where `--config-dir` finds experiments; return its path."""
    file = folder / "best.yaml"
    text = experiment_text(folder, choices, about)
    write_whole(file, text)
    # a file of its own, not a link to the other: folders are copied by tools that drop links
    write_whole(make_folder(folder, "experiment") / "best.yaml", text)
    return file


def experiment_text(folder: Path, choices: Sequence[Choice], about: Sequence[str]) -> str:
    """Return the experiment file: how to use it, the options that the winner chose, the values that it set."""
    kept = [c for c in choices if c.key.split(".")[0] not in LEFT_OUT]
    deleted = [f"'~{c.key}'" for c in kept if c.is_deletion]
    use = f"python -m sftlab.train --config-dir {folder} {' '.join(['experiment=best', *deleted])}"
    head = [
        "# @package _global_",
        *(f"# {line}" for line in about),
        f"#   {use}",
        "# or copy this file to conf/experiment/NAME.yaml: python -m sftlab.train experiment=NAME",
    ]
    defaults: list[Any] = [{f"/{c.key}": c.value} for c in kept if c.key == "experiment"]
    defaults += [
        {f"override /{c.key}": c.value} for c in kept if c.is_group and not c.is_deletion and c.key != "experiment"
    ]
    values: dict[str, Any] = {}
    for c in kept:
        if c.is_group or c.is_deletion:
            continue
        *parents, leaf = c.key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = c.value
    body = ([{"defaults": defaults}] if defaults else []) + ([values] if values else [])
    return "\n".join([*head, *(yaml.safe_dump(part, sort_keys=False).rstrip() for part in body)]) + "\n"
