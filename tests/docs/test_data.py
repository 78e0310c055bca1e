"""docs/data.md: every row is read by the format it stands under, and the text shown is what is learned."""

import json
import re
from typing import Any

import pytest

from sftlab.assets import locate
from sftlab.data.example import Example
from sftlab.data.format import Format
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.from_columns import FromColumns
from sftlab.data.formats.gsm8k import Gsm8k
from sftlab.data.formats.instruction import Instruction
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.formats.text import PlainText
from sftlab.data.render import Renderer
from sftlab.data.template import prepare_tokenizer
from tests.support import REPO, byte_tokenizer

PAGE = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```jsonl (\w+) ?(.*)\n((?:.*\n)+?)```\n\n```text\n((?:.*\n)+?)```", PAGE)
FORMATS: dict[str, type[Format]] = {
    "prompt_completion": PromptCompletion, "instruction": Instruction, "chat": Chat, "squad": Squad, "gsm8k": Gsm8k,
    "text": PlainText, "template": FromColumns,
}  # fmt: skip


def painted(example: Example, tokenizer: Any) -> str:
    """Return the text of an example with what is learned in brackets."""
    out, learning = "", False
    pieces: list[list[int]] = []
    for token, learned in zip(example.tokens, example.supervised, strict=True):
        if learned != learning or not pieces:
            pieces.append([])
        if learned != learning:
            pieces[-1] = []
            learning = bool(learned)
        pieces[-1].append(int(token))
    learning = bool(example.supervised[0])
    for piece in pieces:
        text = tokenizer.decode(piece)
        out += f"⟦{text}⟧" if learning else text
        learning = not learning
    return out.replace("<s>", "⟨bos⟩").replace("</s>", "⟨eos⟩")


def test_every_format_is_on_the_page() -> None:
    options = {path.stem for path in (REPO / "conf" / "data").glob("*.yaml")} - {"base", "demo", "mixture", "own"}
    assert {name for name, *_ in BLOCKS} == options == set(FORMATS)


@pytest.mark.parametrize(("name", "settings", "rows", "shown"), BLOCKS, ids=[name for name, *_ in BLOCKS])
def test_what_is_shown_is_what_is_learned(name: str, settings: str, rows: str, shown: str) -> None:
    tokenizer = byte_tokenizer()
    given = json.loads(settings) if settings else {}
    if name == "chat":
        given["template_path"] = locate("asset://chat.jinja")
    format = FORMATS[name](**given)
    prepare_tokenizer(tokenizer, [format])
    renderer = Renderer(tokenizer, format)
    lines = [json.loads(line) for line in rows.splitlines()]
    assert len(lines) == 5
    texts = [renderer.render(format.to_text(format.row(line))) for line in lines]
    (first,) = renderer.examples(texts[0], ["row 1"])
    assert painted(first, tokenizer).rstrip("\n") == shown.rstrip("\n")
