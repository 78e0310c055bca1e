"""Chat templates at their edges: no end tokens, reasoning, tools, several turns, and what a tokenizer is given."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from sftlab.data.example import Example
from sftlab.data.format import Conversation, Text
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.text import PlainText
from sftlab.data.render import Renderer, first_token, tokens_of
from sftlab.data.template import ChatTemplate, leading_special, prepare_tokenizer
from tests.kinds import KINDS, TEMPLATES, expected, tokenizer

BARE = "{%- for m in messages %}{{- m.content }}{%- endfor %}"
USER, ASSISTANT = "user", "assistant"
TOGETHER = Chat(turns="together")  # templates that end no turn are taken apart otherwise


def said(*words: str, **last: Any) -> list[dict[str, Any]]:
    """Return turns of these words, the user's first; what else is given goes to the last."""
    turns: list[dict[str, Any]] = [{"role": (USER, ASSISTANT)[i % 2], "content": w} for i, w in enumerate(words)]
    turns[-1] |= last
    return turns


def made(tok: Any, messages: list[dict[str, Any]], format: Chat | None = None, **fields: Any) -> Example:
    format = format or Chat()
    prepare_tokenizer(tok, [format])
    renderer = Renderer(tok, format)
    (example,) = renderer.examples(renderer.render(format.to_text({"messages": messages, **fields})), ["here"])
    return example


def learned(tok: Any, e: Example) -> list[str]:
    """Return the stretches of text that are learned."""
    cuts = np.flatnonzero(np.diff(e.supervised)) + 1
    runs = zip(np.split(e.tokens, cuts), e.supervised[np.r_[0, cuts]], strict=True)
    return [tok.decode(run) for run, is_learned in runs if is_learned]


def check(tok: Any, e: Example, parts: list[tuple[str, bool]], end: bool) -> None:
    ids, marks = expected(tok, parts)
    assert e.tokens.tolist() == [*ids, *([tok.eos_token_id] if end else [])]
    assert e.supervised.tolist() == [*marks.tolist(), *([True] if end else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_holds_the_end_of_a_turn_and_the_next_ones_beginning_is_learned(kind: str) -> None:
    tok = tokenizer(kind, BARE)
    words = ["I don't know what it is that you wo", "u", "ld; the ", "kee", "per of th", "e light"]
    e = made(tok, said(*words), TOGETHER)
    begin = "" if kind in ("qwen", "gpt2") else tok.bos_token  # prepare puts it before a template without one
    parts = [(begin, False), *((w, i % 2 == 1) for i, w in enumerate(words))]
    check(tok, e, parts, end=True)

    def ids(text: str) -> list[int]:
        return list(tok(text, add_special_tokens=False)["input_ids"])

    front = begin + "".join(words[:4])
    assert ids(front) != ids(front + words[4])[: len(ids(front))], "the end of a turn does merge here"


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_at_the_end_of_a_turn_is_learned_with_the_word_it_merges_into(kind: str) -> None:
    tok = tokenizer(kind, BARE)
    words = ["Who counts?", "it is ", "keeper", " the ", "steps", " they"]
    begin = "" if kind in ("qwen", "gpt2") else tok.bos_token
    e = made(tok, said(*words), TOGETHER)
    check(tok, e, [(begin, False), *((w, i % 2 == 1) for i, w in enumerate(words))], end=True)


def test_a_tokenizer_that_cuts_or_fills_texts_does_neither_here() -> None:
    tok = tokenizer("qwen")
    text = Text("Question: Who counts the steps? Answer:", " the keeper")
    (expected_,) = Renderer(tok).examples(Renderer(tok).render(text), ["here"])
    tok.backend_tokenizer.enable_truncation(3)
    tok.backend_tokenizer.enable_padding(length=99)
    (found,) = Renderer(tok).examples(Renderer(tok).render(text), ["here"])
    assert found.tokens.tolist() == expected_.tokens.tolist() and 3 < len(found) < 99


def test_the_beginning_of_the_next_turn_is_no_end_of_this_one() -> None:
    each = "{%- for m in messages %}{{- (bos_token if m.role == 'user' else '') + m.content }}{%- endfor %}"
    tok = tokenizer("llama3", each)
    assert learned(tok, made(tok, said("Who?", "they", "How many?", "two"), TOGETHER)) == ["they", "two<|end_of_text|>"]


def test_characters_that_have_no_token_are_stepped_over() -> None:
    t = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "ef": 2, "[UNK]": 3}, unk_token="[UNK]"))
    t.normalizer = normalizers.Replace("~", "")
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    text = "ab ~~ cd ef ~~"
    encoding = t.encode(text)
    assert encoding.ids == [0, 1, 2]

    def held(start: int, stop: int) -> tuple[int, int]:
        return tokens_of(encoding, start, stop, len(text), 3)

    assert held(0, 2) == (0, 1) and held(3, 8) == (1, 2) and held(6, 11) == (1, 3) and held(9, 14) == (2, 3)
    assert held(3, 5) == (1, 1) and held(12, 14) == (3, 3) and held(0, 14) == (0, 3)
    assert held(1, 7) == (0, 2), "a token is held if any of its characters is"
    assert first_token(encoding, 3, 5, 3) == 3 and first_token(encoding, 3, 7, 3) == 1


