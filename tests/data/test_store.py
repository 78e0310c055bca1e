"""The store: every row of a long table comes back as it was rendered, and whatever changes the tokens builds anew."""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest

from sftlab.data import arrow
from sftlab.data import store as store_module
from sftlab.data.dataset import Data
from sftlab.data.example import Example
from sftlab.data.examples import Examples
from sftlab.data.format import Conversation, Fields, Text
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.opening import open_source
from sftlab.data.render import Renderer
from sftlab.data.source import Source
from sftlab.data.store import split, store
from sftlab.data.table import Table
from tests.asymmetric import BAD_ROWS, rows_over_every_block, write_parquet
from tests.kinds import TEMPLATES, tokenizer
from tests.support import byte_tokenizer

TOK = byte_tokenizer()


def lines(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_source(str(path), None, lambda document: document)


def same(ours: Example, theirs: Example) -> bool:
    return (
        ours.tokens.tolist() == theirs.tokens.tolist()
        and ours.supervised.tolist() == theirs.supervised.tolist()
        and (ours.id, ours.group, ours.num_prompt, ours.references)
        == (theirs.id, theirs.group, theirs.num_prompt, theirs.references)
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Source]:
    rows = rows_over_every_block()
    path = write_parquet(tmp_path_factory.mktemp("table") / "long.parquet", rows)
    return rows, open_source(str(path), None, lambda document: document)


def test_a_table_of_2500_rows_is_read_whole_and_by_any_range(table: tuple[list[dict[str, Any]], Source]) -> None:
    rows, source = table
    assert isinstance(source, Table) and len(source) == 2500
    for start, stop in ((0, 2500), (0, 9999), (0, 1000), (0, 1001), (5, 1005), (999, 2001), (1000, 2000), (2499, 2500)):
        assert [r["question"] for r in source.read_rows(start, stop)] == [r["question"] for r in rows[start:stop]]  # type: ignore[index, union-attr]
    assert list(source.read_rows(2500, 2600)) == []
    assert source.where(0).endswith("long.parquet row 1") and source.where(2499).endswith("row 2500")


def test_every_good_row_of_a_long_table_is_stored_as_it_was_rendered(
    table: tuple[list[dict[str, Any]], Source],
) -> None:
    rows, source = table
    found = store(source, Squad(), TOK, num_workers=1, on_error="skip")
    good = [i for i in range(2500) if i not in BAD_ROWS]
    renderer = Renderer(TOK)
    rendered = [r for i in good for r in renderer.render(Squad().to_text(rows[i]))]
    expected = renderer.examples(rendered, [f"{source.name} row {i + 1}" for i in good])
    assert len(found) == len(good) == 2496
    wrong = [i for i, ours, theirs in zip(good, found, expected, strict=True) if not same(ours, theirs)]
    assert wrong == []
    assert (found[0].id, found[1].id) == ("own0", f"{source.name} row 2") and found[2].references == ("a2", "b2", "c")
    assert found.rows.tolist() == good
    assert found.lengths.tolist() == [len(e) for e in expected]
    assert found.groups.tolist() == [e.group for e in expected] and len(set(found.groups.tolist())) == 358
    assert found.num_supervised.tolist() == [int(e.supervised.sum()) for e in expected]
    assert found.ends.all() and len(set(found.digests.tolist())) == 2496
    assert [s.where for s in found.skipped] == [f"{source.name} row {i + 1}" for i in BAD_ROWS]
    assert all("an answer is empty" in s.reason for s in found.skipped)
    assert found.where(998) == f"{source.name} row 1000" and found.named(996) == f"{source.name} row 997 (id own996)"
    assert found.named(0) == f"{source.name} row 1 (id own0)" and found.named(1) == f"{source.name} row 2"
    examples = Examples.of(found)
    assert examples.find_row(1000) == 998 and examples[examples.find_row(2402)].tokens is not None
    assert examples.find_row(2402) == 2397 and examples.num_skipped == 4
    with pytest.raises(ValueError, match="row=2401 is no training example: it was skipped"):
        examples.find_row(2401)
    with pytest.raises(ValueError, match="row=2501 is no training example: there are rows 1 to 2500"):
        examples.find_row(2501)
    with pytest.raises(ValueError, match="row=0 is no training example: there are rows 1 to 2500"):
        examples.find_row(0)


def test_the_same_tokens_with_other_targets_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"prompt": "What ", "completion": "is it"}, {"prompt": "What is ", "completion": "it"}]
    found = store(lines(tmp_path / "a.jsonl", [*rows, rows[0]]), PromptCompletion(), TOK)
    first, second, third = found.digests.tolist()
    assert found[0].tokens.tolist() == found[1].tokens.tolist() and first == third != second


