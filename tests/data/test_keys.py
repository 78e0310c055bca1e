"""Nothing is left out in silence: columns and keys that nobody reads, columns that are named and not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftlab.data.dataset import Data
from sftlab.data.examples import Examples
from sftlab.data.format import Conversation, Format, Text
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.from_columns import FromColumns
from sftlab.data.formats.gsm8k import Gsm8k
from sftlab.data.formats.instruction import Instruction
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.formats.text import PlainText
from sftlab.data.keys import words_of
from sftlab.data.loader import RowLayout
from sftlab.data.plan import Plan
from sftlab.data.report import Account, not_read, report, short
from tests.kinds import TEMPLATES, tokenizer
from tests.support import byte_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def load(folder: Path, format: Format, *rows: dict[str, Any], tok: Any = None, **settings: Any) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(format, str(path), num_workers=1, **settings).load(tok or byte_tokenizer())[0]


def refused(folder: Path, format: Format, *rows: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, format, *rows, **settings)
    return str(error.value)


def learned(examples: Examples) -> list[str]:
    tok = byte_tokenizer()
    return [tok.decode(e.tokens, skip_special_tokens=True) for e in examples]


def test_columns_that_no_row_needed_are_listed_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "source": "web"}, {"prompt": "a", "completion": "c", "id": 3},
            {"prompt": "a", "completion": "d", "source": None, "score": 1}]  # fmt: skip
    account = Account.of(load(tmp_path, PromptCompletion(), *rows))
    assert account.columns_not_read == {"score": 1, "source": 2} and account.keys_not_read == {}
    assert not_read(account) == ["columns not read: score, source"]
    one = Account.of(load(tmp_path, Instruction(), {"instruction": "a", "output": "b"}, {
        "instruction": "c", "output": "d", "input": "e", "system": "f", "history": []}))  # fmt: skip
    assert one.columns_not_read == {"history": 1, "system": 1}, "a column that one row needs is read"
    assert not_read(Account.of(load(tmp_path, PromptCompletion(), rows[1]))) == []


def test_the_report_of_a_run_says_what_is_not_read(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some words", "lang": "en"}\n' * 2000)
    train, _ = Data(PlainText(), str(tmp_path), num_workers=2).examples(byte_tokenizer(), 99)
    found = report(train, None, Plan(train.groups, 4, 0), RowLayout("tree", 512, 1, 0, 1, 0), 1)
    assert found.accounts["training"][""].columns_not_read == {"lang": 2000}, "over all blocks and workers"
    assert f"columns not read: lang, files not read: {tmp_path}/more.jsonl" in short(found)["training"]


MISSING: list[tuple[Format, dict[str, Any], str]] = [
    (PromptCompletion(), {"question": "a", "answer": "b"}, "data.format.prompt=COLUMN (question or answer)"),
    (PromptCompletion(), {"prompt": "a", "reply": "b"}, "data.format.completion=reply"),
    (PromptCompletion(), {"Prompt": "a", "completion": "b"}, "data.format.prompt=Prompt"),
    (PromptCompletion("q"), {"question": "a", "completion": "b"}, "data.format.prompt=question"),
    (Instruction(), {"instruction": "a", "response": "b"}, "data.format.output=response"),
    (PlainText(), {"id": 1, "content": "a"}, "data.format.column=content"),
    (
        Squad(),
        {"context": "a", "frage": "b", "answers": {"text": ["c"]}},
        "data.format.columns={question:COLUMN} (frage or answers)",
    ),
    (Squad(columns={"question": "frage"}), {"context": "a", "fragen": "b"}, "data.format.columns={question:fragen}"),
    (Gsm8k(), {"question": "a", "solution": "b"}, "data.format.columns={answer:solution}"),
    (Chat(), {"dialog": []}, "data.format.columns={messages:dialog}"),
    (FromColumns("{question}", "{answer}"), {"question": "a", "answers": "b"}, "data.format.columns={answer:answers}"),
    (PromptCompletion(), {}, "data.format.prompt=COLUMN"),
]


@pytest.mark.parametrize(("format", "row", "typed"), MISSING)
def test_a_missing_column_is_named_with_what_to_type(
    format: Format, row: dict[str, Any], typed: str, tmp_path: Path
) -> None:
    said = refused(tmp_path, format, row, tok=tokenizer("qwen"))
    assert f"{tmp_path}/rows.jsonl:1: no field " in said and said.endswith(f"say which column it is: {typed}")
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"data.sources.mine.format"):
        Data(format, str(path)).load(tokenizer("qwen"), "data.sources.mine")


def test_a_column_that_is_named_and_in_no_row_is_an_error_even_where_it_is_optional(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "output": "e"}]
    said = refused(tmp_path, Instruction(input="inptu"), *rows)
    assert said.startswith(
        f"data.format.input=inptu: no row of {tmp_path}/rows.jsonl has this column; did you mean input?"
    )
    assert len(load(tmp_path, Instruction(input="input"), *rows)) == 2, "one row has it"
    assert len(load(tmp_path, Instruction(), rows[1])) == 1, "nobody named it"
    chat = {"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}
    said = refused(tmp_path, Chat(columns={"tools": "tool"}), chat, tok=tokenizer("qwen"))
    assert said.startswith("data.format.columns.tools=tool: no row of ") and "they have 'functions', 'messages'" in said
    said = refused(tmp_path, PromptCompletion(columns={"id": "key"}), {"prompt": "a", "completion": "b"})
    assert said.startswith("data.format.columns.id=key: no row of ")


def test_a_renaming_of_what_the_format_never_asks_for_is_an_error(tmp_path: Path) -> None:
    row = {"context": "a", "question": "b", "answers": {"text": ["c"]}}
    said = refused(tmp_path, Squad(columns={"qestion": "question2"}), row)
    assert said.startswith(
        "data.format.columns.qestion=question2 has no effect: did you mean question? this format asks"
    )
    assert "answers, context, id, question" in said


WITH_TOOLS = "{{ tools | tojson if tools }}" + TEMPLATES["qwen"]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (Squad(columns={"context": "passage", "question": "frage", "answers": "a", "id": "key"}),
         {"passage": "P.", "frage": "Q?", "a": {"text": ["A"]}, "key": 7}),
        (PromptCompletion(columns={"prompt": "p", "completion": "c", "id": "key"}), {"p": "P", "c": "A", "key": 7}),
        (Instruction(columns={"instruction": "do", "input": "with", "output": "say", "id": "key"}),
         {"do": "Q", "with": "P", "say": "A", "key": 7}),
        (Gsm8k(columns={"question": "q", "answer": "a", "id": "key"}), {"q": "Q", "a": "A #### 7", "key": 7}),
        (PlainText(columns={"text": "body", "id": "key"}), {"body": "A", "key": 7}),
        (Chat(columns={"messages": "talk", "system": "role play", "tools": "api", "id": "key"}),
         {"talk": [USER, ASSISTANT], "role play": "Be brief.", "api": [{"name": "f"}], "key": 7}),
        (FromColumns("{p}{{ q }}", "{{ a }}", columns={"q": "frage", "a": "antwort", "id": "key"}),
         {"frage": "Q", "antwort": "A", "key": 7}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_column_of_every_format_can_have_another_name(
    format: Format, row: dict[str, Any], tmp_path: Path
) -> None:
    found = load(tmp_path, format, row, tok=tokenizer("qwen", WITH_TOOLS))
    assert found[0].id == "7" and found.store.keys.unread == {}
    made = format.to_text(format.row(row))
    if isinstance(made, Conversation):
        assert made.messages[0] == {"role": "system", "content": "Be brief."} and made.tools is not None
    else:
        assert "A" in made.completion
        assert format.prompt_text(format.row(row)) == made.prompt, "inference reads the same columns"


# Keys of messages ---------------------------------------------------------------------------------------------------

CALL = {"function": {"name": "f", "arguments": {}}}
UNKNOWN = [
    ({**ASSISTANT, "wieght": 0}, "wieght", "did you mean weight?"),
    ({**USER, "mood": "sad"}, "mood", "a message has role, from, content"),
    ({**ASSISTANT, "tool_calls": [{**CALL, "delay": 3}]}, "tool_calls.delay", ""),
    ({**ASSISTANT, "tool_calls": [{"function": {**CALL["function"], "strict": True}}]}, "tool_calls.strict", ""),
    ({"role": "user", "content": [{"type": "text", "text": "Hi", "cache": True}]}, "content.cache", ""),
    ({"from": "human", "value": "Hi", "toxicity": 0.1}, "toxicity", ""),
]


@pytest.mark.parametrize(("turn", "key", "said"), UNKNOWN)
def test_a_key_of_a_message_that_nobody_reads_is_an_error_or_counted(
    turn: dict[str, Any], key: str, said: str, tmp_path: Path
) -> None:
    row = {"messages": [turn, ASSISTANT] if turn.get("role", "user") == "user" else [USER, turn]}
    number = row["messages"].index(turn) + 1
    plain = {"messages": [USER, ASSISTANT]}
    error = refused(tmp_path, Chat(), plain, row, tok=tokenizer("qwen"))
    assert f"rows.jsonl:2: message {number} has the key {key!r}, which neither" in error
    assert said in error and "data.unknown=count" in error
    found = load(tmp_path, Chat(), plain, row, row, tok=tokenizer("qwen"), unknown="count")
    assert len(found) == 3 and Account.of(found).keys_not_read == {key: 2}
    assert not_read(Account.of(found)) == [f"keys of messages not read: {key} (2)"]
    skipped = load(tmp_path, Chat(), plain, row, tok=tokenizer("qwen"), on_error="skip")
    assert len(skipped) == 1 and skipped.num_skipped == 1


def test_a_key_that_the_template_reads_is_read(tmp_path: Path) -> None:
    tok = tokenizer("qwen")
    row = {"messages": [{**USER, "mood": "sad"}, ASSISTANT]}
    tok.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.get('mood', '') }}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    (example,) = load(tmp_path, Chat(), row, tok=tok)
    assert "sad" in tok.decode(example.tokens)
    assert words_of("mood {{ a.b }}{% if c['d'] %}{# mood #}") == {"a", "b", "if", "c", "d"}
    assert words_of({"default": "{{ a }}", "tool_use": "{{ b }}"}) == {"a", "b"} and words_of(None) == set()


def test_an_unknown_key_that_holds_nothing_is_none(tmp_path: Path) -> None:
    empty = {"refusal": None, "annotations": [], "audio": {}, "note": ""}
    assert len(load(tmp_path, Chat(), {"messages": [USER, {**ASSISTANT, **empty}]}, tok=tokenizer("qwen"))) == 1


def test_unknown_is_error_or_count() -> None:
    with pytest.raises(ValueError, match=r"data.unknown=ignore: expected one of error, count"):
        Data(Chat(), "x", unknown="ignore")
    with pytest.raises(ValueError, match=r"data.unknown=count has no effect: the rows of this format hold no messages"):
        Data(PromptCompletion(), "x", unknown="count")


# Whatever goes wrong in a row, the row is named ----------------------------------------------------------------------


class Fails(Format):
    """A format of somebody else, with bugs."""

    def to_text(self, fields: Any) -> Text:
        if fields["n"] == 2:
            return Text("a", fields["words"]["none"])  # a KeyError
        return Text("a", "b" * len(fields["words"]))  # a TypeError


@pytest.mark.parametrize(
    ("row", "said"), [({"n": 2, "words": {}}, "KeyError: 'none'"), ({"n": 1, "words": 3}, "TypeError")]
)
def test_an_error_of_any_kind_names_the_row_and_can_be_skipped(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"n": 1, "words": "two"}
    assert refused(tmp_path, Fails(), good, row).startswith(f"{tmp_path}/rows.jsonl:2: {said}")
    found = load(tmp_path, Fails(), good, row, good, on_error="skip")
    assert len(found) == 2 and found.store.skipped[0].where.endswith(":2") and said in found.store.skipped[0].reason


def test_a_row_that_cannot_be_tokenised_is_named_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftlab.data import render

    class Backend:
        """A tokenizer that fails on a word, as some do on what they have no token for."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def encode_batch_fast(self, texts: list[str], **more: Any) -> Any:
            if any("bad" in text for text in texts):
                raise RuntimeError("no token for it")
            return self.real.encode_batch_fast(texts, **more)

    real = render.Renderer.__init__

    def init(self: Any, *given: Any) -> None:
        real(self, *given)
        self.encoder.backend = Backend(self.backend)

    monkeypatch.setattr(render.Renderer, "__init__", init)
    rows = [{"prompt": "a", "completion": word} for word in ("one", "bad", "two")]
    assert refused(tmp_path, PromptCompletion(), *rows).endswith("rows.jsonl:2: RuntimeError: no token for it")
    found = load(tmp_path, PromptCompletion(), *rows, on_error="skip")
    assert learned(found) == ["aone", "atwo"] and found.store.skipped[0].reason == "RuntimeError: no token for it"