REASONING = (
    "{%- for m in messages %}{{- '<' + m.role + '>' }}"
    "{%- set why = m.reasoning_content or m.reasoning or m.thinking %}"
    "{%- if why %}{{- '(' + why + ')' }}{%- endif %}{{- m.content + eos_token + '\n' }}{%- endfor %}"
)


@pytest.mark.parametrize("prompt", ["", "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learned_with_the_words_that_follow_it(key: str, prompt: str) -> None:
    tok = tokenizer("qwen", REASONING + prompt)
    messages = said("How many?", "two", "Who?", "the keeper")
    messages[1][key], messages[3][key] = "I count", "who counts"
    e = made(tok, messages)
    end = "<|im_end|>"
    parts = [
        (f"<user>How many?{end}\n<assistant>", False),
        (f"(I count)two{end}", True),
        (f"\n<user>Who?{end}\n<assistant>", False),
        (f"(who counts)the keeper{end}", True),
    ]
    check(tok, e, parts, end=False)


def test_of_a_last_turn_without_weight_nothing_is_learned() -> None:
    messages = said("How many?", "two", "Who?", "the keeper")
    for weights, supervised in (((1, 0), ()), ((0, 1), (3,)), ((None, None), (3,))):
        for at, weight in zip((1, 3), weights, strict=True):
            messages[at].pop("weight", None)
            if weight is not None:
                messages[at]["weight"] = weight
        assert Chat(supervise="last").to_text({"messages": messages}).supervised == supervised
    messages[1]["weight"], messages[3]["weight"] = 1, 0
    assert not made(tokenizer("qwen"), messages, Chat(supervise="last")).supervised.any()
    tok = tokenizer("qwen")
    e = made(tok, messages)
    assert learned(tok, e) == ["two<|im_end|>"] and tok.decode(e.tokens).endswith("two<|im_end|>")


def test_the_text_ends_with_the_last_turn_that_is_learned() -> None:
    tok = tokenizer("qwen")
    e = made(tok, [*said("How many?", "two", "Who?"), {"role": ASSISTANT, "content": "x", "weight": 0}])
    assert tok.decode(e.tokens) == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    assert e.num_prompt == len(e.tokens) - int(e.supervised.sum())
    bare = tokenizer("gpt2", BARE)
    e = made(bare, said("How many? ", "two ", "Who? "))  # a turn without an end-of-turn token, and one after it
    assert bare.decode(e.tokens) == "How many? two <|endoftext|>" and e.supervised[-1]


def test_what_is_prompted_with_is_all_before_the_last_turn() -> None:
    tok = tokenizer("qwen")
    e = made(tok, said("How many?", "two", "Who?", "the keeper"))
    assert tok.decode(e.tokens[e.num_prompt :]) == "the keeper<|im_end|>"
    assert tok.decode(e.tokens[: e.num_prompt]).endswith("Who?<|im_end|>\n<|im_start|>assistant\n")


def test_private_characters_in_a_message_are_words_like_any_other() -> None:
    tok = tokenizer("qwen")
    for words in ("a\ue000", "a\U000f0000\U000f0001", "\U000ffffd", "\U00100000"):
        e = made(tok, [*said(*["how?", "so"] * 10), *said(words, words)])
        assert learned(tok, e) == ["so<|im_end|>"] * 10 + [f"{words}<|im_end|>"]


def test_a_turn_without_a_mark_is_refused() -> None:
    once = (
        "{%- for m in messages %}{%- if loop.index == 2 %}{% generation %}{{- m.content }}{% endgeneration %}"
        "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    )
    with pytest.raises(ValueError, match=r"has \{% generation %\}, but marks nothing in an assistant turn"):
        made(tokenizer("qwen", once), said("a", "b", "c", "d"))


def test_two_tool_calls_of_one_turn_are_learned_to_its_end() -> None:
    tok = tokenizer("qwen")
    calls = [{"function": {"name": n, "arguments": a}} for n, a in (("add", {"a": "x", "b": 2}), ("now", {}))]
    messages = [
        *said("How many?"),
        {"role": ASSISTANT, "content": "So: ", "tool_calls": calls},
        {"role": "tool", "content": "two"},
    ]
    e = made(tok, messages)
    (turn,) = learned(tok, e)
    assert turn.startswith("So: <tool_call>") and turn.endswith("</tool_call><|im_end|>")
    assert '"arguments": {"a": "x", "b": 2}' in turn and '"name": "now", "arguments": {}' in turn
    assert tok.decode(e.tokens).startswith("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nSo: ")


def test_tools_are_shown_by_the_template_that_is_for_them() -> None:
    tok = tokenizer("qwen")
    with_tools = "{%- for t in tools %}{{- t.function.name + ';' }}{%- endfor %}" + TEMPLATES["qwen"]
    tok.chat_template = {"default": TEMPLATES["qwen"], "tool_use": with_tools}
    tools = [{"type": "function", "function": {"name": n}} for n in ("add", "sub")]
    messages = said("How many?", "two")
    e = made(tok, messages, tools=tools)
    assert tok.decode(e.tokens).startswith("add;sub;<|im_start|>user") and learned(tok, e) == ["two<|im_end|>"]
    assert tok.decode(made(tok, messages).tokens).startswith("<|im_start|>user")


def test_the_templates_own_end_of_turn_becomes_the_end_of_text() -> None:
    tok = tokenizer("llama3")
    assert tok.eos_token == "<|end_of_text|>"
    prepare_tokenizer(tok, [PlainText(), PromptCompletion()])
    assert tok.eos_token == "<|end_of_text|>", "other formats need nothing of the template"
    prepare_tokenizer(tok, [PlainText(), Chat()])
    assert tok.eos_token == "<|eot_id|>"
    plain = tokenizer("llama3", "{{- bos_token }}{%- for m in messages %}{{- m.content + ' END ' }}{%- endfor %}")
    prepare_tokenizer(plain, [Chat()])
    assert plain.eos_token == "<|end_of_text|>", "END is no single token"


def test_a_templates_file_is_the_conversations_own_affair(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATES["qwen"].replace("|im_end|>\n", "|im_end|>~"))
    tok = tokenizer("qwen")
    prepare_tokenizer(tok, [PlainText(), Chat(template_path=str(own)), PromptCompletion()])
    assert tok.chat_template == own.read_text()
    again = tokenizer("qwen", "{{ 'another' }}")
    prepare_tokenizer(again, [Chat(template_path="asset://chat.jinja")])
    assert "another" not in again.chat_template


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}" + BARE, "<|begin_of_text|>" + BARE, BARE], ids=["named", "written", "without"]
)
def test_a_bos_is_put_before_a_template_only_where_it_has_none(template: str) -> None:
    tok = tokenizer("llama3", template)
    e = made(tok, said("the ", "keeper"))
    assert tok.decode(e.tokens) == "<|begin_of_text|>the keeper<|end_of_text|>"
    qwen = tokenizer("qwen", BARE)
    made(qwen, said("the ", "keeper"))
    assert qwen.chat_template == BARE, "this tokenizer puts nothing before a text"
    assert leading_special(tok) == [tok.bos_token_id] and leading_special(qwen) == []


def test_white_space_before_a_turn_is_prompted_where_the_template_writes_it() -> None:
    """Llama 2's template writes the space before an answer by itself and has no generation prompt."""
    tok = tokenizer(
        "qwen", "{%- for m in messages %}{{- (' ' if m.role == 'assistant' else '') + m.content }}{%- endfor %}"
    )
    e = made(tok, said("How many?", "two", "Who?", "they"), TOGETHER)
    assert learned(tok, e) == [" two", " they<|im_end|>"]
    header = tokenizer("qwen", "{%- for m in messages %}{{- m.role + ': ' + m.content + eos_token }}{%- endfor %}")
    assert "".join(learned(header, made(header, said("How many?", "#two")))) == "#two<|im_end|>"


CALLING = (
    "{%- for m in messages %}{{- m.role + ':' + m.content }}{%- for c in m.tool_calls or [] %}"
    "{{- '[' + c.function.name + ' ' + c.function.arguments | tojson + ']' }}{%- endfor %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
)


def test_an_end_of_text_in_the_next_message_is_not_this_turns_end() -> None:
    tok = tokenizer("gpt2", CALLING)
    e = made(tok, said("Who?", "they", "the <|endoftext|> is what?", "an end"), TOGETHER)
    assert learned(tok, e) == ["they", "an end<|endoftext|>"]
    call = {"role": ASSISTANT, "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": "x"}}}]}
    answer = [{"role": "tool", "content": "it is <|endoftext|> so"}, {"role": ASSISTANT, "content": "an end"}]
    first, second = learned(tok, made(tok, [*said("Who?"), call, *answer], TOGETHER))
    assert first.startswith('[add {"a": "x"') and "it is" not in first and second == "an end<|endoftext|>"
    (last,) = learned(tok, made(tok, [*said("Who?"), call]))
    assert last == '[add {"a": "x"}]<|endoftext|>', "the last turn is learned to its closing bracket"


