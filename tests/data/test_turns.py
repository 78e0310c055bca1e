"""Where turns begin and end, in templates of many kinds, each written here in our own words."""

# ruff: noqa: E501

import json
from typing import Any

import numpy as np
import pytest

from sftlab.data.example import Example
from sftlab.data.formats.chat import Chat
from sftlab.data.render import Renderer
from sftlab.data.spelling import NotWritten
from sftlab.data.template import prepare_tokenizer
from sftlab.data.turns import Turns
from tests.kinds import TEMPLATES, tokenizer

USER, ASSISTANT = "user", "assistant"
LOOP, END = "{%- for m in messages %}", "{%- endfor %}"
HEAD = "{{- '<|im_start|>' + m.role + '\n' }}"
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
CALLS = (
    "{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments}"
    " | tojson + '</tool_call>' }}{%- endfor %}"
)
# Rebuilds the thinking of turns after the last question and drops it from earlier ones, as Qwen 3 does.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}" + LOOP + HEAD + "{%- if m.role == 'assistant' %}{%- set said = m.content %}"
    "{%- set why = m.reasoning_content or '' %}{%- if not why and '</think>' in said %}"
    "{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or why) %}{{- '<think>\n' + why + '\n</think>\n\n' }}{%- endif %}"
    "{{- said }}" + CALLS + "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}" + END + ASK
)
# Knows thinking but never writes it, and opens it in its prompt, as DeepSeek R1's distillations do.
R1 = (
    LOOP + HEAD + "{%- if m.role == 'assistant' %}{{- m.content.split('</think>')[-1].lstrip() }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>' }}" + END
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)  # fmt: skip
# Analysis and answer are messages of their own, and the last of a text ends otherwise, as gpt-oss has it.
CHANNELS = (
    LOOP + "{%- if m.role == 'assistant' %}{%- if m.thinking and loop.last %}{{- '<|im_start|>assistant;analysis:' "
    "+ m.thinking + '<|im_end|>' }}{%- endif %}{{- '<|im_start|>assistant;final:' + m.content }}"
    "{{- '<|endoftext|>' if loop.last else '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{%- endif %}" + END
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)  # fmt: skip
# No prompt of its own; the system message stands in the last question, if that is last. Mistral's older ones do so.
INST = (
    "{%- set rules = messages[0].content if messages[0].role == 'system' else '' %}" + LOOP
    + "{%- if m.role == 'user' %}{{- '[INST]' + (rules + '\n\n' if rules and loop.last else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[CALLS][' }}{%- for c in m.tool_calls %}{{- {'name': c.function.name, "
    "'arguments': c.function.arguments} | tojson + (', ' if not loop.last else '') }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content + '[/RESULT]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- endif %}" + END
)  # fmt: skip
ALWAYS = LOOP + HEAD + "{{- m.content + '<|im_end|>' }}" + END + "{{- '<|im_start|>assistant\n' }}"  # as Command-A
NO_END = LOOP + "{{- '<|' + m.role + '|>' + m.content }}" + CALLS + END + "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"  # fmt: skip
LAST_OPEN = (
    LOOP
    + HEAD
    + "{{- m.content }}{%- if not loop.last %}{{- '<|im_end|>\n' }}{%- endif %}"
    + END
    + ("{%- if add_generation_prompt %}{{- '<|im_end|>\n<|im_start|>assistant\n' }}{%- endif %}")
)
CALLING = LOOP + HEAD + "{{- m.content }}" + CALLS + "{{- '<|im_end|>\n' }}" + END


def said(*words: str) -> list[dict[str, Any]]:
    return [{"role": (USER, ASSISTANT)[i % 2], "content": w} for i, w in enumerate(words)]


def calling(*calls: tuple[str, Any], content: str | None = None) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    return {"role": ASSISTANT, "content": content, "tool_calls": made}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def made(
    template: str, messages: list[dict[str, Any]], kind: str = "qwen", **settings: Any
) -> tuple[Any, list[Example]]:
    row = settings.pop("row", {})
    tok, format = tokenizer(kind, template), Chat(**settings)
    prepare_tokenizer(tok, [format])
    renderer = Renderer(tok, format)
    rendered = renderer.render(format.to_text({"messages": messages, **row}))
    return tok, renderer.examples(rendered, ["here"] * len(rendered))