HALVES: list[tuple[Format, dict[str, Any]]] = [
    (PromptCompletion(), {"prompt": "cut \ud83d:", "completion": "x"}),
    (PromptCompletion(), {"prompt": "a", "completion": "\udc00"}),
    (PromptCompletion(), {"prompt": "a", "completion": "x", "id": "\ud800"}),
    (Squad(), {"context": "c", "question": "q", "answers": {"text": ["a", "b\ud83d"]}}),
    (Chat(), {"messages": [{**USER, "content": "\ud83d"}, ASSISTANT]}),
    (Chat(), {"messages": [{"role": "\ud83d", "content": "x"}, ASSISTANT]}),
    (FromColumns("{q}", "{a}"), {"q": "\ud83d", "a": "b"}),
]


@pytest.mark.parametrize(("format", "row"), HALVES)
def test_half_an_emoji_is_named_and_can_be_skipped(format: Format, row: dict[str, Any], tmp_path: Path) -> None:
    whole = json.loads(json.dumps(row).replace("\\ud83d", "").replace("\\udc00", "y").replace("\\ud800", ""))
    for turn in whole.get("messages", ()):
        turn["role"] = turn["role"] or "user"
        turn["content"] = turn["content"] or "Hi"
    said = refused(tmp_path, format, whole, row, tok=tokenizer("qwen"))
    assert f"{tmp_path}/rows.jsonl:2: " in said and ("half of a character" in said or "unknown role" in said)
    said.encode()  # it can be printed
    found = load(tmp_path, format, whole, row, tok=tokenizer("qwen"), on_error="skip")
    assert len(found) == 1 and found.num_skipped == 1


