"""Histories: the turns of a long conversation that is taken apart, without rendering each by itself.

Each turn is an example with all that was said before it, so rendering each costs the square of the conversation's
length. But the prompts are beginnings of one another: one rendering holds what was said, and turns of one kind differ
in their words alone. The first, the middle and the last turn of each kind are rendered and must be as put together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sftlab.data.format import Fields
from sftlab.data.places import flags, places
from sftlab.data.spelling import REASONING_KEYS
from sftlab.data.template import ChatTemplate, Span

PLAIN = ("system", "user", "assistant")


@dataclass(frozen=True)
class Frame:
    """What stands around the words of a turn: behind the message before it, and between and after its own words."""

    lead: str
    between: tuple[str, ...]
    ended: bool


class Histories:
    """What one rendering of a conversation says about its turns. `said` renders one: (text, its start, ended)."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Fields],
        turns: Sequence[int],
        said: Callable[[int], tuple[str, int, bool]],
    ) -> None:
        self.messages, self.source = messages, template.source
        self.frames: dict[object, Frame] = {}
        plain = [i for i in turns if self._is_plain(i)]
        words = "\n".join(word for message in messages for word in words_of(message))
        self.text, self.where = "", dict[int, Span]()
        if (
            not plain
            or any(m["role"] not in PLAIN for m in messages)
            or any(literal in words for literal in template.literals)
        ):
            return
        self.text = template.text(messages[: turns[-1]])
        self.where = places(template, messages[: turns[-1]], None, self.text)
        for sample in samples(messages, plain):
            frame, *others = (self._frame(i, *said(i)) for i in sample)
            if frame is not None and all(other == frame for other in others):
                self.frames[flags(messages[: sample[0] + 1], sample[0])] = frame

    def _is_plain(self, i: int) -> bool:
        """Return whether a turn and the question before it are words alone, none a word of the template's own."""
        if self.messages[i - 1]["role"] != "user" or any(word in self.source for word in words_of(self.messages[i])):
            return False
        return all(
            set(m) <= {"role", "content", *REASONING_KEYS} and m.get("content") and words_of(m) == [*given(m)]
            for m in (self.messages[i - 1], self.messages[i])
        )

    def _frame(self, i: int, text: str, start: int, ended: bool) -> Frame | None:
        """Return what stands around the words of turn i; None if the one rendering does not hold its prompt."""
        if i - 1 not in self.where:
            return None
        at = self.where[i - 1][1]
        if at > start or text[:at] != self.text[:at]:
            return None
        between: list[str] = []
        rest = text[start:]
        for word in words_of(self.messages[i]):
            if text[start:].count(word) != 1:  # it cannot be told which of them is the turn's word
                return None
            before, _, rest = rest.partition(word)
            between.append(before)
        return Frame(text[at:start], (*between, rest), ended)

    def said(self, i: int) -> tuple[str, int, bool] | None:
        """Return the text that ends with turn i, where the turn starts, whether it ended; None if it is not known."""
        frame = self.frames.get(flags(self.messages[: i + 1], i)) if self._is_plain(i) else None
        if frame is None or i - 1 not in self.where:
            return None
        prompt = self.text[: self.where[i - 1][1]] + frame.lead
        words = [*words_of(self.messages[i]), ""]
        turn = "".join(before + word for before, word in zip(frame.between, words, strict=True))
        return prompt + turn, len(prompt), frame.ended


def given(message: Fields) -> Iterator[str]:
    """Yield the reasoning and the words of a message as they are given."""
    for key in (*REASONING_KEYS, "content"):
        if message.get(key):
            yield str(message[key])


def words_of(message: Fields) -> list[str]:
    """Return the reasoning and the words of a message, without white space around them."""
    return [word.strip() for word in given(message)]


def samples(messages: Sequence[Fields], turns: Sequence[int]) -> Iterator[list[int]]:
    """Yield the first, the middle and the last turn of each kind; what follows a turn is not in its text."""
    kinds: dict[object, list[int]] = {}
    for i in turns:
        kinds.setdefault(flags(messages[: i + 1], i), []).append(i)
    for each in kinds.values():
        yield sorted({each[0], each[len(each) // 2], each[-1]})
