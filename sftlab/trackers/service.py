"""What trackers of a service share: which of its runs this run is, and whether it can be reached."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sftlab.common.files import make_folder, read_json, write_json
from sftlab.common.tracker import About, Answer

REACH_S = 3.0
COLUMNS = ("id", "prompt", "answer", "expected")


def recall(run_dir: Path, service: str, step: int) -> dict[str, Any]:
    """Return what was remembered of a service's run when a run resumes; nothing at step 0, where a new one begins."""
    return read_json(run_dir / "trackers" / f"{service}.json") if step else {}


def remember(run_dir: Path, service: str, what: Mapping[str, Any]) -> None:
    """Remember which of a service's runs this run is, so that a resume goes on in the same curve."""
    write_json(make_folder(run_dir, "trackers") / f"{service}.json", what)


def is_offline(setting: bool | str, url: str) -> bool:
    """Return whether to record on this machine only: as told; for `auto` where the service cannot be reached.

    Behind a proxy only the proxy knows, so the service counts as reachable there.
    """
    if isinstance(setting, bool):
        return setting
    place = urlsplit(url)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return False
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), REACH_S).close()
    except OSError:
        return True
    return False


def check_offline(tracker: str, setting: bool | str) -> None:
    """Raise ValueError for a setting that is none."""
    if setting not in ("auto", True, False):
        raise ValueError(f"tracker.{tracker}.offline={setting}: expected auto, true or false")


def all_tags(about: About, tags: Any) -> list[str]:
    """Return the tags that were typed, and the model's name."""
    model = about.config.get("model")
    name = str(model.get("name_or_path", "")) if isinstance(model, Mapping) else ""
    return list(dict.fromkeys([*map(str, tags), *([name.rstrip("/").rpartition("/")[2][:60]] if name else [])]))


def row(answer: Answer) -> list[str]:
    """Return an answer as a row of COLUMNS."""
    return [str(answer["id"]), str(answer["prompt"]), str(answer["answer"]), " / ".join(answer["references"])]


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a tree by its dotted key."""
    if isinstance(node, Mapping) and node:
        return {key: leaf for k, v in node.items() for key, leaf in flat(v, f"{prefix}{k}.").items()}
    return {prefix.rstrip("."): node}
