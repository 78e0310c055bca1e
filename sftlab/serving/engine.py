"""The transformers engine: one model in this process. It answers one request at a time, as a stream of text.

`decode` does the work, so greedy answers are those of `generate` and `evaluate`. Use vLLM for many users at once.
"""

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.models.architecture import longest_text

WAIT_S = 0.2  # seconds between two looks whether anybody still waits for an answer
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders return it for a character whose bytes are incomplete


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last has a `finish_reason` (stop or length) and the number of tokens generated."""

    text: str
    finish_reason: str | None = None
    num_tokens: int = 0


class TooLong(ValueError):
    """A prompt that is longer than any that fits."""


class Engine:
    """A loaded model that generates one answer at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.model = loaded, loaded.scorer.model
        self.longest = longest_text(self.model.config, loaded.tokenizer)
        self.longest_chars = self.longest * max(map(len, loaded.tokenizer.get_vocab()), default=1)
        self.turn = threading.Lock()

    def defaults(self) -> dict[str, Any]:
        """Return the settings of the model's generation_config if it asks for sampling. vLLM uses them too."""
        own = self.model.generation_config
        found = {key: getattr(own, key, None) for key in ("temperature", "top_p", "top_k")}
        return {key: value for key, value in found.items() if value is not None and own.do_sample}

    def check(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens may follow a prompt: as many as asked for, else as the model's own config allows.

        Raises: ValueError if it cannot be answered.
        """
        size = self.model.config.get_text_config().vocab_size
        left = self.longest - len(prompt)
        if not prompt:
            raise ValueError("the prompt is empty")
        if not all(0 <= t < size for t in prompt):
            raise ValueError(f"a token of the prompt is not in the vocabulary, which has {size}")
        if left < 1 or (max_tokens or 0) > left:
            asked = f" and {max_tokens} more are asked for" if max_tokens else ""
            raise ValueError(
                f"the prompt has {len(prompt)} tokens{asked}, but this model's context holds {self.longest}: "
                "shorten the prompt or lower max_tokens"
            )
        own = self.model.generation_config
        most = own.max_new_tokens or (own.max_length and own.max_length - len(prompt)) or left
        return max_tokens or max(1, min(left, most))

    def check_size(self, texts: Sequence[str]) -> None:
        """Raise TooLong for a text that cannot fit the context, whatever its tokens: it is not worth tokenising."""
        longest = max(map(len, texts), default=0)
        if longest > self.longest_chars:
            raise TooLong(
                f"a prompt has {longest:,} characters; this model's context of {self.longest} tokens never holds more "
                f"than {self.longest_chars:,}"
            )

    def answer(
        self, prompt: Sequence[int], how: Sampling, ends: frozenset[int], left: threading.Event | None = None
    ) -> Iterator[Piece]:
        """Yield the answer piece by piece, as it is generated; closing the iterator or setting `left` ends it.

        Raises: ValueError if `check` refuses the prompt.
        """
        room = self.check(prompt, how.max_tokens)
        decoding = DecodingSettings(
            max_new_tokens=room,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            seed=how.seed if how.seed is not None else secrets.randbits(63),
        )
        tokens = _Tokens(left or threading.Event())
        worker = threading.Thread(target=self._generate, args=(prompt, decoding, ends, tokens), daemon=True)
        worker.start()
        try:
            yield from self._pieces(tokens, how.stop, room)
        finally:
            tokens.stopped.set()
            worker.join()

    def _pieces(self, tokens: "_Tokens", stops: Sequence[str], room: int) -> Iterator[Piece]:
        got: list[int] = []
        shown = 0
        for token in tokens:
            got.append(token)
            text = self.loaded.decode_text(got)
            cut = min((at for at in map(text.find, stops) if at >= 0), default=-1)
            if cut >= 0:
                yield Piece(text[shown:cut], "stop", len(got))
                return
            sure = len(text) - held_back(text, stops)
            if not text.endswith(REPLACEMENT) and sure > shown:
                yield Piece(text[shown:sure])
                shown = sure
        ended = len(got) < room  # by a token that is not told, and counts
        yield Piece(self.loaded.decode_text(got)[shown:], "stop" if ended else "length", len(got) + ended)

    def _generate(
        self, prompt: Sequence[int], decoding: DecodingSettings, ends: frozenset[int], tokens: "_Tokens"
    ) -> None:
        while not self.turn.acquire(timeout=WAIT_S):
            if tokens.over:
                return
        try:
            if not tokens.over:
                list(decode(self.loaded.scorer, [np.array(prompt, np.int32)], decoding, ends, on_token=tokens.put))
            tokens.end()
        except Left:
            pass
        except BaseException as error:
            tokens.fail(error)
        finally:
            self.turn.release()


class Left(Exception):
    """Nobody waits for the answer any more."""


class _Tokens:
    """The tokens that another thread generates, as they come. Setting `stopped` or `left` ends the generation."""

    def __init__(self, left: threading.Event) -> None:
        self.queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.stopped, self.left = threading.Event(), left

    @property
    def over(self) -> bool:
        """Whether nobody wants more tokens."""
        return self.stopped.is_set() or self.left.is_set()

    def put(self, _: int, token: int) -> None:
        """Take one more token of the only prompt. Raises: Left if nobody wants it."""
        if self.over:
            raise Left
        self.queue.put(token)

    def end(self) -> None:
        """No more tokens follow."""
        self.queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that reads the tokens."""
        self.queue.put(error)

    def __iter__(self) -> Iterator[int]:
        while not self.left.is_set():
            try:
                item = self.queue.get(timeout=WAIT_S)
            except Empty:  # another answer is being generated
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin a stop. They cannot be shown yet."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