def learned(tok: Any, e: Example) -> list[str]:
    cuts = np.flatnonzero(np.diff(e.supervised)) + 1
    runs = zip(np.split(e.tokens, cuts), e.supervised[np.r_[0, cuts]], strict=True)
    return [tok.decode(run) for run, is_learned in runs if is_learned]


def all_learned(template: str, messages: list[dict[str, Any]], **settings: Any) -> list[list[str]]:
    tok, examples = made(template, messages, **settings)
    return [learned(tok, e) for e in examples]


NEXT = ["end", "1", "<|im_end|>", "im", "", " ", "They.", "assistant", "\n", "|"]
END_KINDS = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "gpt2": "<|endoftext|>", "sentencepiece": "</s>"}


@pytest.mark.parametrize("words", NEXT)
@pytest.mark.parametrize("kind", END_KINDS)
def test_gauntlet_31_the_end_of_a_turn_is_learned_whatever_the_next_message_says(kind: str, words: str) -> None:
    end = END_KINDS[kind]
    words = words.replace("<|im_end|>", end + "x")
    (turns,) = all_learned(TEMPLATES[kind], said("Who?", "They.", words, "Right."), kind=kind)
    assert [t.strip() for t in turns] == [f"They.{end}", f"Right.{end}"]
    first, _ = all_learned(TEMPLATES[kind], said("Who?", "They.", words, "Right."), kind=kind, turns="apart")
    assert first[0].strip() == f"They.{end}"


@pytest.mark.parametrize("answer", ["1", "end", "name", "add", '{"a": 1}', "", "<|im_end|>x"])
@pytest.mark.parametrize("template", [CALLING + ASK, CALLING, INST])
def test_gauntlet_32_a_tool_call_is_learned_whole(template: str, answer: str) -> None:
    calls = calling(("add", {"a": 1, "b": [2, None]}), ("mul", {}))
    turns = [*said("1 and 2?"), calls, result(answer), {"role": ASSISTANT, "content": "Three."}]
    tok, (e,) = made(template, turns)
    first, second = learned(tok, e)
    both = ['{"name": "add", "arguments": {"a": 1, "b": [2, null]}}', '{"name": "mul", "arguments": {}}']
    if template == INST:
        assert first == f"[CALLS][{', '.join(both)}]<|im_end|>" and second == " Three.<|im_end|>"
    else:
        assert first == "".join(f"<tool_call>{c}</tool_call>" for c in both) + "<|im_end|>"
        assert second == "Three.<|im_end|>"


def test_arguments_are_text_where_the_template_wants_text() -> None:
    raw = CALLING.replace("'arguments': c.function.arguments}", "'arguments': 0}").replace(
        "| tojson + '</tool_call>'", "| tojson + c.function.arguments + '</tool_call>'"
    )
    (turns,) = all_learned(raw + ASK, [*said("1?"), calling(("add", {"a": "é", "b": True}))])
    assert turns[0].endswith('{"a": "é", "b": true}</tool_call><|im_end|>')
    refused = CALLING.replace("'arguments': c.function.arguments}", "'arguments': c.function.arguments | length}")
    with pytest.raises(NotWritten, match="does not write tool calls"):
        made(refused, [*said("1?"), calling(("add", {"a": 1}))])


