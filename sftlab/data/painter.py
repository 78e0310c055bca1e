"""Data on the terminal: examples in colour, a row drawn as a forest, the report. People read it; nothing parses it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from sftlab.data.example_set import ExampleSet
from sftlab.data.forest import Row, lay_out
from sftlab.data.loader import Loader
from sftlab.data.proof import Check
from sftlab.data.report import Account, Finding, Report, exceptions, layout, not_read, read

SUPERVISED = "bold black on green"
SPECIAL = "magenta"
SHOWN_CHARS = 600  # per run of tokens of one kind in an example; the middle of a longer run is left out
SHOWN_BRANCH = 110  # the same for a branch of a forest
FOREST_LINES = 40


class Painter:
    """Draw data on a console, with the text of one tokenizer's tokens."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.console = console
        self.tokenizer = tokenizer
        self.special = np.array(sorted({*tokenizer.all_special_ids, *special_ids(tokenizer)}), np.int64)

    def example(self, examples: ExampleSet, index: int) -> None:
        """Show one example: supervised tokens marked, special ones visible."""
        e = examples[index]
        text = self.tokens(e.tokens, e.supervised, SHOWN_CHARS)
        title = f"{examples.where(index)}: {len(e)} tokens, {int(e.supervised.sum())} supervised"
        self.console.print(Panel(text, title=escape(title), title_align="left", border_style="dim"))

    def tokens(self, tokens: NDArray[Any], supervised: NDArray[np.bool_], most: int) -> Text:
        """Return tokens as text: one style per run of tokens of one kind; runs over `most` characters are shortened."""
        special = np.isin(tokens, self.special)
        kind = supervised * 2 + special
        cuts = np.flatnonzero(np.diff(kind)) + 1
        out = Text()
        for run, is_special, learned in zip(
            np.split(tokens, cuts), special[np.r_[0, cuts]], supervised[np.r_[0, cuts]], strict=True
        ):
            style = " ".join(
                filter(None, [SUPERVISED if learned else "", SPECIAL if is_special and not learned else ""])
            )
            out.append(shorten(self.token_text(run), most), style=style)
        return out

    def token_text(self, tokens: NDArray[Any]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def forest(self, loader: Loader, step: int) -> None:
        """Draw the row of a step that holds the most examples per token."""
        row_layout = loader.row_layout
        examples = [loader.examples[int(i)] for i in loader.plan.examples(step)]
        rows = lay_out(examples, row_layout.layout, row_layout.row_length)
        row = fullest(rows)
        alone = sum(map(len, row.paths))
        title = (
            f"step {step}, one of its {len(rows)} rows: {row.num_examples} examples, {alone:,} tokens in rows of their "
            f"own, {len(row):,} here, {float(row.weight.sum()):g} supervised"
        )
        tree = Tree(Text(title, style="bold"), guide_style="dim")
        self._branches(tree, row)
        self.console.print(tree, "")

    def _branches(self, tree: Tree, row: Row) -> None:
        weight = learned_weight(row)
        parents: list[tuple[int, Tree]] = [(len(row), tree)]  # (where its subtree ends, node), from the root down
        for number, (start, stop) in enumerate(segments(row)):
            if number == FOREST_LINES:
                tree.add(Text("...", style="dim"))
                break
            while parents[-1][0] <= start:
                parents.pop()
            label = self.tokens(row.tokens[start:stop], weight[start:stop] > 0, SHOWN_BRANCH)
            label = Text(label.plain.replace("\n", " "), spans=label.spans)
            most = float(weight[start:stop].max(initial=0))
            counted = f", counted {most:g} times" if most not in (0, 1) else ""
            label.append(f"  {stop - start} tokens{counted}", style="dim")
            parents.append((int(row.reach[start]), parents[-1][1].add(label)))

    def report(self, found: Report, refused: bool) -> None:
        """Show the report on the whole set."""
        for split, accounts in found.accounts.items():
            for name, account in accounts.items():
                self._account(f"{split} {name}".strip(), account)
        if refused and any(a.dropped for accounts in found.accounts.values() for a in accounts.values()):
            self.console.print(
                "train would stop at an example longer than max_length: data.overlong=drop or truncate",
                style="bold red",
            )
        self._finding("validation examples that are training examples too", found.overlap)
        for title, counts in (("length", found.lengths), ("supervised length", found.supervised_lengths)):
            self._histogram(title, counts)
        self.console.print(f"[bold]layout[/]  {escape(layout(found))}")

    def proof(self, checks: Sequence[tuple[Check, int]], source: str = "") -> None:
        """Show the proof of the chat template: each kind of turn, in how many rows of a source it is, what is found."""
        table = Table(title=f"chat template {source}".strip(), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for heading in ("kind of turn", "rows", "", "what is learned, or what is wrong"):
            table.add_column(heading, justify="right" if heading == "rows" else "left", overflow="fold")
        for check, rows in checks:
            verdict = (
                ("refused", "red") if check.trouble else ("right, taken apart" if check.apart else "right", "green")
            )
            learned = Text(shorten(check.trouble or check.learned.replace("\n", "\\n"), SHOWN_CHARS))
            table.add_row(check.kind, f"{rows:,}" if rows else "", Text(verdict[0], style=verdict[1]), learned)
        self.console.print(table)

    def _account(self, title: str, a: Account) -> None:
        self.console.print(
            f"[bold]{escape(title)}[/]  {read(a)}, {a.tokens:,} tokens, {a.supervised_tokens:,} supervised"
        )
        findings = [("skipped", a.skipped), *((f"dropped, {reason}", f) for reason, f in a.dropped.items())]
        findings += [("truncated", a.truncated), ("end of text not supervised", a.end_not_supervised)]
        findings += [("duplicates", a.duplicates), ("rows that hold control tokens as text", a.control)]
        for name, finding in findings:
            self._finding(name, finding)
        for line in [line for line in exceptions(a) if line.endswith("split")] + not_read(a):
            self.console.print(Text(f"  {line}"))

    def _finding(self, name: str, finding: Finding) -> None:
        style = "yellow" if finding.count else "dim"
        more = finding.count - len(finding.examples)
        shown = [*finding.examples, *([f"and {more:,} more"] if more else [])]
        self.console.print(Text(f"  {finding.count:>8,} {name}{': ' if shown else ''}", style=style), end="")
        self.console.print(Text("; ".join(shown)))

    def _histogram(self, title: str, counts: dict[str, int]) -> None:
        table = Table(
            title=f"{title} (tokens)", title_justify="left", box=None, show_header=False, padding=(0, 1, 0, 0)
        )
        table.add_column(justify="right")
        table.add_column(justify="right")
        table.add_column(style="green")
        most = max(counts.values())
        for span, count in counts.items():
            table.add_row(span, f"{count:,}", "█" * -(-40 * count // most))
        self.console.print(table)


def special_ids(tokenizer: Any) -> Iterable[int]:
    """Return the ids of all special added tokens, including those without a role such as BOS."""
    return (int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def shorten(text: str, most: int) -> str:
    """Return the text; if it is longer than `most` characters, its middle is left out."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def segments(row: Row) -> list[tuple[int, int]]:
    """Return (start, stop) of each unbranched stretch of a row: the next token is each token's only child."""
    starts = np.flatnonzero(np.r_[True, (row.position[1:] != row.position[:-1] + 1) | (np.diff(row.reach) != 0)])
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(row)], strict=True))


def fullest(rows: Sequence[Row]) -> Row:
    """Return the row that holds the most examples per token."""
    return max(rows, key=lambda r: r.num_examples / len(r))


def learned_weight(row: Row) -> NDArray[np.float32]:
    """Return how many examples ask for each token of a row, (n,)."""
    weight = np.zeros(len(row), np.float32)
    weight[predicted(row)] = row.weight
    return weight


def predicted(row: Row) -> NDArray[np.int64]:
    """Return the row index of each prediction's target token: the child of token `at` that equals `target`."""
    children: dict[tuple[int, int], int] = {}
    path = np.full(int(row.position.max()) + 1, -1)
    for i, (token, depth) in enumerate(zip(row.tokens.tolist(), row.position.tolist(), strict=True)):
        if depth:
            children[int(path[depth - 1]), token] = i
        path[depth] = i
    return np.array([children[a, t] for a, t in zip(row.at.tolist(), row.target.tolist(), strict=True)], np.int64)


def write_examples(path: Path, examples: ExampleSet, tokenizer: Any) -> None:
    """Write one JSON line per training example, in source order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for e in examples:
            line = {
                "id": e.id,
                "tokens": e.tokens.tolist(),
                "supervised": e.supervised.astype(int).tolist(),
                **({} if e.weights is None else {"weights": e.weights.tolist()}),
                "text": tokenizer.decode(e.tokens, clean_up_tokenization_spaces=False),
                "supervised_text": tokenizer.decode(e.tokens[e.supervised], clean_up_tokenization_spaces=False),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
