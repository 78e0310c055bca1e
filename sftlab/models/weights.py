"""Weights into a sharded scorer, from rank 0's; and out of a checkpoint's files, as a Hugging Face folder."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from sftlab import manifest
from sftlab.distributed import World
from sftlab.manifest import sync
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer

SIDECAR = "hf"  # in a checkpoint: what `describe` wrote, so that it can be exported from nothing else
IN_CHECKPOINT = "model.model."  # the state's model, the scorer's model
GROUP_BYTES = 4 << 30


def fill(scorer: Scorer, load: Callable[[], PreTrainedModel], world: World) -> GenerationConfig | None:
    """Give a sharded scorer without memory the weights and buffers of the model that `load` returns, on rank 0 only.

    Returns that model's own generation config there, None elsewhere: the scorer's is made from the config alone.

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
    return whole.generation_config if whole is not None else None


def describe(scorer: Scorer, tokenizer: Any, folder: Path, generation: GenerationConfig | None = None) -> None:
    """Write all of a Hugging Face folder but the weights: config, generation config, tokenizer.

    `generation` goes before the model's own; it is no part of the model, or it would change a run's answers.
    """
    scorer.model.config.save_pretrained(folder)
    if generation := generation or scorer.model.generation_config:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(
    checkpoint: Path, folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, shard_size: str = "5GB"
) -> None:
    """Write a checkpoint as a folder that `from_pretrained` loads, whole or not at all; in one process, on the host.

    No device sees the model and no rank is asked for anything: the files are read. Host memory is the model in `dtype`
    and `GROUP_BYTES`. A tied weight is written once, under the name that transformers ties the other to.
    Raises: Damaged, naming the files, if the checkpoint is not what was written.
    """
    if wrong := manifest.damage(checkpoint):
        raise manifest.Damaged("\n".join([f"{checkpoint} is damaged:", *wrong]))
    described = checkpoint / SIDECAR
    config = AutoConfig.from_pretrained(described, trust_remote_code=trust_remote_code)
    model = skeleton(config).to(dtype)
    if (described / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(described)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(described, partial)
    model.save_pretrained(partial, state_dict=weights_of(checkpoint, dtype), max_shard_size=shard_size)
    for path in (*partial.iterdir(), partial):
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # at once: to delete it takes a while, in which it would be half there
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def weights_of(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's tensors, whole, on the host, floating-point ones in `dtype`, under transformers' names."""
    entries = manifest.Reader(checkpoint).read_metadata().state_dict_metadata
    waiting = {
        name: entry
        for name, entry in entries.items()
        if name.startswith(IN_CHECKPOINT) and isinstance(entry, TensorStorageMetadata)
    }
    weights: dict[str, torch.Tensor] = {}
    while waiting:
        group: dict[str, Any] = {}
        num_bytes = 0
        while waiting and num_bytes < GROUP_BYTES:
            name, entry = waiting.popitem()
            group[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            num_bytes += group[name].nbytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            load(group, storage_reader=manifest.Reader(checkpoint), planner=manifest.Planner(), no_dist=True)
        for name, value in group.items():
            weights[name.removeprefix(IN_CHECKPOINT)] = value.to(dtype) if value.is_floating_point() else value
    return weights


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters over all ranks; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())