LEFT_OUT = {
    "tool calls": [*said("Who?"), calling(("add", {"a": 1}))],
    "several tool calls in one turn": [*said("Who?"), calling(("add", {"a": 1}), ("mul", {"a": 2}))],
    "tool results": [*said("Who?"), calling(("add", {"a": 1})), result("x"), {"role": ASSISTANT, "content": "y"}],
    "developer messages": [{"role": "developer", "content": "Be brief."}, *said("Who?", "They.")],
    "system messages": [{"role": "system", "content": "Be brief."}, *said("Who?", "They.")],
    "reasoning": [*said("Who?"), {"role": ASSISTANT, "content": "They.", "reasoning_content": "I think"}],
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_gauntlet_33_what_a_template_does_not_write_is_refused_by_name(what: str) -> None:
    one = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    calls = {"tool calls": "", "several tool calls in one turn": one}.get(what, CALLS)
    roles = {"tool results": "tool", "developer messages": "developer", "system messages": "system"}
    skipped = f"{{%- if m.role != '{roles[what]}' %}}" if what in roles else "{%- if true %}"
    template = (
        LOOP + skipped + HEAD + "{{- m.content or '' }}" + calls + "{{- '<|im_end|>\n' }}{%- endif %}" + END + ASK
    )
    with pytest.raises(NotWritten, match=f"this template does not write {what}"):
        made(template, LEFT_OUT[what])
    tok, _ = made(template, said("Who?", "They."))
    assert tok.chat_template == template
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(NotWritten, match="does not write the tools of a row"):
        made(template, said("Who?", "They."), row={"tools": tools})


THOUGHT = [*said("1+1?", "2", "2+2?", "4", "3+3?", "6")]
for at, why in ((1, "add one"), (3, "add two"), (5, "add three")):
    THOUGHT[at]["reasoning_content"] = why


@pytest.mark.parametrize("spelling", ["reasoning_content", "reasoning", "thinking", "content"])
@pytest.mark.parametrize("template", [QWEN3, R1, CHANNELS], ids=["qwen3", "r1", "channels"])
def test_gauntlet_34_a_reasoning_turn_is_learned_where_inference_writes_it(template: str, spelling: str) -> None:
    messages = []
    for m in THOUGHT:
        m = dict(m)
        if why := m.pop("reasoning_content", None):
            m |= (
                {"content": f"<think>\n{why}\n</think>\n\n{m['content']}"} if spelling == "content" else {spelling: why}
            )
        messages.append(m)
    tok, examples = made(template, messages)
    thoughts = [("add one", "2"), ("add two", "4"), ("add three", "6")]
    form = {
        QWEN3: "<think>\n{}\n</think>\n\n{}<|im_end|>",
        R1: "{}\n</think>\n\n{}<|im_end|>",
        CHANNELS: ";analysis:{}<|im_end|><|im_start|>assistant;final:{}<|endoftext|>",
    }[template]
    assert [learned(tok, e) for e in examples] == [[form.format(*t)] for t in thoughts]
    for e, i in zip(examples, (1, 3, 5), strict=True):  # each is prompted as inference prompts
        history = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in THOUGHT[:i]]
        asked = tok.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        assert tok.decode(e.tokens[: e.num_prompt]) == asked
    assert len({e.group for e in examples}) == 1, (
        "they meet in a step, where the forest shares what they have in common"
    )
    assert [e.id for e in examples] == ["here turn 1", "here turn 2", "here turn 3"]


@pytest.mark.parametrize("template", [QWEN3, R1, CHANNELS], ids=["qwen3", "r1", "channels"])
def test_reasoning_is_read_or_dropped_where_that_is_asked_for(template: str) -> None:
    row = said("1+1?", "2")
    row[1]["content"] = "<think>\nadd one\n</think>\n\n2"
    assert "add one" not in made(template, row, reasoning="drop")[0].decode(
        made(template, row, reasoning="drop")[1][0].tokens
    )
    row = said("1+1?", "2")
    row[1]["reasoning_content"] = "add one"
    tok, (e,) = made(template, row, reasoning="context")
    assert learned(tok, e) == [f"2{tok.decode(e.tokens[-1:])}"] and "add one" in tok.decode(e.tokens)
    tok, (e,) = made(template, row, reasoning="drop")
    assert "add one" not in tok.decode(e.tokens) and "".join(learned(tok, e)).endswith(f"2{tok.decode(e.tokens[-1:])}")
    with pytest.raises(ValueError, match=r"data\.format\.reasoning=no: expected learn or context or drop"):
        Chat(reasoning="no")


def test_a_prompt_that_opens_thinking_is_answered_behind_it_without_reasoning_too() -> None:
    assert all_learned(R1, said("1+1?", "2")) == [["\n</think>\n\n2<|im_end|>"]]
    opens = ASK.replace("assistant\n'", "assistant\n<think></think>'")  # opened and closed, as Gemma 4 does
    tok, (e,) = made(LOOP + HEAD + "{{- m.content + '<|im_end|>' }}" + END + opens, said("1+1?", "2"))
    assert learned(tok, e) == ["2<|im_end|>"]
    assert tok.decode(e.tokens).endswith("<|im_start|>assistant\n<think></think>2<|im_end|>")