def test_several_calls_of_a_turn_without_an_end_are_learned_up_to_the_last() -> None:
    tok = tokenizer("gpt2", CALLING)
    calls = [{"function": {"name": n, "arguments": {"a": "x"}}} for n in ("add", "sub")]
    turns = [{"role": ASSISTANT, "content": "", "tool_calls": calls}, {"role": "tool", "content": "so"}]
    first, _ = learned(tok, made(tok, [*said("Who?"), *turns, {"role": ASSISTANT, "content": "an end"}], TOGETHER))
    assert first.startswith('[add {"a": "x"}][sub {"a": "x"')


def test_an_end_of_text_ends_a_turn_where_the_template_cannot_be_asked() -> None:
    """The template is asked with a user's turn first, which this one refuses; GPT-2's end of text is its BOS, too."""
    asks = "{%- if messages[0].role != 'system' %}{{- raise_exception('no system') }}{%- endif %}"
    tok = tokenizer("gpt2", asks + TEMPLATES["gpt2"])
    e = made(tok, [{"role": "system", "content": "Be brief."}, *said("Who?", "they", "How many?", "two")])
    assert learned(tok, e) == ["they<|endoftext|>", "two<|endoftext|>"]


def test_what_a_template_marks_is_learned_and_not_what_follows_the_prompt() -> None:
    marks = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<assistant>so:' }}{% generation %}"
        "{{- m.content + eos_token }}{% endgeneration %}{%- else %}{{- '<user>' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
    )
    tok = tokenizer("qwen", marks)
    assert learned(tok, made(tok, said("Who?", "they", "How many?", "two"))) == ["they<|im_end|>", "two<|im_end|>"]


