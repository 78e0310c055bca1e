"""A row of a step as nested data, for a page to draw: its stretches, whose branch each is, what is learned."""

from typing import Any

import numpy as np

from sftlab.data.forest import Row, lay_out
from sftlab.data.loader import Loader
from sftlab.data.painter import fullest, learned_weight, segments, shorten, special_ids

MOST_STRETCHES = 40
SHOWN_CHARS = 160  # of a run of tokens of one kind


class Picture:
    """Describe rows, with the text of one tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = np.array(sorted({*tokenizer.all_special_ids, *special_ids(tokenizer)}), np.int64)

    def of(self, loader: Loader, step: int) -> dict[str, Any]:
        """Return the row of a step that holds the most examples per token.

        `stretches` are in the order of the row: depth of the branch, number of tokens, how many examples ask for them,
        and `runs` of text, each with whether it is learned and whether it is special.
        """
        row_layout = loader.row_layout
        examples = [loader.examples[int(i)] for i in loader.plan.examples(step)]
        rows = lay_out(examples, row_layout.layout, row_layout.row_length)
        row = fullest(rows)
        return {
            "step": step,
            "rows": len(rows),
            "examples": row.num_examples,
            "tokens": len(row),
            "alone": sum(map(len, row.paths)),
            "supervised": float(row.weight.sum()),
            "layout": row_layout.layout,
            "left_out": max(0, len(segments(row)) - MOST_STRETCHES),
            "stretches": self.stretches(row),
        }

    def stretches(self, row: Row) -> list[dict[str, Any]]:
        """Return the first MOST_STRETCHES unbranched stretches of a row."""
        weight = learned_weight(row)
        ends = [len(row)]  # of the branches that are open, from the root down
        made = []
        for start, stop in segments(row)[:MOST_STRETCHES]:
            while ends[-1] <= start:
                ends.pop()
            runs = self.runs(row.tokens[start:stop], weight[start:stop] > 0)
            counted = float(weight[start:stop].max(initial=0))
            made.append({"depth": len(ends) - 1, "tokens": stop - start, "counted": counted, "runs": runs})
            ends.append(int(row.reach[start]))
        return made

    def runs(self, tokens: Any, learned: Any) -> list[tuple[str, bool, bool]]:
        """Return (text, learned, special) of each run of tokens of one kind."""
        special = np.isin(tokens, self.special)
        cuts = np.flatnonzero(np.diff(learned * 2 + special)) + 1
        starts = np.r_[0, cuts]
        return [
            (self.text(run), bool(learned[at]), bool(special[at]))
            for run, at in zip(np.split(tokens, cuts), starts, strict=True)
        ]

    def text(self, tokens: Any) -> str:
        """Return the text of tokens, its middle left out where it is long."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return shorten(str(text), SHOWN_CHARS)
