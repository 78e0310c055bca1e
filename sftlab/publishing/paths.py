"""Keep this machine's paths out of what is published: rewrite them relative to the run."""

import os
import re
from pathlib import Path
from typing import Any

# A path from the root, of two names or more. After a word, a dot or another slash it would be part of a relative path,
# a URL or a closing tag. /v1/... and /health are paths of the server, so they do not match.
ABSOLUTE = re.compile(
    r"(?<![\w.:/<~@-])(?:~?/(?!v1/)(?:[^\s/'\"`,;:()\[\]{}<>|]+/)+[^\s/'\"`,;:()\[\]{}<>|]*|[A-Za-z]:\\\S+)"
)
SHARED = ("/", "/home", "/Users")  # an entry of these folders may name a person or a machine


def relative(text: str, run_dir: Path) -> str:
    """Return `text` with every absolute path in it rewritten relative to the run.

    If the relative path would climb to the root or past somebody's home, only its last name is kept.
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
