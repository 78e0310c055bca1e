"""Scores of tool calls, in the forms that templates have."""

import json

import pytest

from sftlab.data.formats.chat import Chat
from sftlab.data.formats.tool_calls import calls_in, without_thought

CALL = ("add", {"a": 1, "b": "x y"})
FORMS = [
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x y"}}\n</tool_call>',
    '[{"name": "add", "arguments": {"a": 1, "b": "x y"}, "id": "call00001"}]',
    '{"name": "add", "parameters": {"a": 1, "b": "x y"}}',
    '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": \\"x y\\"}"}}',
    'function<tool_sep>add\n```json\n{"a": 1, "b": "x y"}\n```',
    'commentary to=functions.add json{"a": 1, "b": "x y"}',
    ' to=functions.addcommentary json{"a": 1, "b": "x y"}',
    'analysisI have {"name": "mul"}.assistant to=functions.addcommentary json{"a": 1, "b": "x y"}',
    '<function=add>{"a": 1, "b": "x y"}</function>',
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx y\n</parameter>\n</function>\n</tool_call>",  # noqa: E501
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>x y</arg_value>\n</tool_call>",  # noqa: E501
    '[add(a=1, b="x y")]',
    '<think>\nI could {"name": "mul"}\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x y"}}</tool_call>',  # noqa: E501
]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_found_in_every_form(form: str) -> None:
    reference = json.dumps({"tool_calls": [{"name": "add", "arguments": {"b": "x y", "a": 1}}]})
    assert Chat().score(form, (reference,)) == {"tool_name": 1.0, "tool_valid_json": 1.0, "tool_arguments": 1.0}
    assert calls_in(without_thought(form)) == [CALL]


def test_each_part_of_a_call_is_scored() -> None:
    two = [{"name": "add", "arguments": {"a": 1}}, {"name": "mul", "arguments": {"a": 2}}]
    reference = (json.dumps({"tool_calls": two}),)

    def scores(answer: str) -> tuple[float, ...]:
        return tuple(Chat().score(answer, reference).values())

    assert scores('{"name": "add", "arguments": {"a": 1}} {"name": "mul", "arguments": {"a": 2}}') == (1, 1, 1)
    assert scores('{"name": "add", "arguments": {"a": 1}}') == (0.5, 0.5, 0.5)
    assert scores('{"name": "add", "arguments": {"a": 9}} {"name": "sub", "arguments": {"a": 2}}') == (0.5, 1, 0)
    assert scores('{"name": "add", "arguments": {"a": 1') == (0.5, 0, 0)
    assert scores("I cannot do that.") == (0, 0, 0)
    assert scores('[{"name": "add", "arguments": {"a": 1}}, ' * 4)[0] == 0.25


def test_words_are_scored_without_the_reasoning_before_them() -> None:
    assert Chat().score("<think>\nso\n</think>\n\ntwo", ("two",)) == {"exact_match": 1.0}
    assert Chat().score("analysisIt may be three.assistantfinaltwo", ("two",)) == {"exact_match": 1.0}
    assert Chat().score("finaltwo", ("two",)) == {"exact_match": 1.0}, "gpt-oss's channel, its tokens left out"
    assert Chat().score("finally", ("finally",)) == Chat().score("analysis", ("analysis",)) == {"exact_match": 1.0}
    assert Chat().score("three", ("two",)) == {"exact_match": 0.0}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    made = Chat().to_text({"messages": [{"role": "user", "content": "1?"}, call]})
    assert made.references == ('{"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}',)
