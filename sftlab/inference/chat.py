"""Chat: a conversation in the terminal. Answers are shown while they are generated."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import TextStreamer

from sftlab.common.words import plain
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings


def stream(
    loaded: LoadedModel, messages: list[dict[str, str]], decoding: DecodingSettings, show: Callable[[str], None]
) -> str:
    """Return the assistant's next turn; pass its words to `show` as soon as they are complete."""
    streamer = Streamer(loaded.tokenizer, show)
    prompt = loaded.encode_chat(messages)
    ends = loaded.turn_ends()
    ((_, tokens),) = decode(loaded.scorer, [prompt], decoding, ends, on_token=lambda _, token: streamer.add(token))
    streamer.end()
    return loaded.decode_text(tokens)


class Streamer(TextStreamer):  # type: ignore[misc]
    """The streaming detokeniser of transformers, which passes each word to `show` when it is complete."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.show = show

    def add(self, token: int) -> None:
        """Take one more token."""
        import torch

        self.put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show text that will not change any more."""
        self.show(text)


def opening(system: str | None) -> list[dict[str, str]]:
    """Return the messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []


def converse(
    loaded: LoadedModel, lines: Iterable[str], decoding: DecodingSettings, first: Sequence[dict[str, str]]
) -> None:
    """Answer each line until there are no more; `/new` restarts from the first messages, `/exit` ends."""
    messages = list(first)
    for line in lines:
        if line.strip() == "/exit":
            return
        if line.strip() == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = stream(loaded, messages, decoding, show)
        except ValueError as error:
            show(f"{error} (/new starts another conversation)")
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})
        show("\n")


def typed() -> Iterable[str]:
    """Yield the non-empty lines that a person types at a prompt, or that come from a pipe."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def show(text: str) -> None:
    """Print text at once."""
    print(plain(text), end="", flush=True)
