"""Weights out: from a checkpoint's files to a Hugging Face folder."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, GenerationConfig

from sftlab.checkpoints import manifest
from sftlab.checkpoints.adapter_folder import Base, write_config, write_weights
from sftlab.common import checksums
from sftlab.common.files import copy_plain, refuse_links, remove, sync, sync_tree
from sftlab.common.progress import note
from sftlab.models.adapters import ADAPTER_CONFIG
from sftlab.models.load import skeleton
from sftlab.models.nf4 import num_weights
from sftlab.models.scorer import Scorer

SIDECAR = "hf"  # folder in a checkpoint with all but the weights, so that an export needs nothing else
IN_CHECKPOINT = "model.model."  # prefix of the model's tensors: `model` of the state, then `model` of the scorer
GROUP_BYTES = 4 << 30


def write_all_but_weights(scorer: Scorer, tokenizer: Any, folder: Path, base: Base | None = None) -> None:
    """Write a Hugging Face folder without the weights: config, generation config, tokenizer; of an adapter its own."""
    if base is not None:
        write_config(scorer.model, base, folder)
    else:
        scorer.model.config.save_pretrained(folder)
    if generation := scorer.model.generation_config:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(
    checkpoint: Path, folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, shard_size: str = "5GB"
) -> None:
    """Write a checkpoint as a folder that `from_pretrained` loads, whole or not at all, in one process on the host.

    It only reads files: no device and no other rank takes part. It needs host memory for the model in `dtype` plus
    `GROUP_BYTES`. A tied weight is written once, under the name to which transformers ties the other. An adapter is
    written in peft's format, in float32.
    Raises: Damaged, naming the files, if the checkpoint is not what was written.
    """
    if wrong := manifest.damage(checkpoint):
        raise manifest.Damaged("\n".join([f"{checkpoint} is damaged:", *wrong]))
    with written_whole(folder) as partial:
        copy_sidecar(checkpoint, partial)  # what the manifest lists, and nothing that was put beside it
        if (partial / ADAPTER_CONFIG).is_file():
            write_weights(weights_of(checkpoint, torch.float32), partial)
            return
        config = AutoConfig.from_pretrained(partial, trust_remote_code=trust_remote_code)
        model = skeleton(config).to(dtype)
        if (partial / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(partial)
        model.save_pretrained(partial, state_dict=weights_of(checkpoint, dtype), max_shard_size=shard_size)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into, which takes the place of `folder` at the end, or never. Checksums are added."""
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)
    partial.mkdir()
    yield partial
    checksums.write(partial)
    sync_tree(partial)
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.is_symlink() or folder.exists():
        folder.rename(old)  # a rename is instant; deleting takes a while, and leaves half a folder meanwhile
    partial.rename(folder)
    sync(folder.parent)
    remove(old)


def copy_sidecar(checkpoint: Path, folder: Path) -> None:
    """Copy the files beside the weights into a folder: those that the checkpoint's manifest lists."""
    for name in manifest.read_manifest(checkpoint)["files"]:
        sidecar, _, inner = name.partition("/")
        if sidecar == SIDECAR and inner:
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            copy_plain(refuse_links(checkpoint, name), folder / inner)


def weights_of(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's whole tensors on the host, by transformers' names; floating-point tensors are in `dtype`."""
    entries = manifest.Reader(checkpoint).read_metadata().state_dict_metadata
    waiting = {
        name: entry
        for name, entry in entries.items()
        if name.startswith(IN_CHECKPOINT) and isinstance(entry, TensorStorageMetadata)
    }
    weights: dict[str, torch.Tensor] = {}
    total = len(waiting)
    while waiting:
        note("weights to export", len(weights), total)
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
    note("weights to export", total, total)
    return weights


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters over all ranks; a shared one counts once."""
    return sum(num_weights(p) for p in module.parameters())
