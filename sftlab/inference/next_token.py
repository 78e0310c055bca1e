"""The next token: the model's own generation config, then the likeliest token or a draw.

Every way to an answer (in-run answers, generate, evaluate, chat, serve) chooses here, so a `repetition_penalty` in a
model's generation_config.json counts in all of them, and what cannot be done is refused by name in all of them.
transformers' own processors do the work. Source: `GenerationMixin.generate`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sftlab.data.plan import hash64

Prompt = NDArray[np.int32]

# What a generation config may ask for that is not a rule for the next token, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
}
# The rules that vLLM does not read from a generation_config.json; it would answer as if they were not there.
NOT_IN_VLLM: dict[str, tuple[Any, ...]] = REFUSED | {
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}
# How to draw beside temperature, top_k and top_p, where a model's generation config asks for drawing.
DRAWN = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How to decode. Temperature 0 is greedy; `top_k` and `top_p` limit the tokens to sample from (0 and 1: all).

    The noise of a sample depends only on `seed`, the prompt's number and the step, never on the rest of the batch.
    """

    max_new_tokens: int = 256
    batch_size: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} top_k={self.top_k} top_p={self.top_p}: expected temperature and top_k "
                "of at least 0, and top_p above 0 and at most 1"
            )


def refuse(generation: GenerationConfig) -> None:
    """Raise ValueError if a model's generation config asks for something that no way to an answer here does."""
    if found := asked(generation, REFUSED):
        raise ValueError(
            f"the model's generation config asks for {found}, which sftlab does not do: its answers would not be "
            "those of the model elsewhere. Delete it from the generation_config.json of a copy of the model (a run "
            "without answers, evaluation.num_answers=0, trains all the same)"
        )


def refuse_in_vllm(generation: GenerationConfig) -> None:
    """Raise ValueError if a model's generation config asks for something that vLLM would silently leave out."""
    if found := asked(generation, NOT_IN_VLLM):
        raise ValueError(
            f"the model's generation config asks for {found}, which vLLM does not read from there: its answers would "
            "be others. Use engine=transformers, or delete it from the model's generation_config.json"
        )


def asked(generation: GenerationConfig, names: Mapping[str, tuple[Any, ...]]) -> str | None:
    """Return the first of these names, with its value, that a generation config sets to more than nothing."""
    values = {name: getattr(generation, name, None) for name in names}
    found = (f"{name}={value}" for name, value in values.items() if value is not None and value not in names[name])
    return next(found, None)


class NextToken:
    """Chooses the next token of prompts by a model's own generation config and by the settings of a command.

    `ends` are the tokens that end an answer, `longest` is the model's context in tokens.
    Raises: ValueError if the generation config asks for what cannot be done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoding: DecodingSettings,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        ends: frozenset[int],
        longest: int,
    ) -> None:
        self.model: Any = model
        self.decoding, self.prompts, self.numbers = decoding, prompts, numbers
        self.ends, self.longest = ends, longest
        self.own: GenerationConfig = copy.deepcopy(model.generation_config)
        refuse(self.own)
        self.draws = self._processors(self._drawing()) if decoding.temperature > 0 else []
        self.own.do_sample = False
        self.own._eos_token_tensor = torch.tensor(sorted(ends), device=model.device) if ends else None
        self.reads_prompts = bool(self.own.encoder_repetition_penalty or self.own.encoder_no_repeat_ngram_size)
        self.rules = cache(self._rules)
        self.has_rules = self.reads_prompts or bool(self.rules(1, None))

    def room(self, index: int) -> int:
        """Return how many tokens the answer to a prompt may have."""
        return min(self.decoding.max_new_tokens, self.longest - len(self.prompts[index]))

    def __call__(self, logits: Tensor, index: NDArray[np.int64], out: Mapping[int, Sequence[int]]) -> NDArray[np.int64]:
        """Return the next token of each prompt in `index`, (n,), after its answer so far, `out`."""
        if self.has_rules:
            logits = self._ruled(logits, index, out)
        if self.decoding.temperature > 0:
            for draw in self.draws:
                logits = draw(None, logits)
            # If the noise is exponential, argmax of p / noise is a draw from p. Each drawn token has its own generator.
            seeds = [int(hash64(self.decoding.seed, self.numbers[i], len(out[i]))[0] >> 1) for i in index]
            noise = [
                torch.empty(logits.shape[1]).exponential_(generator=torch.Generator().manual_seed(s)) for s in seeds
            ]
            logits = logits.softmax(-1) / torch.stack(noise).to(logits.device)
        chosen: NDArray[np.int64] = logits.argmax(-1).cpu().numpy()
        return chosen

    def _ruled(self, logits: Tensor, index: NDArray[np.int64], out: Mapping[int, Sequence[int]]) -> Tensor:
        """Return the logits as the rules change them: one call for all prompts and answers of the same lengths."""
        groups: dict[tuple[int, int, int | None], list[int]] = {}
        for k, i in enumerate(index.tolist()):
            key = (len(self.prompts[i]), len(out[i]), i if self.reads_prompts else None)
            groups.setdefault(key, []).append(k)
        logits = logits.clone()
        for (length, _, prompt), members in groups.items():
            texts = np.stack([np.concatenate([self.prompts[i], out[i]]) for i in index[members].tolist()])
            tokens = torch.from_numpy(texts.astype(np.int64)).to(logits.device)
            logits[members] = self.rules(length, prompt)(tokens, logits[members])
        return logits

    def _rules(self, length: int, prompt: int | None) -> Any:
        """Return the rules for prompts of a length; for one of them, where rules read the prompt."""
        self.own.max_length = length + min(self.decoding.max_new_tokens, self.longest - length)
        read = None if prompt is None else torch.from_numpy(self.prompts[prompt].astype(np.int64))[None]
        return self._processors(self.own, length, None if read is None else read.to(self.model.device))

    def _drawing(self) -> GenerationConfig:
        own = {name: getattr(self.own, name, None) for name in DRAWN if self.own.do_sample}
        how = self.decoding
        return GenerationConfig(do_sample=True, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, **own)

    def _processors(self, config: GenerationConfig, length: int | None = None, prompt: Tensor | None = None) -> Any:
        return self.model._get_logits_processor(config, length, prompt, device=self.model.device)
