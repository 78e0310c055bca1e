"""The Python interface to a trained model: load what `run=` names, ask it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftlab.config import latest
from sftlab.config.binding import check_node, instantiate
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.prompts import request
from sftlab.inference.trained_model import resolve
from sftlab.parallel.world import device_of

Asked = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Answerer:
    """A trained model on this machine's device, with its tokenizer and its run's text format."""

    def __init__(self, loaded: LoadedModel, format: Any = None) -> None:
        self.loaded = loaded
        self.format = format

    def answer(self, asked: Asked, **decoding: Any) -> str:
        """Return the model's answer to one prompt, row or conversation; `decoding` as for `answers`."""
        return self.answers([asked], **decoding)[0]

    def answers(self, asked: Iterable[Asked], **decoding: Any) -> list[str]:
        """Return an answer for each of what is asked, in its order.

        A text is a prompt, taken literally. A dict holds what the run's text format fills in, a row without its answer.
        A list holds the messages of a chat. `decoding` is max_new_tokens (256), temperature (0: greedy), top_k, top_p,
        seed, batch_size. Raises: ValueError for a chat without a template, or for a row that the format cannot word.
        """
        requests = [request(self.loaded, fields_of(one), self.format) for one in asked]
        ends = self.loaded.turn_ends() if any(r.chat for r in requests) else self.loaded.ends
        settings = DecodingSettings(**decoding)
        found = dict(decode(self.loaded.scorer, [r.tokens for r in requests], settings, ends))
        return [self.loaded.decode_text(found[i]).strip() for i in range(len(requests))]


def fields_of(asked: Asked) -> Mapping[str, Any]:
    """Return what is asked as the fields of a row."""
    if isinstance(asked, str):
        return {"prompt": asked}
    return asked if isinstance(asked, Mapping) else {"messages": list(asked)}


def load(run: str, trust: bool = False) -> Answerer:
    """Return the model that `run` names: a run directory, `latest`, a checkpoint, a model folder or a hub id.

    `trust` lets code run that comes with it (docs/trust.md).
    """
    word, _, name = str(run).partition(":")
    if word == "latest":
        run = str(latest.newest(name or None, latest.NEEDED["generate"]))
    trained = resolve(str(run), trust)
    if trained.format:
        check_node("data.format", trained.format)
    format = instantiate(trained.format) if trained.format else None
    return Answerer(LoadedModel.load(trained, device_of(0)), format)
