"""Exactly the right tokens are supervised, on four kinds of tokenizer, against the vocabulary's own bytes."""

import functools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab.data.example import Example
from sftlab.data.format import Conversation, Text
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.formats.text import PlainText
from sftlab.data.render import Renderer
from sftlab.data.template import prepare_tokenizer
from sftlab.inference.loaded_model import LoadedModel
from tests.kinds import KINDS, MARKED, TEMPLATES, expected, pieces, tokenizer

HAS_BOS = ("llama3", "sentencepiece")
MESSAGES = [
    {"role": "system", "content": "The keeper counts."},
    {"role": "user", "content": "Who counts the steps?"},
    {"role": "assistant", "content": "the keeper"},
    {"role": "user", "content": "How many steps?"},
    {"role": "assistant", "content": "two hundred,\nI do"},
]


def example(tok: Any, source: Text | Conversation) -> Example:
    renderer = Renderer(tok)
    (made,) = renderer.examples(renderer.render(source), ["here"])
    return made


def chat(tok: Any, messages: list[dict[str, Any]], supervise: str = "all", **fields: Any) -> Example:
    format = Chat(supervise=supervise)
    prepare_tokenizer(tok, [format])
    return example(tok, format.to_text({"messages": messages, **fields}))


@functools.cache
def ready(kind: str, marked: bool = False) -> tuple[Any, Renderer]:
    """Return a tokenizer prepared for conversations and its renderer, made once."""
    tok = tokenizer(kind, MARKED[kind] if marked else None)
    prepare_tokenizer(tok, [Chat()])
    return tok, Renderer(tok)


def inference(tok: Any) -> LoadedModel:
    return LoadedModel(cast(Any, None), tok, frozenset())  # encoding needs no model


def segments(kind: str, messages: list[dict[str, str]] = MESSAGES) -> list[tuple[str, bool]]:
    """Return the conversation as the kind's template words it, written out by hand, each turn's learned part marked.

    The text ends with the last assistant turn; what a template puts after the end-of-turn token is not learned.
    """
    out: list[tuple[str, bool]] = [("<|begin_of_text|>", False)] if kind == "llama3" else []
    out += [("<s>", False)] if kind == "sentencepiece" else []
    for m in messages:
        role, content, learned = m["role"], m["content"], m["role"] == "assistant"
        if kind == "llama3":
            out += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False), (f"{content}<|eot_id|>", learned)]
        elif kind == "qwen":
            out += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", learned), ("\n", False)]
        elif kind == "gpt2":
            out += [(f"<|{role}|>\n", False), (content + ("<|endoftext|>" if learned else ""), learned), ("\n", False)]
        elif learned:
            out += [(f" {content}</s>", True)]
        else:
            out += [(f"[INST] {content} [/INST]", False)]
    return out[:-1] if out[-1] == ("\n", False) else out


def check(tok: Any, e: Example, parts: list[tuple[str, bool]], begin: list[int], end: list[int]) -> None:
    """See that an example has the tokens of these parts and that what is learned of them is supervised, all of it."""
    ids, learned = expected(tok, parts)
    assert e.tokens.tolist() == [*begin, *ids, *end]
    marks = [*(False for _ in begin), *learned.tolist(), *(True for _ in end)]
    marks[0] = False  # nothing predicts the first token
    assert e.supervised.tolist() == marks


def begin_of(kind: str, tok: Any) -> list[int]:
    return [tok.bos_token_id] if kind in HAS_BOS else []


# Prompt/completion boundaries ---------------------------------------------------------------------------------------

