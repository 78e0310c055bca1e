"""Every option that a person can set, and what a test's source sets: for the test that finds options nobody tries.

An option is a top-level key of a command (`train.seed`), the choice of a group (`train.tracker`), or a parameter of a
constructor behind a `_target_` (`TrainerSettings.epochs`, `cosine.final_ratio`).
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from sftlab.config import groups
from tests.support import REPO

RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")
TESTS = REPO / "tests"
PARALLEL = ("fsdp2", "hsdp", "ddp", "fsdp2_tp")
GIVEN_BY_CODE = [
    f"{p}.{key}" for p in PARALLEL for key in ("compile", "activation_checkpointing")
]  # trainer.compile, ...


@dataclass
class Option:
    """Where an option is set on the command line, and its defaults in YAML and signature.

    `chosen_by` holds the choices of its group (`schedule=wsd`) that have it, and "" for the choice made by default.
    """

    name: str
    command: str
    keys: set[str] = field(default_factory=set)
    defaults: list[Any] = field(default_factory=list)
    chosen_by: set[str] = field(default_factory=set)

    def is_default(self, value: Any) -> bool:
        """Return whether setting `value` changes nothing, whichever choice of its group is made."""
        return all(value == default for default in self.defaults)


@functools.cache
def schema() -> dict[str, Option]:
    """Return every option by its name, of every command in conf/ and every choice of every group."""
    found: dict[str, Option] = {}
    group_names = sorted(p.name for p in groups.CONF.iterdir() if p.is_dir() and p.name != "experiment")
    defaults = choices("train")
    train_keys = set(yaml.safe_load((groups.CONF / "train.yaml").read_text()))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(groups.CONF), version_base="1.3"):
        for name in sorted(p.stem for p in groups.CONF.glob("*.yaml")):
            listed = yaml.safe_load((groups.CONF / f"{name}.yaml").read_text())["defaults"]
            known = train_keys if "train" in listed else set()  # preview takes all that train takes
            elsewhere = [f"{g}={groups.options(g)[0]}" for g, c in choices(name).items() if c not in known_to(g)]
            for key, value in plain(compose(name, elsewhere)).items():
                if key not in known and key not in group_names and not is_node(value):
                    own = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) and value else {}
                    for path, default in (own or {key: value}).items():  # estimate.device and so on
                        add(found, f"{name}.{path.removeprefix(f'{name}.')}", name, path, default)
            for group, choice in choices(name).items():
                if len(groups.options(group)) > 1 or choice is None:
                    add(found, f"{name}.{group}", name, group, choice)
        train = plain(compose("train"))
        for path in ("trainer", "evaluation"):
            walk(found, path, train[path], None)
        for group in group_names:
            for choice in groups.options(group):
                node = plain(compose("train", [f"{group}={choice}"])).get(group) or {}
                typed = None if defaults.get(group) == choice else f"{group}={choice}"
                if "_target_" not in node:  # the sweeper's own options go to Hydra's plugin, whole
                    for key, value in node.items():
                        if is_node(value):
                            continue  # tracker.wandb: its parameters are the options
                        add(found, f"{group}.{key}", "train", f"{group}.{key}", value, typed)
                walk(found, group, node, typed)
    return found


def known_to(group: str | None) -> list[str | None]:
    return [None, *groups.options(str(group))]


def plain(config: Any) -> dict[str, Any]:
    made = OmegaConf.to_container(config, resolve=False)
    assert isinstance(made, dict)
    return {str(k): v for k, v in made.items() if k != "hydra"}


def choices(name: str) -> dict[str, str | None]:
    """Return the groups that a command chooses from, with the choice of each that it makes by default."""
    listed = yaml.safe_load((groups.CONF / f"{name}.yaml").read_text())["defaults"]
    named = [entry for entry in listed if isinstance(entry, dict)]
    return {k: v for entry in named for k, v in entry.items() if not k.startswith("override")}


def is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def walk(found: dict[str, Option], path: str, node: Any, typed: str | None) -> None:
    """Add the parameters of a node's constructor, and of those of the nodes in it."""
    if not isinstance(node, Mapping):
        return
    if is_node(node):
        constructor = get_object(node["_target_"])
        signature = inspect.signature(constructor).parameters
        for key, value in node.items():
            if key in RESERVED or is_node(value):
                continue
            name = f"{constructor.__name__}.{key}"
            add(found, name, "train", f"{path}.{key}", value, typed)
            if key in signature and signature[key].default is not inspect.Parameter.empty:
                found[name].defaults.append(signature[key].default)
        for key, parameter in signature.items():
            name = f"{constructor.__name__}.{key}"
            if key not in node and parameter.default is not inspect.Parameter.empty and name not in GIVEN_BY_CODE:
                add(found, name, "train", f"{path}.{key}", parameter.default, typed)
    for key, value in node.items():
        if isinstance(value, Mapping):
            walk(found, f"{path}.{key}", value, typed)


def add(found: dict[str, Option], name: str, of: str, key: str, default: Any, typed: str | None = None) -> None:
    option = found.setdefault(name, Option(name, of))
    option.keys.add(key)
    option.defaults.append(default)
    option.chosen_by.add(typed or "")


