"""What a run will be, before its weights are read: its model without memory, its data, its plan, its console."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sftlab.checkpoints.hugging_face import parameter_count
from sftlab.config.binding import COMPONENTS, instantiate
from sftlab.data.example_set import ExampleSet
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.data.report import Report, short
from sftlab.models.adapters import has_adapter
from sftlab.models.architecture import uses_flex
from sftlab.models.scorer import Scorer
from sftlab.parallel.division import require_rows
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.parallel.world import World
from sftlab.training.console import Console
from sftlab.training.rows import make_row_layout, read_data
from sftlab.training.sharded_model import compiles, divided, dtypes_of, sharded


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The parts of a run that are known before its weights are; `parts` are the components of its config."""

    parts: Mapping[str, Any]
    model_config: Any
    scorer: Scorer
    compiled: bool
    tokenizer: Any
    train: ExampleSet
    val: ExampleSet | None
    plan: Plan
    row_layout: RowLayout
    max_steps: int
    console: Console
    world: World

    def rows(self) -> Loader:
        """Return the rows of any step, as the run will lay them out."""
        return Loader(self.train, self.plan, self.row_layout, self.train.lengths)


def draft(config: Mapping[str, Any], world: World, run_dir: Path) -> Draft:
    """Return the draft of the run that a config describes. Collective. Reads the data, and no weights."""
    parts = instantiate({name: config[name] for name in COMPONENTS})
    model, data, settings = parts["model"], parts["data"], parts["trainer"]
    world = divided(config, world)
    require_rows(settings.batch_size, world)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's first product raises
        torch.use_deterministic_algorithms(True)
    model_config = model.load_config(world.device)
    compiled = compiles(settings.compile, world.device)
    scorer = sharded(parts, model_config, world, compiled, dtypes_of(config, world.device))
    parts["optim"](scorer)  # refuses what it cannot update, before data and weights are read
    tokenizer, train, val = read_data(model, data, model_config)
    settings.require_validation(val is not None)
    joined = uses_flex(model_config)
    share = (world.data_rank, world.data_size)
    row_layout = make_row_layout(data, settings, tokenizer, train, val, world.device, *share, joined)
    plan = Plan(train.groups, settings.batch_size, config["seed"], data.shuffle, data.groups_prefixes)
    max_steps = settings.max_steps or settings.epochs * plan.steps_per_epoch
    console = Console(max_steps, run_dir / "train.log" if world.is_main else None, quiet=not world.is_main)
    return Draft(
        parts=parts,
        model_config=model_config,
        scorer=scorer,
        compiled=compiled,
        tokenizer=tokenizer,
        train=train,
        val=val,
        plan=plan,
        row_layout=row_layout,
        max_steps=max_steps,
        console=console,
        world=world,
    )


def facts(config: Mapping[str, Any], drafted: Draft, found: Report, run_dir: Path) -> dict[str, str]:
    """Return a description of what will run, by name."""
    plan, here, model = drafted.plan, drafted.world, drafted.scorer.model
    dtype = str(compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device)).removeprefix("torch.")
    data = {"data": drafted.parts["data"].described_path, **short(found)}
    if drafted.val is None:
        data["validation"] = "none (data.val_path, data.val_examples)"
    number = f"{parameter_count(model):,}"
    if has_adapter(model):
        number += f", of which {sum(p.numel() for p in model.parameters() if p.requires_grad):,} are trained"
    return {
        "model": f"{config['model']['name_or_path']} ({type(model).__name__}, {config['model']['init']})",
        "parameters": f"{number}, compute in {dtype}, attention {model.config._attn_implementation}",
        **data,
        "steps": f"{drafted.max_steps:,} of {plan.batch_size} examples ({plan.steps_per_epoch:,} per epoch)",
        "device": f"{here.size} x {here.device.type}" if here.size > 1 else here.device.type,
        "run directory": str(run_dir),
    }