def test_the_first_rows_are_kept_apart_from_all_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(7)]
    source = lines(tmp_path / "a.jsonl", rows)
    assert [len(store(source, PromptCompletion(), TOK, limit=n)) for n in (3, None, 1, 7, 9)] == [3, 7, 1, 7, 7]
    assert TOK.decode(store(source, PromptCompletion(), TOK, limit=1)[0].tokens) == "<s>q0a0</s>"
    with pytest.raises(ValueError, match="it holds no row"):
        store(source, PromptCompletion(), TOK, limit=0)


def test_what_was_skipped_once_is_still_refused_later(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}])
    assert len(store(source, PromptCompletion(), TOK, on_error="skip")) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2: field 'completion' is empty"):
        store(source, PromptCompletion(), TOK, on_error="raise")
    assert len(store(source, PromptCompletion(), TOK, on_error="skip").skipped) == 1


def test_a_changed_chat_template_is_tokenised_anew(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    source = lines(tmp_path / "a.jsonl", [{"messages": said}])
    tok = byte_tokenizer()
    found = []
    for mark in (":", ">", ":"):
        tok.chat_template = "{% for m in messages %}{{ m.role + '" + mark + "' + m.content + eos_token }}{% endfor %}"
        found.append(store(source, Chat(), tok))
    assert [tok.decode(f[0].tokens) for f in found] == [
        "user:Hi</s>assistant:Yo</s>",
        "user>Hi</s>assistant>Yo</s>",
        "user:Hi</s>assistant:Yo</s>",
    ]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint


def test_a_changed_end_of_text_is_tokenised_anew(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    tok = byte_tokenizer()
    before = store(source, PromptCompletion(), tok)
    tok.eos_token = "<pad>"
    after = store(source, PromptCompletion(), tok)
    assert (before[0].tokens[-1], after[0].tokens[-1]) == (1, 2)


def shouting(number: int) -> Any:
    """Return a format whose text is another in each version, and whose name is always the same."""

    @dataclass(frozen=True)
    class Shout(PromptCompletion):
        version: ClassVar[int] = number

        def to_text(self, fields: Fields) -> Text | Conversation:
            return Text(fields["prompt"], "!" * number)

    return Shout()


def test_a_formats_new_version_is_tokenised_anew(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    assert [TOK.decode(store(source, shouting(n), TOK)[0].tokens) for n in (1, 3)] == ["<s>q!</s>", "<s>q!!!</s>"]


def test_a_new_version_of_the_columns_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    before = store(source, PromptCompletion(), TOK).fingerprint
    monkeypatch.setattr(store_module, "VERSION", store_module.VERSION + 1)
    assert store(source, PromptCompletion(), TOK).fingerprint != before


def test_as_many_workers_tokenise_as_are_asked_for_and_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    prepare = datasets.ArrowBasedBuilder.download_and_prepare

    def recorded(self: Any, num_proc: int | None = None) -> None:
        asked.append(num_proc)
        prepare(self)

    monkeypatch.setattr(arrow.BlocksBuilder, "download_and_prepare", recorded, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(3000)]
    source = lines(tmp_path / "a.jsonl", rows)
    for limit, workers in ((None, 2), (None, 5), (None, None), (2999, None), (1999, 3), (3, 3), (2998, 1)):
        store(source, PromptCompletion(), TOK, limit, workers)
    for num_workers in (2, 1):
        Data(PromptCompletion(), source.name, num_workers=num_workers).load(TOK)
    assert asked == [2, 3, 3, 2, None, None, None, 2, None]


def test_the_ranges_of_workers_follow_on_one_another_and_are_nearly_equal() -> None:
    for num, parts in ((2500, 2), (10, 3), (7, 7), (2501, 4)):
        ranges = split(num, parts)
        assert len(ranges) == parts and (ranges[0][0], ranges[-1][1]) == (0, num)
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        sizes = [b - a for a, b in ranges]
        assert max(sizes) - min(sizes) <= 1


CALLS = [
    {"name": "add", "arguments": {"a": 1, "b": {"c": None, "d": [{"e": 2}]}}},
    {"name": "say", "arguments": {"words": "hi", "b": {"d": [{"f": "x"}]}}},
]
SCHEMAS = [
    {"name": "add", "parameters": {"properties": {"a": {"type": "int", "enum": [1, 2]}}, "required": ["a"]}},
    {"name": "say", "parameters": {"properties": {"words": {"type": "string", "default": "hi"}}}},
]


def asked(call: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    turn = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    return {"messages": [{"role": "user", "content": "Go."}, turn], "tools": [{"type": "function", "function": schema}]}


def test_gauntlet_36_nulls_that_a_columnar_file_put_in_never_reach_the_text(tmp_path: Path) -> None:
    rows = [asked(call, schema) for call, schema in zip(CALLS, SCHEMAS, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def read(name: str) -> list[Any]:
        source = open_source(str(tmp_path / name), "train", lambda d: d)
        return [Chat().to_text(row) for row in source.read_rows(0, 9) if not isinstance(row, ValueError)]

    meant = read("rows.jsonl")
    assert meant[0].messages[1]["tool_calls"][0]["function"]["arguments"]["b"]["c"] is None, "JSONL: the writer's own"
    for columnar in (read("rows.parquet"), read("saved")):
        for made, call, schema in zip(columnar, CALLS, SCHEMAS, strict=True):
            function = made.messages[1]["tool_calls"][0]["function"]
            assert function["name"] == call["name"] and "null" not in json.dumps([made.messages, made.tools])
            assert made.tools == ({"type": "function", "function": schema},)
        assert columnar[1].messages[1]["tool_calls"][0]["function"] == CALLS[1]
        assert columnar[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": {"d": [{"e": 2}]}}


def test_a_null_inside_json_text_is_the_writers_own_in_a_columnar_file_too(tmp_path: Path) -> None:
    row = asked({"name": "f", "arguments": json.dumps({"a": None})}, SCHEMAS[0])
    row["tools"] = json.dumps([{"name": "f", "parameters": {"default": None}}])  # type: ignore[assignment]
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "rows.parquet"))
    (read,) = open_source(str(tmp_path / "rows.parquet"), "train", lambda d: d).read_rows(0, 1)
    assert not isinstance(read, ValueError)
    made = Chat().to_text(read)
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert made.tools == ({"type": "function", "function": {"name": "f", "parameters": {"default": None}}},)


DATED = "{{- strftime_now('%d %b %Y') }}" + TEMPLATES["qwen"]


def test_gauntlet_38_the_fingerprint_changes_whenever_the_tokens_would(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "They."}]
    path.write_text(json.dumps({"messages": messages}))
    source = open_source(str(path), None, Chat().rows)

    def made(template: str | None, format: Chat, **settings: Any) -> tuple[str, str]:
        tok = tokenizer("qwen", template)
        found = store(source, format, tok, **settings)
        return found.fingerprint, tok.decode(found[0].tokens)

    plain, same = made(None, Chat(date="2026-01-31")), made(None, Chat(date="2026-02-01"))
    assert plain == same, "a template without a date is tokenised once"
    january, february = made(DATED, Chat(date="2026-01-31")), made(DATED, Chat(date="2026-02-01"))
    assert january[1].startswith("31 Jan 2026<|im_start|>") and february[1].startswith("01 Feb 2026<|im_start|>")
    fingerprints = {plain[0], january[0], february[0]}
    fingerprints |= {made(None, Chat(turns="apart"))[0], made(None, Chat(reasoning="drop"))[0]}
    fingerprints |= {made(None, Chat(), control_tokens="escape")[0], made(TEMPLATES["qwen"] + " ", Chat())[0]}
    assert len(fingerprints) == 7


def test_a_template_that_leaves_something_out_is_refused_once_with_the_rows_that_need_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "They."}]
    thought = [turns[0], {**turns[1], "reasoning_content": "I think"}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in [turns, thought] * 8))
    source = open_source(str(path), None, Chat().rows)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: this template does not write reasoning.*8 of 16 rows need it: "
    ) as e:
        store(source, Chat(), tokenizer("qwen"))
    assert str(e.value).count("a.jsonl:") == 6 and str(e.value).endswith(f"{path}:10, ...")
    assert len(store(source, Chat(), tokenizer("qwen"), on_error="skip").skipped) == 8
    assert len(store(source, Chat(reasoning="drop"), tokenizer("qwen"))) == 16


def test_weights_and_turns_that_are_taken_apart_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "They."))] * 2
    rows = [{"messages": turns, "id": "own", "weight": 0.5}, {"messages": turns}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = store(open_source(str(path), None, Chat().rows), Chat(turns="apart"), tokenizer("qwen"))
    assert found.rows.tolist() == [0, 0, 1, 1]
    assert [e.id for e in found] == ["own turn 1", "own turn 2", f"{path}:2", f"{path}:2"]
    assert [set(e.target_weights.tolist()) for e in found] == [{0.0, 0.5}] * 2 + [{0.0, 1.0}] * 2
    assert found.digests[0] != found.digests[2] and found[2].weights is None


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_has_a_bar_in_our_words_on_a_terminal_and_none_elsewhere(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"prompt": f"a prompt for {terminal}", "completion": " yes"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    datasets.enable_progress_bars()  # the tests do without them
    try:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        Data(PromptCompletion(), str(tmp_path / "rows.jsonl")).examples(TOK, 100)
    finally:
        datasets.disable_progress_bars()
    shown = capsys.readouterr().err
    assert "Generating" not in shown and ("reading rows" in shown) == terminal
