"""What the preview draws, letter by letter: a tokenizer of one letter a token, rows small enough to write down."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftlab.data.example import Example
from sftlab.data.forest import row
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.painter import SPECIAL, SUPERVISED, Painter, predicted, segments, shorten, special_ids, write_examples
from sftlab.data.plan import Plan
from sftlab.data.report import Account, Arrangement, Finding, Report


class Letters:
    """Token 0 is <s>, 1 an end of turn that is special among added tokens only, 3 an added word; the rest letters."""

    def __init__(self) -> None:
        self.all_special_ids = [0]
        self.added_tokens_decoder = {i: SimpleNamespace(special=i < 3) for i in (0, 1, 3)}

    def decode(self, tokens: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True) -> str:
        words = ["<s>", "<end>", "\n", "é"]
        made = "".join(words[t] if t < 4 else chr(93 + t) for t in map(int, tokens))
        if skip_special_tokens:
            made = made.replace("<s>", "")
        return made.replace(" ", "") if clean_up_tokenization_spaces else made


def made(text: list[int], learned: str, name: str = "e", group: int = 0) -> Example:
    return Example(np.array(text, np.int32), np.array([c == "x" for c in learned]), name, group)


def painter(width: int = 300) -> tuple[Painter, Console]:
    console = Console(record=True, width=width, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    return Painter(console, Letters()), console


@pytest.fixture
def drawing() -> Any:
    made_painter, console = painter()
    yield made_painter, console
    console.file.close()


def test_special_ids_are_those_of_added_tokens_too(drawing: Any) -> None:
    assert list(special_ids(Letters())) == [0, 1]
    assert drawing[0].special.tolist() == [0, 1]


def test_each_kind_of_token_has_its_style(drawing: Any) -> None:
    ids = np.array([0, 4, 5, 1, 6, 1], np.int32)
    learned = np.array([False, False, True, False, True, True])
    text = drawing[0].tokens(ids, learned, 600)
    assert text.plain == "<s>ab<end>c<end>"
    assert [(text.plain[s.start : s.end], str(s.style)) for s in text.spans] == [
        ("<s>", SPECIAL), ("b", SUPERVISED), ("<end>", SPECIAL), ("c", SUPERVISED), ("<end>", SUPERVISED),
    ]  # fmt: skip


def test_long_stretches_lose_their_middle(drawing: Any) -> None:
    assert shorten("abcdefgh", 8) == "abcdefgh" and shorten("abcdefghi", 8) == "abcd ... fghi"
    text = drawing[0].tokens(np.array([4] * 9 + [5] * 9), np.array([False] * 9 + [True] * 9), 4)
    assert text.plain == "aa ... aabb ... bb"  # each stretch for itself


def test_an_example_is_headed_by_its_place_and_its_counts(drawing: Any) -> None:
    class Two:
        def __getitem__(self, i: int) -> Example:
            return [made([0, 4], ".x"), made([0, 4, 5, 6], "..xx")][i]

        def where(self, i: int) -> str:
            return f"file.jsonl:{i + 7}"

    drawing[0].example(Two(), 1)  # type: ignore[arg-type]
    out = drawing[1].export_text()
    assert "file.jsonl:8: 4 tokens, 2 supervised" in out and "<s>abc" in out


def test_the_densest_row_of_a_step_is_drawn_with_what_it_saves(drawing: Any) -> None:
    """Step 2 holds four examples: three on one stem, `<s>abc` + d, e, e, and a long one that fills a row alone."""
    stem = [0, 4, 5, 6]
    examples = [made([0, 9, 10], "..x", "first", 1), made([0, 9, 11], "..x", "second", 1)]
    examples += [made([*stem, 7], "....x", "d"), made([*stem, 8], "....x", "e"), made([*stem, 8], "....x", "f")]
    examples += [made([2, *[12] * 28, 13], "." * 29 + "x", "long", 2)]

    class Fixed(Plan):
        def examples(self, step: int) -> Any:
            return np.array([0, 1] if step == 1 else [2, 3, 4, 5])

    loader = Loader(examples, Fixed(np.zeros(6, int), 4, 0), RowLayout("tree", 30, 1, 0, 1, 2))
    drawing[0].forest(loader, 2)
    lines = [line.rstrip() for line in drawing[1].export_text().splitlines()]
    assert lines[0] == ("step 2, one of its 2 rows: 3 examples, 15 tokens in rows of their own, 6 here, 3 supervised")
    body = sorted(line.lstrip("└├─ │") for line in lines[1:] if line)
    assert body == ["<s>abc  4 tokens", "d  1 tokens", "e  1 tokens, counted 2 times"]
    assert sum(line.startswith("└── <s>abc") for line in lines) == 1  # the stem, and its branches under it
    assert sum(line.startswith("    ├── ") for line in lines) == sum(line.startswith("    └── ") for line in lines) == 1


def test_a_line_of_the_forest_has_no_line_breaks_and_a_forest_not_too_many_lines(drawing: Any) -> None:
    examples = [made([0, 4 + i % 25, 4 + i // 25, 2], "...x", str(i)) for i in range(50)]
    plan = Plan(np.zeros(50, int), 50, 0)
    drawing[0].forest(Loader(examples, plan, RowLayout("tree", 1000, 1, 0, 1, 2)), 1)
    lines = [line for line in drawing[1].export_text().splitlines() if line.strip()]
    assert len(lines) == 1 + 40 + 1 and lines[-1].endswith("── ...")  # title, 40 stretches, the rest
    assert all("tokens" in line for line in lines[2:-1])


def test_stretches_end_where_a_row_branches() -> None:
    drawn = row([[made([0, 4, 5], "..x"), made([0, 4, 6, 7], "..xx"), made([0, 8], ".x")]])
    parts = [(drawn.tokens[a:b].tolist()) for a, b in segments(drawn)]
    assert sorted(parts) == sorted([[0], [4], [5], [6, 7], [8]])
    target = {int(drawn.tokens[i]) for i in predicted(drawn)}
    assert target == {5, 6, 7, 8} and drawn.tokens[predicted(drawn)].tolist() == drawn.target.tolist()


def account(**changes: Any) -> Account:
    given: dict[str, Any] = {
        "rows": 2000, "kept": 1800, "skipped": Finding(3, ["a:1", "a:2"]), "dropped": {"too long": Finding(7, ["a:9"])},
        "truncated": Finding(0), "end_not_supervised": Finding(5), "duplicates": Finding(1, ["a:4"]),
        "tokens": 54321, "supervised_tokens": 1234,
    }  # fmt: skip
    return Account(**(given | changes))


def report(**accounts: Account) -> Report:
    return Report(
        {split: {"squad": a} for split, a in accounts.items()},
        Finding(2, ["v:1"]), {"0-9": 1, "10-19": 80}, {"0-9": 4},
        Arrangement(steps=2, examples=10, tokens=100, nodes=50, rows=4, padded=80, predictions=20), None,
    )  # fmt: skip


def test_the_report_counts_every_finding(drawing: Any) -> None:
    drawing[0].report(report(training=account()), refused=True)
    lines = [line.strip() for line in drawing[1].export_text().splitlines() if line.strip()]
    assert lines[:10] == [
        "training squad  2,000 rows read, 1,800 kept, 54,321 tokens, 1,234 supervised",
        "3 skipped: a:1; a:2; and 1 more",
        "7 dropped, too long: a:9; and 6 more",
        "0 truncated",
        "5 end of text not supervised: and 5 more",
        "1 duplicates: a:4",
        "0 rows that hold control tokens as text",
        "190 in the other split",
        "train would stop at an example longer than max_length: data.overlong=drop or truncate",
        "2 validation examples that are training examples too: v:1; and 1 more",
    ]
    bars = [line for line in lines if "█" in line]
    assert [(line.split()[:2], line.count("█")) for line in bars] == [
        (["0-9", "1"], 1),  # 1 of 80 at 40 a line is half a block: rounded up, so that nothing is invisible
        (["10-19", "80"], 40),
        (["0-9", "4"], 40),
    ]
    assert lines[-1].startswith("layout  10.0 tokens per example become 5.0 in 4 rows")
    assert [line for line in lines if line.endswith("(tokens)")] == ["length (tokens)", "supervised length (tokens)"]


@pytest.mark.parametrize(("refused", "dropped"), [(False, {"too long": Finding(7)}), (True, {})])
def test_a_refusal_is_announced_only_where_there_is_one(drawing: Any, refused: bool, dropped: Any) -> None:
    drawing[0].report(report(training=account(dropped=dropped, kept=1997), validation=account(dropped={})), refused)
    out = drawing[1].export_text()
    assert "train would stop" not in out and "validation squad" in out


def test_a_refusal_in_the_validation_is_announced_too(drawing: Any) -> None:
    drawing[0].report(report(training=account(dropped={}), validation=account()), refused=True)
    assert "train would stop" in drawing[1].export_text()


def test_findings_are_yellow_where_there_are_any(drawing: Any) -> None:
    drawing[0]._finding("some", Finding(1, ["x"]))
    drawing[0]._finding("none", Finding(0))
    styled = drawing[1].export_text(styles=True)
    some, none = styled.splitlines()[:2]
    assert "\x1b[33m" in some and "\x1b[2m" in none


def test_examples_are_written_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "new" / "all.jsonl"
    examples = [made([0, 4, 3, 5], "..xx", "a"), made([0, 6, 1], "..x", "b")]
    write_examples(file, examples, Letters())  # type: ignore[arg-type]
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"id": "a", "tokens": [0, 4, 3, 5], "supervised": [0, 0, 1, 1], "text": "<s>aéb", "supervised_text": "éb"},
        {"id": "b", "tokens": [0, 6, 1], "supervised": [0, 0, 1], "text": "<s>c<end>", "supervised_text": "<end>"},
    ]
    assert "é" in file.read_text(encoding="utf-8")  # not as an escape
