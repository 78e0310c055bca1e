"""A sweep's folder as --config-dir, which runs its winner again: only what `sftlab.sweep` writes there is composed.

A folder that is named with --config-dir chooses classes, and Hydra's own plugins, so it must be the user's own. A
sweep's folder may be somebody else's, and only its best.yaml is wanted: options that exist here, and values.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml, refuse_links
from sftlab.config.groups import given_folders, installed_folders
from sftlab.config.trust import Untrusted, refuse_code

MARKS = ("sweep.json", "multirun.yaml", "optuna.jsonl", "best.yaml", "experiment/best.yaml")
# ${optim.lr} reads nothing but the config. Every other form may look something up: ${oc.env:TOKEN}, and
# ${${name}:TOKEN} too, where the config itself says what `name` is.
REFERENCE = re.compile(r"\$\{\.*\w[\w.\[\]]*\}")
LEFT_OUT = ("run_dir", "resume", "launcher", "sweeper")  # where and how a run ran: no winner has these


def refuse_foreign(arguments: Sequence[str]) -> None:
    """Raise Untrusted if --config-dir names a sweep's folder and more than its winner's values would be composed."""
    for folder in given_folders():
        if any((folder / mark).exists() for mark in MARKS):
            chosen = [a.partition("=")[2] for a in arguments if re.match(r"\+{0,2}experiment=", a)]
            others = sorted({p.parent.name for p in folder.glob("*/*.yaml") if p.parent.name in groups_here()})
            if chosen != ["best"] or others != ["experiment"]:
                raise Untrusted(
                    f"--config-dir {folder} is a sweep's folder, of which only experiment=best may be used: "
                    f"given experiment={','.join(chosen) or 'null'}, and it has options for {', '.join(others) or '-'}"
                )
            refuse_experiment(refuse_links(folder, "experiment") / "best.yaml")


def groups_here() -> set[str]:
    """Return the names of the config groups of this installation, and Hydra's own."""
    return {p.name for folder in installed_folders() for p in folder.iterdir() if p.is_dir()} | {"hydra"}


def refuse_experiment(file: Path) -> None:
    """Raise Untrusted if an experiment file holds anything but options of this installation and plain values."""
    body = read_yaml(file)

    def wrong(what: str) -> Untrusted:
        return Untrusted(f"{file}: {what}. Copy what you need of it into conf/experiment/NAME.yaml of your own")

    if not isinstance(body, dict):
        raise wrong("it is not what sftlab.sweep writes")
    for entry in body.pop("defaults", []):
        key, option = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", None)
        group = str(key).removeprefix("override ").removeprefix("/").partition("@")[0]
        offered = any((folder / group / f"{option}.yaml").is_file() for folder in installed_folders())
        if (
            group in LEFT_OUT
            or not re.fullmatch(r"\w+", group)
            or not re.fullmatch(r"[\w.-]+", str(option))
            or not offered
        ):
            raise wrong(f"its defaults ask for {entry}, which is no option of this installation")
    if "hydra" in body:
        raise wrong("it sets hydra., which could run code")
    for key in LEFT_OUT:
        if key in body:
            raise wrong(f"it sets {key}, which says where and how a run runs")
    refuse_code(body, str(file))
    for path, text in texts(body, ""):
        if "${" in REFERENCE.sub("", text):
            raise wrong(f"{path}={text} would be looked up on this machine")


def texts(node: Any, path: str) -> list[tuple[str, str]]:
    """Return every (key, text) in a tree."""
    if isinstance(node, Mapping):
        return [found for key, value in node.items() for found in [(path, str(key)), *texts(value, f"{path}.{key}")]]
    if isinstance(node, list):
        return [found for value in node for found in texts(value, path)]
    return [(path.lstrip("."), node)] if isinstance(node, str) else []
