"""The folder that is published: the run's model, its card and loss plot, its config without this machine's paths."""

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sftlab.checkpoints.adapter_folder import BASE
from sftlab.common import checksums
from sftlab.common.files import copy_plain, make_folder, plain_files, read_json, read_jsonl, refuse_links, remove
from sftlab.models.adapters import ADAPTER_CONFIG
from sftlab.publishing.card import make_card
from sftlab.publishing.licence import Licence
from sftlab.publishing.paths import relative_tree
from sftlab.publishing.plot import loss_plot
from sftlab.publishing.refuse import refuse

PLOT = "loss.svg"
CONFIG = "sftlab_config.yaml"  # not config.yaml: beside the model's config.json that name would mislead
BASE_NAMES = ((ADAPTER_CONFIG, "base_model_name_or_path"), (BASE, "name"))  # where an adapter names its base
# What a model's folder consists of, in transformers' names. Other files stay here.
NAMES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG, BASE),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
    ),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template.*", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),  # a model's own code
)


def stage(
    run_dir: Path,
    model: Path,
    repo_id: str,
    config: Mapping[str, Any],
    prompt: str,
    licence: Licence,
    token: str | None,
) -> tuple[Path, list[str]]:
    """Return the folder `publish/` in the run, and the files of the model's folder that are not in it.

    It is written whole or not at all, from copies: nothing in it is a link to a file elsewhere.
    Raises: ValueError if the model's folder, or the folder made from it, holds what must not be published;
    Changed if the model is not what was exported; LinkRefused if a link is in the way.
    """
    refuse_links(run_dir, "publish")
    own = os.path.relpath(model, run_dir)
    if not own.startswith(".."):
        refuse_links(run_dir, own)
    names = [name for name in plain_files(model) if name not in ("README.md", checksums.NAME)]
    checksums.verify(model)
    refuse(model, token, replaced=base_names(model))
    listed = checksums.read(model)
    chosen = [n for n in names if (not listed or n in listed) and any(fnmatch.fnmatch(n, known) for known in NAMES)]
    partial = run_dir / ".publish.partial"
    remove(partial)
    partial.mkdir()
    for name in chosen:
        copy_plain(refuse_links(model, name), make_folder(partial, os.path.dirname(name)) / os.path.basename(name))
    listed |= name_base(partial, str(relative_tree(dict(config), run_dir)["model"]["name_or_path"]))
    try:
        write_own(partial, run_dir, repo_id, config, prompt, licence)
        checksums.write_list(partial, {name: listed[name] for name in chosen if listed})
        refuse(partial, token)
    except BaseException:
        remove(partial)
        raise
    folder = run_dir / "publish"
    remove(folder)
    partial.rename(folder)
    return folder, [name for name in names if name not in chosen]


def base_names(folder: Path) -> set[str]:
    """Return the names of an adapter's base in its files, which `name_base` replaces."""
    found = [read_json(folder / file).get(key) for file, key in BASE_NAMES if (folder / file).is_file()]
    return {str(name) for name in found if name}


def name_base(folder: Path, name: str) -> dict[str, str]:
    """Name the base of an adapter in its files as the run's config does; return the new checksums.

    In the run they have the absolute path of a local base, for whoever loads the adapter on this machine.
    """
    changed = {}
    for file, key in BASE_NAMES:
        if (folder / file).is_file():
            node = read_json(folder / file) | {key: name}
            (folder / file).write_text(json.dumps(node, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            changed[file] = checksums.sha256(folder / file)
    return changed


def write_own(
    folder: Path, run_dir: Path, repo_id: str, config: Mapping[str, Any], prompt: str, licence: Licence
) -> None:
    """Write what is told of the run: the loss plot, the config, the card."""
    plot = loss_plot(read_jsonl(run_dir / "metrics.jsonl"))
    if plot is not None:
        (folder / PLOT).write_text(plot, encoding="utf-8")
    repeatable = yaml.safe_dump(relative_tree(dict(config), run_dir), sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(repeatable, encoding="utf-8")
    card = make_card(run_dir, repo_id, config, prompt, PLOT if plot is not None else None, licence)
    (folder / "README.md").write_text(card, encoding="utf-8")
