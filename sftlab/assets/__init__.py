"""What ships with the package: the demo's model, tokenizer and data, named `asset://...` in a config."""

import os
from pathlib import Path

SCHEME = "asset://"
FOLDER = Path(__file__).parent


def locate(name: str) -> str:
    """Return the path of a shipped file or folder for `asset://...`, that of `~/...`, any other name as it is."""
    if name.startswith("~"):  # a shell does not expand it behind `key=`
        return os.path.expanduser(name)  # which leaves `~nobody` as it is
    if not name.startswith(SCHEME):
        return name
    path = FOLDER / name.removeprefix(SCHEME)
    if not path.resolve().is_relative_to(FOLDER.resolve()):  # rows of shipped data are shown and published
        raise ValueError(f"{name}: nothing outside of the shipped files is named so")
    return str(path)
