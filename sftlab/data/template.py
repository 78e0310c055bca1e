"""Chat templates: turn messages into text, and get a tokenizer ready for conversations.

Here a template is only run. turns.py says where in the text the learned turns are, spelling.py how a template wants its
messages, and proof.py whether it writes what it is given.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from sftlab.assets import locate
from sftlab.common.time_limit import time_limit
from sftlab.data.format import Fields, Format
from sftlab.data.limits import TEMPLATE_S

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = re.compile(r"(?<=\{%)([-+]?\s*)(end|)generation(?=\s*[-+]?%\})")
STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
QUESTION, ANSWER, SECOND, THIRD = "zqone", "zaone", "zqtwo", "zatwo"  # words that no template writes by itself
Span = tuple[int, int]


class SlowTemplate(ValueError):
    """A chat template that does not end in time."""


class ChatTemplate:
    """The chat template of one tokenizer; `date` (YYYY-MM-DD) is its today. Raises: ValueError without a template.

    `end` closes an assistant's turn, `after` is what the template writes after that; `stops` says whether `end` holds a
    token that stops generation. All are decided here, once, from a conversation of known words.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: name a file with one, "
                "data.format.template_path=FILE (asset://chat.jinja is a plain one), or use data=prompt_completion"
            )
        self.tokenizer = tokenizer
        self.variables = dict(tokenizer.special_tokens_map)
        self._templates: dict[bool, Any] = {}
        self.today = datetime.fromisoformat(date) if date else datetime.now()
        special = special_texts(tokenizer)
        if tokenizer.bos_token != tokenizer.eos_token:
            special -= {tokenizer.bos_token}
        self.special = tuple(special)
        self.ends = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.opening = self._opening()
        self.end, self.after = self._end_of_turn()
        self.stops = self.ends.search(self.end) is not None
        self.header, self.extra = self._header()

    def text(self, messages: Sequence[Fields], tools: Any = None, prompt: bool = False) -> str:
        """Return the text of messages; with `prompt` it ends where the assistant's next words begin.

        The compiled template is called directly: `render_jinja_template` copies every value first, which took as long
        as the rendering. Rows hold plain JSON values, which is what its copies are for. Raises: ValueError if it fails.
        """
        try:
            with time_limit(TEMPLATE_S, "it"):
                return str(
                    self._compiled(bool(tools)).render(
                        messages=messages,
                        tools=list(tools) if tools else None,
                        documents=None,
                        add_generation_prompt=prompt,
                        **self.variables,
                    )
                )
        except TimeoutError as error:
            raise SlowTemplate(f"the chat template was stopped: {error}") from None
        except Exception as error:  # a template may raise anything: report it as this row's error
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error

    def _compiled(self, tools: bool) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        use_sandbox()
        if tools not in self._templates:
            template = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
            # Marks cost as much as the rest of the rendering; a block of the same scope leaves them out.
            compiled = _compile_jinja_template(MARKS.sub(r"\1\2with", self._dated(template)))
            compiled.globals = dict(compiled.globals)  # each rendering copies them, and a ChainMap copies slowly
            self._templates[tools] = compiled
        return self._templates[tools]

    def marked(self, messages: Sequence[Fields], tools: Any = None) -> tuple[str, list[Span] | None]:
        """Return the text, and what the template marks with `{% generation %}`; None if it knows no such marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        use_sandbox()
        template = self._dated(self.tokenizer.get_chat_template(tools=tools))
        if not GENERATION.search(template):
            return self.text(messages, tools), None
        try:
            with time_limit(TEMPLATE_S, "it"):
                texts, spans = render_jinja_template(
                    [list(messages)],
                    tools=list(tools) if tools else None,
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **self.variables,
                )
        except TimeoutError as error:
            raise SlowTemplate(f"the chat template was stopped: {error}") from None
        except Exception as error:
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error
        return texts[0], spans[0]

    def _dated(self, template: str) -> str:
        """Return a template with the date in place of its calls for today's; transformers passes it no other clock."""
        if "strftime_now" not in template:
            return template
        return STRFTIME.sub(lambda call: repr(self.today.strftime(call[2])), template)

    @property
    def source(self) -> str:
        """The template's own text; of several templates, all of them."""
        given = self.tokenizer.chat_template
        return given if isinstance(given, str) else "\n".join(given.values())

    @cached_property
    def marks(self) -> bool:
        """Whether the template marks what the assistant says with `{% generation %}`."""
        return GENERATION.search(self.source) is not None

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """The texts that the template writes or may look for: a message with one of them may be worded differently."""
        found = {a or b for a, b in re.findall(r"'([^'\n]*)'|\"([^\"\n]*)\"", self.source)}
        return tuple(sorted(t.strip() for t in found if len(t.strip()) > 2 and not t.strip().isidentifier()))

    def close(self, text: str) -> tuple[str, bool]:
        """Return a text that ends with an assistant's turn, cut after the turn's end, and whether that end stops it.

        A template may write more after the end (a line break, the next header), or leave the end of the last turn out.
        """
        text = text.removesuffix(self.after)
        bare = text.rstrip()
        if self.stops and bare.endswith(self.end):
            return bare, True
        if bare.endswith(self.special):
            return bare, True
        if self.left_out:
            return text + self.end, self.stops
        return text, False

    def _opening(self) -> list[dict[str, str]]:
        """Return the messages that this template wants before a question: none, or a system message."""
        system = {"role": "system", "content": "zsystem"}
        for opening in ([], [system]):
            try:
                self.text([*opening, {"role": "user", "content": QUESTION}], prompt=True)
            except SlowTemplate:
                raise
            except ValueError:
                continue
            return opening
        return []

    def _end_of_turn(self) -> tuple[str, str]:
        """Return what ends an assistant's turn, and what the template writes after that in a text that ends there.

        `left_out` says that the end of a text's last turn is missing in its rendering.
        """
        self.left_out = False
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        begin = [*self.opening, question, answer]
        try:
            _, words, last = self.text(begin).rpartition(ANSWER)
        except SlowTemplate:
            raise
        except ValueError:
            words = last = ""
        if not words:  # the proof says what is wrong
            return self.tokenizer.eos_token or "", ""
        try:
            more = self.text([*begin, {**question, "content": SECOND}, {**answer, "content": THIRD}])
        except SlowTemplate:
            raise
        except ValueError:
            more = ""
        start, _, rest = more.partition(ANSWER)
        middle = rest.partition(SECOND)[0]
        if last.strip():
            same = common_start(last, middle)
            if self.ends.search(same) is None and same.strip() != last.strip():
                same = last  # the last turn of a text ends otherwise, as gpt-oss's does
            end = self._up_to_stop(same, whole=same.strip() == last.strip())
            return end, last[len(end) :]
        header = common_start(start.partition(QUESTION)[0][::-1], middle[::-1])[::-1]
        end = self._up_to_stop(middle.removesuffix(header), whole=False)
        self.left_out = bool(self.ends.search(end))
        return (end, last) if self.left_out else ("", last)

    def _up_to_stop(self, text: str, whole: bool) -> str:
        """Return the beginning of a text that ends with the token that stops a turn."""
        eos = self.tokenizer.eos_token or ""
        if eos and eos in text:
            return text[: text.index(eos) + len(eos)]
        found = self.ends.search(text)
        return text.rstrip() if whole or found is None else text[: found.end()]

    def _header(self) -> tuple[str, str]:
        """Return how the prompt and the text of an answered question differ where the answer begins.

        A header is in the text alone: the template has no generation prompt for it. White space is no header (Llama 2's
        template writes that itself), and neither is what a tool call begins with. An extra is in the prompt alone, such
        as the thinking that Gemma 4 opens and closes there, or a line break.
        """
        question = [*self.opening, {"role": "user", "content": QUESTION}]
        try:
            prompt = self.text(question, prompt=True)
            whole = self.text([*question, {"role": "assistant", "content": ANSWER}])
            if ANSWER not in whole:
                return "", ""
            asked = prompt != self.text(question)
        except SlowTemplate:
            raise
        except ValueError:
            return "", ""
        same = common_start(prompt, whole)
        extra, lead = prompt[len(same) :], whole[len(same) :].partition(ANSWER)[0]
        if extra:
            return "", "" if extra.strip() and lead.strip() else extra
        return "" if asked or not lead.strip() else lead, ""


