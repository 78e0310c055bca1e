"""Loading: turns a model option into a tokenizer, a config and weights, from the hub, a folder or nothing at all.

Rank 0 reads the weights with transformers, which knows every checkpoint's conversions. The model that is sharded is
made without memory ("meta") on every rank and filled from rank 0. So one code path serves every world size, and a host
holds one copy, however many ranks it runs.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sftlab.assets import locate
from sftlab.common.hub import explain

if TYPE_CHECKING:  # a sweep constructs the Model of every point at submission, and transformers takes 2 s to import
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

DEMO = "asset://demo/model"
INITS = ("pretrained", "random")
ATTENTIONS = {"flex": "flex_attention", "blocks": "sdpa_by_blocks", "sdpa": "sdpa"}  # transformers' names


@dataclass(frozen=True)
class Model:
    """One model option.

    `architecture` is the shape (a transformers config) that init=random builds without a network. The model
    fine-tunes well with `learning_rate`, which is the default of `optim.lr`.
    """

    name_or_path: str
    learning_rate: float = 1e-5
    tokenizer: str | None = None
    init: str = "pretrained"
    attention: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    architecture: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"model.init={self.init}: expected {' or '.join(INITS)}")
        if self.attention not in ("auto", *ATTENTIONS):
            raise ValueError(f"model.attention={self.attention}: expected auto, flex, blocks or sdpa")

    def load_tokenizer(self) -> Any:
        """Return the tokenizer; without a network an untrained hub model uses the demo's tokenizer, with a warning."""
        from transformers import AutoTokenizer

        name = self.tokenizer or self.name_or_path
        try:
            return AutoTokenizer.from_pretrained(locate(name), **self._hub())
        except Exception as error:
            if self.init == "random" and self.tokenizer is None and self.architecture is not None:
                log.warning(
                    "the tokenizer of %s cannot be loaded here; using the demo's (model.tokenizer= names another)", name
                )
                return AutoTokenizer.from_pretrained(locate(DEMO))
            raise explain(
                error, name, "tokenizer", "model.tokenizer" if self.tokenizer else "model.name_or_path"
            ) from error

    def load_config(self, device: torch.device) -> "PreTrainedConfig":
        """Return the config with the chosen attention, and no dropout: it would make the loss depend on layout."""
        from transformers import AutoConfig

        if self.init == "random" and self.architecture is not None:
            config = AutoConfig.for_model(**self.architecture)
        else:
            try:
                config = AutoConfig.from_pretrained(locate(self.name_or_path), **self._hub())
            except Exception as error:
                raise explain(error, self.name_or_path, "model", "model.name_or_path") from error
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if self.attention == "flex" and device.type != "cuda":
            raise ValueError("model.attention=flex needs CUDA: FlexAttention has no backward on CPU. Use auto or sdpa")
        if self.attention == "blocks" and best_attention(config, device) != "blocks":
            raise ValueError(
                "model.attention=blocks needs a CPU and an architecture whose SDPA transformers lets us replace; "
                f"this is {config.model_type} on {device.type}. Use auto"
            )
        chosen = best_attention(config, device) if self.attention == "auto" else self.attention
        config._attn_implementation = ATTENTIONS[chosen]
        return config

    def load_weights(self, config: "PreTrainedConfig", seed: int) -> "PreTrainedModel":
        """Return the whole model on the host in float32: pretrained, or initialised from `seed`."""
        from transformers import AutoModelForCausalLM

        if self.init == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        try:
            return AutoModelForCausalLM.from_pretrained(
                locate(self.name_or_path), config=config, dtype=torch.float32, **self._hub()
            )
        except Exception as error:
            raise explain(error, self.name_or_path, "model", "model.name_or_path") from error

    def _hub(self) -> dict[str, Any]:
        if self.trust_remote_code:
            log.warning("model.trust_remote_code=true: code from %s will run on this machine", self.name_or_path)
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}


def skeleton(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return the model without memory, in float32 and in training mode."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def best_attention(config: "PreTrainedConfig", device: torch.device) -> str:
    """Return the fastest attention that transformers supports for the architecture (GPT-2 has no FlexAttention)."""
    from transformers import AutoModelForCausalLM

    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if device.type == "cuda":
        return "flex" if getattr(architecture, "_supports_flex_attn", True) else "sdpa"
    needed = ("_supports_sdpa", "_supports_attention_backend")
    return "blocks" if all(getattr(architecture, flag, False) for flag in needed) else "sdpa"


def check_vocabulary(config: "PreTrainedConfig", tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has tokens that the model has no embedding for."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model embeds {size}: they do not "
            "belong together (see model.tokenizer)"
        )
