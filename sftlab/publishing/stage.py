"""The folder that is published: the run's model, its card and loss plot, its config without this machine's paths."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sftlab.common.files import read_jsonl
from sftlab.publishing.card import make_card
from sftlab.publishing.licence import Licence
from sftlab.publishing.paths import relative_tree
from sftlab.publishing.plot import loss_plot
from sftlab.publishing.refuse import refuse

PLOT = "loss.svg"
CONFIG = "sftlab_config.yaml"  # not config.yaml: beside the model's config.json that name would mislead


def stage(
    run_dir: Path,
    model: Path,
    repo_id: str,
    config: Mapping[str, Any],
    prompt: str,
    licence: Licence,
    token: str | None,
) -> Path:
    """Return the folder `publish/` in the run. It is written whole or not at all.

    Raises: ValueError if the model's folder, or the folder made from it, holds what must not be published.
    """
    refuse(model, token)
    folder = run_dir / "publish"
    partial = run_dir / ".publish.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, copy_function=link_or_copy, ignore=shutil.ignore_patterns("README.md"))
    plot = loss_plot(read_jsonl(run_dir / "metrics.jsonl"))
    if plot is not None:
        (partial / PLOT).write_text(plot, encoding="utf-8")
    repeatable = yaml.safe_dump(relative_tree(dict(config), run_dir), sort_keys=False, allow_unicode=True)
    (partial / CONFIG).write_text(repeatable, encoding="utf-8")
    card = make_card(run_dir, repo_id, config, prompt, PLOT if plot is not None else None, licence)
    (partial / "README.md").write_text(card, encoding="utf-8")
    try:
        refuse(partial, token)
    except ValueError:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file if the disk allows it, which takes no space; else copy it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
