"""The JSON schema: every comment of the YAMLs is in it, right experiments fit, wrong ones do not; finding comments."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.config.comments import comments
from sftlab.config.composing import composed
from sftlab.config.groups import CONF
from sftlab.config.schema import schema
from tests.commands import Typed


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return schema()


def descriptions(node: Any) -> str:
    """Return every description in a schema, as one text."""
    if isinstance(node, list):
        return "\n".join(map(descriptions, node))
    if not isinstance(node, dict):
        return ""
    own = node["description"] if isinstance(node.get("description"), str) else ""
    return "\n".join([own, *(descriptions(value) for value in node.values())])


def wrong(value: Any, node: dict[str, Any], path: str = "") -> list[str]:
    """Return where a value does not fit a schema; the words of JSON Schema that ours uses, no others."""
    assert set(node) <= {
        *("type", "enum", "anyOf", "properties", "items", "prefixItems", "minItems", "maxItems", "required"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "additionalProperties"),
        *("description", "title", "$schema"),
    }
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind = node.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" or kind == "integer":
        right = number and (kind == "number" or isinstance(value, int))
    else:
        right = kind is None or isinstance(value, kinds[kind])
    bounds = {"minimum": lambda a, b: a >= b, "maximum": lambda a, b: a <= b}
    bounds |= {"exclusiveMinimum": lambda a, b: a > b, "exclusiveMaximum": lambda a, b: a < b}
    right = right and all(holds(value, node[name]) for name, holds in bounds.items() if name in node and number)
    right = right and value in node.get("enum", [value])
    if "anyOf" in node:
        right = right and any(not wrong(value, option, path) for option in node["anyOf"])
    found = [] if right else [path]
    if isinstance(value, dict):
        known = node.get("properties", {})
        for key, inner in value.items():
            if key in known:
                found += wrong(inner, known[key], f"{path}.{key}")
            elif node.get("additionalProperties") is False:
                found.append(f"{path}.{key}")
    if isinstance(value, list) and right:
        inner = node.get("prefixItems", [node.get("items", {})] * len(value))
        found += [path] * (len(inner) != len(value)) + [
            w for v, n in zip(value, inner, strict=False) for w in wrong(v, n, path)
        ]
    return found


def test_every_comment_is_in_it(made: dict[str, Any]) -> None:
    said = descriptions(made)
    files = [CONF / "train.yaml", *(f for f in sorted(CONF.glob("*/*.yaml")) if f.parent.name != "experiment")]
    count = 0
    for file in files:
        for text in comments(file.read_text()).values():
            for line in text.split("\n"):
                count += 1
                assert line in said or file.stem == "base", f"{file}: {line}"
    assert count > 120


def test_every_comment_of_a_file_is_found() -> None:
    """What `#` stands before in the file, less what is in block texts."""
    for file in sorted(CONF.glob("**/*.yaml")):
        text = re.sub(r"(?m)^(hydra:|  help:)\n(?:  .*\n|\n)*", "", file.read_text())
        written = re.findall(r"(?:^|\s)# (?!@package)(.+)$", text, re.MULTILINE)
        found = "\n".join(comments(file.read_text()).values())
        assert [line for line in written if line not in found] == [], file


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_right_experiment_fits(file: Path, made: dict[str, Any]) -> None:
    assert wrong(yaml.safe_load(file.read_text()), made) == []


def test_a_run_s_config_fits(made: dict[str, Any]) -> None:
    assert wrong(composed([]), made) == [] == wrong(composed(["data=mixture", "schedule=wsd"]), made)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("trainer: {batch_size: 0}", ".trainer.batch_size"),
        ("trainer: {max_stps: 3}", ".trainer.max_stps"),
        ("trainer: {compile: maybe}", ".trainer.compile"),
        ("optim: {lr: abc}", ".optim.lr"),
        ("optim: {betas: 0.9}", ".optim.betas"),
        ("schedule: {warmup_steps: 0.5}", ".schedule.warmup_steps"),
        ("data: {layout: trees}", ".data.layout"),
        ("data: {format: {supervize: last}}", ".data.format.supervize"),
        ("launcher: {nodes: 0}", ".launcher.nodes"),
        ("sed: 1", ".sed"),
        ("seed: abc", ".seed"),
    ],
)
def test_a_wrong_experiment_does_not(text: str, where: str, made: dict[str, Any]) -> None:
    assert wrong(yaml.safe_load(text), made) == [where]


def test_where_a_comment_belongs() -> None:
    text = (
        "# @package _global_\n# Of the file,\n# in two lines.\ndefaults:\n  - a\n\none: 1 # first\n"
        "two: # second\n  inner: '#no' # third\n    # and more of it\n# fourth\nthree: |-\n  # no comment\n"
        'four: "a\n  # no"\n# at the end\n'
    )
    assert comments(text) == {
        "": "Of the file,\nin two lines.",
        "one": "first",
        "two": "second",
        "two.inner": "third\nand more of it",
        "three": "fourth",
        "four": "at the end",
    }


def test_the_command_prints_or_writes_it(typed: Typed, tmp_path: Path, made: dict[str, Any]) -> None:
    assert json.loads(typed("schema")) == made
    said = typed("schema", f"output={tmp_path / 'sftlab.json'}")
    assert json.loads((tmp_path / "sftlab.json").read_text()) == made
    assert f"# yaml-language-server: $schema={tmp_path / 'sftlab.json'}" in said
