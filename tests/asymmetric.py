"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.support import byte_tokenizer, tiny_llama


def reciter(folder: Path, words: str, after: str, hears: float = 0.5) -> Path:
    """Write a model whose every probability is known: it breaks scores that nobody worked out by hand.

    After a prompt that ends with the last token of `after` it says `words` and ends. Each next token of that speech has
    the probability `hears` and the others share the rest; after any other token all 320 are equally likely. With
    `hears` of 1/320 it knows nothing at all: every loss is ln 320, and its answer is empty.
    """
    tokenizer = byte_tokenizer()
    first = tokenizer(after)["input_ids"][-1]
    speech = [first, *tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(set(speech)) == len(speech) < 32, "a token that is said twice has no single successor"
    model = tiny_llama(tied=False)
    vocab, width = model.model.embed_tokens.weight.shape
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # each layer adds nothing, so that a token's state is its own embedding
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 100  # the axis of the tokens that are not in the speech
        for axis, (token, following) in enumerate(pairwise(speech), 1):
            model.model.embed_tokens.weight[token] = 0
            model.model.embed_tokens.weight[token, axis] = 100
            logit = math.log(hears / (1 - hears) * (vocab - 1))  # the others' logits are 0
            model.lm_head.weight[following, axis] = logit / math.sqrt(width)  # the norm makes a state that long
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def two_passages(path: Path) -> Path:
    """Write three questions on one passage and one on another: it breaks an interval that is not over passages."""
    oven, shop = "The oven sells rye bread and clocks.", "A shop by the sea sells tea and the rye bread of Oakgate."
    rows = [
        ("a", oven, "What is sold?", ["rye bread"]),
        ("b", oven, "Which flour?", ["rye", "a flour"]),
        ("c", oven, "What ticks?", ["clocks"]),
        ("d", shop, "What else is there?", ["the rye bread", "tea"]),
    ]
    with path.open("w") as file:
        for name, context, question, answers in rows:
            starts = [max(context.find(a), 0) for a in answers]
            row = {"id": name, "context": context, "question": question}
            file.write(json.dumps(row | {"answers": {"text": answers, "answer_start": starts}}) + "\n")
    return path


def model_that_listens(folder: Path, template: str | None = None, **config: Any) -> Path:
    """Write a random model with weights so large that its answer hangs on every token and on every setting."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    model = tiny_llama(seed=5, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
