"""sftlab schema: what every key of a config takes, with its comment, as a JSON schema for editors."""

import json
from pathlib import Path

from omegaconf import DictConfig

from sftlab.config import start


def schema(cfg: DictConfig) -> None:
    """Print the schema, or write it."""
    from sftlab.common.files import write_whole
    from sftlab.config import schema as made

    text = json.dumps(made.schema(), indent=2, ensure_ascii=False) + "\n"
    if cfg.output is None:
        print(text, end="")
        return
    output = Path(str(cfg.output)).expanduser()
    write_whole(output, text)
    print(
        f"{output}\nIn an experiment's first line, for editors with the YAML language server:\n"
        f"# yaml-language-server: $schema={output.absolute()}"
    )


def main() -> None:
    """Entry point."""
    start.main(schema, "schema")


if __name__ == "__main__":
    main()