# What a test sets


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def definitions(file: Path) -> dict[str, ast.AST]:
    """Return what a module defines at its top, by name."""
    found: dict[str, ast.AST] = {}
    for node in parsed(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                found[name.id] = node
    return found


@functools.cache
def imported(file: Path) -> dict[str, tuple[Path, str]]:
    """Return what a test module takes from other test modules: {its name here: (file, name there)}."""
    found = {}
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tests":
            there = (REPO / Path(*node.module.split("."))).with_suffix(".py")
            if there.is_file():
                found |= {alias.asname or alias.name: (there, alias.name) for alias in node.names}
    return found


def resolve(file: Path, name: str, as_fixture: bool) -> tuple[Path, ast.AST] | None:
    """Return the definition that a name in a test module has in the tests; of a fixture's name, in a conftest too."""
    if name in definitions(file):
        return file, definitions(file)[name]
    if name in imported(file):
        there, original = imported(file)[name]
        return resolve(there, original, False)
    if as_fixture:
        for folder in (file.parent, *file.parent.parents):
            conftest = folder / "conftest.py"
            if conftest.is_file() and name in definitions(conftest):
                return conftest, definitions(conftest)[name]
            if folder == TESTS:
                break
    return None


def sources(file: Path, test: str) -> list[tuple[Path, ast.AST]]:
    """Return a test with all that it uses in the tests: its fixtures, helpers and constants, and theirs."""
    seen: dict[int, tuple[Path, ast.AST]] = {}
    waiting = [resolve(file, test, False)]
    while waiting:
        found = waiting.pop()
        if found is None or id(found[1]) in seen:
            continue
        seen[id(found[1])] = found
        here, node = found
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        fixtures = {a.arg for a in node.args.args} if isinstance(node, ast.FunctionDef) else set()
        waiting += [resolve(here, name, name in fixtures) for name in names | fixtures]
    return list(seen.values())


@dataclass
class Sets:
    """What the source of a test sets, by `key=value` texts, dict entries and keywords, and the words in it."""

    typed: list[tuple[str, Any]] = field(default_factory=list)
    keywords: list[tuple[str, str, Any]] = field(default_factory=list)  # what is called, keyword, value
    words: set[str] = field(default_factory=set)


class Unknown:
    """A value that stands in a variable: it differs from every default."""


OVERRIDE = re.compile(r"^\+{0,2}(~?[A-Za-z_][\w.@]*)=(.*)$", re.DOTALL)


@functools.cache
def what_is_set(file: Path, test: str) -> Sets:
    """Return what a test sets. Docstrings, comments and texts that are only compared with do not count."""
    sets = Sets()
    with_any = {n.name for _, n in sources(file, test) if isinstance(n, ast.FunctionDef) and n.args.kwarg}
    for _, source in sources(file, test):
        texts = [n.value for n in ast.walk(source) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        skipped = {id(text) for text in texts}
        for node in ast.walk(source):
            if isinstance(node, ast.Compare):
                skipped |= {id(operand) for operand in (node.left, *node.comparators)}
            if id(node) in skipped:
                if isinstance(node, ast.Constant):
                    sets.words.add(str(node.value))
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                sets.words |= set(re.split(r"[^\w=@.]+", node.value)) | {node.value}
                for word in {node.value, *node.value.split()}:
                    if match := OVERRIDE.match(word):
                        sets.typed.append((match.group(1), read(match.group(2))))
            elif isinstance(node, ast.JoinedStr):
                first = node.values[0]
                if isinstance(first, ast.Constant) and (match := OVERRIDE.match(str(first.value))):
                    sets.typed.append((match.group(1), Unknown))
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str) and "." in key.value:
                        sets.typed.append((key.value, literal(value)))
            elif isinstance(node, ast.Call):
                called = name_of(node.func)
                if called in with_any:
                    called = "*"
                elif called in ("replace", "partial") and node.args:
                    called = name_of(node.args[0])
                sets.keywords += [(called, k.arg, literal(k.value)) for k in node.keywords if k.arg]
            elif isinstance(node, ast.Name):
                sets.words.add(node.id)
            elif isinstance(node, ast.Attribute):
                sets.words.add(node.attr)
    return sets


def name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Unknown


def read(text: str) -> Any:
    """Return the value of an override, as Hydra reads it where that is simple."""
    if text == "":
        return Unknown
    try:
        return yaml.safe_load(re.sub(r"^(-?\d+)e(-?\d+)$", r"\1.0e\2", text))
    except yaml.YAMLError:
        return text


def is_set_by(option: Option, sets: Sets) -> bool:
    """Return whether a test sets an option off its default."""
    if option.command != "train" and option.command not in sets.words:
        return False
    leaf = option.name.rpartition(".")[2]
    constructor = option.name.partition(".")[0]
    for called, keyword, value in sets.keywords:
        by_helper = called == "*" and (constructor in sets.words or is_chosen(option, sets))
        if keyword == leaf and not option.is_default(value) and (called == constructor or by_helper):
            return True
    for key, value in sets.typed:
        if fits(key, option) and not option.is_default(value) and is_chosen(option, sets):
            return True
    return False


def fits(key: str, option: Option) -> bool:
    leaf = option.name.rpartition(".")[2]
    inside_a_source = any(k.startswith("data.sources.") for k in option.keys) and key.startswith("data.sources.")
    added = any(f"@{k}." in key for k in option.keys)  # +data@data.sources.NAME=OPTION
    return key in option.keys or added or (inside_a_source and key.endswith(f".{leaf}"))


def is_chosen(option: Option, sets: Sets) -> bool:
    """Return whether a test chooses an option of the group that has this one, where the default choice has it not."""
    files = {f"{choice.replace('=', '/')}.yaml" for choice in option.chosen_by}
    return "" in option.chosen_by or bool(sets.words & (option.chosen_by | files))


def tests(folder: Path = TESTS) -> Iterator[tuple[Path, str]]:
    """Yield every test function there is."""
    for file in sorted(folder.rglob("test_*.py")):
        for name, node in definitions(file).items():
            if isinstance(node, ast.FunctionDef) and name.startswith("test_"):
                yield file, name
