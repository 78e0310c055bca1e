"""The report's numbers, each worked out by hand, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftlab.data.dataset import Data
from sftlab.data.examples import Examples
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.loader import RowLayout
from sftlab.data.mixture import Mixture
from sftlab.data.plan import Plan
from sftlab.data.report import (
    Account,
    Arrangement,
    Finding,
    Report,
    histogram,
    layout,
    report,
    short,
    write_skipped,
)
from tests.support import byte_tokenizer, read_jsonl

TOK = byte_tokenizer()


def jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def row_layout(length: int = 256) -> RowLayout:
    return RowLayout("tree", length, 1, 0, 1, 2)


def test_histograms_by_hand() -> None:
    assert histogram(np.array([5])) == {"5-5": 1}
    assert histogram(np.array([1, 3, 12, 12])) == {f"{i}-{i}": {1: 1, 3: 1, 12: 2}.get(i, 0) for i in range(1, 13)}
    assert histogram(np.array([0, 1, 2, 12])) == {
        "0-1": 2,
        "2-3": 1,
        "4-5": 0,
        "6-7": 0,
        "8-9": 0,
        "10-11": 0,
        "12-12": 1,
    }
    assert list(histogram(np.arange(7, 7 + 24)))[-1] == "29-30" and len(histogram(np.arange(7, 7 + 24))) == 12


def test_every_row_of_a_source_is_accounted_for(tmp_path: Path) -> None:
    long = "word " * 60
    rows = [("q0", "a"), ("q1", ""), ("q2", long), (long, "a"), ("q4", "a"), ("q0", "a"), ("q6", "abc"), ("q7", "")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    held = jsonl(tmp_path / "v.jsonl", [("q4", "a"), ("new", "a"), ("q0", "a")])
    data = Data(PromptCompletion(), str(path), val_path=str(held), on_error="skip", overlong="truncate")
    train, val = data.examples(TOK, 40)
    found = report(train, val, Plan(train.groups, 2, 0), row_layout())
    account = found.accounts["training"][""]
    assert (account.rows, account.kept) == (8, 5)
    assert account.skipped.count == 2
    assert [s.split(": ")[0] for s in account.skipped.examples] == [f"{path}:2", f"{path}:8"]
    assert account.dropped == {"no supervised token": Finding(1, [f"{path}:4"])}
    assert account.truncated == account.end_not_supervised == Finding(1, [f"{path}:3"])
    assert account.duplicates == Finding(1, [f"{path}:6"])
    assert (
        account.tokens == sum(len(e) for e in train)
        and account.tokens - sum(len(e) for e in train if len(e) < 40) == 40
    )
    assert account.supervised_tokens == sum(int(e.supervised.sum()) for e in train)
    assert found.overlap == Finding(2, [f"{held}:1", f"{held}:3"])
    assert found.accounts["validation"][""].kept == 3 and list(found.accounts) == ["training", "validation"]
    alone = report(train, None, Plan(train.groups, 2, 0, True, False), row_layout())
    assert list(alone.accounts) == ["training"] and alone.overlap == Finding(0) and alone.saved_by_grouping is None


def test_at_most_five_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*[("q", "a")] * 9, *[("q", "")] * 6])
    held = jsonl(tmp_path / "v.jsonl", [("q", "a")] * 7)
    train, val = Data(PromptCompletion(), str(path), val_path=str(held), on_error="skip").examples(TOK, 40)
    found = report(train, val, Plan(train.groups, 2, 0), row_layout())
    skipped = found.accounts["training"][""].skipped
    assert skipped.count == 6 and [s.split(": ")[0] for s in skipped.examples] == [f"{path}:{i}" for i in range(10, 15)]
    assert found.arrangement.predictions == 5 * 2  # "a" and the end, once in each step for both of its examples
    assert found.accounts["training"][""].duplicates == Finding(8, [f"{path}:{i}" for i in range(2, 7)])
    assert found.overlap == Finding(7, [f"{held}:{i}" for i in range(1, 6)])


def test_what_grouping_saves_is_counted_against_the_same_steps_without_it(tmp_path: Path) -> None:
    names = ("Ada", "Bo", "Cleo", "Dan")
    stems = {name: f"{name} counts the two hundred steps of the lighthouse in Oakgate. " * 4 for name in names}
    rows = [(stems[n] + " more" * (i + j), " yes") for j in (0, 5) for i, n in enumerate(names)]
    data = Data(PromptCompletion(group_chars=12), str(jsonl(tmp_path / "a.jsonl", rows)))
    train, _ = data.examples(TOK, 400)
    texts = [e.tokens.tolist() for e in train]

    def nodes(*members: int) -> int:
        return len({tuple(texts[i][:n]) for i in members for n in range(1, len(texts[i]) + 1)})

    plan = Plan(train.groups, 4, 0, shuffle=False, group_by_prefix=True)  # Ada and Bo, then Cleo and Dan
    found = report(train, None, plan, row_layout(1024))
    # The stems have a BOS in common, but one of so few tokens is not shared in trees this long.
    grouped, plain = sum(nodes(i, i + 4) for i in range(4)), sum(map(len, texts))
    assert (found.arrangement.tokens, found.arrangement.nodes) == (sum(map(len, texts)), grouped)
    assert found.saved_by_grouping == plain - grouped > 60
    assert (found.arrangement.steps, found.arrangement.examples, found.arrangement.rows) == (2, 8, 2)
    first = report(
        train, None, plan, row_layout(1024), max_steps=1
    )  # other examples than without grouping: so per token
    assert (first.arrangement.steps, first.arrangement.examples) == (1, 4)
    assert first.arrangement.nodes == nodes(0, 4) + nodes(1, 5)
    tokens, other = (sum(len(texts[i]) for i in members) for members in ((0, 4, 1, 5), (0, 1, 2, 3)))
    assert tokens != other
    assert first.saved_by_grouping == tokens - nodes(0, 4) - nodes(1, 5)
    assert report(train, None, plan, row_layout(1024), max_steps=9).arrangement.steps == 2
    yes = len(TOK(" yes", add_special_tokens=False).input_ids) + 1  # and the end of text
    assert found.arrangement.predictions == 8 * yes
    padded = sum(16 * -(-(nodes(i, i + 4) + nodes(i + 1, i + 5)) // 16) for i in (0, 2))
    assert found.arrangement.padded == padded > grouped and found.arrangement.fill == grouped / padded


def test_each_source_of_a_mixture_has_an_account_and_its_duplicates_are_its_own(tmp_path: Path) -> None:
    both = {n: Data(PromptCompletion(), str(jsonl(tmp_path / f"{n}.jsonl", rows))) for n, rows in (
        ("one", [("q", "a"), ("long " * 9, "a")]), ("two", [("q", "a"), ("r", "a"), ("r", "a")]))}  # fmt: skip
    train, _ = Mixture(both, {"one": 2, "two": 1}).examples(TOK, 100)
    held = Data(PromptCompletion(), str(jsonl(tmp_path / "v.jsonl", [("r", "a"), ("s", "a")]))).examples(TOK, 100)[0]
    found = report(train, held, Plan(train.groups, 2, 0), row_layout())
    accounts = found.accounts["training"]
    assert [(n, a.rows, a.kept, a.duplicates.count) for n, a in accounts.items()] == [
        ("one", 2, 2, 0),
        ("two", 3, 3, 1),
    ]
    assert found.overlap == Finding(1, [f"{tmp_path}/v.jsonl:1"])
    assert sum(found.lengths.values()) == len(train) == 9 and sum(found.supervised_lengths.values()) == 5
    assert list(short(found)) == ["training one", "training two", "validation", "overlap", "layout"]


ACCOUNT = Account(
    rows=2000,
    kept=1500,
    skipped=Finding(11, ["x"]),
    dropped={"longer than max_length": Finding(22), "no supervised token": Finding(3)},
    truncated=Finding(44),
    end_not_supervised=Finding(55),
    duplicates=Finding(66),
    tokens=1,
    supervised_tokens=1,
)
ARRANGED = Arrangement(steps=1200, examples=100, tokens=25_050, nodes=9_000, rows=1_500, padded=12_000, predictions=7)


def test_the_report_in_a_few_lines() -> None:
    quiet = Account(7, 7, Finding(0), {}, Finding(0), Finding(0), Finding(0), 1, 1)
    found = Report({"training": {"": ACCOUNT}, "validation": {"": quiet}}, Finding(0), {}, {}, ARRANGED, 730)
    assert short(found) == {
        "training": "2,000 rows read, 1,500 kept, 11 skipped, 22 dropped (longer than max_length), "
        "3 dropped (no supervised token), 44 truncated, 55 whose end is not supervised, 66 duplicates, "
        "464 in the other split",
        "validation": "7 rows read, 7 kept",
        "layout": "250.5 tokens per example become 90.0 in 1,500 rows, 75.0% full (first 1,200 steps); "
        "grouping by prefix saves 7.3 of them",
    }
    plain = Report({}, Finding(1234), {}, {}, ARRANGED, None)
    assert short(plain)["overlap"] == "1,234 validation examples are training examples too"
    assert layout(plain).endswith("(first 1,200 steps)")


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    Report({"training": {"": ACCOUNT}}, Finding(1, ["é"]), {"1-2": 3}, {"1-1": 4}, ARRANGED, 5).write_json(
        tmp_path / "r"
    )
    written: dict[str, Any] = json.loads((tmp_path / "r").read_text())
    assert written["accounts"]["training"][""]["skipped"] == {"count": 11, "examples": ["x"]}
    assert (written["saved_by_grouping"], written["lengths"], written["supervised_lengths"]) == (
        5,
        {"1-2": 3},
        {"1-1": 4},
    )


def test_skipped_rows_of_both_splits_are_listed_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [("q", "a"), ("r", ""), ("s", "a")])
    held = jsonl(tmp_path / "v.jsonl", [("", "")] * 2 + [("q", "a")])

    def read(**settings: Any) -> tuple[Any, Any]:
        return Data(PromptCompletion(), str(path), on_error="skip", **settings).examples(TOK, 40)

    write_skipped(tmp_path / "one.jsonl", read(val_path=str(held)))
    assert [line["where"] for line in read_jsonl(tmp_path / "one.jsonl")] == [f"{path}:2", f"{held}:1", f"{held}:2"]
    write_skipped(tmp_path / "two.jsonl", read(val_examples=1))  # both splits are of one store
    assert [line["where"] for line in read_jsonl(tmp_path / "two.jsonl")] == [f"{path}:2"]
    whole = Data(PromptCompletion(), str(jsonl(tmp_path / "good.jsonl", [("q", "a")]))).examples(TOK, 40)
    write_skipped(tmp_path / "none.jsonl", whole)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(("kept", "rest"), [(8, 0), (5, 3)])
def test_rows_in_the_other_split_are_said_to_be_there(kept: int, rest: int, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [(f"q{i}", "a") for i in range(8)])
    train, val = Data(PromptCompletion(), str(path), val_examples=rest).examples(TOK, 40)
    assert isinstance(train, Examples) and len(train) == kept
    said = short(report(train, val, Plan(train.groups, 2, 0), row_layout()))["training"]
    assert said == "8 rows read, 5 kept, 3 in the other split" if rest else "8 rows read, 8 kept"