def test_turns_are_taken_apart_exactly_where_history_is_rewritten() -> None:
    plain = said(*["Who counts?", "they"] * 5)
    assert len(made(TEMPLATES["qwen"], plain)[1]) == 1
    assert len(made(TEMPLATES["qwen"], plain, turns="apart")[1]) == 5
    assert len(made(QWEN3, plain)[1]) == 5, "an empty thought is written for the last turn alone"
    tools = [*said("1?"), calling(("add", {"a": 1})), result("2"), calling(("add", {"a": 3})), result("4")]
    assert len(made(QWEN3, [*tools, {"role": ASSISTANT, "content": ""} | calling(("end", {}))])[1]) == 3
    for m in tools:
        m |= {"reasoning_content": "so"} if m["role"] == ASSISTANT else {}
    last = {"role": ASSISTANT, "content": "5", "reasoning_content": "so"}
    assert len(made(QWEN3, [*tools, last])[1]) == 1, "after one question nothing is rewritten"
    with pytest.raises(ValueError, match=r"turns=together: this template words a turn differently"):
        made(QWEN3, plain, turns="together")


def test_a_template_that_always_ends_in_a_header_has_none_learned() -> None:
    tok, (e,) = made(ALWAYS, said("Who?", "they", "How many?", "two"))
    assert learned(tok, e) == ["they<|im_end|>", "two<|im_end|>"]


def test_an_end_that_is_left_out_of_the_last_turn_is_put_there() -> None:
    tok, (e,) = made(LAST_OPEN, said("Who?", "they", "How many?", "two"))
    assert learned(tok, e) == ["they<|im_end|>", "two<|im_end|>"]


def test_every_turn_of_a_template_that_ends_none_learns_to_stop() -> None:
    tok, examples = made(NO_END, said("Who?", "they", "How many?", "two"))
    assert [learned(tok, e) for e in examples] == [["they<|im_end|>"], ["two<|im_end|>"]]
    assert tok.decode(examples[1].tokens) == "<|user|>Who?<|assistant|>they<|user|>How many?<|assistant|>two<|im_end|>"


def test_a_system_message_that_stands_in_the_last_question_is_in_the_prompt() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *said("Who?", "they", "How many?", "two")]
    tok, examples = made(INST, turns)
    assert [learned(tok, e) for e in examples] == [[" they<|im_end|>"], [" two<|im_end|>"]]
    assert [tok.decode(e.tokens[: e.num_prompt]) for e in examples] == [
        "[INST]Be brief.\n\nWho?[/INST]",
        "[INST]Who?[/INST] they<|im_end|>[INST]Be brief.\n\nHow many?[/INST]",
    ]


def test_several_marked_stretches_of_one_turn_are_one_turn() -> None:
    marked = (
        LOOP + HEAD + "{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}{{- '~' }}"
        "{% generation %}{{- '!<|im_end|>' }}{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}"
        "{%- endif %}" + END + ASK
    )
    tok, (e,) = made(marked, said("Who?", "they", "How many?", "seven"))
    assert learned(tok, e) == ["they", "!<|im_end|>", "seven", "!<|im_end|>"]
    assert tok.decode(e.tokens[: e.num_prompt]).endswith("How many?<|im_end|><|im_start|>assistant\n")
    renderer = Renderer(tok, Chat())
    for first in ("they", "we"):  # the second of a shape too
        (found,) = renderer.render(Chat().to_text({"messages": said("Who?", first, "How many?", "seven")}))
        assert [found.text[a:b] for a, b, _ in found.spans] == [first, "!<|im_end|>", "seven", "!<|im_end|>"]


