"""The model of a run: its skeleton, its adapter, spread over the ranks; and what an adapter lies beside."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton

from sftlab.assets import locate
from sftlab.checkpoints.adapter_folder import Base, record
from sftlab.models.adapters import has_adapter
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.division import divide
from sftlab.parallel.fsdp2 import compute_dtype, dtype_named
from sftlab.parallel.tensor import require_plan
from sftlab.parallel.world import World


def sharded(
    parts: Mapping[str, Any],
    model_config: Any,
    world: World,
    compiled: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Scorer:
    """Return the scorer of a model, with its adapter, spread over the ranks; it has no memory yet."""
    if world.tensor > 1:
        require_plan(model_config, world.tensor)
    trained, frozen = dtypes
    model = skeleton(model_config, trained)
    option = parts["model"]
    parts["peft"].adapt(model, base_name_of(option), option.revision, frozen)
    how = {"compile": compiled, "activation_checkpointing": parts["trainer"].activation_checkpointing}
    scorer: Scorer = parts["parallel"](Scorer(model), world, **how)
    return scorer


def divided(config: Mapping[str, Any], world: World) -> World:
    """Return the world as a config divides it. Raises: ValueError if it cannot be."""
    return divide(world, **{key: config["parallel"].get(key, 1) for key in ("replicate", "tensor")})


def dtypes_of(config: Mapping[str, Any], device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of weights that are trained, and of weights that an adapter leaves frozen."""
    trained = dtype_named(config["optim"].get("master_dtype", "float32"))
    return trained, compute_dtype(config["parallel"].get("param_dtype", "auto"), device)


def compiles(setting: bool | str, device: torch.device) -> bool:
    """Return whether the decoder blocks are compiled: as told; for `auto` on CUDA where Triton is installed.

    Raises: ValueError if they should be on CUDA and Triton is not there.
    """
    if setting is True and device.type == "cuda" and not has_triton():
        raise ValueError(
            "trainer.compile=true needs Triton on CUDA, which this Python does not have (pip install triton). Use "
            "trainer.compile=auto or false"
        )
    return setting if isinstance(setting, bool) else device.type == "cuda" and has_triton()


def base_under(parts: Mapping[str, Any], model_config: Any, scorer: Scorer, world: World) -> Base | None:
    """Return what tells the base of an adapter from any other, the same on every rank; None without an adapter."""
    if not has_adapter(scorer.model):
        return None
    option = parts["model"]
    made = (
        record(parts["peft"], base_name_of(option), option.revision, option.weight_files(model_config).values())
        if world.is_main
        else None
    )
    return world.broadcast(made)


def base_name_of(option: Any) -> str:
    """Return where anybody finds the model of an option: a hub id, or the absolute path of a folder."""
    name = locate(option.name_or_path)
    return os.path.abspath(name) if Path(name).is_dir() else name
