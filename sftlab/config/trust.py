"""What a folder may have run. A stored config is data that anybody may have written, so it chooses nothing by itself.

A class or function that it names must be one that an option names for the same place (conf/, packages installed beside
sftlab, --config-dir), or lie in a package that the user trusts: SFTLAB_TRUST=my_package,other in the
environment. For anything else `trust=true` on the command line is needed; the message says what would run.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.common.files import read_text, read_yaml
from sftlab.common.renamed import MOVED
from sftlab.config.groups import CONF, ENTRY_POINTS, folders

VARIABLE = "SFTLAB_TRUST"
RUNS = ("setup", "python", "sbatch")  # options of launcher=slurm that are commands, or can name one
GROUPS = ("model", "peft", "data", "optim", "schedule", "parallel", "tracker", "launcher")
Place = tuple[str, str]  # the config group, and `format` for a text format


class Untrusted(ValueError):
    """A folder names code that nobody vouched for."""


def refuse_code(config: Any, source: str, trust: bool = False) -> None:
    """Raise Untrusted if a stored config would run code of its own. `source` names it, for the message."""
    found = [] if trust else [*code_in(config), *remote_code(config)]
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise Untrusted(
            f"{source} names code that is not sftlab's, which would run on this machine:\n{lines}\n"
            f"Read it first. Then trust=true allows it for this command; for packages of your own, name them once: "
            f"export {VARIABLE}=PACKAGE"
        )


def refuse_launcher(options: Any, source: str, trust: bool = False) -> None:
    """Raise Untrusted if a stored launcher is none of this installation's options, or runs shell lines of its own."""
    refuse_code({"launcher": options}, source, trust)
    if trust or not isinstance(options, Mapping):
        return
    known = [node.get("launcher", node) for node in options_of("launcher", folders())]
    for key in RUNS:
        value = options.get(key)
        if value and all(value != option.get(key) for option in known):
            raise Untrusted(
                f"{source}: launcher.{key}={value} would run on this machine, and no launcher option in conf/ has it. "
                "Read it first. Then trust=true allows it; or keep it in an option of your own, conf/launcher/NAME.yaml"
            )


def code_in(node: Any, path: str = "") -> Iterator[str]:
    """Yield `key=target` for every target that is neither offered for its place nor in a trusted package."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if "_target_" in node and not (trusted(target) or (place_of(path), str(target)) in offered()):
            yield f"{path}._target_={target}"
        for key, value in node.items():
            yield from code_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from code_in(value, path)


def remote_code(config: Any) -> Iterator[str]:
    """Yield the key that would let a model's own code run."""
    model = config.get("model") if isinstance(config, Mapping) else None
    if isinstance(model, Mapping) and model.get("trust_remote_code"):
        yield f"model.trust_remote_code={model['trust_remote_code']} for {model.get('name_or_path')}"


def trusted(target: Any) -> bool:
    """Return whether a target lies in a package that the user named, or installed to offer options."""
    named = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {"", "sftlab"}
    return isinstance(target, str) and (target.partition(".")[0] in named | offering_packages())


@functools.cache
def offering_packages() -> frozenset[str]:
    """Return the packages that were installed to offer options."""
    return frozenset(entry.value.partition(".")[0] for entry in metadata.entry_points(group=ENTRY_POINTS))


def place_of(path: str) -> Place:
    """Return for what a dotted key asks: `data.sources.squad.format` is a format of the group `data`."""
    group, _, rest = path.partition(".")
    return group, "format" if rest.rpartition(".")[2] == "format" else ""


def offered() -> frozenset[tuple[Place, str]]:
    """Return every (place, target) of the options that this command can choose from."""
    return of_folders(tuple(folders()))


@functools.cache
def of_folders(places: tuple[Path, ...]) -> frozenset[tuple[Place, str]]:
    """Return every (place, target) that the options in these config folders name."""
    found = set(targets(read_yaml(CONF / "train.yaml"), ""))
    for group in GROUPS:
        for node in options_of(group, places):
            inside = node.get(group)  # a global option, such as a launcher's
            found |= set(targets(inside if isinstance(inside, Mapping) else node, group))
    return frozenset(found)


def options_of(group: str, places: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Return what the YAMLs of a config group hold; those without a `_target_` are not parsed."""
    files = [file for folder in places for file in sorted((folder / group).glob("*.yaml"))]
    told = [file for file in files if group == "launcher" or "_target_" in read_text(file)]
    return [node for file in told if isinstance(node := read_yaml(file), Mapping)]


def targets(node: Any, path: str) -> Iterator[tuple[Place, str]]:
    """Yield (place, target) of every target in an option, by today's names."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            target = str(node["_target_"])
            yield place_of(path), MOVED.get(target, target)
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))


def literally(node: Any) -> Any:
    """Return a stored config for Hydra, with its interpolations made text: `${oc.env:TOKEN}` must not be looked up."""
    if isinstance(node, Mapping):
        return {str(key): literally(value) for key, value in node.items()}
    if isinstance(node, list):
        return [literally(value) for value in node]
    if not isinstance(node, str):
        return node
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", node)
