"""Weights in and out of a sharded scorer: filled from rank 0's, exported as a Hugging Face folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel

from sftlab.distributed import World
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer


def fill(scorer: Scorer, load: Callable[[], PreTrainedModel], world: World) -> None:
    """Give a sharded scorer without memory the weights and buffers of the model that `load` returns, on rank 0 only.

    Buffers that are not saved (rotary tables, float32) are copied too: recomputing them is where AutoModel #2549 went
    wrong. Collective.
    """
    scorer.to_empty(device=world.device)
    scorer.model.tie_weights()  # to_empty gives a shared parameter two memories
    whole = load() if world.is_main else None
    set_model_state_dict(
        scorer.model,
        whole.state_dict() if whole is not None else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    theirs = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in scorer.model.named_buffers():
        if whole is not None:
            buffer.copy_(theirs[name])
        dist.broadcast(buffer, src=0)


def export(scorer: Scorer, tokenizer: Any, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Write the model as a folder that `from_pretrained` loads, whole or not at all. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(scorer.model, options=options)
    if world.is_main:
        model = skeleton(scorer.model.config)
        model.generation_config = scorer.model.generation_config
        model.config.dtype = dtype
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        weights = {k: v.to(dtype) for k, v in state.items() if k not in tied}
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    world.barrier()


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters over all ranks; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())
