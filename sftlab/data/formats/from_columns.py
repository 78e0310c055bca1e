"""Your own columns and your own wording: templates in the config make a prompt and a completion, or a conversation.

The text goes into the tokenizer's chat template, or stands plain, as it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_of
from functools import cached_property
from typing import Any, ClassVar, Literal

from sftlab.common.values import Count
from sftlab.data.format import Columns, Conversation, Fields, Format, Text, field, id_field
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import GROUP_CHARS
from sftlab.data.wording import Wording

INTO = ("plain", "chat")
KEY = "data.format"


@dataclass(frozen=True)
class FromColumns(Format):
    """`prompt` and `completion`, with `into: chat` perhaps `system` before them; or `messages`, a whole conversation.

    `messages` is a list of {role, content}, where each content is a template, or one template that prints a JSON list.
    `tools` is the name of a column. The settings of Chat that stand here too need `into: chat`.
    """

    message_keys: ClassVar[tuple[str, ...]] = Chat.message_keys

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    messages: str | Sequence[Mapping[str, str]] | None = None
    into: Literal["plain", "chat"] = "plain"
    tools: str | None = None
    supervise: Literal["all", "last"] = "all"
    template_path: str | None = None
    turns: Literal["auto", "together", "apart"] = "auto"
    reasoning: Literal["learn", "context", "drop"] = "learn"
    date: str | None = field_of(default=None, repr=False)  # as in Chat
    group_chars: Count = GROUP_CHARS
    columns: Columns | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.into not in INTO:
            raise ValueError(f"{KEY}.into={self.into}: expected {' or '.join(INTO)}")
        pair = self.prompt is not None and self.completion is not None
        if pair == (self.messages is not None) or (self.prompt is None) != (self.completion is None):
            raise ValueError(
                f"data=template words {KEY}.prompt and {KEY}.completion, or {KEY}.messages: set the pair or the list. "
                f"For example {KEY}.prompt='Question: {{question}} Answer:' {KEY}.completion=' {{answer}}'"
            )
        only_chat: dict[str, Any] = {"system": self.system, "messages": self.messages, "tools": self.tools}
        only_chat |= {"template_path": self.template_path, "date": self.date}
        only_chat["template_kwargs"] = self.template_kwargs
        for name, usual in (("supervise", "all"), ("turns", "auto"), ("reasoning", "learn")):
            only_chat[name] = value if (value := getattr(self, name)) != usual else None
        for name, value in only_chat.items():
            if value is not None and self.into != "chat":
                raise ValueError(f"{KEY}.{name} has no effect on plain text: set {KEY}.into=chat, or leave it out")
        if self.system is not None and self.messages is not None:
            raise ValueError(f"{KEY}.system has no effect beside {KEY}.messages: make it the first of the messages")
        for needed in ("chat", "words"):  # what cannot be is refused at once
            getattr(self, needed)

    @property
    def converses(self) -> bool:  # type: ignore[override]
        """Whether the chat template words the rows."""
        return self.into == "chat"

    @cached_property
    def chat(self) -> Chat:
        """The format of the conversations that are made here."""
        return Chat(self.supervise, self.template_path, self.turns, self.reasoning, self.date)

    @cached_property
    def words(self) -> dict[str, Wording]:
        """The wordings by the name of their setting."""
        given = {"prompt": self.prompt, "completion": self.completion, "system": self.system}
        if isinstance(self.messages, str):
            given["messages"] = self.messages
        else:
            for i, turn in enumerate(self.messages or ()):
                if not isinstance(turn, Mapping) or {"role", "content"} != set(turn):
                    raise ValueError(f"{KEY}.messages[{i}] is {turn!r}: expected {{role: ..., content: a template}}")
                given[f"messages[{i}]"] = turn["content"]
        return {name: Wording(text, f"{KEY}.{name}") for name, text in given.items() if text is not None}

    def to_text(self, fields: Fields) -> Text | Conversation:
        """Return the prompt and the completion, or the conversation."""
        if not self.converses:
            prompt, completion = self.prompt_text(fields), self._completion(fields)
            references = (completion.strip(),)
            return Text(prompt, completion, id_field(fields), prompt[: self.group_chars], references)
        made = {"messages": self._messages(fields), "id": id_field(fields)}
        if self.tools is not None:
            made["tools"] = field(fields, self.tools)
        return self.chat.to_text(made)

    def prompt_text(self, fields: Fields) -> str:
        """Return the prompt, which needs no column of the completion."""
        return super().prompt_text(fields) if self.converses else self.words["prompt"].fill(fields)

    def _completion(self, fields: Fields) -> str:
        completion = self.words["completion"].fill(fields)
        if not completion.strip():
            raise ValueError(f"{KEY}.completion gives an empty text: there is nothing to learn")
        return completion

    def _messages(self, fields: Fields) -> Any:
        if isinstance(self.messages, str):
            text = self.words["messages"].fill(fields)
            try:
                return json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{KEY}.messages must print a JSON list ({error}): it prints {text[:200]!r}") from None
        if self.messages is not None:
            words = [self.words[f"messages[{i}]"].fill(fields) for i in range(len(self.messages))]
            return [{"role": m["role"], "content": text} for m, text in zip(self.messages, words, strict=True)]
        turns = [("user", self.words["prompt"].fill(fields)), ("assistant", self._completion(fields))]
        if self.system is not None:
            turns.insert(0, ("system", self.words["system"].fill(fields)))
        return [{"role": role, "content": text} for role, text in turns]