def test_a_whole_emoji_written_as_two_halves_is_whole(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "\\ud83d\\ude00"}\n')
    assert learned(Data(PromptCompletion(), str(tmp_path / "rows.jsonl")).load(byte_tokenizer())[0]) == ["a\U0001f600"]


ODD_LINES = {
    "a key that stands twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "has the key 'prompt' twice"),
    "twice deep inside": ('{"prompt": "a", "completion": "b", "m": [{"k": 1, "k": 2}]}', "has the key 'k' twice"),
    "nested too deeply": ('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "a number of many digits": ('{"prompt": ' + "9" * 5000 + "}", "this line cannot be read"),
    "two objects": ('{"prompt": "a"} {"completion": "b"}', "not JSON"),
    "a number": ("17", "expected a JSON object, found int"),
    "null": ("null", "expected a JSON object, found NoneType"),
    "Python's quotes": ("{'prompt': 'a'}", "not JSON"),
    "a comma at the end": ('{"prompt": "a",}', "not JSON"),
    "a number as prompt": ('{"prompt": 3, "completion": "b"}', "field 'prompt' holds int, expected text"),
    "a list as completion": ('{"prompt": "a", "completion": ["b"]}', "field 'completion' holds list"),
    "null as completion": ('{"prompt": "a", "completion": null}', "field 'completion' holds NoneType"),
    "only white space": ('{"prompt": "a", "completion": "\\u00a0\\n"}', "field 'completion' is empty"),
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_an_odd_line_is_named_and_can_be_skipped(name: str, tmp_path: Path) -> None:
    line, said = ODD_LINES[name]
    path, good = tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b"}'
    path.write_text(f"{good}\n{line}\n{good}")
    with pytest.raises(ValueError) as error:
        Data(PromptCompletion(), str(path)).load(byte_tokenizer())
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value) and len(str(error.value)) < 700
    found, _ = Data(PromptCompletion(), str(path), on_error="skip").load(byte_tokenizer())
    assert len(found) == 2 and found.num_skipped == 1
