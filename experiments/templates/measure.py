"""The proof of real chat templates, and what twelve conversations each would teach. See README.md.

python experiments/templates/measure.py FOLDER [--texts] [--only NAME]
"""

# ruff: noqa: E501, RUF001

import argparse
import re
from functools import cache
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS  # beside this file
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from sftlab.assets import locate
from sftlab.data.formats.chat import Chat
from sftlab.data.proof import KINDS
from sftlab.data.render import Renderer
from sftlab.data.template import prepare_tokenizer

# What a template writes and a tokenizer would have as one special token.
MARKER = re.compile(
    r"<\|[^|<>'\"{}\s]+\|>|<｜[^｜<>'\"]+｜>|\[/?[A-Z_]{3,}\]|<</?SYS>>|</?s>|<(?:start|end)_of_(?:turn|image)>|<bos>|<eos>"
    r"|<sop>|\[gMASK\]|<\|(?:turn|channel|tool)[^|<>\s]*>|<(?:turn|channel|tool)\|>|<extra_id_\d>|\[\|[a-z]+\|\]|<end_of_utterance>"
)
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<turn|>", "<|return|>", "<|end|>",
    "<｜end▁of▁sentence｜>", "[|endofturn|]", "<|end_of_text|>", "<|end_of_turn|>", "<end_of_utterance>", "<|endoftext|>",
    "<extra_id_1>", "</s>",
)  # fmt: skip


@cache
def backend() -> str:
    return str(Tokenizer.from_file(locate("asset://demo/model/tokenizer.json")).to_str())


def tokenizer_for(template: str) -> Any:
    """Return the demo's tokenizer with the markers of a template as special tokens, and its end of turn as EOS."""
    made = Tokenizer.from_str(backend())
    made.post_processor = None
    markers = sorted({*MARKER.findall(template), "</s>", "<s>"})
    made.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    eos = next(e for e in ENDS if e in markers)
    bos = next(
        (b for b in ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<BOS_TOKEN>") if b in template), "<s>"
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, bos_token=bos, clean_up_tokenization_spaces=False
    )
    tok.chat_template = template
    return tok


def proved(tok: Any, kind: str) -> str:
    check = Renderer(tok, Chat(date="2026-01-31")).proof.check(kind, tools=kind in ("one call", "parallel calls"))
    if check.trouble:
        return check.trouble
    return "apart" if check.apart else "right"


def taught(tok: Any, row: dict[str, Any]) -> str:
    """Return the supervised text of a conversation, read back from its tokens; ` | ` parts examples."""
    format = Chat(date="2026-01-31")
    renderer = Renderer(tok, format)
    try:
        rendered = renderer.render(format.to_text(row))
    except ValueError as error:
        return f"refused: {error}"
    out = []
    for e in renderer.examples(rendered, ["here"] * len(rendered)):
        said = []
        for i, token in enumerate(e.tokens):
            if e.supervised[i]:
                said.append(int(token))
            elif said and said[-1] != -1:
                said.append(-1)
        runs = " ".join(map(str, said)).split(" -1")
        out.append(" ... ".join(tok.decode([int(t) for t in run.split()]) for run in runs if run.strip()))
    return " | ".join(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", action="store_true", help="the supervised text of the twelve conversations")
    parser.add_argument("--only", default="", help="templates whose name holds this")
    given = parser.parse_args()
    files = [f for f in sorted(given.folder.glob("*.jinja")) if given.only in f.name]
    print("| template |", " | ".join(KINDS), "|")
    print("| --- |", " | ".join("---" for _ in KINDS), "|")
    refusals: dict[str, list[str]] = {}
    for file in files:
        tok = tokenizer_for(file.read_text())
        prepare_tokenizer(tok, [Chat()])
        cells = []
        for kind in KINDS:
            found = proved(tok, kind)
            if found not in ("right", "apart"):
                refusals.setdefault(found, []).append(f"{file.stem} ({kind})")
                found = "refused"
            cells.append(found)
        print(f"| {file.stem} |", " | ".join(cells), "|", flush=True)
        if given.texts:
            for name, row in CONVERSATIONS.items():
                print(f"    {name}: {taught(tok, row)!r}")
    print()
    for why, where in sorted(refusals.items(), key=lambda r: -len(r[1])):
        print(f"{len(where)} x {why.partition(': name another')[0]}\n    {', '.join(where)}")


if __name__ == "__main__":
    main()
