"""What ships with the package: the demo's model, tokenizer and data, named `asset://...` in a config."""

from pathlib import Path

SCHEME = "asset://"
FOLDER = Path(__file__).parent


def locate(name: str) -> str:
    """Return the path of a shipped file or folder for `asset://...`, that of `~/...`, any other name as it is."""
    if name.startswith("~"):  # a shell does not expand it behind `key=`
        return str(Path(name).expanduser())
    return str(FOLDER / name.removeprefix(SCHEME)) if name.startswith(SCHEME) else name
