"""What each format makes of a row, and what it says of a bad one."""

import json
from typing import Any

import pytest

from sftlab.data.format import Conversation, Format, Text
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.gsm8k import Gsm8k
from sftlab.data.formats.instruction import Instruction
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.formats.text import PlainText

SQUAD = {"id": "q1", "context": "A b c.", "question": "What?", "answers": {"text": ["b", "b c"], "answer_start": [2]}}
GSM = {"question": "48 and half?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072.50"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def test_squad() -> None:
    text = Squad().to_text(SQUAD)
    assert text == Text("Context: A b c. Question: What? Answer:", " b", "q1", "A b c.", ("b", "b c"))
    assert Squad().prompt_text({"context": "A b c.", "question": "What?"}) == text.prompt
    none = Squad(unanswerable="cannot say").to_text({**SQUAD, "answers": {"text": []}})
    assert (none.completion, none.references) == (" cannot say", ("cannot say",))


def test_squads_own_json_of_both_versions() -> None:
    qas = [
        {"id": "1", "question": "Who?", "answers": [{"text": "b", "answer_start": 2}, {"text": "A b"}]},
        {"id": "2", "question": "No?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "c"}]},
    ]
    document = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "A b c.", "qas": qas}]}]}
    first, second = (Squad().to_text(row) for row in Squad().rows(document))
    assert (first.id, first.completion, first.references) == ("1", " b", ("b", "A b"))
    assert (second.id, second.completion) == ("2", " unanswerable")
    with pytest.raises(ValueError, match=r"this is not SQuAD"):
        Squad().rows({"rows": []})


def test_squad_scores_as_the_official_script() -> None:
    score = Squad().score
    assert score("The Keeper!", ["a keeper", "Ravi"]) == {"exact_match": 1.0, "f1": 1.0}
    assert score("keeper of light", ["the keeper"]) == {"exact_match": 0.0, "f1": pytest.approx(0.5)}
    assert score("", ["x"]) == {"exact_match": 0.0, "f1": 0.0}


def test_prompt_completion_joins_the_columns_as_they_stand() -> None:
    row = {"p": "Say ", "c": "it ", "id": 7}
    assert PromptCompletion("p", "c").to_text(row) == Text("Say ", "it ", "7", "Say ", ("it",))
    assert PromptCompletion("p", "c", group_chars=2).to_text(row).group == "Sa"


def test_instruction_has_alpacas_two_wordings() -> None:
    row = {"instruction": "Add.", "input": "", "output": "3"}
    plain = Instruction().to_text(row)
    assert plain.prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n") and "Input" not in plain.prompt
    assert plain == Instruction().to_text({k: v for k, v in row.items() if k != "input"})
    given = Instruction().to_text({**row, "input": "1 {and} 2"})
    assert given.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {and} 2\n\n### Response:\n")
    assert given.completion == "3" and given.prompt.startswith("Below is an instruction that describes a task, paired")
    named = Instruction("q", None, "a", without_input="{instruction}?").to_text({"q": "Add", "a": "3", "input": "x"})
    assert (named.prompt, named.completion) == ("Add?", "3")


def test_gsm8k_is_scored_by_its_number() -> None:
    format = Gsm8k()
    text = format.to_text(GSM)
    assert text.prompt == "Question: 48 and half?\nAnswer:" and text.completion == f" {GSM['answer']}"
    for answer in ("so\n#### 1072.5", "#### $1,072.50", "####1072.500 clips", "#### 1072.50."):
        assert format.score(answer, text.references) == {"exact_match": 1.0}, answer
    for answer in ("1072.5", "#### 1072", "#### -1072.5", "", "####"):
        assert format.score(answer, text.references) == {"exact_match": 0.0}, answer


def test_text_is_learned_whole() -> None:
    assert PlainText("body").to_text({"body": "All of it"}) == Text("", "All of it", None, "All of it")


def test_chat_of_openai_and_sharegpt_are_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    openai = Chat().to_text({"messages": [system, USER, ASSISTANT, USER, {**ASSISTANT, "content": " Ho "}], "id": "x"})
    said = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Yo"), ("human", "Hi"), ("gpt", " Ho ")]
    sharegpt = Chat().to_text({"conversations": [{"from": f, "value": v} for f, v in said], "id": "x"})
    assert openai == sharegpt
    assert isinstance(openai, Conversation) and openai.supervised == (2, 4) and openai.references == ("Ho",)
    assert Chat(supervise="last").to_text({"messages": list(openai.messages)}).supervised == (4,)
    as_text = Chat().to_text({"messages": json.dumps([system, USER, ASSISTANT])})
    assert as_text.messages == openai.messages[:3]
    parts = Chat().to_text(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, ASSISTANT]}
    )
    assert parts.messages[0] == USER
    weighed = Chat().to_text({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]})
    assert weighed.supervised == (3,) and all("weight" not in m for m in weighed.messages)


