"""Errors that teach: what was given, what was expected, what to type; the nearest key or option for a typo."""

import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from hydra.errors import CompactHydraException, InstantiationException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sftlab.common import secrets
from sftlab.common.words import COMMAND, plain
from sftlab.config.groups import options
from sftlab.config.unknown import explain_key, nearest

# The message of these errors says what to do, and a traceback would hide it. SFTLAB_TRACEBACK=1 shows the traceback.
TAUGHT = (ValueError, OSError, ArithmeticError, MemoryError)


def complain(text: str) -> None:
    """Print an error to standard error, in red on a terminal, with the rank where there are several."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    text = f"error{f' on rank {rank}' if rank else ''}: {plain(secrets.strike(text))}"
    if sys.stderr.isatty():
        text = f"\033[31m{folded(text, shutil.get_terminal_size().columns)}\033[0m"
    print(text, file=sys.stderr, flush=True)


def folded(text: str, width: int) -> str:
    """Return lines folded at words; a long word, and a command to be copied, stays whole."""

    def fold(line: str) -> str:
        if line.startswith(COMMAND) or len(line) <= width:
            return line
        indent = " " * (len(line) - len(line.lstrip()))
        how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
        return textwrap.fill(line.strip(), width, initial_indent=indent, subsequent_indent=indent, **how)

    return "\n".join(map(fold, text.split("\n")))


def explain(error: BaseException, config_name: str, words: Sequence[str] | None = None) -> str:
    """Return what to show for an error: its message if that says what to do, else the traceback.

    `words` are the overrides that were typed, by default those of this process.
    """
    while isinstance(error, InstantiationException) and error.__cause__:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: give one, {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    cause = error.__cause__ if isinstance(error, CompactHydraException) else None
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        text = str(cause if isinstance(cause, OmegaConfBaseException) else error).split("\n    full_key")[0]
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
        return text_of_hydra(str(error), text, config_name, words)
    if isinstance(error, TAUGHT) and not os.environ.get("SFTLAB_TRACEBACK"):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


CONFIG_FILE = (
    "a file FOLDER/experiment/NAME.yaml of your own is --config-dir FOLDER experiment=NAME; a file of axolotl or "
    "AutoModel becomes one by python -m sftlab.convert FILE"
)


def unreadable(word: str) -> str:
    """Return the message for a word of the command line that is no override."""
    key, equals, _ = word.partition("=")
    if not equals and word.endswith((".yaml", ".yml")):
        return f"{word}: {CONFIG_FILE}"
    if not equals:
        key, _, value = key.partition(":")
        return f"{word}: expected KEY=VALUE, such as {key.lstrip('~+')}={value or '...'}"
    return (
        f"{word}: the value cannot be read. A list is [a,b], several settings {{a:1,b:2}}; any other text with "
        f"brackets, commas or quotes in it stands in quotes of its own: {key}='\"...\"'"
    )


def text_of_hydra(message: str, text: str, config_name: str, words: Sequence[str] | None) -> str:
    """Return a composition error in plain words, with the nearest key or option."""
    unknown = re.search(r"Could not override '([^']+)'", message)
    unknown = unknown or re.search(r"Key '([^']+)' is not in struct", message)
    if unknown:
        return explain_key(unknown.group(1).lstrip("+"), config_name, words)
    option = re.search(r"Could not (?:find|override) '([\w./@]+)/([^/']+)'", message)
    if option:
        group, name = option.groups()
        if "//" in f"{group}/{name}":  # a path
            group, _, path = f"{group}/{name}".partition("/")
            return f"{group}={path}: expected the name of an option ({', '.join(options(group))}); {CONFIG_FILE}"
        known = options(group)
        return f"{group}={name}: no such option; {nearest(name, known)}the options are {', '.join(known)}"
    return text
