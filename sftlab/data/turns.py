"""Turns: where in a conversation's text the learned turns begin and end, as inference will see them.

A turn is what the model writes behind the prompt. So it is found by rendering, never by searching: the prompt before it
says where it begins, and the text that ends with it says where it ends. Where the longer text begins with each of
these, one text holds all turns (together). Where the template rewrites history when the conversation goes on, each
turn becomes an example of its own (apart), and the forest computes what they share once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftlab.data.format import Conversation, Fields
from sftlab.data.histories import Histories
from sftlab.data.places import Offsets, Walk, flags, places
from sftlab.data.spelling import REASONING_KEYS, Spelling, apart, spell_thought
from sftlab.data.template import ANSWER, QUESTION, ChatTemplate, Span, common_start

TURNS = ("auto", "together", "apart")
CHECKED = 8  # in a conversation with more learned turns, the first and the last of each kind are rendered
PLANS = 4096  # shapes of conversations remembered
MARK = "\U000ffffd"  # private: no tokenizer or template treats it specially
Messages = Sequence[Fields]


@dataclass(frozen=True)
class Said:
    """One turn as inference sees it: a text that ends with it, what is learned in it, and where its prompt ends."""

    text: str
    spans: list[Span]
    prompt: int
    ended: bool


@dataclass(frozen=True)
class Worded:
    """The text of one example, its learned (start, stop, weight), where its last turn begins, and which that is.

    `end` says that the tokenizer's end-of-text has to follow, because the template ends no turn. `part` counts the
    examples of a conversation that was taken apart, from 1; it is 0 for one that was not.
    """

    text: str
    spans: list[tuple[int, int, float]]
    prompt: int
    end: bool
    turn: int
    part: int = 0


class Turns:
    """Word conversations with one chat template."""

    def __init__(self, template: ChatTemplate, turns: str = "auto", reasoning: str = "learn") -> None:
        if turns not in TURNS:
            raise ValueError(f"data.format.turns={turns}: expected one of {', '.join(TURNS)}")
        self.template, self.turns = template, turns
        self.spelling = Spelling(template, reasoning)
        self.plans: dict[Any, Walk | None] = {}
        self._closer: str | None = None

    def worded(self, conversation: Conversation) -> list[Worded]:
        """Return the examples of a conversation. Raises: ValueError if the template fails, or leaves something out."""
        if not conversation.supervised:
            messages, _ = self.spelling.spelt(conversation.messages, conversation.tools)
            text = self.template.text(messages, conversation.tools)
            return [Worded(text, [], len(text), False, len(messages) - 1)]
        count = conversation.supervised[-1] + 1
        shape = self._shape(conversation, count)
        walk = self.plans.get(shape) if shape is not None else None
        if walk is not None:
            plain = conversation.messages[:count]
            text, ended = self.template.close(self.template.text(plain))
            spans = walk.spans(text, plain)
            if spans is not None:
                return [self._together(conversation, text, spans, spans[-1][0][0], ended)]
        return self._studied(conversation, count, shape)

    def _studied(self, conversation: Conversation, count: int, shape: Any) -> list[Worded]:
        """Return the examples of a conversation whose shape is new, or whose words a template may look at."""
        tools = conversation.tools
        messages, by_hand = self.spelling.spelt(conversation.messages[:count], tools)
        found = None if self.turns == "apart" else self._all_in_one(messages, tools, by_hand, conversation.supervised)
        if found is not None:
            last, spans = found
            if shape is not None:
                self._remember(shape, last.text, messages, conversation.supervised, spans)
            return [self._together(conversation, last.text, spans, last.prompt, last.ended)]
        if self.turns == "together":
            raise ValueError(
                "data.format.turns=together: this template words a turn differently when the conversation goes on, or "
                "ends none, so that no one text holds all turns as they will be generated. Leave turns=auto"
            )
        return list(self._each(conversation, messages, by_hand))

    def _together(
        self, conversation: Conversation, text: str, spans: list[list[Span]], prompt: int, ended: bool
    ) -> Worded:
        weighted = [(a, b, w) for turn, w in zip(spans, conversation.turn_weights, strict=True) for a, b in turn]
        return Worded(text, weighted, prompt, not ended, conversation.supervised[-1])

    def _each(self, conversation: Conversation, messages: Messages, by_hand: Mapping[int, str]) -> Iterator[Worded]:
        known = self._known(conversation, messages, by_hand)
        turns = zip(conversation.supervised, conversation.turn_weights, strict=True)
        for part, (i, weight) in enumerate(turns, 1):
            said = known(i) or self.said(messages, conversation.tools, i, by_hand)
            part = part if len(conversation.supervised) > 1 else 0
            yield Worded(said.text, [(a, b, weight) for a, b in said.spans], said.prompt, not said.ended, i, part)

    def _known(
        self, conversation: Conversation, messages: Messages, by_hand: Mapping[int, str]
    ) -> Callable[[int], Said | None]:
        """Return what says how a turn of a long conversation is worded without rendering it, where that can be told."""
        turns = conversation.supervised
        odd = conversation.tools or any(by_hand.values()) or self.template.marks or self.spelling.reasoning == "context"
        if odd or len(turns) <= CHECKED:
            return lambda i: None

        def rendered(i: int) -> tuple[str, int, bool]:
            said = self.said(messages, None, i, by_hand)
            return said.text, said.prompt, said.ended

        histories = Histories(self.template, messages, turns, rendered)

        def known(i: int) -> Said | None:
            if (found := histories.said(i)) is None:
                return None
            text, start, ended = found
            return Said(text, [(start, len(text))], start, ended)

        return known

    def _all_in_one(
        self, messages: Messages, tools: Any, by_hand: Mapping[int, str], supervised: Sequence[int]
    ) -> tuple[Said, list[list[Span]]] | None:
        """Return the last turn, whose text holds all others, and the spans of each; None if it does not hold them."""
        last = self.said(messages, tools, supervised[-1], by_hand)
        said = {supervised[-1]: last}
        text, forced = last.text, self.turns == "together"
        for i in self._sample(messages, supervised):
            said[i] = self.said(messages, tools, i, by_hand)
            if not text.startswith(said[i].text) or not (said[i].ended or forced):
                return None
        if len(said) == len(supervised):
            return last, [said[i].spans for i in supervised]
        where = places(self.template, messages, tools, text)
        reached = Offsets(text, messages, where, {i: s.spans for i, s in said.items()})
        spans: list[list[Span]] = []
        for i in supervised:
            span = reached.span(i) if i not in said else None
            if span is not None:
                spans.append([span])
                continue
            if i not in said:
                said[i] = self.said(messages, tools, i, by_hand)
                if not text.startswith(said[i].text):
                    return None
            spans.append(said[i].spans)
        return last, spans

    def _sample(self, messages: Messages, supervised: Sequence[int]) -> list[int]:
        """Return the turns to render by themselves: all of a few; of many, the first and last of each kind.

        A template rewrites a turn by its kind and by what follows, so the first of a kind is rewritten if any is.
        """
        if len(supervised) <= CHECKED or self.template.marks:
            return list(supervised[:-1])
        firsts: dict[Any, int] = {}
        lasts: dict[Any, int] = {}
        for i in supervised[:-1]:
            kind = flags(messages, i)
            firsts.setdefault(kind, i)
            lasts[kind] = i
        return sorted({*firsts.values(), *lasts.values()})

    def said(self, messages: Messages, tools: Any, i: int, by_hand: Mapping[int, str]) -> Said:
        """Return turn i behind the prompt that inference asks it with. Raises: ValueError if it is not there."""
        template = self.template
        prompt = template.text(messages[:i], tools, prompt=True)
        whole, marks = template.marked(messages[: i + 1], tools)
        text, ended = template.close(whole)
        if by_hand.get(i) or (i in by_hand and not text.startswith(prompt)):
            return self._thought_by_hand(prompt, text, by_hand[i], ended)
        start = len(prompt)
        if not text.startswith(prompt):
            text, marks, ended = self._behind(prompt, text, marks, ended, messages[i], tools)
        elif template.header and text.startswith(template.header, start):
            start += len(template.header)
        spans = [(start, len(text))] if marks is None else self._marked(text, start, marks)
        if self.spelling.reasoning == "context" and apart(messages[i])[0]:
            after = self._after_thought(text, messages, tools, i)
            spans = [(max(a, after), b) for a, b in spans if b > after]
        return Said(text, spans, start, ended)

    def _behind(
        self, prompt: str, text: str, marks: list[Span] | None, ended: bool, message: Fields, tools: Any
    ) -> tuple[str, list[Span] | None, bool]:
        """Return the prompt and a turn behind it, where the template words what is before the turn differently.

        A prompt may hold more than the text does (ChatTemplate.extra). Mistral's older templates write the system
        message into the last user's turn, and drop it when an answer follows. The turn's own words are taken from a
        conversation of one question, and must be what the whole ends with.
        """
        extra = self.template.extra
        bare = prompt.removesuffix(extra)
        if extra and bare != prompt and text.startswith(bare):
            words = text[len(bare) :] if extra.strip() else text[len(bare) :].lstrip()
            return prompt + words, moved(marks, len(prompt) + len(words) - len(text)), ended
        question = [*self.template.opening, {"role": "user", "content": QUESTION}]
        before = self.template.text(question, tools, prompt=True)
        whole, marks = self.template.marked([*question, message], tools)
        alone, ended = self.template.close(whole)
        words = alone[len(before) :]
        if not alone.startswith(before) or not text.endswith(words):
            same = len(common_start(prompt, text))
            raise ValueError(
                f"its prompt goes on with {prompt[same:][:40]!r} where its text of the turn has {text[same:][:40]!r}: "
                "the turn would be learned where it is never generated"
            )
        return prompt + words, moved(marks, len(prompt) - len(before)), ended

    def _thought_by_hand(self, prompt: str, text: str, thought: str, ended: bool) -> Said:
        """Return a turn with the reasoning that the template leaves out, as the model writes it behind the prompt."""
        bare = prompt.rstrip()
        opened = bare.endswith("<think>")
        before = bare.removesuffix("<think>") if opened else prompt
        if not text.startswith(before):
            raise ValueError("the chat template rewrites the conversation before a turn with reasoning")
        head = ("" if opened else "<think>\n") + ("\n" if opened and prompt == bare else "") + thought
        whole = prompt + head + "\n</think>\n\n"
        start = len(whole) if self.spelling.reasoning == "context" and thought else len(prompt)
        whole += text[len(before) :].lstrip()
        return Said(whole, [(start, len(whole))], len(prompt), ended)

    def _marked(self, text: str, start: int, marks: Sequence[Span]) -> list[Span]:
        """Return the stretches of a turn that the template marks, with the turn's end; they may be several."""
        spans = [(max(a, start), min(b, len(text))) for a, b in marks if b > start and a < len(text)]
        if not spans:
            raise ValueError("the chat template has {% generation %}, but marks nothing in an assistant turn")
        a, b = spans[-1]
        if not self.template.ends.sub("", text[b:]).strip():
            spans[-1] = (a, len(text))
        return spans

    def _after_thought(self, text: str, messages: Messages, tools: Any, i: int) -> int:
        """Return where the reasoning of turn i is over in a text that ends with the turn."""
        thought, rest = apart(messages[i])
        assert thought is not None and self.spelling.thought is not None
        key = next((k for k in REASONING_KEYS if messages[i].get(k)), self.spelling.thought)
        marked = spell_thought(rest, key, thought.rstrip() + MARK)
        at = self.template.text([*messages[:i], marked], tools).rfind(MARK)
        if self._closer is None:
            own = spell_thought({"role": "assistant", "content": ANSWER}, key, MARK)
            question = [*self.template.opening, {"role": "user", "content": QUESTION}]
            self._closer = self.template.text([*question, own]).rpartition(MARK)[2].partition(ANSWER)[0]
        return at + len(common_start(self._closer, text[at:]))

    def _shape(self, conversation: Conversation, count: int) -> Any:
        """Return what a template may tell two plain conversations apart by; None if one is not plain."""
        if conversation.tools or self.turns == "apart":
            return None
        messages = conversation.messages[:count]
        if any(len(m) > 2 or not m["content"] for m in messages):
            return None
        words = "\n".join(m["content"] for m in messages)
        if "</think>" in words or any(literal in words for literal in self.template.literals):
            return None
        return tuple(m["role"] for m in messages), conversation.supervised

    def _remember(
        self, shape: Any, text: str, messages: Messages, supervised: Sequence[int], spans: list[list[Span]]
    ) -> None:
        """Keep how a conversation of this shape is worded, so that the next one costs one rendering."""
        if len(self.plans) >= PLANS:
            self.plans.pop(next(iter(self.plans)))
        self.plans[shape] = Walk.of(text, messages, places(self.template, messages, None, text), supervised, spans)


def moved(marks: list[Span] | None, shift: int) -> list[Span] | None:
    """Return spans moved by a number of characters."""
    return None if marks is None else [(a + shift, b + shift) for a, b in marks]
