"""Spelling: how one chat template wants to be given tool calls and reasoning. Decided once, by trying.

Templates differ: arguments as an object or as JSON text, no words beside a call as `""` or as null, reasoning under one
of three keys or as `<think>` in the words. Each form is tried on a conversation of known words, and the first that is
written is used. Reasoning that a template knows of but never writes (DeepSeek R1's) is written here, as the model
would write it behind the prompt.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sftlab.data.call_ids import with_nine
from sftlab.data.format import Fields
from sftlab.data.template import ANSWER, QUESTION, ChatTemplate

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING = ("learn", "context", "drop")
THOUGHT = re.compile(r"\s*(?:<think>)?(?P<thought>.*?)</think>\s*", re.DOTALL)
NOT_WRITTEN = "this template does not write"
THINKING = "data.format.template_kwargs={enable_thinking: true}"
IN_WORDS, BY_HAND = "in the words", "by hand"
NAME, KEY, VALUE, NESTED, WHY = "zfname", "zkone", "zvone", "zktwo", "zwhy"
ARGUMENTS = {KEY: VALUE, NESTED: {"on": True}}


class Spelling:
    """The forms of one template. `arguments`, `words` and `thought` are None where the template writes none of them."""

    def __init__(self, template: ChatTemplate, reasoning: str = "learn") -> None:
        if reasoning not in REASONING:
            raise ValueError(f"data.format.reasoning={reasoning}: expected one of {', '.join(REASONING)}")
        self.template, self.reasoning = template, reasoning
        self.trouble: dict[str, str] = {}
        self._call: dict[bool, tuple[str, str | None] | None] = {}
        self._thought: str | None = ""
        self._nine: bool | None = None

    def call(self, tools: bool) -> tuple[str, str | None] | None:
        """Return how calls are spelt ("object" or "text", words beside a call), None if they are not written."""
        if tools not in self._call:
            self._call[tools] = next(self._written_calls(tools), None)
        return self._call[tools]

    def _written_calls(self, tools: bool) -> Iterator[tuple[str, str | None]]:
        given = [definition(NAME)] if tools else None
        failures: list[str] = []
        for arguments in ("object", "text"):
            for words in ("", None):
                message = spell_call(calling([(NAME, ARGUMENTS)]), arguments, words)
                try:
                    text = self.template.text([*self.template.opening, asking(), message], given)
                except ValueError as error:
                    failures.append(str(error))
                    continue
                if writes_call(text, NAME, ARGUMENTS):
                    yield arguments, words
        if len(failures) == 4:  # where it renders some form, its failures on the others say nothing
            self.trouble["call"] = failures[0]

    @property
    def thought(self) -> str | None:
        """How reasoning is given: a key of the message, IN_WORDS or BY_HAND; None if the template writes none."""
        if self._thought == "":
            self._thought = self._written_thought()
        return self._thought

    def _written_thought(self) -> str | None:
        knows = "</think>" in self.template.source
        for key in (*REASONING_KEYS, *([IN_WORDS] if knows else [])):
            message = spell_thought({"role": "assistant", "content": ANSWER}, key, WHY)
            try:
                prompt = self.template.text([*self.template.opening, asking()], prompt=True)
                text = self.template.text([*self.template.opening, asking(), message])
            except ValueError as error:
                self.trouble.setdefault("reasoning", str(error))
                continue
            if 0 <= text.find(WHY) < text.find(ANSWER):
                if text.startswith(prompt):
                    return key
                self.trouble["reasoning"] = f"its prompt ends in {prompt[-40:]!r}: thinking is off there"
        if knows and not prompt_of(self.template).rstrip().endswith("</think>"):
            return BY_HAND
        return None

    @property
    def wants_nine(self) -> bool:
        """Whether calls need ids of nine letters and digits: they are written with such ids alone."""
        if self._nine is None:
            how = self.call(tools=True)
            self._nine = how is not None and not any(self._takes_id(key, how) for key in ("call_abcdefghij", None))
        return self._nine

    def _takes_id(self, key: str | None, how: tuple[str, str | None]) -> bool:
        message = spell_call(calling([(NAME, ARGUMENTS)]), *how)
        call = {k: v for k, v in message["tool_calls"][0].items() if k != "id"}
        message["tool_calls"] = [{**call, "id": key} if key else call]
        try:
            self.template.text([*self.template.opening, asking(), message], [definition(NAME)])
        except ValueError:
            return False
        return True

    def spelt(self, messages: Sequence[Fields], tools: Any) -> tuple[list[Fields], dict[int, str]]:
        """Return messages as the template wants them, and the reasoning that is to be written by hand, by message.

        Raises: ValueError if the template writes no tool calls, or no reasoning, and a message has some.
        """
        if any(m.get("tool_calls") for m in messages) and self.wants_nine:
            messages = with_nine(messages)
        out: list[Fields] = []
        by_hand: dict[int, str] = {}
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                message = self._spell(i, message, bool(tools), by_hand)
            out.append(message)
        return out, by_hand

    def _spell(self, i: int, message: Fields, tools: bool, by_hand: dict[int, str]) -> Fields:
        thought, rest = apart(message)
        if thought is not None:
            if self.reasoning == "drop":
                message = rest
            elif self.thought is None:
                if any(message.get(key) for key in REASONING_KEYS):
                    raise NotWritten("reasoning", self.trouble.get("reasoning"))
            elif self.thought == BY_HAND:
                message, by_hand[i] = rest, thought
            else:
                message = spell_thought(rest, self.thought, thought)
        elif self.thought == BY_HAND:
            by_hand[i] = ""
        if message.get("tool_calls"):
            how = self.call(tools)
            if how is None:
                raise NotWritten("tool calls", self.trouble.get("call"))
            message = spell_call(message, *how)
        return message


class NotWritten(ValueError):
    """A template does not write something that the data has. `what` names it, in words."""

    def __init__(self, what: str, why: str | None = None) -> None:
        self.what, self.why = what, why
        advice = "name another with data.format.template_path=FILE"
        if what.startswith("reasoning"):
            advice += ", or leave it out with data.format.reasoning=drop"
            if why and why.endswith("thinking is off there"):
                advice = "turn it on if the template has a variable for it, such as " + THINKING + ", or " + advice
        super().__init__(f"{NOT_WRITTEN} {what}{f' ({why})' if why else ''}: {advice}")

    @classmethod
    def of(cls, message: str) -> "NotWritten":
        """Return the error of a message that is worded already."""
        error = cls("")
        error.args = (message,)
        return error

    def __reduce__(self) -> Any:
        return NotWritten.of, (str(self),)  # an error of a worker process is sent to the first


def apart(message: Fields) -> tuple[str | None, Fields]:
    """Return an assistant's reasoning, None without one, and the message without it."""
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    found = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if found is not None:
        return str(found), rest
    content = message.get("content")
    if not isinstance(content, str):
        return None, message
    match = THOUGHT.match(content) if "</think>" in content else None
    if match is None or "<think>" in match["thought"]:
        return None, message
    return match["thought"].strip("\n"), {**rest, "content": content[match.end() :]}


