"""The config as a JSON schema, for editors: every key, what it takes, and its comment in the YAMLs.

It describes an experiment (conf/experiment/NAME.yaml), which may set any key of any option. Types and bounds come from
the annotations of the constructors, as in config/binding.py; comments from the files in conf/.
Source: https://json-schema.org/draft/2020-12
"""

import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.utils import get_object

from sftlab.common.files import read_text, read_yaml
from sftlab.common.values import Bounds, NoneType, annotations, is_kind
from sftlab.config.binding import KEYS, RESERVED, RunKeys
from sftlab.config.comments import comments
from sftlab.config.groups import CONF, file_of_option, folders, options

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> Schema:
    """Return the schema of an experiment, and of a run's own config.yaml."""
    told = comments(read_text(CONF / "train.yaml"))
    train = dict(read_yaml(CONF / "train.yaml"))
    made: Schema = {"$schema": DRAFT, "title": "sftlab", "description": told.get("", ""), "type": "object"}
    properties: Schema = {
        "defaults": described(defaults(), told.get("defaults")),
        "hydra": {"type": "object", "description": "Hydra's own settings"},
    }
    kinds = annotations(RunKeys)
    for key in RunKeys.__dataclass_fields__:
        properties[key] = described(of(kinds[key]), told.get(key))
    for group in sorted({folder.name for place in folders() for folder in place.iterdir() if folder.is_dir()}):
        if group in KEYS and group != "experiment":
            properties[group] = of_group(group)
    for key in ("trainer", "evaluation"):
        properties[key] = node_schema(train[key], told, key)
    return {**made, "properties": dict(sorted(properties.items())), "additionalProperties": False}


def defaults() -> Schema:
    """Return what an experiment's defaults list may choose: the options of each group, with what each file says."""
    choices = []
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()):
        said = {name: comments(read_text(file_of_option(group, name))).get("", "") for name in options(group)}
        words = "\n".join(f"{name}: {text}" if text else name for name, text in said.items())
        choices.append(
            {
                "type": "object",
                "properties": {f"override /{group}": {"enum": [*said, None], "description": words}},
                "required": [f"override /{group}"],
            }
        )
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}, *choices]}}


def of_group(group: str) -> Schema:
    """Return the schema of a group: the keys of any of its options."""
    made: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
    for name in options(group):
        for file in [*bases(group, name), file_of_option(group, name)]:
            node, told = read_yaml(file) or {}, comments(read_text(file))
            if group in node and "@package _global_" in read_text(file):  # a launcher's, or the search's
                node = node[group]
                told = {key.removeprefix(f"{group}."): text for key, text in told.items()}
            merge(made, node_schema(node, told, ""))
    return made


def bases(group: str, name: str) -> list[Path]:
    """Return the files that an option builds on."""
    body = read_yaml(file_of_option(group, name)) or {}
    names = [entry for entry in body.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return [file for base in names for file in (*bases(group, base), file_of_option(group, base))]


def node_schema(node: Mapping[str, Any], told: Mapping[str, str], path: str) -> Schema:
    """Return the schema of a node: its constructor's settings, and the keys that its YAML has."""
    made: Schema = {}
    target = node.get("_target_")
    if target is not None and target != "???":
        constructor = get_object(str(target))
        partial = bool(node.get("_partial_"))
        kinds = annotations(constructor)
        for key, parameter in inspect.signature(constructor).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY or not partial:
                made[key] = of(kinds[key])
    prefix = f"{path}." if path else ""
    for key, value in node.items():
        if key in (*RESERVED, "defaults", "hydra"):
            continue
        own = node_schema(value, told, f"{prefix}{key}") if isinstance(value, Mapping) else {}
        if own.get("properties"):
            made.setdefault(key, {})
            merge(made[key], {**own, "additionalProperties": "_target_" not in value})
        made[key] = described(made.get(key, {}), told.get(f"{prefix}{key}"))
    made = {key: {} for key in RESERVED if key in node} | made
    return {"type": "object", "properties": made, "additionalProperties": False}


def merge(made: Schema, other: Schema) -> None:
    """Add the properties of a schema to another's; a key that differs takes what either takes."""
    properties = made.setdefault("properties", {})
    for key, value in other.get("properties", {}).items():
        mine = properties.get(key, {})
        said = dict.fromkeys(line for one in (mine, value) for line in one.get("description", "").split("\n") if line)
        if "properties" in mine and "properties" in value:
            merge(mine, value)
        elif not bare(mine):
            mine = value
        elif bare(value) and bare(value) != bare(mine):
            kinds = [kind for one in (mine, value) for kind in bare(one).get("anyOf", [bare(one)])]
            mine = {"anyOf": [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]]}
        properties[key] = described(bare(mine), "\n".join(said))
    for key in ("type", "additionalProperties"):
        if key in other:
            made.setdefault(key, other[key])


def bare(made: Schema) -> Schema:
    """Return a schema without its description."""
    return {key: value for key, value in made.items() if key != "description"}


def described(made: Schema, text: str | None) -> Schema:
    """Return a schema with a comment."""
    return {**made, "description": text} if text else made


def of(annotation: Any) -> Schema:
    """Return the schema of an annotation; an empty one takes everything."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        made = of(arguments[0])
        for bounds in arguments[1:]:
            if isinstance(bounds, Bounds):
                names = {"minimum": bounds.least, "exclusiveMinimum": bounds.above}
                names |= {"maximum": bounds.most, "exclusiveMaximum": bounds.below}
                made |= {name: value for name, value in names.items() if value is not None}
        return made
    if origin in (Union, types.UnionType):
        return {"anyOf": [of(option) for option in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and Ellipsis not in arguments:
        count = len(arguments)
        return {"type": "array", "prefixItems": [of(a) for a in arguments], "minItems": count, "maxItems": count}
    if origin is tuple or is_kind(origin, Sequence) or is_kind(annotation, Sequence):
        return {"type": "array", "items": of(arguments[0]) if arguments else {}}
    if is_kind(origin, Mapping) or is_kind(annotation, Mapping):
        return {"type": "object"}
    plain = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
    return {"type": plain[annotation]} if annotation in plain else {}
