"""Ids of tool calls where a template takes nine letters and digits only."""

from typing import Any

import pytest

from sftlab.data.call_ids import with_nine
from sftlab.data.spelling import Spelling
from sftlab.data.template import ChatTemplate
from tests.support import byte_tokenizer

# As in Mistral's templates.
STRICT = """{%- for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' %}[RESULT]{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/RESULT]
{%- elif m.tool_calls %}[CALLS]
{%- for call in m.tool_calls %}
{%- if not call.id is defined or call.id|length != 9 %}{{ raise_exception('Tool call IDs: 9 letters') }}{% endif %}
{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id}|tojson }}
{%- endfor %}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""


def calls(*ids: str | None) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": 1}}
    made = [{"type": "function", "function": function} | ({"id": key} if key else {}) for key in ids]
    return {"role": "assistant", "content": "", "tool_calls": made}


def result(key: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": "2"} | ({"tool_call_id": key} if key else {})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([calls("abc123XYZ"), result("abc123XYZ")], ["abc123XYZ", "abc123XYZ"]),
        ([calls("call_1"), result("call_1")], ["call00001", "call00001"]),
        ([calls(None), result(), calls(None), result()], ["call00001", "call00001", "call00002", "call00002"]),
        ([calls("a", "b"), result("b"), result("a")], ["call00001", "call00002", "call00002", "call00001"]),
        ([calls("a", "b"), result("b"), result()], ["call00001", "call00002", "call00002", "call00001"]),
        ([result("lost"), calls("a")], ["lost", "call00001"]),
    ],
)
def test_a_call_and_its_result_get_one_id(messages: list[dict[str, Any]], expected: list[str]) -> None:
    found: list[str] = []
    for message in with_nine(messages):
        found += [call["id"] for call in message.get("tool_calls", ())]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    assert found == expected


@pytest.mark.parametrize(("source", "wants"), [(STRICT, True), (STRICT.replace("call.id|length != 9", "false"), False)])
def test_ids_are_changed_only_where_the_template_takes_no_others(source: str, wants: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    spelling = Spelling(ChatTemplate(tokenizer))
    asked = {"role": "user", "content": "1 + 1?"}
    messages, _ = spelling.spelt([asked, calls("call_abc"), result("call_abc")], tools=[])
    assert messages[1]["tool_calls"][0]["id"] == ("call00001" if wants else "call_abc")
    text = spelling.template.text(messages)
    assert text.count("call00001" if wants else "call_abc") == 2
