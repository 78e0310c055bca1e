"""Revisions: which commits of the hub a run was made from. A branch moves; a commit does not.

`revisions.json` in a run directory holds, for each key of the config that names a revision, the repository, what was
asked for and the commit that it stood for when the run began. A resume, an evaluation and the card use that commit.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sftlab.assets import locate
from sftlab.common.files import read_json, write_json

FILE = "revisions.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 10.0
Asked = tuple[str, str, str | None, str]  # key of the config, repository, revision asked for, model or dataset


def asked_in(config: Mapping[str, Any]) -> Iterator[Asked]:
    """Yield what a config asks the hub for."""
    model = config.get("model") or {}
    if model and not (model.get("init") == "random" and model.get("architecture")):
        yield "model.revision", str(model.get("name_or_path")), model.get("revision"), "model"
    if model.get("tokenizer"):
        yield "model.tokenizer_revision", str(model["tokenizer"]), model.get("tokenizer_revision"), "model"
    data = config.get("data") or {}
    nodes = {"data": data, **{f"data.sources.{name}": node for name, node in (data.get("sources") or {}).items()}}
    for path, node in nodes.items():
        if isinstance(node, Mapping) and node.get("path"):
            yield f"{path}.revision", str(node["path"]), node.get("revision"), "dataset"


def resolve(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of the commits that a config stands for: those recorded already, else what the hub says now."""
    found = {}
    for key, name, revision, kind in asked_in(config):
        commit = recorded_commit(recorded, key, name, revision) or commit_of(name, revision, kind)
        if commit:
            found[key] = {"name": name, "asked": revision, "commit": commit}
    return found


def recorded_commit(recorded: Mapping[str, Any], key: str, name: str, revision: str | None) -> str | None:
    """Return the commit that was recorded for this key, if the same was asked for."""
    entry = recorded.get(key)
    if not isinstance(entry, Mapping) or (entry.get("name"), entry.get("asked")) != (name, revision):
        return None
    commit = str(entry.get("commit"))
    return commit if COMMIT.fullmatch(commit) else None


def with_commits(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that asks for the recorded commits."""
    made = copy.deepcopy(dict(config))
    for key, name, revision, _ in list(asked_in(made)):
        commit = recorded_commit(recorded, key, name, revision)
        if commit:
            *parents, leaf = key.split(".")
            node = made
            for parent in parents:
                node = node[parent]
            node[leaf] = commit
    return made


def read(run_dir: Path | None) -> dict[str, Any]:
    """Return a run's record; an empty one where it has none."""
    return read_json(run_dir / FILE) if run_dir is not None else {}


def pin(config: Mapping[str, Any], run_dir: Path, source: Path | None = None) -> dict[str, Any]:
    """Return the record of a run that starts, written; `source` is a checkpoint or run that it begins from.

    A run of a version that kept no record resumes as it was: its data would otherwise count as other data.
    """
    recorded = read(run_dir)
    if not recorded and any((run_dir / "checkpoints").glob("step_*")):
        return {}
    if source is not None:
        origin = source if (source / FILE).is_file() else source.resolve().parents[1]
        recorded = read(origin) | recorded
    found = resolve(config, recorded)
    if found:
        write_json(run_dir / FILE, found)
    return found


def commit_of(name: str, revision: str | None, kind: str) -> str | None:
    """Return the commit of a repository's revision, from the hub or else the local cache; None for what is no hub id.

    None too where neither knows it: whoever loads it next says what is wrong.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    if not HUB_ID.fullmatch(name) or name.startswith(".") or Path(locate(name)).exists():
        return None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=TIMEOUT_S).sha
        except Exception:  # no network, gated, not there: the loader's own error is the one to show
            pass
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / (revision or "main")
    commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else None  # a revision may be `../../mine`, and is no reason to keep that