def spell_thought(message: Fields, key: str, thought: str) -> dict[str, Any]:
    """Return a message with its reasoning under `key`, or in its words."""
    if key != IN_WORDS:
        return {**message, key: thought} if thought else dict(message)
    return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message.get('content') or ''}"}


def spell_call(message: Fields, arguments: str, words: str | None) -> dict[str, Any]:
    """Return a message with the arguments of its calls as objects or as JSON text, and `words` if it has none."""
    calls = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        if arguments == "text" and not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    return {**message, "content": message.get("content") or words, "tool_calls": calls}


def writes_call(text: str, name: str, arguments: Fields) -> bool:
    """Return whether a text holds a call's name and its arguments, neither as Python writes them nor quoted twice."""
    flat = json.dumps(arguments)
    if name not in text or re.search(rf"'{KEY}'\s*:|\\\"{KEY}", text) is not None:
        return False
    return all(w in text for w in re.findall(r"z\w+", flat))


def asking() -> dict[str, Any]:
    """Return a user's turn of known words."""
    return {"role": "user", "content": QUESTION}


def calling(calls: Sequence[tuple[str, Fields]]) -> dict[str, Any]:
    """Return an assistant's turn of calls. Mistral's templates want ids of nine letters and digits."""
    made = [
        {"type": "function", "id": f"zcall000{i}", "function": {"name": name, "arguments": dict(arguments)}}
        for i, (name, arguments) in enumerate(calls, 1)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def definition(name: str) -> dict[str, Any]:
    """Return the definition of a tool."""
    properties = {KEY: {"type": "string", "description": "a word"}, NESTED: {"type": "object", "description": "more"}}
    parameters = {"type": "object", "properties": properties, "required": [KEY]}
    return {"type": "function", "function": {"name": name, "description": "zdescribed", "parameters": parameters}}


def prompt_of(template: ChatTemplate) -> str:
    """Return the prompt that asks for an answer to one question; empty if the template fails."""
    try:
        return template.text([*template.opening, asking()], prompt=True)
    except ValueError:
        return ""
