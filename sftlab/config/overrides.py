"""Overrides as people type them: paths and free text are quoted before Hydra parses them, names are checked."""

import re
from collections.abc import Iterable
from pathlib import Path

from sftlab.config.groups import file_of_option, options

FREE_TEXT = re.compile(
    r"^(\+{0,2})((?:\S*\.)?(?:\w*path|\w*dir|vllm_python|run|resume|tokenizer|prompts|output|file))=(.*)$", re.DOTALL
)


LITERAL = re.compile(r"^(prompt|system|fields\.\w+)=(.*)$", re.DOTALL)


TEMPLATE = re.compile(  # wordings with {column} in them, which Hydra would take for a dict
    r"^(\+{0,2})((?:\S*\.)?format\.(?:prompt|completion|system|messages|with_input|without_input))=((?!\[(?!\{%)).*\{.*)$",
    re.DOTALL,
)


SOURCE = re.compile(r"^\+{0,2}data\.sources\.(\w+)(\.\S+?)?=(.*)$", re.DOTALL)
CHOICE = re.compile(r"^(?:\+{0,2}|~)data@data\.sources\.(\w+)(?:=.*)?$")


GIVEN: dict[str, str] = {}  # free texts of the command line by key, kept away from Hydra's parser


def quote(argument: str, multirun: bool) -> str:
    """Quote the value of a free-text or path override, so that Hydra does not interpret commas, brackets and the like.

    In a multirun a path that does not exist is not quoted, because `data.path=a.jsonl,b.jsonl` is a sweep.
    A prompt may hold anything, quotes and `${...}` too: Hydra only gets a reference to it.
    """
    if argument.startswith("peft="):  # the word of AutoModel's guide
        return re.sub(r"(?<=[=,])None(?=,|$)", "none", argument)
    literal = LITERAL.match(argument)
    if literal:
        key, text = literal.groups()
        GIVEN[key] = text
        return f"{'+' if key.startswith('fields.') else ''}{key}='${{given:{key}}}'"
    template = TEMPLATE.match(argument)
    match = template or FREE_TEXT.match(argument)
    if not match:
        return argument
    plus, key, value = match.groups()
    if value in ("", "null") or value[0] + value[-1] in ("''", '""') or "${" in value:
        return argument
    if multirun and not template and not Path(value).expanduser().exists():
        return argument
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    return f"{plus}{key}='{escaped}'"


def add_sources(arguments: list[str]) -> list[str]:
    """Return the overrides with the sources that a mixture names added, and those that it has by default left out.

    `data.sources.NAME=OPTION` adds a source. Once one is added, a source that the mixture's YAML lists is kept only if
    an override or `data.weights` names it. Raises: ValueError for a source without an option.
    """
    if "data=mixture" not in arguments:
        return arguments
    listed, chosen, settings = listed_sources("mixture"), set[str](), set[str]()
    made = []
    for argument in arguments:
        source, choice = SOURCE.match(argument), CHOICE.match(argument)
        if choice:
            chosen.add(choice.group(1))
        elif source and source.group(2) is None and source.group(3) in options("data"):
            chosen.add(source.group(1))
            plus = "" if source.group(1) in listed else "+"
            argument = f"{plus}data@data.sources.{source.group(1)}={source.group(3)}"
        elif source:
            (settings if source.group(2) else chosen).add(source.group(1))  # or a whole node: NAME={_target_: ...}
        made.append(argument)
    if unknown := sorted(settings - chosen - listed):
        name, kinds = unknown[0], ", ".join(o for o in options("data") if o != "mixture")
        raise ValueError(
            f"data.sources.{name}: say what its rows are with data.sources.{name}=OPTION, such as "
            f"data.sources.{name}=chat; the options are {kinds}"
        )
    said = " ".join(a for a in arguments if a.startswith(("data.weights", "~data.sources", "++data.weights")))
    named = chosen | settings | set(re.findall(r"\w+", said))
    return made + ([f"~data@data.sources.{name}" for name in sorted(listed - named)] if chosen - listed else [])


def listed_sources(option: str) -> set[str]:
    """Return the names of the sources that a data option lists in its defaults."""
    from omegaconf import OmegaConf

    listed = OmegaConf.to_container(OmegaConf.load(file_of_option("data", option)), resolve=False)
    assert isinstance(listed, dict)
    keys = [key for entry in listed.get("defaults", ()) if isinstance(entry, dict) for key in entry]
    return {str(key).rpartition(".")[2] for key in keys if "@sources." in str(key)}


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
