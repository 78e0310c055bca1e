"""A finding of the doctor: what was looked at, how it is, and what to do where it is not well."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sftlab.common import secrets

STATES = ("ok", "note", "fail")  # a note is no obstacle: something is missing that a run can go without


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    state: str
    text: str

    def as_json(self) -> dict[str, str]:
        """Return the finding for another process."""
        return asdict(self)


Answer = tuple[str, str]  # state and text


def examine(checks: Mapping[str, Callable[[], Answer]], show: Callable[[Finding], None]) -> list[Finding]:
    """Return a finding for each check, each shown as it is made. A check that raises has failed; no secret is shown."""
    found = []
    for name, check in checks.items():
        began_s = time.perf_counter()
        try:
            state, text = check()
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            state, text = "fail", f"{type(error).__name__}: {said}"
        took_s = time.perf_counter() - began_s
        text = secrets.strike(text) + (f" ({took_s:.0f} s)" if took_s > 5 else "")
        found.append(Finding(name, state, text))
        show(found[-1])
    return found


def line(finding: Finding, width: int) -> str:
    """Return a finding on one line."""
    return f"{finding.name:<{width}}  {finding.state:<4}  {finding.text}"


def read(value: Any) -> Finding:
    """Return the finding that another process made."""
    return Finding(str(value["name"]), str(value["state"]), str(value["text"]))
