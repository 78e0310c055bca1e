"""What an architecture of transformers supports: its attention, its longest text, and the rows that it can take.

Training, the probe, in-run answers and loading for inference all ask here, so that they agree. Nothing is assumed of a
config: Bloom, MPT and Mamba have no `max_position_embeddings`, and Gemma 2 and GPT-OSS (softcap, sinks) have no SDPA.
"""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the check of a config imports this, and these take seconds to import
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Names of model.attention, and transformers' names for them; the first two are ours.
ATTENTIONS = {"flex": "flex_by_reach", "blocks": "sdpa_by_blocks", "sdpa": "sdpa", "eager": "eager"}
# The types of attention layers, and the attribute of a config that limits what each sees.
LAYERS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
NO_LIMIT = 2**31 - 1  # tokens; positions are int32
# Attributes of windows that a model cuts by itself, counting along the row: GPT-Neo's local layers, Doge's mask.
OWN_WINDOWS = ("window_size", "keep_window_size", "attention_window_size", "local_attention")

# Phi-MoE draws among experts whose scores differ by less than this, in training mode only. It is a threshold of the
# routing, not noise to set to 0.
DRAWN_EXPERTS = {"phimoe": "router_jitter_noise"}


def in_layers(config: "PreTrainedConfig", name: str, num_layers: int = 1) -> list[Any]:
    """Return the value of a setting in each layer; None in a layer that does not have it.

    In Gemma 4 heads are wider in some layers than in others, and reading `config.head_dim` raises an error.
    """
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [getattr(config, name, None)] * num_layers


def causal_class(config: "PreTrainedConfig") -> Any:
    """Return transformers' class for a causal language model of this config; None for one with code of its own.

    Raises: ValueError for an architecture that transformers has, but not as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if found is None and type(config).__module__.startswith("transformers."):
        raise ValueError(
            f"{config.name_or_path or 'this model'} is of type {config.model_type}, which transformers does not have "
            "as a causal language model. sftlab trains models that predict the next token of a text: name one in "
            "model.name_or_path"
        )
    return found


def supported(config: "PreTrainedConfig", device: "torch.device") -> list[str]:
    """Return the attentions that an architecture supports on a device, the fastest first.

    Blocks are SDPA's. FlexAttention has no backward on a CPU, and is compiled or it is useless, so it needs Triton.
    Code that comes with a model is expected to take whatever transformers offers.
    """
    from torch.utils._triton import has_triton

    architecture = causal_class(config)

    def has(flag: str) -> bool:
        return architecture is None or bool(getattr(architecture, f"_supports_{flag}", False))

    possible = {
        "flex": device.type == "cuda" and has_triton() and has("flex_attn"),
        "blocks": device.type != "cuda" and architecture is not None and has("sdpa") and has("attention_backend"),
        "sdpa": has("sdpa"),
        "eager": True,
    }
    return [name for name, can in possible.items() if can]


def attention(config: "PreTrainedConfig", device: "torch.device", asked: str = "auto") -> str:
    """Return transformers' name of the attention to train with: the fastest that is supported, or the one asked for.

    Raises: ValueError if that one is not supported here (says why, and which are).
    """
    can = supported(config, device)
    if asked != "auto" and asked not in can:
        why = {
            "flex": "FlexAttention has no backward on a CPU, needs Triton (pip install triton), and transformers must "
            "support it for the architecture",
            "blocks": "it needs a CPU and an architecture whose SDPA transformers lets us replace",
            "sdpa": "transformers has no SDPA for it, which knows neither a softcap nor sinks",
        }[asked]
        raise ValueError(
            f"model.attention={asked} is impossible for {config.model_type} on {device.type}: {why}. Use auto, "
            f"or {' or '.join(can)}"
        )
    return ATTENTIONS[can[0] if asked == "auto" else asked]


def uses_flex(config: "PreTrainedConfig") -> bool:
    """Return whether a model computes its attention by FlexAttention, which wants all rows end to end in one."""
    return bool(config._attn_implementation == ATTENTIONS["flex"])


def cached_attention(config: "PreTrainedConfig") -> str:
    """Return the attention to answer with: a cache grows, so FlexAttention would compile every length."""
    import torch

    return next(name for name in supported(config, torch.device("cpu")) if name in ("sdpa", "eager"))


def longest_text(config: "PreTrainedConfig", tokenizer: Any = None) -> int:
    """Return how many tokens a text may have: the model's positions, else the tokenizer's limit, else NO_LIMIT."""
    text = config.get_text_config()
    for limit in (getattr(text, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)):
        if isinstance(limit, int) and 0 < limit < NO_LIMIT:
            return limit
    return NO_LIMIT


def body(model: "PreTrainedModel") -> "nn.Module":
    """Return the module that makes a model's hidden states: what its `base_model_prefix` names, if that exists.

    Raises: ValueError if no part of the model does that.
    """
    from transformers import PreTrainedModel

    base: nn.Module = model.base_model
    if base is not model:
        return base
    # Llama 4's prefix names nothing.
    parts: list[nn.Module] = [m for m in model.children() if isinstance(m, PreTrainedModel)]
    if len(parts) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(parts)} parts that could make its hidden states: one was expected, with "
            "the head beside it. This model cannot be trained here"
        )
    return parts[0]


def takes_positions(model: "PreTrainedModel") -> bool:
    """Return whether a model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(body(model).forward).parameters


def apart(model: "PreTrainedModel") -> str | None:
    """Return why a model's examples must lie one per row; None if it takes the masks and positions that it is given."""
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS))
    if getattr(model, "_is_stateful", False) and not others:
        return "has layers that carry a state along the row"
    if others:
        return f"has layers of type {', '.join(others)}, which mix the tokens of a row by a rule other than attention"
    if not takes_positions(model):
        return "counts positions by itself, along the row"
    local = "local" in (getattr(config, "attention_layers", None) or ("local",))
    if windows := [key for key in OWN_WINDOWS if getattr(config, key, None) and local]:
        return f"cuts windows by itself, along the row ({windows[0]}={getattr(config, windows[0])})"
    return None