BOUNDARIES = [
    ("Answer:", " the keeper"),
    ("Answer: ", "the keeper"),  # the space merges into the answer's first word
    ("What would you un", "do?"),  # one word, cut in two
    ("It was 12", "345 steps"),
    ("Answer:", " the keeper\n"),
    ("Context: caf", "é 🙂 the"),
    ("Answer:\n", "\nthe keeper"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
def test_gauntlet_10_a_merge_across_the_boundary_masks_no_answer_token(kind: str, prompt: str, completion: str) -> None:
    tok = tokenizer(kind)
    e = example(tok, PromptCompletion().to_text({"prompt": prompt, "completion": completion}))
    check(tok, e, [(prompt, False), (completion, True)], begin_of(kind, tok), [tok.eos_token_id])
    said = b"".join(pieces(tok, e.tokens[e.supervised].tolist()))
    assert completion.encode() + tok.eos_token.encode() in said
    assert not e.supervised[: e.num_prompt].any() and e.supervised[e.num_prompt :].all()


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_10_some_of_these_boundaries_do_merge(kind: str) -> None:
    tok = tokenizer(kind)

    def ids(text: str) -> list[int]:
        return list(tok(text, add_special_tokens=False)["input_ids"])

    merged = [p for p, c in BOUNDARIES if ids(p) != ids(p + c)[: len(ids(p))]]
    assert len(merged) >= 2, merged


# Letters that no normaliser joins; "\u00a0" and "\u3000" are spaces of other kinds.
LETTERS = st.text(st.sampled_from("ab theundo.,'12 \n\té🙂日\u00a0\u3000"), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=LETTERS, completion=LETTERS)
def test_gauntlet_10_any_prompt_and_any_completion(kind: str, prompt: str, completion: str) -> None:
    tok, renderer = ready(kind)
    prompt, completion = f"Q{prompt}", f"{completion}A"
    (e,) = renderer.examples(renderer.render(Text(prompt, completion)), ["here"])
    check(tok, e, [(prompt, False), (completion, True)], begin_of(kind, tok), [tok.eos_token_id])


# The beginning and the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_06_the_end_of_text_is_supervised_even_where_it_is_the_padding(kind: str) -> None:
    tok = tokenizer(kind)
    tok.pad_token = tok.eos_token
    e = example(tok, Squad().to_text({"context": "a b", "question": "c?", "answers": {"text": ["the keeper"]}}))
    assert e.tokens[-1] == tok.eos_token_id == tok.pad_token_id and e.supervised[-1]
    from sftlab.data.batch import collate
    from sftlab.data.forest import lay_out

    for layout in ("tree", "packed", "padded"):  # and so it is after collating, with padding of the same token
        batch = collate(lay_out([e, e], layout, 128), 2, 128, pad_token=tok.pad_token_id)
        assert float(batch.weight[batch.target == tok.eos_token_id].sum()) == 2
        assert int((batch.tokens == tok.pad_token_id).sum()) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_09_one_bos_or_none_as_the_tokenizer_has_it(kind: str) -> None:
    tok = tokenizer(kind)
    row = {"context": "The steps", "question": "Who counts?", "answers": {"text": ["keeper"]}}
    made = [
        example(tok, Squad().to_text(row)),
        example(tok, PlainText().to_text({"text": "The keeper counts"})),
        chat(tokenizer(kind), MESSAGES),
    ]
    made += [chat(tokenizer(kind, MARKED[kind]), MESSAGES)] if kind in MARKED else []
    prompts = [
        inference(tok).encode(Squad().prompt_text(row)),  # generate, evaluate and serve begin here
        inference(tok).encode_chat(MESSAGES[:2]),
        *(e.tokens[: e.num_prompt] for e in made if e.num_prompt),  # what an evaluation within a run is asked
    ]
    for tokens in [*(e.tokens for e in made), *prompts]:
        if kind in HAS_BOS:
            assert tokens[0] == tok.bos_token_id and tokens.tolist().count(tok.bos_token_id) == 1
        else:
            assert tok.bos_token_id is None or tokens[0] != tok.bos_token_id


@pytest.mark.parametrize("kind", HAS_BOS)
def test_gauntlet_09_a_template_without_bos_is_given_the_tokenizers(kind: str) -> None:
    tok = tokenizer(kind, TEMPLATES[kind].replace("{{- bos_token }}", ""))
    e = chat(tok, MESSAGES)
    assert e.tokens[0] == tok.bos_token_id and e.tokens.tolist().count(tok.bos_token_id) == 1
    asked = inference(tok).encode_chat(MESSAGES[:2])  # the template that is saved with the model has it
    assert asked.tolist() == e.tokens[: len(asked)].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_13_the_first_token_is_never_a_target(kind: str) -> None:
    tok = tokenizer(kind)
    e = example(tok, PlainText().to_text({"text": "the keeper counts two hundred steps"}))
    assert not e.supervised[0] and e.supervised[1:].all()
    assert e.num_prompt == (1 if kind in HAS_BOS else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_11_the_text_trained_on_is_the_text_generation_is_prompted_with(kind: str) -> None:
    tok = tokenizer(kind)
    rows: list[tuple[Any, dict[str, Any]]] = [
        (Squad(), {"context": "The steps", "question": "Who counts?", "answers": {"text": ["the keeper"]}}),
        (PromptCompletion(), {"prompt": "Question: who?\nAnswer:", "completion": " the baker"}),
    ]
    for format, row in rows:
        e = example(tok, format.to_text(row))
        asked = inference(tok).encode(format.prompt_text(row))
        assert asked.tolist() == e.tokens[: e.num_prompt].tolist()
    tok = tokenizer(kind)
    e = chat(tok, MESSAGES)
    asked = inference(tok).encode_chat(MESSAGES[:-1])
    trained = e.tokens[: e.num_prompt].tolist()
    assert asked.tolist() == trained
    assert tok.eos_token_id not in trained[-1:]


# Conversations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "generation"])
@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_08_the_assistant_mask_is_exact(kind: str, marked: bool) -> None:
    if marked and kind not in MARKED:
        pytest.skip("this kind's template has no role header to leave out")
    tok = tokenizer(kind, MARKED[kind] if marked else None)
    check(tok, chat(tok, MESSAGES), segments(kind), [], [])


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "generation"])
@pytest.mark.parametrize("kind", ["llama3", "qwen", "gpt2"])
def test_gauntlet_08_the_role_header_is_not_supervised(kind: str, marked: bool) -> None:
    tok = tokenizer(kind, MARKED[kind] if marked else None)
    e = chat(tok, MESSAGES)
    first = np.flatnonzero(np.diff(e.supervised.astype(int)) == 1)  # the token that predicts a turn's first word
    headers = {"llama3": "<|end_header_id|>\n\n", "qwen": "<|im_start|>assistant\n", "gpt2": "<|assistant|>\n"}
    for at in first:
        assert b"".join(pieces(tok, e.tokens[: at + 1].tolist())).endswith(headers[kind].encode())
    assert len(first) == 2


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "generation"])
@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_07_the_end_of_every_supervised_turn_is_supervised(kind: str, marked: bool) -> None:
    if marked and kind not in MARKED:
        pytest.skip("this kind has no template with marks")
    tok = tokenizer(kind, MARKED[kind] if marked else None)
    e = chat(tok, MESSAGES)
    ends = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "gpt2": "<|endoftext|>", "sentencepiece": "</s>"}
    end = tok.convert_tokens_to_ids(ends[kind])
    assert int((e.supervised & (e.tokens == end)).sum()) == 2  # of the two turns, no other
    assert tok.eos_token_id == end  # the exported tokenizer stops where turns were trained to end
    assert e.tokens[-1] == end and e.supervised[-1]
    last = chat(tok, MESSAGES, supervise="last")
    assert last.tokens.tolist() == e.tokens.tolist()
    assert int((last.supervised & (last.tokens == end)).sum()) == 1 and last.supervised[-1]
    assert not last.supervised[: last.num_prompt].any() and last.supervised[last.num_prompt :].all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(words=st.lists(LETTERS, min_size=2, max_size=5), marked=st.booleans())
