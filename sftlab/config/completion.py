"""Shell completion for `python -m sftlab.<command>`: `eval "$(python -m sftlab.train -sc install=bash)"`.

Hydra completes `python file.py` and installed scripts, but not `python -m`. This installs a bash function of our own
for `python -m`. It asks the command itself (`-sc query=bash`, with the line in COMP_LINE) and hides `-m` from Hydra.
"""

import os
import re
from collections.abc import Sequence

MODULE = re.compile(r"^\s*\S*python[\d.]*\s+-m\s+(sftlab)\.(\w+)")

BASH = r"""_sftlab() {
    local words=($COMP_LINE)
    [[ "${words[1]}" == -m && "${words[2]}" == sftlab.* && $COMP_CWORD -gt 2 ]] || return
    local found=$(COMP_LINE="$COMP_LINE" "${words[0]}" -m "${words[2]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _sftlab python python3
"""


def prepare(arguments: Sequence[str], as_module: bool) -> str | None:
    """Return the script to print for `-sc install=bash`; rewrite the line of a query so that Hydra understands it."""
    if as_module and "install=bash" in arguments and {"-sc", "--shell-completion"} & set(arguments):
        return BASH
    line = os.environ.get("COMP_LINE")
    if line is not None:
        os.environ["COMP_LINE"] = MODULE.sub(r"python \2.py", line)
    return None
