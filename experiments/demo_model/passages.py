"""Tell short passages about invented places, with questions on them. Owns the demo's text; worlds.toml holds its words.

A passage is drawn from one world: an opening sentence, five or six facts in random order, each in one of several
wordings, and now and then a sentence without any fact. Everything follows from the random.Random handed in. Training
the tokenizer and the model on this text is pretrain.py's.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

WORLDS = tomllib.loads(Path(__file__).with_name("worlds.toml").read_text())


@dataclass(frozen=True)
class Fact:
    answer: str
    start: int  # characters into the context
    statements: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Passage:
    title: str
    context: str
    facts: tuple[Fact, ...]


def draw(kind: str, rng: random.Random) -> str:
    """Return one filler for a slot of this kind (see the head of worlds.toml)."""
    pools = WORLDS["pools"]
    if kind == "person":
        return f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"
    if kind == "place":
        return rng.choice(pools["front"]) + rng.choice(pools["back"])
    if kind == "year":
        return str(rng.randint(1804, 1998))
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(pools['month'])}"
    if kind.startswith("int "):
        low, high = kind.split()[1:]
        return str(rng.randint(int(low), int(high)))
    return " ".join(rng.choice(pools[word]) for word in kind.split())


def draw_slots(kinds: dict[str, str], rng: random.Random) -> dict[str, str]:
    """Return a filler for each slot; no two share a word, so that names and numbers differ within a passage."""
    values: dict[str, str] = {}
    taken: set[str] = set()
    for slot, kind in kinds.items():
        value = draw(kind, rng)
        while taken & set(value.split()):
            value = draw(kind, rng)
        values[slot] = value
        taken |= set(value.split())
    return values


def fill(template: str, values: dict[str, str], slot: str = "") -> tuple[str, int]:
    """Return the sentence and where the value of `slot` starts in it (-1: nowhere); `a` becomes `an` where needed."""
    text, start = "", -1
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2 == 0:
            text += part
            continue
        value = values[part]
        if re.search(r"\b[Aa] $", text) and value[0] in "aeiou" and not value.startswith("one-"):
            text = text[:-1] + "n "
        if part == slot:
            start = len(text)
        text += value
    return text, start


def tell(rng: random.Random, world: dict | None = None) -> Passage:
    """Return a passage from `world`, or from a random one."""
    world = world or rng.choice(WORLDS["world"])
    values = draw_slots(world["slots"], rng)
    chosen = rng.sample(world["fact"], rng.choice((5, 5, 6)))
    sentences = [(fact, *fill(rng.choice(fact["say"]), values, fact["slot"])) for fact in chosen]
    if rng.random() < 0.4:
        sentences.insert(rng.randrange(len(sentences) + 1), (None, rng.choice(world["colour"]), -1))

    context, _ = fill(rng.choice(world["open"]), values)
    facts = []
    for fact, sentence, start in sentences:
        if fact is not None:
            answer = values[fact["slot"]]
            statements = tuple(fill(again, values)[0] for again in fact["again"])
            question, _ = fill(rng.choice(fact["ask"]), values)
            facts.append(Fact(answer, len(context) + 1 + start, statements, question))
        context += " " + sentence
    title, _ = fill(world["title"], values)
    return Passage(title, context, tuple(facts))


def squad_rows(passage: Passage, key: str, rng: random.Random, annotators: int = 1) -> list[dict]:
    """Return the hub's SQuAD rows for five of the passage's facts; a second annotator keeps an answer's article."""
    rows = []
    for i, fact in enumerate(rng.sample(passage.facts, 5)):
        texts, starts = [fact.answer], [fact.start]
        article = re.search(r"\b(an?|the) $", passage.context[: fact.start], re.IGNORECASE)
        if annotators > 1:
            start = article.start() if article else fact.start
            texts.append(passage.context[start : fact.start] + fact.answer)
            starts.append(start)
        assert all(passage.context[s : s + len(t)] == t for t, s in zip(texts, starts, strict=True))
        rows.append(
            {
                "id": f"{key}-{i}",
                "title": passage.title,
                "context": passage.context,
                "question": fact.question,
                "answers": {"text": texts, "answer_start": starts},
            }
        )
    return rows