@pytest.mark.parametrize("template", [TEMPLATES["qwen"], CALLING + ASK])
def test_a_long_conversation_is_worded_as_its_turns_are_by_themselves(template: str) -> None:
    rng = np.random.default_rng(0)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Count."}]
    while len(messages) < 90:
        words = [" ".join(rng.choice(["the", "end", "1", "\n", " keeper "], 3)) + "x" for _ in range(3)]
        messages += said(words[0])
        if rng.random() < 0.5:
            messages += [calling(("add", {"a": words[1]})), result(words[2])]
        messages += [{"role": ASSISTANT, "content": words[1]}]
    _, (together,) = made(template, messages)
    _, apart = made(template, messages, turns="apart")
    assert len(apart) > 40
    marks = np.zeros(len(together.tokens), bool)
    for e in apart:
        assert e.tokens.tolist() == together.tokens[: len(e)].tolist()
        marks[: len(e)] |= e.supervised
    assert (marks == together.supervised).all()


LATE = QWEN3.replace("{{- said }}", "{{- 'late ' if loop.index0 > 70 }}{{- said }}")


@pytest.mark.parametrize("template", [QWEN3, NO_END, LATE])
def test_a_long_conversation_that_is_taken_apart_is_worded_as_its_turns_are_by_themselves(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Count."}]
    for i in range(60):
        asked, answer = {"role": "user", "content": f"Say {i}?"}, {"role": ASSISTANT, "content": f"It is {i * 7}."}
        if i % 2 and template == QWEN3:
            answer["reasoning_content"] = f"I think of {i * 3}"
        if i in (20, 21):
            asked["content"] = answer["content"] = " the same\n"
        if i in (30, 31):
            answer["content"] = "think"  # Qwen 3's own word
        messages += [asked, answer]
    calls: list[int] = []
    real = Turns.said
    monkeypatch.setattr(Turns, "said", lambda self, *given: calls.append(given[2]) or real(self, *given))
    quick = made(template, messages)[1]
    assert len(quick) == 60
    assert template == LATE or len(set(calls)) < 25, "most turns need no rendering of their own"
    monkeypatch.setattr(Turns, "_known", lambda *given: lambda i: None)
    for a, b in zip(quick, made(template, messages)[1], strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.supervised.tolist() == b.supervised.tolist()
        assert (a.num_prompt, a.id) == (b.num_prompt, b.id)


def test_what_is_marked_in_conversations_of_one_shape_is_what_the_template_marks() -> None:
    marked = (
        LOOP
        + HEAD
        + (
            "{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
            "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}" + END + ASK
        )
    )
    tok = tokenizer("qwen", marked)
    known = Renderer(tok, Chat())
    for i in range(9):
        source = Chat().to_text({"messages": said(*(" a b"[j % 2 :] + "x" * (i + j) for j in range(4)))})
        (found,), (fresh,) = known.render(source), Renderer(tok, Chat()).render(source)
        assert (found.text, found.spans, found.prompt) == (fresh.text, fresh.spans, fresh.prompt)
        assert [found.text[a:b] for a, b, _ in found.spans] == [
            source.messages[j]["content"] + "<|im_end|>" for j in (1, 3)
        ]


def test_many_conversations_of_one_shape_are_worded_as_the_first_of_each() -> None:
    """The second of a shape is worded from what is known of the first; here each is compared with a fresh start."""
    tok = tokenizer("llama3")
    format = Chat()
    prepare_tokenizer(tok, [format])
    known = Renderer(tok, format)
    words = [" a ", "b", "c\n", "<|eot_id|>d", "end", "\n\ne", "f  g", "b<|eot_id|>"]
    for i in range(40):
        row = {"messages": said(*(words[(i * 7 + j * (i + 1)) % 8] + "x" * (i % 3) for j in range(4)))}
        source = format.to_text(row)
        fresh = Renderer(tok, format)
        assert [(r.text, r.spans, r.prompt) for r in known.render(source)] == [
            (r.text, r.spans, r.prompt) for r in fresh.render(source)
        ]


def test_a_marker_that_swallows_white_space_takes_no_header_along() -> None:
    tok = tokenizer("qwen", LOOP + "{{- '<|h|>\n' + m.content + '<|im_end|>\n' }}" + END + "{%- if add_generation_prompt %}{{- '<|h|>\n' }}{%- endif %}")  # fmt: skip
    from tokenizers import AddedToken

    tok.add_special_tokens({"additional_special_tokens": [AddedToken("<|h|>", rstrip=True, lstrip=True, special=True)]})
    format = Chat()
    prepare_tokenizer(tok, [format])
    renderer = Renderer(tok, format)
    for words in ("they", "\n they", " they\n\n"):
        (e,) = renderer.examples(
            renderer.render(format.to_text({"messages": said("Who?", words, "So?", words)})), ["x"]
        )
        assert tok.convert_tokens_to_ids("<|h|>") not in e.tokens[e.supervised].tolist()
        assert e.tokens[e.supervised].tolist().count(tok.eos_token_id) == 2


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({"weight": 0}, None),
        ({"weight": 0.25}, 0.25),
        ({"train": False}, None),
        ({"training": True}, 1.0),
        ({"loss": False}, None),
        ({"loss": 0.5}, 0.5),
        ({"mask": True}, None),
        ({"mask": False}, 1.0),
        ({"weight": 0.5, "mask": False, "train": True}, 0.5),
        ({"weight": 1, "train": False}, None),
    ],
)
@pytest.mark.parametrize("spelling", ["openai", "sharegpt"])
def test_gauntlet_35_a_turns_flags_are_obeyed(spelling: str, flags: dict[str, Any], weights: float | None) -> None:
    row: dict[str, Any] = {
        "messages": [*said("Who?"), {"role": ASSISTANT, "content": "they"} | flags, *said("So?", "two")]
    }
    if spelling == "sharegpt":
        names = {USER: "human", ASSISTANT: "gpt"}
        turns = [{"from": names[m.pop("role")], "value": m.pop("content"), **m} for m in row["messages"]]
        row = {"conversations": turns}
    tok, format = tokenizer("qwen"), Chat()
    prepare_tokenizer(tok, [format])
    renderer = Renderer(tok, format)
    (e,) = renderer.examples(renderer.render(format.to_text(row)), ["here"])
    assert learned(tok, e) == (["two<|im_end|>"] if weights is None else ["they<|im_end|>", "two<|im_end|>"])
    assert set(e.target_weights[e.supervised]) == {1.0, weights or 1.0}
    (half,) = renderer.examples(renderer.render(format.to_text(row | {"weight": 0.5})), ["here"])
    assert (half.target_weights == e.target_weights / 2).all()


