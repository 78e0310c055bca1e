"""The wiring diagram: from a composed config to the parts of a run. The one place that builds components.

Every node with settings names its constructor (`_target_`), whose signature is its schema. The parts do not know about
configs. They are built in the order in which data flows.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sftlab.checkpoints.hugging_face import write_all_but_weights
from sftlab.checkpoints.pretrained import fill
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common.files import read_yaml
from sftlab.common.metrics import Metrics
from sftlab.common.run_directory import OVERRIDES, Claim, names
from sftlab.common.secrets import strike_values
from sftlab.common.tracker import About, Background, Tracker
from sftlab.config.binding import COMPONENTS, check_node, instantiate
from sftlab.data.example_set import ExampleSet
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.inference.ends import ending, ends_of, learned_ends
from sftlab.inference.next_token import refuse
from sftlab.inference.sharded import Generator
from sftlab.models.neftune import step_noise
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from sftlab.parallel.division import require_rows
from sftlab.parallel.world import World
from sftlab.reports.run_report import RunReport
from sftlab.training.console import Console
from sftlab.training.ending import Ending
from sftlab.training.laps import Laps
from sftlab.training.preempt import StopSignal
from sftlab.training.profile import Profile
from sftlab.training.rows import make_row_layout, read_data
from sftlab.training.sharded_model import base_under, compiles, divided, dtypes_of, sharded
from sftlab.training.throughput import Throughput
from sftlab.training.trainer import Trainer
from sftlab.training.validation import AnswerEvaluator, Evaluator, LossEvaluator, sample
from sftlab.training.warm_up import WarmUp


def component(path: str, node: Any) -> Any:
    """Return the component that a node of a config describes. `path` is the node's key, such as `data.format`."""
    check_node(path, node)
    return instantiate(node)


@dataclass(frozen=True)
class Run:
    """The parts of a run that its start and its end need."""

    trainer: Trainer
    tokenizer: Any
    train: ExampleSet
    val: ExampleSet | None
    run_dir: Path
    data_path: str


def build(config: Mapping[str, Any], world: World, run_dir: Path, claim: Claim, stop: StopSignal) -> Run:
    """Return the run that a config describes, ready to fit. Collective."""
    parts = instantiate({name: config[name] for name in COMPONENTS})
    model, data, settings, seed = parts["model"], parts["data"], parts["trainer"], config["seed"]
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
    generation = world.broadcast(fill(scorer, model, model_config, seed, world))
    scorer.model.generation_config = ending(generation, learned_ends(train, tokenizer))
    base = base_under(parts, model_config, scorer, world)
    probe(scorer, data.layout, world.device)
    optimizer = parts["optim"](scorer)

    joined = model_config._attn_implementation == "flex_attention"
    share = (world.data_rank, world.data_size)
    row_layout = make_row_layout(data, settings, tokenizer, train, val, world.device, *share, joined)
    plan = Plan(train.groups, settings.batch_size, seed, data.shuffle, data.groups_prefixes)
    max_steps = settings.max_steps or settings.epochs * plan.steps_per_epoch

    console = Console(max_steps, run_dir / "train.log" if world.is_main else None, quiet=not world.is_main)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        settings.keep_checkpoints,
        world,
        console.say,
        source=claim.source,
        rewind=claim.rewind,
        identity={"data": train.fingerprint} | ({"base": base.weights} if base else {}),
        anyway=config.get("resume_despite_changes", False),
        sidecar=partial(write_all_but_weights, scorer, tokenizer, base=base),
    )
    alpha = settings.neftune_alpha
    noise = None if alpha is None else partial(step_noise, alpha=alpha, seed=seed)
    loader = Loader(train, plan, row_layout, train.lengths, noise)
    laps = Laps(scorer, optimizer, world.device)
    metrics = Metrics(None)
    if world.is_main:
        about = about_run(config, run_dir, max_steps, console.say)
        metrics = Metrics(run_dir / "metrics.jsonl", start_trackers(parts["tracker"], about))
    around: Callable[[Iterator[Any]], Iterator[Any]] = laps.waited_for
    if settings.profile and world.is_main:
        watched = Profile(run_dir, world.device, console.say).watched
        around = lambda steps: watched(laps.waited_for(steps))  # noqa: E731
    trainer = Trainer(
        scorer=scorer,
        optimizer=optimizer,
        schedule=partial(parts["schedule"], total_steps=max_steps),
        loader=loader,
        evaluators=[] if val is None else evaluate_on(val, parts, scorer, tokenizer, row_layout, world),
        checkpoints=checkpoints,
        metrics=metrics,
        console=console,
        throughput=Throughput(scorer, world, laps),
        world=world,
        settings=settings,
        ending=Ending(
            world=world,
            last_step=max_steps,
            patience=settings.patience,
            max_hours=settings.max_hours,
            saves_best=settings.export == "best",
        ),
        stop=stop,
        around=around,
        warm_up=WarmUp(
            scorer=scorer,
            optimizer=optimizer,
            loader=loader,
            world=world,
            console=console,
            compiled=compiled,
            evaluates=val is not None,
            halves=settings.rows_per_microbatch == "auto" and world.device.type == "cuda",
        ),
    )
    return Run(trainer, tokenizer, train, val, run_dir, data.described_path)


def about_run(config: Mapping[str, Any], run_dir: Path, max_steps: int, say: Callable[[str], None]) -> About:
    """Return what trackers are told about a run."""
    name, group = names(run_dir)
    typed = read_yaml(run_dir / OVERRIDES)
    pairs = [str(o).lstrip("+~").partition("=") for o in typed] if isinstance(typed, list) else []
    chosen = {key: value for key, _, value in pairs if key != "run_dir"}
    return About(run_dir, name, group, strike_values(config), strike_values(chosen), max_steps, say)


def start_trackers(chosen: Any, about: About) -> list[Tracker]:
    """Return the trackers of a run, each in its thread: those of the config, and the one that keeps report.html.

    Raises: ValueError if the config does not name each tracker.
    """
    if not isinstance(chosen, Mapping) or not all(map(callable, chosen.values())):
        raise ValueError(
            "tracker: expected a name for each tracker, as in conf/tracker/tensorboard.yaml: "
            "{tensorboard: {_target_: ..., _partial_: true}}"
        )
    makers = {"report": RunReport, **chosen}
    return [Background(name, partial(make, about), about.say) for name, make in makers.items()]


def evaluate_on(
    val: ExampleSet,
    parts: Mapping[str, Any],
    scorer: Scorer,
    tokenizer: Any,
    row_layout: RowLayout,
    world: World,
) -> list[Evaluator]:
    """Return the evaluators of the validation examples: the loss, and answers to a sample of each source."""
    data, evaluation = parts["data"], parts["evaluation"]
    plan = Plan(val.groups, parts["trainer"].batch_size, 0, shuffle=False, group_by_prefix=data.groups_prefixes)
    evaluators: list[Evaluator] = [LossEvaluator(scorer, val, plan, row_layout, world)]
    if evaluation.num_answers:
        refuse(scorer.model.generation_config)
    ends = ends_of(scorer.model.generation_config, tokenizer)
    how = (evaluation.max_new_tokens, evaluation.batch_size, evaluation.gather)
    generator = Generator(scorer, tokenizer, ends, world, *how)
    for name, part in val.parts.items():
        if answered := sample(part, evaluation.num_answers):
            evaluators.append(AnswerEvaluator(generator, answered, data.formats[name].score, world, name))
    return evaluators
