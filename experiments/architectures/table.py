"""The verdict on each family, and the table of all."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EQUAL = 1e-5  # relative
HEADER = (
    "| family | verdict | tree | padded | plain transformers | export | in-run answers | decode | what was refused |"
)


def verdict(line: Mapping[str, Any]) -> str:
    """Return one word or two on a family: what it does in tree rows and in padded rows."""
    if "not built" in line:
        return "not built"
    tree, padded = line["tree"], line["padded"]
    if "crash" in tree or "crash" in padded:
        return "CRASH"
    if "refused" in padded:
        return "refused"
    runs = [padded] if "refused" in tree else [tree, padded]
    if not all(abs(run["losses"][0] - run["plain"]) <= EQUAL * abs(run["plain"]) for run in runs):
        return "WRONG LOSS"
    if not all(run["export"] == "equal" for run in runs):
        return "WRONG EXPORT"
    if not all(whole(run["answers"]) for run in runs):
        return "WRONG ANSWERS"
    if not all(whole(run["decoded"]) or run["decoded"].startswith("refused") for run in runs):
        return "WRONG DECODING"
    return "padded only" if "refused" in tree else "equal"


def whole(count: str) -> bool:
    """Return whether a count such as 4/4 is of all."""
    some, _, every = count.partition("/")
    return some == every


def write_table(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a count of verdicts and one row per family."""
    lines = sorted(lines, key=lambda line: line["family"])
    found = {line["family"]: verdict(line) for line in lines}
    text = [f"- {kind}: {num}" for kind, num in Counter(found.values()).most_common()]
    text += ["", HEADER, "|" + "---|" * HEADER.count(" |")]
    for line in lines:
        tree, padded = line.get("tree", {}), line.get("padded", {})
        why = line.get("not built") or next(
            (run[key] for run in (padded, tree) for key in ("crash", "refused") if key in run), ""
        )
        cells = [
            line["family"], found[line["family"]], loss(tree), loss(padded), number(padded.get("plain")),
            padded.get("export", ""), padded.get("answers", ""), padded.get("decoded", "").partition(":")[0],
            why.replace("|", "/").replace("\n", " "),
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    file.write_text("\n".join(text) + "\n")


def loss(run: Mapping[str, Any]) -> str:
    """Return the loss of the first step."""
    return number(run["losses"][0]) if run.get("losses") else ""


def number(value: float | None) -> str:
    """Return six digits, or nothing."""
    return "" if value is None else f"{value:.6f}"
