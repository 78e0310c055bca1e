"""The transformers engine: one model in this process. It answers one request at a time, as a stream of text.

`model.generate` does the work, so greedy answers are the same as its own. Use vLLM for many users at once.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sftlab.inference.loaded_model import LoadedModel

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


class Engine:
    """A loaded model that generates one answer at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.model = loaded, loaded.scorer.model
        self.longest = int(self.model.config.get_text_config().max_position_embeddings)
        self.turn = threading.Lock()

    def defaults(self) -> dict[str, Any]:
        """Return the settings of the model's generation_config if it asks for sampling. vLLM uses them too."""
        own = self.model.generation_config
        found = {key: getattr(own, key, None) for key in ("temperature", "top_p", "top_k")}
        return {key: value for key, value in found.items() if value is not None and own.do_sample}

    def check(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens may follow a prompt. Raises: ValueError if it cannot be answered."""
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
        return max_tokens or left

    def answer(self, prompt: Sequence[int], how: Sampling, ends: frozenset[int]) -> Iterator[Piece]:
        """Yield the answer piece by piece, as it is generated; closing the iterator ends the generation.

        Raises: ValueError if `check` refuses the prompt.
        """
        room = self.check(prompt, how.max_tokens)
        tokens = _Tokens()
        worker = threading.Thread(target=self._generate, args=(prompt, how, room, ends, tokens), daemon=True)
        worker.start()
        try:
            yield from self._pieces(tokens, how.stop, ends)
        finally:
            tokens.stopped.set()
            worker.join()

    def _pieces(self, tokens: "_Tokens", stops: Sequence[str], ends: frozenset[int]) -> Iterator[Piece]:
        got: list[int] = []
        shown, reason = 0, "length"
        for token in tokens:
            got.append(token)
            if token in ends:
                reason = "stop"
                break
            text = self.loaded.decode_text(got)
            cut = min((at for at in map(text.find, stops) if at >= 0), default=-1)
            if cut >= 0:
                yield Piece(text[shown:cut], "stop", len(got))
                return
            sure = len(text) - held_back(text, stops)
            if not text.endswith(REPLACEMENT) and sure > shown:
                yield Piece(text[shown:sure])
                shown = sure
        text = self.loaded.decode_text(got[:-1] if reason == "stop" else got)
        yield Piece(text[shown:], reason, len(got))

    def _generate(
        self, prompt: Sequence[int], how: Sampling, room: int, ends: frozenset[int], tokens: "_Tokens"
    ) -> None:
        sampled: dict[str, Any] = {"do_sample": False}
        if how.temperature > 0:
            sampled = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        pad = self.loaded.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=room,
            eos_token_id=sorted(ends),
            pad_token_id=pad if pad is not None else min(ends, default=0),
            **sampled,
        )
        ids = torch.tensor([list(prompt)], device=self.model.device)
        try:
            with self.turn, torch.random.fork_rng(enabled=how.seed is not None), torch.inference_mode():
                if how.seed is not None:
                    torch.manual_seed(how.seed)
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=tokens,
                    stopping_criteria=StoppingCriteriaList([tokens]),
                )
        except BaseException as error:
            tokens.fail(error)


class _Tokens(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """The tokens that another thread generates, as they come. Setting `stopped` ends the generation."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.stopped = threading.Event()
        self.skipped = False

    def put(self, value: torch.Tensor) -> None:
        """Take tokens from `generate`. Its first call passes the prompt, which is skipped."""
        if self.skipped:
            for token in value.reshape(-1).tolist():
                self.queue.put(int(token))
        self.skipped = True

    def end(self) -> None:
        """No more tokens follow."""
        self.queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that reads the tokens."""
        self.queue.put(error)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        """Return for each row whether to stop."""
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin a stop. They cannot be shown yet."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
