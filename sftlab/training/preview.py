"""Show the data of a run as the model will see it, before training: examples, a forest row, the report.

It reads the tokenizer and the model's config, never its weights. It writes no run directory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sftlab.config.binding import check
from sftlab.data.loader import Loader
from sftlab.data.painter import Painter, write_examples
from sftlab.data.report import report
from sftlab.parallel.world import device_of
from sftlab.training.build import preview_parts
from sftlab.training.run import quiet_transformers


def show_preview(config: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Show examples, a forest row and the report; write the files asked for."""
    check(config)
    quiet_transformers()
    refused = config["data"]["overlong"] == "error"
    if refused:  # train stops at the first overlong example; the preview shows all
        config["data"]["overlong"] = "drop"
    device = device_of(0)
    tokenizer, train, val, plan, row_layout = preview_parts(config, device)
    console = Console(record=own["picture"] is not None, highlight=False)
    painter = Painter(console, tokenizer)
    if own["row"] is None:
        for index in range(min(own["rows"], len(train))):
            painter.example(train, index)
    else:
        painter.example(train, train.find_row(own["row"]))
    if not 1 <= own["step"] <= plan.steps_per_epoch:
        raise ValueError(f"step={own['step']}: an epoch has steps 1 to {plan.steps_per_epoch}")
    painter.forest(Loader(train, plan, row_layout), own["step"])
    painter.report(report(train, val, plan, row_layout), refused)
    if own["output"]:
        write_examples(Path(own["output"]), train, tokenizer)
        console.print(f"{len(train):,} examples written to {own['output']}", markup=False)
    if own["picture"]:
        console.save_svg(own["picture"], title="python -m sftlab.preview")
