"""Weights in and out: from rank 0 into a sharded scorer, and from a checkpoint's files to a Hugging Face folder."""

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

from sftlab.checkpoints import manifest
from sftlab.common.files import sync
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World

SIDECAR = "hf"  # folder in a checkpoint with all but the weights, so that an export needs nothing else
IN_CHECKPOINT = "model.model."  # prefix of the model's tensors: `model` of the state, then `model` of the scorer
GROUP_BYTES = 4 << 30


def broadcast_weights(scorer: Scorer, load: Callable[[], PreTrainedModel], world: World) -> GenerationConfig | None:
    """Fill a sharded scorer that has no memory yet with the weights and buffers of a model that rank 0 loads.

    Returns that model's own generation config on rank 0, None elsewhere: the scorer's is made from the config alone.

    Buffers that are not saved (rotary tables, float32) are copied too, because recomputing them went wrong in AutoModel
    #2549. Collective.
    """
    scorer.to_empty(device=world.device)
    scorer.model.tie_weights()  # to_empty allocates a shared parameter twice
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


def write_all_but_weights(
    scorer: Scorer, tokenizer: Any, folder: Path, generation: GenerationConfig | None = None
) -> None:
    """Write a Hugging Face folder without the weights: config, generation config, tokenizer.

    `generation` replaces the model's own config. It is not set on the model, where it would change a run's answers.
    """
    scorer.model.config.save_pretrained(folder)
    if generation := generation or scorer.model.generation_config:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(
    checkpoint: Path, folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, shard_size: str = "5GB"
) -> None:
    """Write a checkpoint as a folder that `from_pretrained` loads, whole or not at all, in one process on the host.

    It only reads files: no device and no other rank takes part. It needs host memory for the model in `dtype` plus
    `GROUP_BYTES`. A tied weight is written once, under the name to which transformers ties the other.
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
        folder.rename(old)  # a rename is instant; deleting takes a while, and leaves half a folder meanwhile
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def weights_of(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's whole tensors on the host, by transformers' names; floating-point tensors are in `dtype`."""
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
            warnings.filterwarnings(
                "ignore", message="torch.distributed is disabled"
            )  # loading without process groups is intended
            load(group, storage_reader=manifest.Reader(checkpoint), planner=manifest.Planner(), no_dist=True)
        for name, value in group.items():
            weights[name.removeprefix(IN_CHECKPOINT)] = value.to(dtype) if value.is_floating_point() else value
    return weights


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters over all ranks; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())
