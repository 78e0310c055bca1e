"""sftlab COMMAND key=value ..., or python -m sftlab COMMAND: run one of the commands."""

import difflib
import sys
from importlib import import_module

COMMANDS = {
    "train": "fine-tune a causal language model on labelled data; with -m or a launcher a sweep of such runs",
    "preview": "the data of a run as the model will see it, and what became of every row",
    "evaluate": "scores of a trained model with its predictions, the base model's beside them",
    "generate": "a trained model's answer to a prompt, to a file of prompts, or in a chat",
    "serve": "an OpenAI-compatible server for a trained model",
    "publish": "a run's model on the Hugging Face Hub, with a card",
    "export": "a checkpoint of a run as a Hugging Face folder",
    "sweep": "status, ranking and report of a sweep; retry and cancel",
    "compare": "any runs on one page: scores, curves, settings",
    "benchmark": "how fast a run trains on this machine",
    "estimate": "memory, time, price and disk of a run, from its config alone",
    "convert": "a config of NeMo AutoModel or axolotl as an experiment",
    "schema": "what every key of a config takes, as a JSON schema for editors",
    "doctor": "whether this machine, or the nodes of a cluster, can train; what to do if not",
    "cache": "the tokenised data that is kept: list it, clear it",
}


def main() -> None:
    """Run the command that the first argument names, as `python -m sftlab.COMMAND` would."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help", "help"):
        print(usage())
        sys.exit(0 if name else 2)
    if name == "--version":
        from sftlab import __version__

        print(__version__)
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: {name}: no such command; {hint}the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = import_module(f"sftlab.{name}")
    sys.argv = [str(module.__file__), *sys.argv[2:]]
    module.main()


def usage() -> str:
    """Return the help of the one command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    told = ["usage: sftlab COMMAND key=value ...", "", *lines, "", "sftlab COMMAND --help: its settings, with examples"]
    return "\n".join(told)


if __name__ == "__main__":
    main()
