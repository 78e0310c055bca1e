"""A config file of NeMo AutoModel or axolotl as an experiment of ours, and a list of what it has that we do not.

Keys are translated by the table of foreign.py; what describes datasets is translated here, because it decides which
data option reads their rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml, to_yaml
from sftlab.common.values import as_typed
from sftlab.config import foreign
from sftlab.config.groups import is_group
from sftlab.config.unknown import value_of

AXOLOTL_TYPES = {"alpaca": "instruction", "chat_template": "chat", "sharegpt": "chat", "completion": "text"}
AUTOMODEL_TARGETS = {"make_squad_dataset": "squad", "ChatDataset": "chat"}
AUTOMODEL_PATHS = ("dataset_name", "path_or_dataset_id", "path_or_dataset")
IGNORED = ("_target_", "collate_fn")  # names of classes of the other trainer
USUAL_MESSAGES = ("messages", "conversations")


@dataclass
class Converted:
    """What a file became: overrides of `train`, words for the command line, and what has no counterpart."""

    tool: str
    settings: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # settings whose meaning differs a little
    left: list[str] = field(default_factory=list)

    def set(self, words: tuple[str, ...] | list[str]) -> None:
        """Take over overrides; an option of a group that was chosen by something more particular stays."""
        for word in words:
            key, _, value = word.partition("=")
            if key == "peft" and self.settings.get("peft") not in (None, "lora"):
                continue
            self.settings[key] = value


def convert(file: Path) -> Converted:
    """Return what a config file becomes. Raises: ValueError if it is of neither trainer."""
    body = read_yaml(file)
    if not isinstance(body, Mapping):
        raise ValueError(f"{file}: expected a YAML of NeMo AutoModel or axolotl; it holds no keys")
    if "base_model" in body:
        made, rest = axolotl(body)
    elif "step_scheduler" in body or "nemo_automodel" in str(body):
        made, rest = automodel(body)
    else:
        raise ValueError(
            f"{file}: neither a config of axolotl (it has no base_model) nor one of NeMo AutoModel (no step_scheduler)"
        )
    given = {key: value for key, value in flat(rest) if value is not None}
    for key, value in given.items():
        found = foreign.answer(key, value, given)
        if found is not None and found.settings:
            made.set(found.settings)
            if found.note:
                made.notes.append(f"{' '.join(found.settings)}: {found.note}")
        elif key.rpartition(".")[2] not in IGNORED:
            made.left.append(f"{key}={as_typed(value)}" + (f": {found.note}" if found else ""))
    made.notes = list(dict.fromkeys(made.notes))
    return made


def axolotl(body: Mapping[str, Any]) -> tuple[Converted, dict[str, Any]]:
    """Return what the datasets of an axolotl file become, and the rest of the file."""
    made = Converted("axolotl")
    rest = {key: value for key, value in body.items() if key not in ("datasets", "test_datasets")}
    sources = [source(entry, made) for entry in body.get("datasets") or ()]
    if len(sources) == 1:
        made.set([f"{key}={value}" for key, value in sources[0].items()])
    for number, words in enumerate(sources if len(sources) > 1 else (), 1):
        option = words.pop("data", "chat")
        made.command += ["data=mixture"] * (number == 1) + [f"data.sources.s{number}={option}"]
        made.command += [f"data.sources.s{number}.{k.removeprefix('data.')}={v}" for k, v in words.items()]
    for entry in body.get("test_datasets") or ():
        made.set([f"data.val_path={entry.get('path')}"])
    return made, rest


def source(entry: Mapping[str, Any], made: Converted) -> dict[str, str]:
    """Return the data option and its settings of one entry of axolotl's `datasets`."""
    kind = str(entry.get("type") or "")
    option = AXOLOTL_TYPES.get(kind.partition(".")[0].partition(":")[0])
    words = {"data": option} if option else {}
    words["data.path"] = str(entry.get("path"))
    for theirs, ours in (("split", "data.split"), ("name", "data.subset"), ("revision", "data.revision")):
        if entry.get(theirs):
            words[ours] = str(entry[theirs])
    messages = entry.get("field_messages")
    if messages and messages not in USUAL_MESSAGES:
        words["data.format.columns.messages"] = str(messages)
    if option == "text" and entry.get("field"):
        words["data.format.column"] = str(entry["field"])
    if option is None:
        made.left.append(f"datasets.type={kind or '(none)'}: say what a row of {entry.get('path')} is, data=OPTION")
    known = ("path", "type", "split", "name", "revision", "field_messages", "message_property_mappings", "field")
    made.left += [f"datasets.{key}={as_typed(value)}" for key, value in entry.items() if key not in known]
    return words


def automodel(body: Mapping[str, Any]) -> tuple[Converted, dict[str, Any]]:
    """Return what the datasets of an AutoModel file become, and the rest of the file."""
    made, rest = Converted("NeMo AutoModel"), dict(body)
    node = dict(rest.pop("dataset", None) or {})
    target = str(node.pop("_target_", "")).rpartition(".")[2]
    option = AUTOMODEL_TARGETS.get(target)
    path = next((str(node[key]) for key in AUTOMODEL_PATHS if node.get(key)), "")
    if option:
        made.set([f"data={option}"])
    elif mapping := node.pop("column_mapping", None):
        prompt = [f"{{{mapping[key]}}}" for key in ("context", "question") if mapping.get(key)]
        made.set(["data=template", f"data.format.prompt={' '.join(prompt)}"])
        made.set([f"data.format.completion= {{{mapping.get('answer')}}}"])
    else:
        made.left.append(f"dataset._target_={target}: say what a row of {path} is, data=OPTION or data=template")
    rest["dataset"] = node
    held = dict(rest.pop("validation_dataset", None) or {})
    held.pop("_target_", None)
    if path and path in (held.get(key) for key in AUTOMODEL_PATHS):  # another split of the same
        held = {key: value for key, value in held.items() if key not in AUTOMODEL_PATHS}
    rest["validation_dataset"] = held
    rest.pop("validation_dataloader", None)
    if not rest.get("lr_scheduler"):  # the rate is constant there, where no scheduler is named
        made.set(["schedule=constant"])
    return made, rest


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a tree and their values; a list is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value_of(value) if isinstance(value, str) else value


def as_experiment(made: Converted, file: Path) -> str:
    """Return the text of the experiment, which `experiment=NAME` composes."""
    defaults = [{f"override /{key}": value} for key, value in made.settings.items() if is_group(key)]
    tree: dict[str, Any] = {}
    for key, value in made.settings.items():
        if not is_group(key):
            *path, leaf = key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = value if key.startswith(("data.format", "name")) else value_of(value)
    about = [f"# {line}" for line in (f"From {file.name} of {made.tool}. Not converted:", *made.left)]
    body = ({"defaults": defaults} if defaults else {}) | tree
    return "# @package _global_\n" + "\n".join(about) + f"\n{to_yaml(body)}"
