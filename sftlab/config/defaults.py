"""What a run's config changes: its values beside those of the options that were chosen.

The options' YAMLs are read as they are, without Hydra, so that a running trainer can ask.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.common.files import read_yaml
from sftlab.config.groups import CONF, file_of_option, is_group, options

LEFT_OUT = ("run_dir", "hydra", "name")


def differences_from_defaults(config: Mapping[str, Any], overrides: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (key, default, here) of what was chosen or set.

    An option that was typed comes first, with the default option. Then every value that the YAMLs of the chosen options
    do not give: those that were typed, and those of an experiment.
    """
    typed = dict(o.lstrip("+").partition("=")[::2] for o in overrides if "=" in o)
    listed = read_yaml(CONF / "train.yaml")
    groups = {k: v for entry in listed["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    chosen = {k: v for k, v in typed.items() if "." not in k and k in groups and is_group(k)}
    found = [(k, str(groups[k]), v) for k, v in chosen.items() if str(groups[k]) != v]
    values = default_values(listed, {**groups, **chosen})
    for key, here in flat(config):
        if key.split(".")[0] not in LEFT_OUT and not key.endswith(("_target_", "_partial_")):
            before = values.get(key, "")
            while (reference := re.fullmatch(r"\$\{([\w.]+)\}", str(before))) and reference[1] in values:
                before = values[reference[1]]  # optim.lr is that of peft, which is the model's own
            if before != here and not (isinstance(before, str) and "${" in before):
                found.append((key, shown(before), shown(here)))
    return found


def default_values(listed: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value by its dotted key, as the YAMLs of the primary config and of these options give them."""
    found = dict(flat({k: v for k, v in listed.items() if k != "defaults"}))
    for group, names in chosen.items():
        for name in names if isinstance(names, list) else str(names or "").strip("[]").split(","):
            if group != "experiment" and name in options(group):
                node = option(group, name)
                found |= flat(node) if group in node else flat({group: node})
    return found


def option(group: str, name: str) -> dict[str, Any]:
    """Return what the YAML of an option holds, with the options that it builds on."""
    body = read_yaml(file_of_option(group, name)) or {}
    found: dict[str, Any] = {}
    for base in body.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            found = merged(found, option(group, base))
    return merged(found, body)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with the values of another put over it."""
    made = dict(old)
    for key, value in new.items():
        before = made.get(key)
        made[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return made


def flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every leaf of a tree; a list or an empty dict is a leaf."""
    if isinstance(node, Mapping) and node:
        return [pair for k, v in node.items() for pair in flat(v, f"{prefix}{k}.")]
    return [(prefix.rstrip("."), node)]


def shown(value: Any) -> str:
    """Return a value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "{}" if value == {} else str(value)
