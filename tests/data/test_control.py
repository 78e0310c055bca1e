"""Control tokens that stand in the data: counted, refused or escaped; ends that are there are not added again."""

from typing import Any

import pytest

from sftlab.data.format import Text
from sftlab.data.formats.chat import Chat
from sftlab.data.render import Renderer
from sftlab.data.template import prepare_tokenizer
from tests.kinds import tokenizer

END = "<|im_end|>"


def rendered(tok: Any, source: Any, mode: str = "count") -> Any:
    renderer = Renderer(tok, Chat(), mode)
    (r,) = renderer.render(source)
    (e,) = renderer.examples([r], ["here"])
    return r, e


def chat(*words: str) -> Any:
    messages = [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]
    return Chat().to_text({"messages": messages})


@pytest.mark.parametrize("kind", ["qwen", "llama3", "sentencepiece"])
def test_a_bos_and_an_end_that_stand_in_a_text_are_not_added_again(kind: str) -> None:
    tok = tokenizer(kind)
    bos, eos = tok.bos_token or "", tok.eos_token
    _, plain = rendered(tok, Text("Who?", " they"))
    for source in (Text(f"{bos}Who?", " they"), Text("Who?", f" they{eos}"), Text("Who?", f" they{eos}\n")):
        _, e = rendered(tok, source)
        assert e.tokens.tolist().count(tok.eos_token_id) == 1 and e.supervised[-1]
        assert e.tokens.tolist().count(tok.bos_token_id) == (1 if bos else 0)
        if kind != "sentencepiece" or not source.prompt.startswith("<s>"):
            assert e.tokens.tolist() == plain.tokens.tolist() and (e.supervised == plain.supervised).all()


@pytest.mark.parametrize("kind", ["qwen", "llama3", "sentencepiece", "gpt2"])
def test_an_end_that_stands_in_a_turn_is_not_added_again(kind: str) -> None:
    tok = tokenizer(kind)
    prepare_tokenizer(tok, [Chat()])
    _, plain = rendered(tok, chat("Who?", "they", "So?", "two"))
    r, e = rendered(tok, chat(f"Who?{tok.eos_token}", f"they{tok.eos_token}", "So?", f"two{tok.eos_token}\n"))
    assert e.tokens.tolist() == plain.tokens.tolist() and (e.supervised == plain.supervised).all() and r.control


def test_control_tokens_in_a_text_are_counted_or_refused() -> None:
    tok = tokenizer("qwen")
    prepare_tokenizer(tok, [Chat()])
    said = chat("What is <|im_start|>?", "a marker")
    assert rendered(tok, said)[0].control and not rendered(tok, chat("What?", "a <|marker|>"))[0].control
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": ["x" + END]}}}],
    }
    assert rendered(tok, Chat().to_text({"messages": [{"role": "user", "content": "x"}, call]}))[0].control
    for source in (said, Text("What is <|im_start|>?", " it")):
        with pytest.raises(ValueError, match=r"the text holds <\|im_start\|>.*data\.control_tokens=escape"):
            rendered(tok, source, "error")


@pytest.mark.parametrize("kind", ["qwen", "llama3", "gpt2"])
def test_escaped_control_tokens_are_letters(kind: str) -> None:
    tok = tokenizer(kind)
    prepare_tokenizer(tok, [Chat()])
    eos = tok.eos_token
    _, e = rendered(tok, chat(f"What is {eos}?", f"It is {eos}, so.", "So?", "two"), "escape")
    of_template = rendered(tok, chat("What?", "It is.", "So?", "two"))[1].tokens.tolist().count(tok.eos_token_id)
    assert e.tokens.tolist().count(tok.eos_token_id) == of_template
    text = tok.decode(e.tokens)
    assert text.count(eos) == of_template + 2 and f"It is {eos}, so.{eos}" in text
    assert tok.decode(e.tokens[e.supervised]) == f"It is {eos}, so.{eos}two{eos}"
    _, plain = rendered(tok, chat("What is it?", "It is, so.", "So?", "two"), "escape")
    assert plain.tokens.tolist() == rendered(tok, chat("What is it?", "It is, so.", "So?", "two"))[1].tokens.tolist()
    _, t = rendered(tok, Text(f"{eos} what?", f" an {eos}"), "escape")
    assert tok.decode(t.tokens[t.supervised]) == f" an {eos}{eos}" and t.tokens.tolist().count(tok.eos_token_id) == 1
    with pytest.raises(ValueError, match="private characters"):
        rendered(tok, Text(f"\U00100000{eos}", " x"), "escape")