def test_gauntlet_08_any_conversation(kind: str, words: list[str], marked: bool) -> None:
    trim = kind in ("llama3", "sentencepiece")  # one strips its words, the other merges spaces with those it puts
    said = [f"Q{w}A".strip() if trim else f"Q{w}A" for w in words]
    messages = [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(said)]
    messages = messages if len(messages) % 2 == 0 else messages[:-1]
    tok, renderer = ready(kind, marked and kind in MARKED)
    (e,) = renderer.examples(renderer.render(Chat().to_text({"messages": messages})), ["here"])
    check(tok, e, segments(kind, messages), [], [])


@pytest.mark.parametrize("kind", KINDS)
def test_two_turns_of_the_same_words_and_a_turn_that_quotes_another(kind: str) -> None:
    messages = [
        {"role": "user", "content": "the keeper"},
        {"role": "assistant", "content": "the keeper"},
        {"role": "user", "content": "the keeper"},
        {"role": "assistant", "content": "the keeper"},
    ]
    tok = tokenizer(kind)
    check(tok, chat(tok, messages), segments(kind, messages), [], [])


def test_tool_calls_are_learned_with_their_end_of_turn() -> None:
    tok = tokenizer("qwen")
    calls = [{"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 48, "b": 24})}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "48 and 24?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "72"},
        {"role": "assistant", "content": "72 steps"},
    ]
    called = '<tool_call>{"name": "add", "arguments": {"a": 48, "b": 24}}</tool_call><|im_end|>'
    parts = [
        ("<|im_start|>user\n48 and 24?<|im_end|>\n<|im_start|>assistant\n", False),
        (called, True),
        ("\n<|im_start|>tool\n72<|im_end|>\n<|im_start|>assistant\n", False),
        ("72 steps<|im_end|>", True),
    ]
    check(tok, chat(tok, messages), parts, [], [])
    parts[1] = (called, False)
    check(tok, chat(tok, messages, supervise="last"), parts, [], [])
    messages[1]["weight"] = 0  # OpenAI's own way of leaving a turn out
    check(tok, chat(tok, messages), parts, [], [])


def test_a_template_that_ends_no_turn_is_given_the_end_of_text() -> None:
    tok = tokenizer("gpt2", "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}")
    messages = MESSAGES[1:3]
    e = chat(tok, messages)
    check(tok, e, [("user: Who counts the steps?\nassistant: ", False), ("the keeper", True)], [], [tok.eos_token_id])


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATES["qwen"])
    tok = tokenizer("qwen", "{{ 'another' }}")
    prepare_tokenizer(tok, [Chat(template_path=str(path))])
    tok.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == TEMPLATES["qwen"] and again.eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match="cannot read it"):
        prepare_tokenizer(tok, [Chat(template_path=str(tmp_path / "none.jinja"))])
    with pytest.raises(ValueError, match="a run has one chat template"):
        prepare_tokenizer(tok, [Chat(), Chat(template_path=str(path))])


def test_templates_that_fail_say_why() -> None:
    tok = tokenizer("qwen", "{{ raise_exception('no system, please') if messages[0].role == 'system' else 'x' }}")
    with pytest.raises(ValueError, match=r"the chat template fails: TemplateError: no system, please"):
        chat(tok, MESSAGES)
    with pytest.raises(ValueError, match="does not write a plain answer"):
        chat(tok, [{"role": "user", "content": "x"}, *MESSAGES[1:]])
    tok = tokenizer("qwen")
    tok.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: name a file with one"):
        chat(tok, MESSAGES)


def test_a_tokenizer_that_never_ends_is_refused() -> None:
    tok = tokenizer("qwen")
    tok.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        Renderer(tok)