def rendered(tokenizer: Any, messages: Sequence[Fields], prompt: bool = False) -> str:
    """Return the text of a conversation as the tokenizer itself renders it, for inference: nothing is looked into.

    Raises: TimeoutError, TemplateError or whatever else the template raises.
    """
    use_sandbox()
    with time_limit(TEMPLATE_S, "the chat template"):
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False))


def use_sandbox() -> None:
    """Let transformers run templates in our sandbox, which has no setting for this."""
    from transformers.utils import chat_template_utils

    from sftlab.data.sandbox import Sandbox

    chat_template_utils.ImmutableSandboxedEnvironment = Sandbox


def prepare_tokenizer(tokenizer: Any, formats: Sequence[Format]) -> None:
    """Set up the tokenizer for conversations of these formats, so that the exported one serves the model as trained.

    Its chat template becomes the format's, if the format names one. The template gets the BOS that the tokenizer adds
    to a text, if it has none. EOS becomes the template's end-of-turn token, if it is one token, so that inference stops
    where turns were trained to end. Other formats change nothing. Raises: ValueError without a template, or with two.
    """
    chats = [f for f in formats if f.converses]
    if not chats:
        return
    path = the_one("template_path", [f.template_path for f in chats])
    values = the_one("template_kwargs", [dict(f.template_kwargs or {}) for f in chats])
    if path is not None:
        try:
            tokenizer.chat_template = Path(locate(path)).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.format.template_path={path}: cannot read it ({error})") from None
    given = tokenizer.chat_template
    if isinstance(given, Mapping):
        tokenizer.chat_template = {name: with_values(text, values) for name, text in given.items()}
    elif given:
        tokenizer.chat_template = with_values(given, values)
    template = ChatTemplate(tokenizer)  # raises without one
    bos = tokenizer.bos_token
    if leading_special(tokenizer) and isinstance(tokenizer.chat_template, str):
        text = tokenizer.chat_template
        if not re.search(r"\bbos_token\b", text) and bos not in text:
            tokenizer.chat_template = "{{- bos_token }}" + text
    stops = template.ends.findall(template.end)
    if stops and stops[-1] in tokenizer.get_vocab() and stops[-1] != tokenizer.eos_token:
        tokenizer.eos_token = stops[-1]