def test_a_tokenizer_is_asked_once_what_its_template_does() -> None:
    template = ChatTemplate(tokenizer("llama3"))
    assert (template.end, template.after, template.stops) == ("<|eot_id|>", "", True)
    bare = ChatTemplate(tokenizer("qwen", BARE))
    assert (bare.end, bare.after, bare.stops, bare.header) == ("", "", False, "")
    failing = ChatTemplate(tokenizer("qwen", "{{ raise_exception('no') }}"))
    assert (failing.end, failing.after) == ("<|im_end|>", "")


def test_a_text_without_id_or_group_is_called_and_grouped_by_where_it_stands() -> None:
    renderer = Renderer(tokenizer("qwen"))
    texts = [Text("a", "b"), Text("a", "b", id="own", group="g", references=("b", "c")), Text("c", "d", group="g")]
    first, second, third = renderer.examples(
        [r for t in texts for r in renderer.render(t)], ["file:1", "file:2", "file:3"]
    )
    assert [e.id for e in (first, second, third)] == ["file:1", "own", "file:3"]
    assert second.group == third.group != first.group and second.references == ("b", "c") and first.references == ()
    other = renderer.examples(renderer.render(texts[0]), ["file:9"])[0]
    assert other.group != first.group and 0 <= first.group < 2**63
    silent = renderer.render(Conversation(tuple(said("How many?", "two")), ()))
    (e,) = renderer.examples(silent, ["file:4"])
    assert not e.supervised.any() and renderer.tokenizer.decode(e.tokens).endswith("two<|im_end|>\n")
    assert e.num_prompt == len(e)


