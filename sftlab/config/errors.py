"""Errors that teach: what was given, what was expected, what to type; the nearest key or option for a typo."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sftlab.common import secrets
from sftlab.common.renamed import KEYS
from sftlab.config.groups import keys, keys_of_option, options

# The message of these errors says what to do, and a traceback would hide it. SFTLAB_TRACEBACK=1 shows the traceback.
TAUGHT = (ValueError, OSError, ArithmeticError, MemoryError)


def complain(text: str) -> None:
    """Print an error to standard error, in red on a terminal, with the rank where there are several."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    text = f"error{f' on rank {rank}' if rank else ''}: {secrets.strike(text)}"
    print(f"\033[31m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def explain(error: BaseException, config_name: str) -> str:
    """Return what to show for an error: its message if that says what to do, else the traceback."""
    while isinstance(error, InstantiationException) and error.__cause__:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: give one, {error.full_key}=..."
    cause = error.__cause__ if isinstance(error, CompactHydraException) else None
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        text = str(cause if isinstance(cause, OmegaConfBaseException) else error).split("\n    full_key")[0]
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
        return text_of_hydra(str(error), text, config_name)
    if isinstance(error, TAUGHT) and not os.environ.get("SFTLAB_TRACEBACK"):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def text_of_hydra(message: str, text: str, config_name: str) -> str:
    """Return a composition error in plain words, with the nearest key or option."""
    unknown = re.search(r"Could not override '([^']+)'", message)
    unknown = unknown or re.search(r"Key '([^']+)' is not in struct", message)
    if unknown:
        return unknown_key(unknown.group(1).lstrip("+"), keys(config_name))
    option = re.search(r"Could not (?:find|override) '([\w./@]+)/([^/']+)'", message)
    if option:
        group, name = option.groups()
        known = options(group)
        return f"{group}={name}: no such option; {nearest(name, known)}the options are {', '.join(known)}"
    return text


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key: which options of its group have it, or the nearest key that exists."""
    if key in KEYS:
        return f"{key}: it is now called {KEYS[key]}"
    known = list(known)
    group, _, leaf = key.partition(".")
    keys_of = {o: keys_of_option(group, o) for o in options(group)} if leaf else {}
    takers = [o for o, theirs in keys_of.items() if leaf in theirs]
    if takers:
        names = " and ".join(f"{group}={t}" for t in takers)
        return f"{key}: the chosen {group} option has no such key; it belongs to {names}"
    known += sorted({f"{group}.{k}" for theirs in keys_of.values() for k in theirs} - set(known))
    return f"{key}: no such key; {nearest(key, known) or '--cfg job lists all keys'}".rstrip("; ")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for the known name most like `name`, or nothing."""
    known = list(known)
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    found = difflib.get_close_matches(name, known, 1, 0.6) or [
        by_leaf[m] for m in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, 1, 0.7)
    ]
    return f"did you mean {found[0]}? " if found else ""
