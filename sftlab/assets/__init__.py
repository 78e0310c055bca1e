"""What ships with the package: the demo's model, tokenizer and data, named `asset://...` in a config."""

from pathlib import Path

SCHEME = "asset://"
FOLDER = Path(__file__).parent


def locate(name: str) -> str:
    """Return the path of a shipped file or folder for `asset://...`, any other name as it is."""
    return str(FOLDER / name.removeprefix(SCHEME)) if name.startswith(SCHEME) else name
