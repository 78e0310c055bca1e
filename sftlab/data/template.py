"""Chat templates: turn a conversation into text, and find the characters of the learned turns.

A turn is learned from the first character that the model writes to its end-of-turn token, which is learned too. The
role header belongs to the prompt. A template with `{% generation %}` marks its turns. For other templates, rendering
the prompt shows where a turn begins, and rendering with the turn replaced by a mark shows where it ends.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.assets import locate
from sftlab.data.format import Conversation, Fields, Format

MARK = "\ue000"  # from Unicode's private use area: no tokenizer or template treats it specially
QUOTES = "\"'\\"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class ChatTemplate:
    """The chat template of one tokenizer. Raises: ValueError if it has none."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: name a file with one, "
                "data.format.template_path=FILE (asset://chat.jinja is a plain one), or use data=prompt_completion"
            )
        self.tokenizer = tokenizer
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        if tokenizer.bos_token != tokenizer.eos_token:
            special -= {tokenizer.bos_token}
        self.end = self._end_of_turn()
        ends = sorted(filter(None, {self.end, *special}), key=len, reverse=True)
        self.ends = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
        self.has_prompt = self._has_prompt()

    def render(self, conversation: Conversation) -> tuple[str, list[Span], bool]:
        """Return (text, spans of the learned turns in it, whether end-of-text is missing after the last).

        The text ends with the last learned turn, because computing what follows would be wasted.
        Raises: ValueError if the template fails, or rewrites a turn so that it cannot be found.
        """
        messages, tools = conversation.messages, conversation.tools
        if any(MARK in str(m.get("content")) for m in messages):
            raise ValueError(f"a message holds the private character {MARK!r}, which marks turns here")
        text, marked = self._text(messages, tools, marks=True)
        found = self._marked(text, messages, marked) if marked is not None else {}
        spans, ended = [], True
        for i in conversation.supervised:
            start, stop = found[i] if i in found else self._found(text, messages, tools, i)
            stop, ended = self._to_end_of_turn(text, start, stop, messages, i)
            spans.append((start, stop))
        last = spans[-1][1] if spans else len(text)
        return text[:last], spans, not ended

    def _text(
        self, messages: Sequence[Fields], tools: Any, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=tools)
        marks = marks and GENERATION.search(template) is not None
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template may raise anything: report it as this row's error
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error
        return texts[0], spans[0] if marks else None

    def _marked(self, text: str, messages: Sequence[Fields], spans: list[Span]) -> dict[int, Span]:
        spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(spans) != len(spoken):
            raise ValueError(
                f"the chat template marks {len(spans)} turns with {{% generation %}}, but the conversation has "
                f"{len(spoken)} assistant turns"
            )
        return dict(zip(spoken, spans, strict=True))

    def _found(self, text: str, messages: Sequence[Fields], tools: Any, i: int) -> Span:
        """Return where turn i lies in a text without marks."""
        other, _ = self._text([*messages[:i], marked(messages[i]), *messages[i + 1 :]], tools)
        before, _, _ = other.partition(MARK)
        _, mark, after = other.rpartition(MARK)
        if messages[i].get("tool_calls"):  # the mark is quoted there; numbers and empty arguments are not
            before, after = before.rstrip(QUOTES), after.lstrip(QUOTES)
        if not mark or not text.endswith(after) or not text.startswith(before):
            raise ValueError(
                f"the chat template rewrites the conversation around message {i + 1}, so that its turn cannot be found "
                "in the text: mark turns in the template with {% generation %}"
            )
        start = len(before)
        if self.has_prompt or text[:start][-1:].isspace():
            try:
                prompt, _ = self._text(messages[:i], tools, prompt=True)
            except ValueError:  # a template may refuse a conversation that ends there
                prompt = text
            # Without a generation prompt, the text between is a header, unless it is space: Llama 2 writes that itself.
            if (
                text.startswith(prompt)
                and prompt != text
                and (self.has_prompt or not text[len(prompt) : start].strip())
            ):
                start = len(prompt)
        return start, max(start, len(text) - len(after))

    def _to_end_of_turn(self, text: str, start: int, stop: int, messages: Sequence[Fields], i: int) -> tuple[int, bool]:
        """Return where the turn stops, including its end-of-turn token, and whether it has one."""
        for match in self.ends.finditer(text, start, stop):
            if not text[match.end() : stop].strip():
                return match.end(), True  # already in the turn's span; white space after it is never generated
        following = str(messages[i + 1].get("content") or "").strip() if i + 1 < len(messages) else ""
        bound = text.find(following, stop) if following else -1
        end = self.ends.search(text, stop, bound if bound >= 0 else len(text))
        if end and (messages[i].get("tool_calls") or not text[stop : end.start()].strip()):
            return end.end(), True
        return (len(text.rstrip()) if messages[i].get("tool_calls") and i + 1 == len(messages) else stop), False

    def _end_of_turn(self) -> str:
        """Return what the template puts after an assistant's words; empty if nothing, or if the template fails."""
        try:
            text, _ = self._text([{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}], None)
        except ValueError:
            return ""
        return text.rpartition(MARK)[2].strip()

    def _has_prompt(self) -> bool:
        """Return whether the template knows `add_generation_prompt`."""
        question = [{"role": "user", "content": "a"}]
        try:
            return self._text(question, None, prompt=True) != self._text(question, None)
        except ValueError:
            return True


def marked(message: Fields) -> dict[str, Any]:
    """Return an assistant message with the mark as its words, or as the arguments of its last tool call."""
    out = {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning", "thinking")}
    calls = [dict(c) for c in message.get("tool_calls") or ()]
    if calls:
        calls[-1]["function"] = {**calls[-1]["function"], "arguments": {MARK: MARK}}
        return {**out, "tool_calls": calls}
    return {**out, "content": MARK}


def prepare_tokenizer(tokenizer: Any, formats: Sequence[Format]) -> None:
    """Set up the tokenizer for conversations of these formats, so that the exported one serves the model as trained.

    Its chat template becomes the format's, if the format names one. The template gets the BOS that the tokenizer adds
    to other text. The end-of-text token becomes the template's end-of-turn token, if that is a single token.
    """
    paths = {f.template_path for f in formats if f.converses}
    if not paths:
        return
    if len(paths) > 1:
        raise ValueError(f"a run has one chat template: data.format.template_path is {' and '.join(map(str, paths))}")
    path = paths.pop()
    if path is not None:
        try:
            tokenizer.chat_template = Path(locate(path)).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.format.template_path={path}: cannot read it ({error})") from None
    template = ChatTemplate(tokenizer)  # raises without one
    bos = tokenizer.bos_token
    if leading_special(tokenizer) and isinstance(tokenizer.chat_template, str):
        text = tokenizer.chat_template
        if not re.search(r"\bbos_token\b", text) and bos not in text:
            tokenizer.chat_template = "{{- bos_token }}" + text
    if template.end in tokenizer.get_vocab() and template.end != tokenizer.eos_token:
        tokenizer.eos_token = template.end


def leading_special(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text (its BOS, or nothing)."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    special: Sequence[int] = encoding.special_tokens_mask
    count = special.index(0) if 0 in special else 0
    return list(encoding.ids[:count])
