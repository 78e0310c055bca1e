"""python -m sftlab COMMAND key=value ...: run one of the commands."""

import sys
from importlib import import_module

COMMANDS = ("train", "evaluate", "generate", "serve", "publish", "preview", "export", "sweep")


def main() -> None:
    """Run the command that the first argument names, as `python -m sftlab.COMMAND` would."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        given = f"error: {name}: no such command; " if name not in ("", "-h", "--help") else ""
        print(f"{given}usage: python -m sftlab COMMAND key=value ...; the commands are {', '.join(COMMANDS)}")
        sys.exit(2 if given or not name else 0)
    module = import_module(f"sftlab.{name}")
    sys.argv = [str(module.__file__), *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main()
