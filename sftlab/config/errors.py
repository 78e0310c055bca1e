"""Errors that teach: what was given, what was expected, what to type; the nearest key or option for a typo."""

import os
import re
import sys
import traceback
from collections.abc import Sequence

from hydra.errors import CompactHydraException, InstantiationException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sftlab.common import secrets
from sftlab.common.words import plain
from sftlab.config.groups import options
from sftlab.config.unknown import explain_key, nearest

# The message of these errors says what to do, and a traceback would hide it. SFTLAB_TRACEBACK=1 shows the traceback.
TAUGHT = (ValueError, OSError, ArithmeticError, MemoryError)


def complain(text: str) -> None:
    """Print an error to standard error, in red on a terminal, with the rank where there are several."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    text = f"error{f' on rank {rank}' if rank else ''}: {plain(secrets.strike(text))}"
    print(f"\033[31m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


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


def unreadable(word: str) -> str:
    """Return the message for a word of the command line that is no override."""
    key, equals, _ = word.partition("=")
    if not equals:
        return f"{word}: expected KEY=VALUE, such as {key.lstrip('~+')}=..."
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
        known = options(group)
        return f"{group}={name}: no such option; {nearest(name, known)}the options are {', '.join(known)}"
    return text