def test_of_two_ends_that_begin_alike_the_longer_is_found() -> None:
    tok = tokenizer("qwen")
    longer = "<|im_end|>!"
    for added in ([longer], ["<|im", longer]):
        tok.add_special_tokens({"additional_special_tokens": added})
        found = ChatTemplate(tok).ends.search(f"words{longer}")
        assert found is not None and found.group() == longer


def test_values_of_the_templates_variables_are_saved_with_it_and_may_be_set_otherwise() -> None:
    thinks = "{%- macro said(m) %}[{{ m.role }}:{{ mood }}]{{ m.content }}</s>{%- endmacro %}"
    thinks += "{% for m in messages %}{{- said(m) }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"
    tok = tokenizer("sentencepiece", thinks)
    chat = Chat(template_kwargs={"enable_thinking": True, "mood": "it's 'so'"})
    for _ in range(2):  # a tokenizer that was saved with them is prepared again
        prepare_tokenizer(tok, [chat])
    asked = [{"role": "user", "content": "Who?"}]
    render = partial(tok.apply_chat_template, asked, tokenize=False)
    assert render() == "<s>[user:it's 'so']Who?</s><think>"
    assert render(enable_thinking=False, mood="") == "<s>[user:]Who?</s>"
    assert tok.chat_template.count("enable_thinking is not defined") == 1
    with pytest.raises(ValueError, match=r"data\.format\.template_kwargs\.enable_thinkin has no effect"):
        prepare_tokenizer(tok, [Chat(template_kwargs={"enable_thinkin": True})])
    with pytest.raises(ValueError, match=r"one chat template: data\.format\.template_kwargs is"):
        prepare_tokenizer(tok, [chat, Chat()])
