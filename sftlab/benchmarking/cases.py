"""The cases of a benchmark: the settings of each, and generated data of its sizes where no data is given.

Sizes are in tokens of the run's own tokenizer, so that a case is the same work for every model. Texts are made of
nonsense words; speed does not depend on what they say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.common.files import write_jsonl

if TYPE_CHECKING:  # the command imports this module before Hydra answers --help
    from sftlab.benchmarking.words import Words

CALLS, FORKS = 8, 8  # of an agent's trace, and traces of one task
STAND_IN = "generated"  # as data.path: the case's generated data

CHAT = ("data.format.template_path=asset://chat.jinja", "data.group_by_prefix=true")
# The data option of a case, settings that belong to it, and settings of the trainer.
CASES: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "squad": ("squad", (), ("trainer.batch_size=256",)),
    "chat": ("chat", CHAT, ("trainer.batch_size=64",)),
    "dense": ("text", ("data.overlong=truncate", "data.max_length=4096"), ("trainer.batch_size=8",)),
    "agent": ("chat", (*CHAT, "data.row_length=16384"), ("trainer.batch_size=32",)),
}


def overrides(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the overrides that its `case=` stands for in front, where anything typed wins.

    Raises: SystemExit for a case that there is not; nothing is composed yet.
    """
    case = next((a.removeprefix("case=") for a in reversed(arguments) if a.startswith("case=")), "null")
    if case not in CASES:
        return list(arguments)  # null; an unknown one is refused with the other settings
    option, of_data, of_trainer = CASES[case]
    typed = {a.partition("=")[0] for a in arguments}
    added = list(of_trainer)
    if "data" not in typed:
        added += [f"data={option}", *of_data, *([] if "data.path" in typed else [f"data.path={STAND_IN}"])]
    return [*(a for a in added if a.partition("=")[0] not in typed), *arguments]


def write_stand_in(case: str, folder: Path, words: "Words", num: int, scale: float) -> Path:
    """Write at least `num` generated examples of a case as JSONL; return the file."""
    path = folder / f"{case}.jsonl"
    write_jsonl(path, ROWS[case](words, num, scale))
    return path


def squad(words: "Words", num: int, scale: float) -> Iterator[dict[str, Any]]:
    """Yield questions on paragraphs, in SQuAD's schema.

    With Llama 3's tokenizer SQuAD has 196 tokens an example, 5 questions on a paragraph, and 55 after sharing. The
    logarithm of a paragraph's length has the standard deviation 0.39.
    """
    made = paragraph = 0
    while made < num:
        context = words.text(words.lengths(171, 0.39, scale))
        for _ in range(int(words.rng.choice([3, 4, 5, 6, 10], p=[0.1, 0.22, 0.58, 0.05, 0.05]))):
            answer = " ".join(context.split()[:2])
            yield {
                "id": str(made),
                "title": f"paragraph {paragraph}",
                "context": context,
                "question": words.text(words.lengths(12, 0.3, scale)),
                "answers": {"text": [answer], "answer_start": [0]},
            }
            made += 1
        paragraph += 1


def chat(words: "Words", num: int, scale: float) -> Iterator[dict[str, Any]]:
    """Yield conversations of 2 to 5 questions and answers, under one of 4 system prompts."""
    systems = [words.text(words.lengths(250, 0.4, scale)) for _ in range(4)]
    for _ in range(num):
        messages = [say("system", systems[int(words.rng.integers(len(systems)))])]
        for _ in range(int(words.rng.integers(2, 6))):
            messages.append(say("user", words.text(words.lengths(60, 0.8, scale))))
            messages.append(say("assistant", words.text(words.lengths(200, 0.6, scale))))
        yield {"messages": messages}


def dense(words: "Words", num: int, scale: float) -> Iterator[dict[str, Any]]:
    """Yield texts a tenth longer than a row of 4,096 tokens, every token learned; they are cut to full rows."""
    for _ in range(num):
        yield {"text": words.text(int(4500 * scale))}


def agent(words: "Words", num: int, scale: float) -> Iterator[dict[str, Any]]:
    """Yield tool traces of CALLS calls: FORKS for each task, all but the first forked from an earlier one of them."""
    tools = [words.text(words.lengths(1200, 0.2, scale)) for _ in range(3)]
    for _ in range(-(-num // FORKS)):
        system, task = tools[int(words.rng.integers(len(tools)))], words.text(words.lengths(150, 0.5, scale))
        opening = [say("system", system), say("user", task)]
        traces: list[list[dict[str, str]]] = []
        for _ in range(FORKS):
            trace = list(opening)
            if traces:  # at one of the later calls
                parent, calls = traces[int(words.rng.integers(len(traces)))], int(words.rng.integers(CALLS // 2, CALLS))
                trace = parent[: len(opening) + 2 * calls]
            while len(trace) < len(opening) + 2 * CALLS:
                trace.append(say("assistant", words.text(words.lengths(60, 0.5, scale))))
                trace.append(say("tool", words.text(words.lengths(250, 0.7, scale))))
            trace.append(say("assistant", words.text(words.lengths(80, 0.5, scale))))
            traces.append(trace)
            yield {"messages": trace}


def say(role: str, content: str) -> dict[str, str]:
    """Return one message."""
    return {"role": role, "content": content}


ROWS: Mapping[str, Callable[["Words", int, float], Iterator[dict[str, Any]]]] = {
    "squad": squad,
    "chat": chat,
    "dense": dense,
    "agent": agent,
}
