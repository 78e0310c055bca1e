"""Paths of this machine, out of what is published: rewritten relative to the run."""

import os
import re
from pathlib import Path
from typing import Any

# A path of two names or more that begins at the root. Not after a word, a dot or another slash: those are parts of a
# relative path, a URL or a closing tag; /v1/... and /health are the server's.
ABSOLUTE = re.compile(
    r"(?<![\w.:/<~@-])(?:~?/(?!v1/)(?:[^\s/'\"`,;:()\[\]{}<>|]+/)+[^\s/'\"`,;:()\[\]{}<>|]*|[A-Za-z]:\\\S+)"
)
SHARED = ("/", "/home", "/Users")  # what lies in these names a person or a machine


def relative(text: str, run_dir: Path) -> str:
    """Return `text` with every absolute path in it rewritten relative to the run.

    Where the way there would climb to the root or past somebody's home, only the path's last name is kept.
    """
    if text.startswith(("/", "~/")) and "\n" not in text:
        return _one(text, run_dir)  # a value that is a path may hold spaces and commas
    return ABSOLUTE.sub(lambda found: _one(found.group(), run_dir), text)


def relative_tree(node: Any, run_dir: Path) -> Any:
    """Return a config with every path in its texts rewritten."""
    if isinstance(node, dict):
        return {key: relative_tree(value, run_dir) for key, value in node.items()}
    if isinstance(node, list):
        return [relative_tree(value, run_dir) for value in node]
    return relative(node, run_dir) if isinstance(node, str) else node


def _one(path: str, run_dir: Path) -> str:
    target, start = os.path.abspath(os.path.expanduser(path)), str(run_dir.absolute())
    if "\\" in path:
        return path.rpartition("\\")[2]
    if os.path.commonpath([target, start]) in SHARED:
        return os.path.basename(target)
    return os.path.relpath(target, start)
