"""Shell completion for `python -m sftlab.<command>`: `eval "$(python -m sftlab.train -sc install=bash)"`.

Hydra completes `python file.py` and installed scripts, but not `python -m`. This installs a bash function of our own
for `python -m`. It asks the command itself (`-sc query=bash`, with the line in COMP_LINE) and hides `-m` from Hydra.
"""

import os
import re
from collections.abc import Sequence

# python -m sftlab.train, python -m sftlab train, sftlab train
COMMAND = re.compile(r"^\s*(?:\S*python[\d.]*\s+-m\s+sftlab[.\s]\s*|(?:\S*/)?sftlab\s+)(\w+)")

BASH = r"""_sftlab() {
    local words=($COMP_LINE) run word
    if [[ "${words[0]##*/}" == sftlab ]]; then run=("${words[@]:0:2}") word=2
    elif [[ "${words[1]}" == -m && "${words[2]}" == sftlab.* ]]; then run=("${words[@]:0:3}") word=3
    elif [[ "${words[1]}" == -m && "${words[2]}" == sftlab ]]; then run=("${words[@]:0:4}") word=4
    else return
    fi
    (( COMP_CWORD >= word )) || return
    local found=$(COMP_LINE="$COMP_LINE" "${run[@]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _sftlab python python3 sftlab
"""


def prepare(arguments: Sequence[str], as_module: bool) -> str | None:
    """Return the script to print for `-sc install=bash`; rewrite the line of a query so that Hydra understands it."""
    if as_module and "install=bash" in arguments and {"-sc", "--shell-completion"} & set(arguments):
        return BASH
    line = os.environ.get("COMP_LINE")
    if line is not None:
        os.environ["COMP_LINE"] = COMMAND.sub(r"python \1.py", line)
    return None
