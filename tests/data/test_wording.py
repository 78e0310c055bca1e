"""Wordings in a config: `{column}` and Jinja, what they print and refuse; data=template made of them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from sftlab.data.dataset import Data
from sftlab.data.format import Conversation, Text
from sftlab.data.formats.from_columns import FromColumns
from sftlab.data.formats.instruction import Instruction
from sftlab.data.wording import Wording
from tests.kinds import tokenizer
from tests.support import byte_tokenizer

FIELDS = {
    "q": "Why?",
    "n": 3,
    "a b": "both",
    "none": None,
    "list": ["x"],
    "braces": "{q} {{ n }}",
    "yes": True,
    "f": 0.5,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {q}\nA:", "Q: Why?\nA:"),
        ("{a b}|{n}|{f}|{yes}", "both|3|0.5|True"),
        ("{braces}", "{q} {{ n }}"),  # what a column holds is no template
        ('as JSON: {"key": 1}, {}', 'as JSON: {"key": 1}, {}'),
        ("{{ q | upper }}, {{ row['a b'] }}\n", "WHY?, both\n"),
        ("{{ braces }}", "{q} {{ n }}"),
        ("{% if none %}x{% else %}y{% endif %}{{ none or '' }}", "y"),
        ("{% for x in list %}{{ x }}{% endfor %}{{ list | tojson }}", 'x["x"]'),
        ("{# a comment #}{{ q }} {q}", "Why? {q}"),
        ("{{ missing | default('z') }}", "z"),
        ("no column", "no column"),
    ],
)
def test_what_a_wording_prints(template: str, text: str) -> None:
    wording = Wording(template, "data.format.prompt")
    assert wording.fill(FIELDS) == text
    assert pickle.loads(pickle.dumps(wording)).fill(FIELDS) == text, "it can be sent to a worker"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{missing}", "no field 'missing'; it has 'q'"),
        ("{{ missing }}", "no field 'missing'; it has 'q'"),
        ("{none}", "data.format.prompt: column 'none' is null"),
        ("{{ none }}", "data.format.prompt: ValueError: is null"),
        ("{list}", "column 'list' holds list"),
        ("{{ list }}", "holds list: write {{ column | tojson }}"),
        ("{{ q.missing }}", "has no attribute 'missing'"),
        ("{{ 1 / 0 }}", "data.format.prompt: ZeroDivisionError"),
        ("{{ q.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.format.__globals__ }}", "SecurityError"),
        ("{{ list.append(1) }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ("{q.__class__}", "no field 'q.__class__'"),
    ],
)
def test_what_a_wording_refuses(template: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        Wording(template, "data.format.prompt").fill(FIELDS)
    assert said in str(error.value)


@pytest.mark.parametrize("template", ["{{ q", "{% if q %}", "{{ q | nofilter }}", "{% for %}{% endfor %}", 3, None])
def test_what_is_no_template_is_refused_before_any_row(template: Any) -> None:
    with pytest.raises(ValueError, match=r"data.format.completion: (this is not a Jinja|expected a) template"):
        Wording(template, "data.format.completion")


def test_two_columns_in_ones_own_words() -> None:
    format = FromColumns("Q: {q}\nA:", " {{ a | trim }}", group_chars=4)
    row = {"q": "Why?", "a": " so\n", "id": 7}
    assert format.to_text(row) == Text("Q: Why?\nA:", " so", "7", "Q: W", ("so",))
    assert format.prompt_text({"q": "Why?"}) == "Q: Why?\nA:" and not format.converses
    with pytest.raises(ValueError, match=r"data.format.completion gives an empty text"):
        format.to_text({"q": "x", "a": " "})


def test_two_columns_as_a_conversation() -> None:
    format = FromColumns("{q}", "{a}", system="Be {how}.", into="chat", tools="api")
    made = format.to_text({"q": "Why?", "a": "So.", "how": "brief", "api": '[{"name": "f"}]'})
    assert isinstance(made, Conversation) and format.converses
    assert [(m["role"], m["content"]) for m in made.messages] == [
        ("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]  # fmt: skip
    assert made.supervised == (2,) and made.tools == ({"type": "function", "function": {"name": "f"}},)
    with pytest.raises(ValueError, match=r"use chat=true"):
        format.prompt_text({"q": "a"})


def test_a_conversation_of_listed_messages_and_of_a_template() -> None:
    turns = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"},
             {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "{{ b }}"}]  # fmt: skip
    listed = FromColumns(messages=turns, into="chat").to_text({"q": "1", "a": "2", "b": "3"})
    assert isinstance(listed, Conversation) and listed.supervised == (1, 3)
    assert [m["content"] for m in listed.messages] == ["1", "2", "Sure?", "3"]
    turn, comma = "{{ {'role': t.who, 'content': t.said} | tojson }}", "{{ ', ' if not loop.last else '' }}"
    loop = f"[{{% for t in log %}}{turn}{comma}{{% endfor %}}]"
    format = FromColumns(messages=loop, into="chat", supervise="last")
    row = {
        "log": [
            {"who": w, "said": s}
            for w, s in (("user", 'a "b"'), ("assistant", "<c>"), ("user", "d"), ("assistant", "e"))
        ]
    }
    made = format.to_text(row)
    assert isinstance(made, Conversation) and made.supervised == (3,)
    assert [m["content"] for m in made.messages] == ['a "b"', "<c>", "d", "e"]
    with pytest.raises(ValueError, match=r"data.format.messages must print a JSON list"):
        FromColumns(messages="{{ q }}", into="chat").to_text({"q": "no"})


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "set the pair or the list"),
    ({"prompt": "{a}"}, "set the pair or the list"),
    ({"prompt": "{a}", "completion": "{b}", "messages": "[]", "into": "chat"}, "set the pair or the list"),
    ({"prompt": "{a}", "completion": "{b}", "into": "turns"}, "data.format.into=turns: expected plain or chat"),
    ({"prompt": "{a}", "completion": "{b}", "system": "x"}, "data.format.system has no effect on plain text"),
    ({"prompt": "{a}", "completion": "{b}", "tools": "x"}, "data.format.tools has no effect on plain text"),
    ({"prompt": "{a}", "completion": "{b}", "supervise": "last"}, "data.format.supervise has no effect"),
    ({"prompt": "{a}", "completion": "{b}", "template_path": "x"}, "data.format.template_path has no effect"),
    ({"messages": "[]"}, "data.format.messages has no effect on plain text: set data.format.into=chat"),
    ({"messages": "[]", "system": "x", "into": "chat"}, "data.format.system has no effect beside"),
    ({"messages": [{"role": "user"}], "into": "chat"}, "data.format.messages[0] is {'role': 'user'}"),
    ({"messages": [{"role": "user", "content": "{{"}], "into": "chat"}, "data.format.messages[0]: this is not"),
    ({"prompt": "{a}", "completion": "{b}", "into": "chat", "supervise": "first"}, "supervise=first"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), BAD_SETTINGS)
def test_settings_that_cannot_be_or_have_no_effect_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        FromColumns(**settings)
    assert said in str(error.value)


def test_several_workers_and_a_second_start_read_a_template(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": i, "a": i + 1}) + "\n" for i in range(2100)))
    format = FromColumns("{{ q }} and ", "{a}")
    for workers in (2, 2):
        found, _ = Data(format, str(path), num_workers=workers).load(byte_tokenizer())
        assert byte_tokenizer().decode(found[2099].tokens, skip_special_tokens=True) == "2099 and 2100"
    chat = FromColumns("{q}", "{a}", into="chat", template_path=None)
    found, _ = Data(chat, str(path), limit=3).load(tok := tokenizer("qwen"))
    assert tok.decode(found[2].tokens[found[2].supervised]) == "3<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"with_input": "{instruction}"}, "data.format.with_input must name {instruction} and {input} and no other"),
        ({"without_input": "{instruction} {input}"}, "data.format.without_input must name {instruction} and no other"),
        ({"with_input": "{instrucion} {input}"}, "it names input, instrucion"),
        ({"without_input": "{{ instruction"}, "data.format.without_input: this is not a Jinja template"),
        ({"input": None, "with_input": "{instruction}{input}"}, "data.format.with_input has no effect"),
    ],
)
def test_an_instructions_wording_that_drops_a_column_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        Instruction(**settings)
    assert said in str(error.value)


def test_an_instruction_may_be_worded_in_jinja() -> None:
    format = Instruction(with_input="{{ input | upper }}: {{ instruction }}", without_input="{{ instruction }}!")
    assert format.to_text({"instruction": "Add", "input": "x {input}", "output": "y"}).prompt == "X {INPUT}: Add"
    assert format.to_text({"instruction": "Add", "output": "y"}).prompt == "Add!"
