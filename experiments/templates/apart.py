"""What taking conversations apart costs: tokens through the model, apart against together. See README.md.

python experiments/templates/apart.py TEMPLATE.jinja [--turns 5] [--conversations 200]
"""

import argparse
import random
from pathlib import Path
from typing import Any

from measure import tokenizer_for  # beside this file

from sftlab.data.forest import lay_out
from sftlab.data.formats.chat import Chat
from sftlab.data.render import Renderer
from sftlab.data.template import prepare_tokenizer

WORDS = [
    "the",
    "keeper",
    "counts",
    "two",
    "hundred",
    "steps",
    "in",
    "the",
    "night",
    "when",
    "the",
    "lights",
    "of",
    "the",
    "harbour",
    "go",
    "out",
    "and",
    "no",
    "boat",
    "is",
    "due",
]


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def conversation(rng: random.Random, turns: int, reasoning: bool) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for _ in range(turns):
        messages.append({"role": "user", "content": words(rng, 20, 60)})
        answer = {"role": "assistant", "content": words(rng, 40, 120)}
        messages.append(answer | ({"reasoning_content": words(rng, 100, 300)} if reasoning else {}))
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("template", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=200)
    given = parser.parse_args()
    for reasoning in (True, False):
        rng = random.Random(0)
        tok, format = tokenizer_for(given.template.read_text()), Chat()
        prepare_tokenizer(tok, [format])
        renderer = Renderer(tok, format)
        alone = shared = once = learned = 0
        for _ in range(given.conversations):
            row = conversation(rng, given.turns, reasoning)
            rendered = renderer.render(format.to_text(row))
            examples = renderer.examples(rendered, ["here"] * len(rendered))
            alone += sum(map(len, examples))
            learned += sum(int(e.supervised.sum()) for e in examples)
            shared += sum(map(len, lay_out(examples, "tree", 1 << 20)))
            whole = renderer.proof.turns.template.text(format.to_text(row).messages)
            once += len(tok(whole, add_special_tokens=False)["input_ids"])
        per = given.conversations
        print(
            f"{'with' if reasoning else 'without'} reasoning, {given.turns} turns: {once / per:,.0f} tokens per conversation "  # noqa: E501
            f"as one text, {alone / per:,.0f} apart in rows of their own, {shared / per:,.0f} apart in a forest "
            f"({shared / once:.2f} of the one text, {alone / shared:.2f} times fewer than rows); {learned / per:,.0f} learned"  # noqa: E501
        )


if __name__ == "__main__":
    main()
