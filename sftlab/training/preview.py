"""Show the data of a run as the model will see it, before training: examples, a forest row, the report.

It reads the tokenizer and the model's config, never its weights. It writes no run directory. The first examples are
shown before all rows are tokenised, and before what training needs is imported (2 s), so that a wrong template is seen
at once.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftlab.common.hub import quiet_transformers
from sftlab.common.terminal import Terminal
from sftlab.config.binding import check
from sftlab.data.format import Format
from sftlab.data.loader import Loader
from sftlab.data.painter import Painter, write_examples
from sftlab.data.proof import KINDS, Check
from sftlab.data.render import Renderer
from sftlab.data.report import count_kinds, report
from sftlab.data.spelling import NOT_WRITTEN
from sftlab.data.template import prepare_tokenizer

FIRST_ROWS = 200  # of which some are shown at once


def show_preview(config: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Show examples, a forest row and the report; write the files asked for."""
    refused = config["data"]["overlong"] == "error"
    parts = check(config)
    quiet_transformers()
    if refused:  # train stops at the first overlong example; the preview shows all
        config["data"]["overlong"] = "drop"
    console = Terminal(record=own["picture"] is not None, markup=True)
    shown: set[bytes] = set()
    parts = check(config) if refused else parts
    chats = {name: format for name, format in parts["data"].formats.items() if format.converses}
    tokenizer = parts["model"].load_tokenizer()
    prepare_tokenizer(tokenizer, list(parts["data"].formats.values()))
    painter = Painter(console, tokenizer)
    try:
        if own["row"] is None and own["rows"]:
            few = parts["data"].first(tokenizer, FIRST_ROWS, parts["data"].max_length or sys.maxsize)
            show_examples(painter, few or (), own["rows"], shown)

        from sftlab.parallel.world import device_of
        from sftlab.training.rows import preview_parts

        tokenizer, train, val, plan, row_layout = preview_parts(config, device_of(0))
    except ValueError as error:
        if chats and NOT_WRITTEN in str(error):  # show all that the template writes, and what it does not
            painter.proof(proof(tokenizer, next(iter(chats.values())), {}))
        raise
    painter = Painter(console, tokenizer)
    for name, format in chats.items():
        painter.proof(proof(tokenizer, format, count_kinds(train.parts[name].store.kinds)), name)
    if own["row"] is None:
        show_examples(painter, train, own["rows"], shown)
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


def show_examples(painter: Painter, examples: Any, num: int, shown: set[bytes]) -> None:
    """Show the first `num` examples but for those already shown, and add them to these."""
    seen = set(shown)
    for index in range(min(num, len(examples))):
        tokens = f"{examples.where(index)} ".encode() + examples[index].tokens.tobytes()
        if tokens not in seen:  # a row may give several examples
            painter.example(examples, index)
            shown.add(tokens)


def proof(tokenizer: Any, format: Format, kinds: Mapping[str, int]) -> list[tuple[Check, int]]:
    """Return the chat template's check of each kind of turn in `kinds`, {kind: rows}; of every kind if it is empty."""
    found = Renderer(tokenizer, format).proof
    listed = "tools" in kinds
    return [(found.check(kind, tools=listed), kinds.get(kind, 0)) for kind in KINDS if kind in kinds or not kinds]
