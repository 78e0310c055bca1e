"""The proof of a chat template: for each kind of turn, that it writes what it is given and that turns are found.

Each kind is a short conversation of words that no template writes by itself. The proof renders it as a row is rendered,
and looks: does everything that was given stand in the text? Is every turn learned from the end of its prompt to one end
token? Only the kinds that the data has are asked for, each once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sftlab.data.format import Conversation, Fields
from sftlab.data.spelling import (
    ARGUMENTS,
    KEY,
    NAME,
    NESTED,
    REASONING_KEYS,
    VALUE,
    WHY,
    NotWritten,
    asking,
    calling,
    definition,
)
from sftlab.data.template import ANSWER, QUESTION, SECOND, THIRD
from sftlab.data.turns import Turns, Worded

RULES, RESULT, OTHER = "zrules", "zresult", "zfother"
SECOND_ARGUMENTS = {KEY: "zvthree", NESTED: {"on": False}}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """What the proof of one kind found: `trouble` is empty where it is right; `learned` is what a model would learn."""

    kind: str
    trouble: str
    learned: str
    apart: bool = False


def answer(words: str = ANSWER, **more: Any) -> dict[str, Any]:
    """Return an assistant's turn."""
    return {"role": "assistant", "content": words, **more}


def called(*calls: tuple[str, Fields], result: str = RESULT) -> Messages:
    """Return a turn of calls, and the tools' results."""
    turn = calling(calls)
    results = [
        {"role": "tool", "content": result, "name": name, "tool_call_id": c["id"]}
        for (name, _), c in zip(calls, turn["tool_calls"], strict=True)
    ]
    return [asking(), turn, *results]


# kind: (what it is called in an error, its messages, what must stand in the text). What is particular comes first, so
# that it is named where a template fails on it.
KINDS: Mapping[str, tuple[str, Callable[[], Messages], tuple[str, ...]]] = {
    "system": (
        "system messages",
        lambda: [{"role": "system", "content": RULES}, asking(), answer()],
        (RULES, QUESTION, ANSWER),
    ),
    "empty system": (
        "an empty system message",
        lambda: [{"role": "system", "content": ""}, asking(), answer()],
        (QUESTION, ANSWER),
    ),
    "developer": (
        "developer messages",
        lambda: [{"role": "developer", "content": RULES}, asking(), answer()],
        (RULES, QUESTION, ANSWER),
    ),
    "tools": ("the tools of a row", lambda: [asking(), answer()], (NAME, ANSWER)),
    "one call": ("tool calls", lambda: called((NAME, ARGUMENTS))[:2], (NAME, KEY, VALUE, NESTED)),
    "parallel calls": (
        "several tool calls in one turn",
        lambda: called((NAME, ARGUMENTS), (OTHER, SECOND_ARGUMENTS))[:2],
        (NAME, VALUE, OTHER, "zvthree"),
    ),
    "tool result": (
        "tool results",
        lambda: [*called((NAME, ARGUMENTS)), answer()],
        (QUESTION, NAME, VALUE, RESULT, ANSWER),
    ),
    "reasoning": ("reasoning", lambda: [asking(), answer(reasoning_content=WHY)], (WHY, ANSWER)),
    "text": ("a plain answer", lambda: [asking(), answer()], (QUESTION, ANSWER)),
    "several turns": (
        "several turns",
        lambda: [asking(), answer(), {**asking(), "content": SECOND}, answer(THIRD)],
        (QUESTION, ANSWER, SECOND, THIRD),
    ),
}
NEEDS_TOOLS = ("tools", "one call", "parallel calls", "tool result")


class Proof:
    """The proof of the template that words conversations for `turns`."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.check = cache(self._check)

    def _check(self, kind: str, tools: bool = False) -> Check:
        """Return what rendering a kind of turn gives; `tools` says that the row lists its tools."""
        what, messages, given = KINDS[kind]
        tools = tools or kind == "tools"
        listed = (definition(NAME), definition(OTHER)) if tools else None
        made = messages()
        if made[0]["role"] == "user":
            made = [*self.turns.template.opening, *made]
        learned = tuple(i for i, m in enumerate(made) if m["role"] == "assistant")
        try:
            worded = self.turns.worded(Conversation(tuple(made), learned, listed))
        except NotWritten as error:
            return Check(kind, str(error), "")
        except ValueError as error:
            return Check(kind, str(NotWritten(what, str(error))), "")
        trouble = self._trouble(what, made, given, worded)
        return Check(kind, trouble, shown(worded), len(worded) > 1)

    def _trouble(self, what: str, made: Messages, given: tuple[str, ...], worded: list[Worded]) -> str:
        text = worded[-1].text
        missing = [word for word in given if word not in text]
        if missing and not (missing == [WHY] and self.turns.spelling.reasoning == "drop"):
            return str(NotWritten(what))
        learned = [w.text[a:b] for w in worded for a, b, _ in w.spans]
        everything = "\n".join(learned)
        spoken = [m for m in made if m["role"] == "assistant"]
        words = [w for m in spoken for w in words_of(m) if w in given or w in (ANSWER, THIRD)]
        lost = [w for w in words if w not in everything and w != WHY]
        if lost:
            return f"this template's turns are not found: {what} would be learned without {', '.join(lost)}"
        unlearned = [w for w in (QUESTION, SECOND, RULES, RESULT) if w in everything]
        if unlearned:
            return f"this template's turns are not found: with {what}, more than the assistant's words is learned"
        for w in worded:
            said = w.text[: w.spans[-1][1]]
            end = next((t for t in self.turns.template.special if said.endswith(t)), "")
            if not end and not w.end:
                return f"with {what}, a turn of this template has no end: the model would never stop"
            if end and said.removesuffix(end).rstrip().endswith(end):
                return f"with {what}, this template ends a turn twice with {end}"
        return ""


def words_of(message: Fields) -> list[str]:
    """Return the known words of an assistant's turn."""
    calls = [c["function"] for c in message.get("tool_calls") or ()]
    return [
        *([message["content"]] if message.get("content") else []),
        *(word for f in calls for word in (f["name"], *map(str, f["arguments"].values())) if word.startswith("z")),
    ]


def shown(worded: list[Worded]) -> str:
    """Return what is learned, the turns one after another."""
    return " | ".join("".join(w.text[a:b] for a, b, _ in w.spans) + (" + end of text" if w.end else "") for w in worded)


def kinds_of(conversation: Conversation) -> frozenset[str]:
    """Return the kinds of turn that a conversation has."""
    found = {"tools"} if conversation.tools else set()
    spoken = 0
    for message in conversation.messages:
        role = message["role"]
        if role == "assistant":
            spoken += 1
            calls = len(message.get("tool_calls") or ())
            found.add("parallel calls" if calls > 1 else "one call" if calls else "text")
            if len(message) > 2 and any(message.get(key) for key in REASONING_KEYS):
                found.add("reasoning")
        elif role == "system":
            found.add("system" if message["content"] else "empty system")
        elif role != "user":
            found.add("tool result" if role == "tool" else role)
    if "parallel calls" in found:
        found.add("one call")
    elif spoken > 1 and "one call" not in found:
        found.add("several turns")
    return frozenset(found)