def test_flags_that_cannot_be_obeyed_are_errors() -> None:
    for flag in ({"weight": -1}, {"weight": "much"}, {"train": "yes"}, {"weight": float("nan")}):
        with pytest.raises(ValueError, match=rf"message 2: {next(iter(flag))} is .*expected a number of at least 0"):
            Chat().to_text({"messages": [*said("Who?"), {"role": ASSISTANT, "content": "they"} | flag]})
    with pytest.raises(ValueError, match=r"message 1 \(user\) is flagged to be learned"):
        Chat().to_text({"messages": [said("Who?")[0] | {"train": True}, said("", "they")[1]]})
    with pytest.raises(ValueError, match="field 'weight' is 'x'"):
        Chat().to_text({"messages": said("Who?", "they"), "weight": "x"})


def test_a_fraction_scales_the_loss_and_its_denominator() -> None:
    from sftlab.data.forest import row as forest_row

    messages = said("Who?", "they", "So?", "two")
    messages[1]["weight"] = 0.25
    _, (e,) = made(TEMPLATES["qwen"], messages)
    made_row = forest_row([[e, e]])
    assert float(made_row.weight.sum()) == 2 * float(e.target_weights.sum())
    assert sorted(set(made_row.weight.tolist())) == [0.5, 2.0]


def test_calls_of_the_old_kind_and_empty_lists_of_calls() -> None:
    old = {"role": ASSISTANT, "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*said("1?"), old, {"role": "function", "name": "add", "content": "2"}, *said("", "2")[1:]]
    (first, second) = all_learned(CALLING + ASK, turns)[0]
    assert (
        first == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>' and second == "2<|im_end|>"
    )
    none = [*said("1?"), {"role": ASSISTANT, "content": "2", "tool_calls": [], "function_call": None}]
    assert all_learned(TEMPLATES["llama3"], none, kind="llama3") == [["2<|eot_id|>"]]
