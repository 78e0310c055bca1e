"""A trained model with its tokenizer, loaded for inference. generate, evaluate and serve use it.

Text is tokenised as in training: with one BOS if the tokenizer adds one, never two, and without end-of-text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftlab.data.template import rendered
from sftlab.inference.ends import ends_of, special
from sftlab.inference.next_token import Prompt, refuse
from sftlab.inference.trained_model import TrainedModel
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from sftlab.models.vocabulary import check_vocabulary, grow
from sftlab.parallel.fsdp2 import compute_dtype

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class LoadedModel:
    """A scorer for inference, its tokenizer, and the tokens that end a text."""

    scorer: Scorer
    tokenizer: Any
    ends: frozenset[int]

    @classmethod
    def load(cls, trained: TrainedModel, device: torch.device, tokenizer: Any = None) -> "LoadedModel":
        """Return a trained model on `device`, in the default compute dtype there; `tokenizer` replaces its own."""
        tokenizer = tokenizer or trained.load_tokenizer()
        model = trained.load_model(device, compute_dtype("auto", device))
        if trained.option is not None and (new := trained.option.new_rows()):
            grow(model, new)
        check_vocabulary(model.config, tokenizer)
        refuse(model.generation_config)
        scorer = Scorer(model).eval().requires_grad_(False)
        probe(scorer, "padded", device)  # finds out whether prompts can share rows
        return cls(scorer.eval(), tokenizer, ends_of(model.generation_config, tokenizer))

    def encode(self, text: str) -> Prompt:
        """Return the tokens of a prompt that is taken literally."""
        ids = self.tokenizer(text)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[0] == ids[1] == bos:  # the text has a BOS, and the tokenizer added another
            ids = ids[1:]
        if len(ids) > 1 and ids[-1] == eos and self.tokenizer("a")["input_ids"][-1] == eos:
            ids = ids[:-1]  # this tokenizer ends every text; the renderer removes that as well
        return np.array(ids, np.int32)

    def encode_chat(self, messages: Messages) -> Prompt:
        """Return the tokens of a conversation, up to where the assistant's next words begin.

        Raises: ValueError if the tokenizer has no chat template; what `rendered` raises.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this model's tokenizer has no chat template: it was not made for chat. Use prompt= instead"
            )
        text = rendered(self.tokenizer, messages, prompt=True)
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def turn_ends(self) -> frozenset[int]:
        """Return the tokens that end an assistant's turn: those that end a text, and the template's own."""
        mark = "sftlab"
        turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        text = rendered(self.tokenizer, turns)
        closing = self.tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)["input_ids"]
        return self.ends | special(closing[:1], self.tokenizer)

    def decode_text(self, tokens: Sequence[int] | Prompt) -> str:
        """Return tokens as text, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
