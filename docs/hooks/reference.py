"""The page of every setting, made of conf/ and of the constructors' signatures whenever the site is built.

A key's comment is the one in its YAML, what it takes is its parameter's annotation, and what an option does is its
constructor's docstring. So the page has nothing of its own that could be out of date.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from hydra.utils import get_object  # noqa: E402

from sftlab.common.values import annotations, as_typed, expected  # noqa: E402
from sftlab.config.binding import KEYS, RESERVED, RunKeys  # noqa: E402
from sftlab.config.comments import comments  # noqa: E402
from sftlab.config.groups import BASE, CONF  # noqa: E402

LONG = 60  # characters of a default that are shown
SKIPPED = ("defaults", "hydra", *RESERVED)
GROUPS = [key for key in KEYS if (CONF / key).is_dir() and key != "experiment"]

Row = tuple[str, str, str, str]


def on_files(there: Files, /, config: Any) -> Files:
    """Add the page."""
    there.append(File.generated(config, "reference.md", content=page()))
    return there


def page() -> str:
    """Return the page's Markdown."""
    parts = [
        "# Every setting",
        "Made from the files in `conf/` and from the constructors' signatures when this site is built. Type a setting "
        "as `key=value` and an option as `group=option`. `python -m sftlab.train --cfg job` shows a run's settings "
        "with their values.",
        "## train {#train}",
        of_file("train", RunKeys, skip=("trainer", "evaluation")),
    ]
    body, told = load(CONF / "train.yaml")
    for key in ("trainer", "evaluation"):
        parts += [f"### {key} {{#{key}}}", doc(body[key]), table(rows(body[key], told, f"{key}."))]
    for group in GROUPS:
        parts += of_group(group)
    parts += ["## experiment {#experiment}", "Recipes: what differs from `train.yaml`.", listed("experiment")]
    parts.append("## The other commands {#commands}")
    for file in sorted(CONF.glob("*.yaml")):
        if file.stem not in ("train", "command"):
            parts += [f"### {file.stem} {{#command-{file.stem}}}", load(file)[1].get("", ""), of_file(file.stem)]
    return "\n\n".join(part for part in parts if part) + "\n"


def files(group: str) -> list[Path]:
    """Return the YAML of each option of a group: those of the project alone, whatever else is installed here."""
    return [file for file in sorted((CONF / group).glob("*.yaml")) if file.stem != BASE]


def load(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a YAML file's body and the comments of its keys."""
    import yaml

    text = file.read_text(encoding="utf-8")
    return dict(yaml.safe_load(text) or {}), comments(text)


def of_file(name: str, signature: Any = None, skip: tuple[str, ...] = ()) -> str:
    """Return the table of a command's own keys."""
    body, told = load(CONF / f"{name}.yaml")
    return table(rows({key: value for key, value in body.items() if key not in skip}, told, "", signature))


def of_group(group: str) -> list[str]:
    """Return the part of a group: its options, what all of them share, then what each sets."""
    parts = [f"## {group} {{#{group}}}", listed(group)]
    shared: dict[str, str] = {}
    constructor = None
    base = CONF / group / f"{BASE}.yaml"
    if base.is_file():
        body, shared = load(base)
        constructor = get_object(body["_target_"])
        parts += [f"### All options of {group} {{#{group}-all}}", cell(shared.get("", "")), doc(body)]
        parts.append(table(rows(body, shared, f"{group}.", told_as="")))
    for file in files(group):
        body, told = load(file)
        option = file.stem
        whole = "@package _global_" in file.read_text(encoding="utf-8")
        node, prefix = (body.get(group) or {}, f"{group}.") if whole else (body, "")
        node = {key: value for key, value in node.items() if key != "architecture"}
        if set(node) - {*SKIPPED, "name_or_path"}:  # a model's id stands in the list of options
            found = rows(node, told, f"{group}.", constructor, told_as=prefix, shared=shared)
            parts += [f"### {group}={option} {{#{group}-{option}}}", doc(node)]
            parts += [doc(inner) for inner in node.values() if isinstance(inner, Mapping)]
            parts.append(table(found))
    return parts


def listed(group: str) -> str:
    """Return the options of a group, each with what its file says first."""
    lines = ["| option | |", "| --- | --- |"]
    for file in files(group):
        body, told = load(file)
        named = f" `{body['name_or_path']}`" if isinstance(body.get("name_or_path"), str) else ""
        lines.append(f"| `{group}={file.stem}` | {cell(told.get('', ''))}{named} |")
    return "\n".join(lines)


def doc(node: Mapping[str, Any]) -> str:
    """Return the docstring of a node's constructor, and where it is."""
    target = node.get("_target_")
    if not isinstance(target, str) or target == "???":
        return ""
    said = (inspect.getdoc(get_object(target)) or "").replace("{", "&#123;")
    return f"{said}\n\n`{target}`".strip()


def rows(
    node: Mapping[str, Any],
    told: Mapping[str, str],
    typed_as: str,
    signature: Any = None,
    told_as: str | None = None,
    shared: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Yield each key of a node, and of the nodes in it: key, default, what it takes, comment.

    A node of a file lies at `told_as` in that file, and is typed with `typed_as` in front.
    """
    told_as = typed_as if told_as is None else told_as
    target = node.get("_target_")
    constructor = get_object(target) if isinstance(target, str) and target != "???" else signature
    kinds = annotations(constructor) if constructor else {}
    for key, value in node.items():
        if key in SKIPPED:
            continue
        said = told.get(f"{told_as}{key}") or (shared or {}).get(f"{told_as}{key}", "")
        if isinstance(value, Mapping) and value:
            if said:
                yield f"{typed_as}{key}", "", "", said
            yield from rows(value, told, f"{typed_as}{key}.", told_as=f"{told_as}{key}.", shared=shared)
            continue
        takes = expected(kinds[key]) if kinds.get(key, Any) is not Any else ""
        yield f"{typed_as}{key}", shortened(as_typed(value)), takes, said


def shortened(text: str) -> str:
    """Return a default on one line, cut if it is long."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def table(found: Iterator[Row]) -> str:
    """Return a table of keys."""
    lines = ["| key | default | takes | |", "| --- | --- | --- | --- |"]
    for key, default, takes, said in found:
        lines.append(f"| `{key}` | {code(default)} | {cell(takes)} | {cell(said)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def code(text: str) -> str:
    """Return a value as code; nothing for none."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def cell(text: str) -> str:
    """Return a text for a cell of a table: one line, nothing in it taken for HTML or for the next cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
