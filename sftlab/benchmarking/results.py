"""The results of a benchmark: a table for people, JSON to commit, and the comparison of two of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

SCHEMA = "sftlab.benchmark/1"
CONVENTION = (
    "MFU: 6 operations per matmul parameter and token in the decoder blocks, 6 per parameter of the head and "
    "prediction, 12 per width, layer and attended pair; recomputation and padding do not count; over the data sheet's "
    "dense bfloat16 rate. 'of matrix rate' is over the rate of the model's own matrix product, measured just before."
)
# What is compared: whether more is better, and how many times `tolerance` may be lost. A start depends on caches.
COMPARED = {"examples_per_s": (True, 1.0), "peak_gib": (False, 1.0), "first_step_s": (False, 3.0)}
PARTS = ("data", "forward", "backward", "optimiser", "communication")


@dataclass(frozen=True)
class Change:
    """A number beside that of a baseline; `worse` says that it is a regression."""

    layout: str
    name: str
    before: float
    now: float
    worse: bool

    def __str__(self) -> str:
        return (
            f"{self.layout} {self.name} {self.now:,.4g} against {self.before:,.4g} ({self.now / self.before - 1:+.1%})"
        )


def read_baseline(path: Path) -> dict[str, Any]:
    """Return the results in a file. Raises: ValueError if it is missing or not of a benchmark."""
    if not path.is_file():
        raise ValueError(f"compare={path}: there is no such file; output=FILE of an earlier benchmark makes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"compare={path} is not JSON ({error})") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"compare={path}: expected the JSON of a benchmark, with schema {SCHEMA!r}; it has {schema!r}")
    return dict(found)


def refuse_other(path: Path, before: Mapping[str, Any], case: str | None, device: str, layouts: Sequence[str]) -> None:
    """Raise ValueError if a baseline is of another case or device, or lacks a layout: no difference would mean much."""
    for key, theirs, ours in (("case", before["case"], case), ("device", before["hardware"]["device"], device)):
        if theirs != ours:
            raise ValueError(
                f"compare={path} was measured with {key} {theirs}, and this is {ours}: measure a baseline here first, "
                "with output=FILE"
            )
    missing = [layout for layout in layouts if layout not in before["layouts"]]
    if missing:
        raise ValueError(f"compare={path} has no layout {missing[0]}; it has {', '.join(before['layouts'])}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> list[Change]:
    """Return every compared number of every layout beside that of the baseline."""
    found = []
    for layout, values in now["layouts"].items():
        for name, (more_is_better, times) in COMPARED.items():
            old, new = before["layouts"][layout][name], values[name]
            factor = new / old if more_is_better else old / new
            found.append(Change(layout, name, old, new, worse=factor < 1 - min(0.99, times * tolerance)))
    return found


def table_of_changes(found: Sequence[Change]) -> Table:
    """Return a comparison as a table; regressions are marked."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layout", "", "before", "now", "change", ""):
        table.add_column(heading, justify="right" if heading in ("before", "now", "change") else "left")
    for c in found:
        mark = "[red]REGRESSION[/red]" if c.worse else ""
        table.add_row(c.layout, c.name, f"{c.before:,.4g}", f"{c.now:,.4g}", f"{c.now / c.before - 1:+.1%}", mark)
    return table


def table(results: Mapping[str, Any]) -> Table:
    """Return results as a table with a column per layout."""
    layouts = results["layouts"]
    found = Table(title=title(results), title_justify="left", box=None, padding=(0, 2, 0, 0))
    found.add_column("")
    for name in layouts:
        found.add_column(name, justify="right")
    for label, cell in ROWS.items():
        found.add_row(label, *(cell(values) for values in layouts.values()))
    for part in PARTS:
        found.add_row(f"share of {part}", *(f"{values['shares'][part]:.1%}" for values in layouts.values()))
    return found


def title(results: Mapping[str, Any]) -> str:
    """Return in one line what was measured on what."""
    case = f"case={results['case']}" if results["case"] else results["data"]
    return (
        f"{results['model']}, {results['parameters']:,} parameters in {results['dtype']}; {case}; "
        f"{results['hardware']['devices']} x {results['hardware']['device']}"
    )


def ratio(value: float | None) -> str:
    """Return a fraction as a percentage; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


ROWS: Mapping[str, Any] = {
    "examples/s, median": lambda v: f"{v['examples_per_s']:,.1f}",
    "  spread over windows": lambda v: ratio(v["spread"]),
    "tokens/s through the model": lambda v: f"{v['tokens_per_s']:,.0f}",
    "tokens/s of examples": lambda v: f"{v['example_tokens_per_s']:,.0f}",
    "supervised tokens/s": lambda v: f"{v['supervised_per_s']:,.0f}",
    "tokens per example": lambda v: f"{v['tokens_per_example']:,.1f}",
    "  after sharing": lambda v: f"{v['shared_tokens_per_example']:,.1f}",
    "padding": lambda v: ratio(v["padding"]),
    "microbatch": lambda v: f"{v['rows_per_microbatch']} x {v['row_length']:,}",
    "step, median": lambda v: f"{1e3 * v['step_s_median']:,.0f} ms",
    "  longest": lambda v: f"{1e3 * v['step_s_max']:,.0f} ms",
    "first step": lambda v: f"{v['first_step_s']:,.1f} s",
    "peak memory": lambda v: f"{v['peak_gib']:.2f} GiB",
    "TFLOP/s": lambda v: f"{v['flops_per_s'] / 1e12:,.3f}",
    "matrix rate, TFLOP/s": lambda v: f"{v['matrix_flops_per_s'] / 1e12:,.3f}",
    "  of matrix rate": lambda v: ratio(v["of_matrix_rate"]),
    "MFU": lambda v: ratio(v["mfu"]),
    "graphs traced": lambda v: f"{v['graphs']}",
    "  after warm-up": lambda v: f"{v['graphs_after_warm_up']}",
}