def test_chat_with_tools() -> None:
    called = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    rows = [
        {"from": "human", "value": "1?"},
        called,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    made = Chat().to_text({"conversations": rows, "tools": json.dumps(tools)})
    assert [m["role"] for m in made.messages] == ["user", "assistant", "tool", "assistant"]
    assert made.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert made.supervised == (1, 3) and made.tools == tuple(tools)
    # A columnar file has every key in every message.
    filled = {"role": "assistant", "content": "Yo", "tool_calls": None, "name": None}
    assert Chat().to_text({"messages": [USER, filled], "tools": None}).messages[1] == ASSISTANT


BAD: list[tuple[Format, dict[str, Any], str]] = [
    (Squad(), {"context": "c", "answers": {"text": ["a"]}}, "no field 'question'; it has 'context', 'answers'"),
    (Squad(), {**SQUAD, "answers": ["a"]}, "field 'answers' must hold {'text': [answers...]}"),
    (Squad(), {**SQUAD, "answers": {"text": [" "]}}, "an answer is empty"),
    (Squad(), {**SQUAD, "context": 3}, "field 'context' holds int, expected text"),
    (PromptCompletion(), {"prompt": "a", "text": "b"}, "no field 'completion'; it has 'prompt', 'text'"),
    (
        PromptCompletion(),
        {"prompt": "a", "completion": " \n"},
        "field 'completion' is empty: there is nothing to learn",
    ),
    (PromptCompletion(), {"prompt": None, "completion": "b"}, "field 'prompt' holds NoneType, expected text"),
    (PromptCompletion(), {}, "no field 'prompt'; it has none"),
    (Instruction(), {"instruction": "a", "output": ""}, "field 'output' is empty"),
    (Instruction(), {"instruction": "a", "output": "b", "input": 3}, "field 'input' holds int, expected text"),
    (Gsm8k(), {"question": "a", "answer": "it is 72"}, "no number after '####': it ends 'it is 72'"),
    (PlainText(), {"text": ""}, "field 'text' is empty"),
    (Chat(), {"prompt": "a"}, "no field 'messages'; it has 'prompt'"),
    (Chat(), {"messages": []}, "must be a list of messages, and not empty"),
    (Chat(), {"messages": "[{"}, "messages is a string that is not JSON"),
    (
        Chat(),
        {"messages": [USER, {"role": "robot", "content": "a"}]},
        "message 2 has the unknown role 'robot': expected",
    ),
    (Chat(), {"conversations": [{"from": "alien", "value": "a"}]}, "message 1 has the unknown role 'alien'"),
    (Chat(), {"messages": [ASSISTANT, USER, ASSISTANT]}, "the conversation starts with the assistant"),
    (Chat(), {"messages": [USER]}, "the conversation has no assistant turn"),
    (Chat(), {"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 is an empty assistant turn"),
    (Chat(), {"messages": [{"role": "user"}, ASSISTANT]}, "message 1 (user) has no content; it has role"),
    (Chat(), {"messages": ["Hi", ASSISTANT]}, "message 1 is str, expected {'role': ..., 'content': ...}"),
    (
        Chat(),
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
        "content that is not text",
    ),
    (Chat(), {"messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}]}, "names no function"),
    (
        Chat(),
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments of f is a string that is not JSON",
    ),
]


@pytest.mark.parametrize(("format", "row", "said"), BAD, ids=[f"{type(f).__name__}-{s[:30]}" for f, _, s in BAD])
def test_a_bad_row_says_what_is_wrong(format: Format, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        format.to_text(row)
    assert said in str(error.value)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"data\.format\.supervise=first: expected all or last"):
        Chat(supervise="first")


def test_squads_f1_by_hand() -> None:
    score = Squad().score
    # Two of our three words are right, and two of the reference's five: precision 2/3, recall 2/5.
    assert score("the keeper of Oakgate", ["a keeper in Oakgate who counts"])["f1"] == pytest.approx(
        2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)
    )
    assert score("steps steps", ["steps"])["f1"] == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert score("x", ["y", "x z", "x"]) == {"exact_match": 1.0, "f1": 1.0}
    assert score("x", ["x z", "y"]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert score("An  anthem.", ["anthem"])["exact_match"] == 1.0
    assert score("theory", ["ory"])["exact_match"] == 0.0, "articles are whole words"


def test_squads_group_is_its_passage_and_its_own_words_stand_for_no_answer() -> None:
    text = Squad(unanswerable="none").to_text({**SQUAD, "answers": {"text": []}})
    assert (text.group, text.completion, text.references) == ("A b c.", " none", ("none",))
    with pytest.raises(ValueError, match=r"an answer is empty"):
        Squad().to_text({**SQUAD, "answers": {"text": ["b", 3]}})
    assert Squad().rows([SQUAD]) == [SQUAD]
    with pytest.raises(ValueError, match=r"no field 'paragraphs'"):
        Squad().rows({"data": [{"title": "t"}]})


def test_the_default_score_is_whether_the_answer_is_one_of_the_references() -> None:
    score = PromptCompletion().score
    assert score(" b ", ["a", "b"]) == {"exact_match": 1.0} and score("b", [" b\n"]) == {"exact_match": 1.0}
    assert score("ab", ["a", "b"]) == {"exact_match": 0.0} and score("b", []) == {"exact_match": 0.0}


def test_the_prompt_of_a_format_is_that_of_its_text_and_a_conversation_has_none() -> None:
    assert PromptCompletion().prompt_text({"prompt": "Say ", "completion": "it"}) == "Say "
    assert Gsm8k().prompt_text(GSM) == "Question: 48 and half?\nAnswer:"
    with pytest.raises(ValueError, match=r"worded by the chat template: use chat=true"):
        Chat().prompt_text({"messages": [USER, ASSISTANT]})


def test_prefix_groups_are_as_many_characters_as_are_said() -> None:
    long = "x" * 300
    assert PromptCompletion().to_text({"prompt": long, "completion": "a"}).group == "x" * 256
    assert PlainText().to_text({"text": long}).group == "x" * 256
    assert PlainText(column="body", group_chars=3).to_text({"body": long, "text": "no"}).group == "xxx"
    text = PromptCompletion("p", "c", 2).to_text({"p": "abc", "c": " d\n", "prompt": "no", "completion": "no", "id": 0})
    assert (text.group, text.prompt, text.completion, text.references, text.id) == ("ab", "abc", " d\n", ("d",), "0")
    assert PlainText().to_text({"text": "a", "id": "i"}) == Text("", "a", "i", "a")


def test_every_option_of_an_instruction_is_used() -> None:
    format = Instruction("do", "with", "say", "{instruction} WITH {input}:", "{instruction} ALONE:")
    row = {"do": "Add", "with": "1 2", "say": " 3 ", "instruction": "no", "input": "no", "output": "no", "id": 5}
    text = format.to_text(row)
    assert (text.prompt, text.completion, text.references, text.id) == ("Add WITH 1 2:", " 3 ", ("3",), "5")
    for empty in ({**row, "with": " "}, {**row, "with": None}, {k: v for k, v in row.items() if k != "with"}):
        assert format.to_text(empty).prompt == "Add ALONE:"
    groups = [format.to_text(r).group for r in (row, {**row, "with": "8"}, {**row, "with": ""}, {**row, "do": "Sub"})]
    assert groups[0] == groups[1] and len(set(groups)) == 3
    default = Instruction().to_text({"instruction": "a", "input": "i", "output": "b"})
    assert "Input:\ni\n" in default.prompt


def test_gsm8k_groups_by_its_question_and_takes_the_first_number() -> None:
    text = Gsm8k().to_text({**GSM, "id": 3})
    assert (text.group, text.references, text.id) == ("48 and half?", (GSM["answer"],), "3")
    score = Gsm8k().score
    assert score("#### 5\n#### 6", ["#### 5"]) == {"exact_match": 1.0}
    assert score("#### 5", ["#### 4", "#### 5"]) == {"exact_match": 1.0}
    assert score("#### 100", ["#### 1"]) == {"exact_match": 0.0}, "the zeros of a whole number stay"
    assert score("#### -5", ["#### -5.00"]) == {"exact_match": 1.0}
    assert score("none", ["none"]) == {"exact_match": 0.0}


def test_text_learns_nothing_of_a_blank_and_everything_else() -> None:
    with pytest.raises(ValueError, match=r"field 'body' is empty"):
        PlainText(column="body").to_text({"body": " \n", "text": "x"})


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("bing", "assistant"),
        ("chatgpt", "assistant"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("system", "system"),
        ("developer", "developer"),
        ("user", "user"),
    ],
)
def test_sharegpts_roles(given: str, role: str) -> None:
    made = Chat().to_text({"conversation": [{"from": "human", "value": "a"}, {"from": given, "value": "b"}, ASSISTANT]})
    assert made.messages[1]["role"] == role
    assert made.supervised == ((1, 2) if role == "assistant" else (2,))


def test_what_else_a_conversation_carries() -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = [system, USER, {**ASSISTANT, "content": " Ho "}, USER, {**ASSISTANT, "reasoning_content": "so"}]
    made = Chat().to_text({"messages": messages, "conversations": "not this", "id": 7, "tools": []})
    assert made.group == json.dumps([system, USER]), "what forks of one conversation have in common"
    assert (made.id, made.tools, made.references) == ("7", None, ("Yo",))
    assert made.messages[4] == {**ASSISTANT, "reasoning_content": "so"}
    assert Chat().to_text({"messages": messages[:3]}).references == ("Ho",)
    null = {"messages": None, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert Chat().to_text(null).supervised == (1,)


def test_an_empty_turn_is_no_error_where_it_is_not_learned() -> None:
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert Chat().to_text({"messages": [USER, empty, USER, ASSISTANT]}).supervised == (3,)
    with pytest.raises(ValueError, match=r"message 2 is an empty assistant turn"):
        Chat().to_text({"messages": [USER, {**empty, "weight": 1}, USER, ASSISTANT]})


def test_a_tool_call_is_brought_into_openais_shape() -> None:
    def called(given: Any) -> Any:
        return (
            Chat().to_text({"messages": [USER, {"role": "assistant", "tool_calls": [given]}]}).messages[1]["tool_calls"]
        )

    shape = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert called({"function": {"name": "f", "arguments": '{"a": 1}'}}) == [shape]
    assert called({"name": "f", "arguments": {"a": 1}, "type": "x"}) == [
        {**shape, "function": {"name": "f", "arguments": {"a": 1}, "type": "x"}}
    ]
    assert called({"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}) == [{**shape, "id": "c1"}]
    assert called({"function": {"name": "f"}})[0]["function"]["arguments"] == {}
    assert called({"function": {"name": "f", "arguments": None}})[0]["function"]["arguments"] == {}
    for wrong in ("f", {"function": "f"}):
        with pytest.raises(ValueError, match=r"a tool call is "):
            called(wrong)
    with pytest.raises(ValueError, match=r"message 2 is a string that is not JSON"):
        Chat().to_text({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]})
    with pytest.raises(ValueError, match=r"content of type int, expected text"):
        Chat().to_text({"messages": [{"role": "user", "content": 3}, ASSISTANT]})


@pytest.mark.parametrize("part", [{"type": "image", "url": "x"}, "words", {"type": "text", "text": 3}])
def test_a_part_without_text_is_refused_among_others_that_have_some(part: Any) -> None:
    content = [{"type": "text", "text": "What is this?"}, part]
    with pytest.raises(ValueError, match=r"content"):
        Chat().to_text({"messages": [{"role": "user", "content": content}, ASSISTANT]})


# What a conversation's row says besides its turns ---------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_system_message(column: str) -> None:
    system = {"role": "system", "content": "You are the town crier."}
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    made = Chat().to_text({column: system["content"], "conversations": turns})
    assert made.messages == (system, USER, ASSISTANT) and made.supervised == (2,)
    assert made == Chat().to_text({column: system["content"], "messages": [system, USER, ASSISTANT]}), "said twice"
    for empty in ("", " \n", None):
        assert Chat().to_text({column: empty, "conversations": turns}).messages == (USER, ASSISTANT)
    with pytest.raises(ValueError, match=rf"two system messages that differ: the first message and field '{column}'"):
        Chat().to_text({column: "Other.", "messages": [system, USER, ASSISTANT]})
    with pytest.raises(ValueError, match=r"two system messages that differ: field 'system' and field 'system_prompt'"):
        Chat().to_text({"system": "a", "system_prompt": "b", "messages": [USER, ASSISTANT]})
    with pytest.raises(ValueError, match=rf"field '{column}' holds int, expected text"):
        Chat().to_text({column: 3, "messages": [USER, ASSISTANT]})
    with pytest.raises(ValueError, match=r"message 2 is an empty assistant turn"):  # as the row numbers them
        Chat().to_text({column: "x", "messages": [USER, {**ASSISTANT, "content": ""}]})


@pytest.mark.parametrize(
    "given",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        json.dumps([TOOL["function"]]),
        [{"type": "function", **TOOL["function"]}],
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_in_every_spelling_are_one(given: Any, column: str) -> None:
    assert Chat().to_text({column: given, "messages": [USER, ASSISTANT]}).tools == (TOOL,)


@pytest.mark.parametrize("given", ["", " ", "[]", "null", [], None])
def test_no_tools_in_every_spelling_are_none(given: Any) -> None:
    assert Chat().to_text({"tools": given, "messages": [USER, ASSISTANT]}).tools is None


@pytest.mark.parametrize("given", ["{", "words", [3], ["words"], {"name": "f"}, [{"parameters": {}}], '"f"', [None]])
def test_what_are_no_tools_is_an_error(given: Any) -> None:
    with pytest.raises(ValueError, match=r"tool"):
        Chat().to_text({"tools": given, "messages": [USER, ASSISTANT]})


def test_calls_in_every_spelling_are_one() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None, "b": 1}}}
    flat, text = call["function"], '{"a": null, "b": 1}'
    as_text = {**call, "function": {"name": "f", "arguments": text}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    spelt: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [as_text]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([as_text])},
        {"role": "assistant", "tool_calls": [flat]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": text}},
        {"from": "function_call", "value": json.dumps(flat)},
        {"from": "function_call", "value": json.dumps([flat])},
        {"role": "tool_call", "content": json.dumps(flat)},
        {"from": "gpt", "value": "", "tool_calls": [call]},
    ]
    for turn in spelt:
        made = Chat().to_text({"messages": [USER, turn]})
        assert made.messages[1] == said, turn
        assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": 1}, "the writer's null"
    both = {"from": "function_call", "value": json.dumps([flat, {"name": "g", "arguments": {}}])}
    assert [c["function"]["name"] for c in Chat().to_text({"messages": [USER, both]}).messages[1]["tool_calls"]] == [
        "f",
        "g",
    ]
    for none in ([], None, "", "[]"):
        assert Chat().to_text({"messages": [USER, {**ASSISTANT, "tool_calls": none}]}).messages[1] == ASSISTANT
    for result in ({"role": "function", "name": "f", "content": "1"}, {"role": "tool_response", "content": "1"}):
        assert Chat().to_text({"messages": [USER, spelt[0], result, ASSISTANT]}).messages[2]["role"] == "tool"


@pytest.mark.parametrize("arguments", [3, [1], "[1]", "3", '"text"'])
def test_arguments_that_are_no_object_are_an_error(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"arguments of f are .*, expected an object"):
        Chat().to_text(
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]}
        )


def test_a_sharegpt_turn_keeps_what_else_it_says() -> None:
    turn = {"from": "gpt", "value": "Yo", "weight": 0, "name": "Ada"}
    made = Chat().to_text({"conversations": [{"from": "human", "value": "Hi"}, turn, USER, ASSISTANT]})
    assert made.supervised == (3,) and made.messages[1] == {**ASSISTANT, "name": "Ada"}
    with pytest.raises(ValueError, match=r"message 1 has both 'content' and 'value', and they differ"):
        Chat().to_text({"messages": [{"role": "user", "content": "a", "value": "b"}, ASSISTANT]})


def calls_learned(row: dict[str, Any]) -> Any:
    found = Chat().to_text(row)
    return [m["tool_calls"][0]["function"] for m in found.messages if m.get("tool_calls")], found.tools, found.unknown


WEATHER = {"name": "get_weather", "arguments": {"city": "Lima"}}
WEATHER_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("spelling", ["openai", "legacy", "json", "sharegpt"])
def test_a_calls_arguments_are_read_under_any_of_their_names(key: str, spelling: str) -> None:
    call = {"name": "get_weather", key: {"city": "Lima"}}
    turns = {
        "openai": {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        "legacy": {"role": "assistant", "content": None, "function_call": {**call, key: json.dumps(call[key])}},
        "json": {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
        "sharegpt": {"from": "function_call", "value": json.dumps(call)},
    }
    row = {"messages": [{"role": "user", "content": "Weather?"}, turns[spelling]], "tools": [WEATHER_TOOL]}
    assert calls_learned(row) == ([WEATHER], (WEATHER_TOOL,), ())


@pytest.mark.parametrize("spelling", ["function_call", "tool_calls"])
def test_what_a_call_holds_besides_is_noticed_in_every_spelling(spelling: str) -> None:
    call = {"name": "get_weather", "arguments": {}, "result": "sunny"}
    turn = {"role": "assistant", "content": None, spelling: call if spelling == "function_call" else json.dumps([call])}
    row = {"messages": [{"role": "user", "content": "Weather?"}, turn]}
    assert calls_learned(row)[2] == (("tool_calls.result", "message 2"),)
    both = {**WEATHER, "input": {"city": "Rome"}}
    with pytest.raises(ValueError, match="a call of get_weather has both 'arguments' and 'input'"):
        Chat().to_text({"messages": [row["messages"][0], {"role": "assistant", "tool_calls": [{"function": both}]}]})


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_that_stand_in_a_message_are_the_rows(name: str) -> None:
    asked = [{"role": "system", "content": "Help.", name: [WEATHER_TOOL]}, {"role": "user", "content": "Weather?"}]
    answer = {"role": "assistant", "content": None, "tool_calls": [{"function": WEATHER}]}
    found = Chat().to_text({"messages": [*asked, answer]})
    assert (
        found.tools == (WEATHER_TOOL,)
        and found.messages[0] == {"role": "system", "content": "Help."}
        and not found.unknown
    )
    assert Chat().to_text({"messages": [*asked, answer], "tools": [WEATHER_TOOL]}).tools == (WEATHER_TOOL,)
    other = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(ValueError, match=f"two lists of tools that differ: 'tools' and '{name} of message 1'"):
        Chat().to_text({"messages": [*asked, answer], "tools": [other]})


@pytest.mark.parametrize(
    ("turn", "thought"),
    [
        ({"reasoning_content": "add", "content": "2"}, "add"),
        ({"thinking": ["add", "stop"], "content": "2"}, "add\nstop"),
        ({"thinking": [{"type": "thinking", "thinking": "add"}], "content": "2"}, "add"),
        ({"reasoning": "add", "thinking": "add", "content": "2"}, "add"),
        ({"reasoning_content": "add", "content": "<think>\nadd\n</think>\n\n2"}, "add"),
        ({"reasoning": {"content": "add"}, "content": "2"}, r"message 2: reasoning holds dict .*, expected text"),
        ({"thinking": True, "content": "2"}, r"message 2: thinking holds bool \(True\), expected text"),
        (
            {"reasoning": "add", "thinking": "carry", "content": "2"},
            "reasoning in reasoning and in thinking, and they differ",
        ),
        (
            {"reasoning": "add", "content": "<think>carry</think>2"},
            "reasoning in reasoning and in content, and they differ",
        ),
    ],
)
def test_a_turn_has_one_thought_and_it_is_text(turn: dict[str, Any], thought: str) -> None:
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", **turn}]}
    if " " in thought:
        with pytest.raises(ValueError, match=thought):
            Chat().to_text(row)
        return
    (found,) = (m for m in Chat().to_text(row).messages if m["role"] == "assistant")
    (key,) = found.keys() - {"role", "content"}
    assert (found[key], found["content"]) == (thought, "2")


@pytest.mark.parametrize(
    ("odd", "what"), [({"reasoning": "I wonder"}, "reasoning"), ({"tool_calls": [{"function": WEATHER}]}, "tool calls")]
)
def test_only_an_assistant_thinks_and_calls(odd: dict[str, Any], what: str) -> None:
    row = {"messages": [{"role": "user", "content": "Hi", **odd}, {"role": "assistant", "content": "Hello."}]}
    with pytest.raises(ValueError, match=rf"message 1 \(user\) has {what}, which only an assistant turn may have"):
        Chat().to_text(row)


def test_of_a_prompt_and_its_completion_only_the_completion_is_learned() -> None:
    prompt = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}]}
    found = Chat().to_text(row)
    assert [m["content"] for m in found.messages] == ["1", "2", "3", "4"] and found.supervised == (3,)
    system = Chat().to_text({**row, "system": "Count."})
    assert next(m["content"] for m in system.messages) == "Count." and system.supervised == (4,)
