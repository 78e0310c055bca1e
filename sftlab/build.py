"""The wiring diagram: from a composed config to the parts of a run. The one place that calls hydra.utils.instantiate.

Every node with settings names the constructor it goes to (`_target_`), whose signature is its schema; the parts know
nothing of configs. They are made in the order in which data flows.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate

from sftlab.checkpoint import Checkpoints
from sftlab.command import keys_of_option, nearest, options, unknown_key
from sftlab.console import Console
from sftlab.data.dataset import Examples
from sftlab.data.loader import Arranger, Loader, round_up
from sftlab.data.plan import Plan
from sftlab.distributed import World
from sftlab.evaluation import AnswerEvaluator, Evaluator, LossEvaluator, sample
from sftlab.generation import Generator
from sftlab.metrics import Metrics
from sftlab.models.load import check_vocabulary, skeleton
from sftlab.models.scorer import Scorer
from sftlab.models.weights import fill
from sftlab.throughput import Throughput
from sftlab.trainer import Trainer

COMPONENTS = ("model", "data", "optim", "schedule", "parallel", "tracker", "trainer", "evaluation")
KEYS = (*COMPONENTS, "launcher", "seed", "name", "run_dir", "resume")
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a key or value that no constructor takes, wherever written; builds nothing heavy."""
    for key in config:
        if key not in KEYS:
            raise ValueError(f"{key}: no such key; {nearest(key, KEYS)}".rstrip("; "))
    for name in COMPONENTS:
        check_node(name, config[name])
    for key in config["launcher"] or {}:
        known = {o: keys_of_option("launcher", o) for o in options("launcher")}
        if not any(key in keys and keys <= set(config["launcher"]) for keys in known.values()):
            raise ValueError(unknown_key(f"launcher.{key}", sorted(set().union(*known.values()))))
    instantiate({name: config[name] for name in COMPONENTS}, _convert_="all")  # their own checks of values


def check_node(path: str, node: Any) -> None:
    """Bind a node's keys to the signature of its target, and those of the nodes in it."""
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        signature = inspect.signature(get_object(node["_target_"]))
        taken = signature.parameters
        for key in node:
            if key not in RESERVED and key not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                raise ValueError(
                    f"{path}.{key}: {node['_target_']} takes no such key; {nearest(key, taken)}".rstrip("; ")
                )
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        try:
            bind(**{k: v for k, v in node.items() if k not in RESERVED})
        except TypeError as error:
            raise ValueError(f"{path}: {node['_target_']}: {error}") from None
    for key, value in node.items():
        check_node(f"{path}.{key}", value)


def component(path: str, node: Any) -> Any:
    """Return the one component that a node of a config describes, such as a run's `data.format`; `path` names it."""
    check_node(path, node)
    return instantiate(node, _convert_="all")


@dataclass(frozen=True)
class Run:
    """The parts of a run that its start and its end need."""

    trainer: Trainer
    tokenizer: Any
    train: Examples
    val: Examples | None
    run_dir: Path


def build(config: Mapping[str, Any], world: World, run_dir: Path) -> Run:
    """Return the run that a config describes, ready to fit. Collective."""
    parts = instantiate({name: config[name] for name in COMPONENTS}, _convert_="all")
    model, data, settings, seed = parts["model"], parts["data"], parts["trainer"], config["seed"]
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)

    tokenizer = model.load_tokenizer()
    model_config = model.load_config(world.device)
    check_vocabulary(model_config, tokenizer)
    longest = model_config.get_text_config().max_position_embeddings
    train, val = data.examples(tokenizer, min(data.max_length or longest, longest))

    scorer = Scorer(skeleton(model_config))
    scorer = parts["parallel"](
        scorer, world, compile=settings.compile, activation_checkpointing=settings.activation_checkpointing
    )
    fill(scorer, lambda: model.load_weights(model_config, seed), world)
    optimizer = parts["optim"](scorer)

    length = data.row_length or row_length(train, val, world.device)
    arranger = Arranger(
        layout=data.layout,
        row_length=length,
        rows_per_microbatch=settings.rows_per_microbatch,
        rank=world.rank,
        num_ranks=world.size,
        pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        length_multiple=round_up(length // 8, 128) if settings.compile or world.device.type == "cuda" else 16,
        prediction_multiple=256 if settings.compile else 1,
        pin_memory=world.device.type == "cuda",
    )
    plan = Plan(train.groups, settings.batch_size, seed, data.shuffle, data.group_by_prefix)
    max_steps = settings.max_steps or settings.epochs * plan.steps_per_epoch

    evaluators: list[Evaluator] = []
    if val is not None:
        val_plan = Plan(val.groups, settings.batch_size, 0, shuffle=False, group_by_prefix=data.group_by_prefix)
        evaluators.append(LossEvaluator(scorer, val, val_plan, arranger, world))
        answered = sample(val, parts["evaluation"].answers)
        if answered:
            generator = Generator(
                scorer,
                tokenizer,
                world.device,
                parts["evaluation"].max_new_tokens,
                parts["evaluation"].batch_size,
            )
            evaluators.append(AnswerEvaluator(generator, answered, data.format.score, world))

    trainer = Trainer(
        scorer=scorer,
        optimizer=optimizer,
        schedule=partial(parts["schedule"], total_steps=max_steps),
        loader=Loader(train, plan, arranger),
        evaluators=evaluators,
        checkpoints=Checkpoints(run_dir / "checkpoints", settings.keep_checkpoints, world),
        metrics=Metrics(run_dir / "metrics.jsonl", parts["tracker"](run_dir)) if world.is_main else Metrics(None),
        console=Console(max_steps, run_dir / "train.log" if world.is_main else None, quiet=not world.is_main),
        throughput=Throughput(scorer, world),
        world=world,
        settings=settings,
        max_steps=max_steps,
    )
    return Run(trainer, tokenizer, train, val, run_dir)


def row_length(train: Examples, val: Examples | None, device: torch.device) -> int:
    """Return the row length for `data.row_length=null`: the longest example's, and at least what a device likes.

    On CPU attention is dense, its cost growing with the square of a row's length; on CUDA empty blocks are skipped and
    long rows fill the device.
    """
    longest = max(int(e.lengths.max()) for e in (train, val) if e is not None)
    return max(round_up(longest, 128), 4096 if device.type == "cuda" else 512)