def the_one(key: str, values: Sequence[Any]) -> Any:
    """Return the one value that the formats of a run have. Raises: ValueError if they differ."""
    if differing := [v for v in values if v != values[0]]:
        raise ValueError(f"a run has one chat template: data.format.{key} is {values[0]} and {differing[0]}")
    return values[0]


def with_values(template: str, values: Mapping[str, Any]) -> str:
    """Return a template with values for its variables, which whoever renders it may still set otherwise.

    They are written into the template, so that the exported model is prompted as it was trained.
    Raises: ValueError for a variable that the template does not read.
    """
    for name in values:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"data.format.template_kwargs.{name} has no effect: the chat template reads no such variable"
            )
    lines = [f"{{%- if {n} is not defined %}}{{% set {n} = {v!r} %}}{{% endif -%}}\n" for n, v in values.items()]
    defaults = "".join(lines)
    return template if defaults in template else defaults + template


def common_start(a: str, b: str) -> str:
    """Return the characters that two texts begin with alike."""
    if a.startswith(b) or b.startswith(a):
        return min(a, b, key=len)
    return a[: next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)]


def special_texts(tokenizer: Any) -> set[str]:
    """Return the texts of all special tokens of a tokenizer."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return {t for t in special | set(tokenizer.all_special_tokens) if t}


def leading_special(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text (its BOS, or nothing)."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    special: Sequence[int] = encoding.special_tokens_mask
    count = special.index(0) if 0 in special else 0
    return list(encoding.ids[:count])
