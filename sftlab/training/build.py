"""The wiring diagram: from a composed config to the parts of a run. The one place that builds components.

Every node with settings names its constructor (`_target_`), whose signature is its schema. The parts do not know about
configs. They are built in the order in which data flows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.checkpoints.hugging_face import write_all_but_weights
from sftlab.checkpoints.pretrained import fill
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common.files import read_yaml
from sftlab.common.metrics import Metrics
from sftlab.common.run_directory import OVERRIDES, Claim, names
from sftlab.common.secrets import strike_values
from sftlab.common.tracker import About, Background, Tracker
from sftlab.config.binding import check_node, instantiate
from sftlab.data.example_set import ExampleSet
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan
from sftlab.inference.ends import ending, ends_of, learned_ends
from sftlab.inference.next_token import refuse
from sftlab.inference.sharded import Generator
from sftlab.models.neftune import step_noise
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World
from sftlab.reports.command import unquoted
from sftlab.reports.run_report import RunReport
from sftlab.training.draft import Draft, draft
from sftlab.training.ending import Ending
from sftlab.training.laps import Laps
from sftlab.training.preempt import StopSignal
from sftlab.training.profile import Profile
from sftlab.training.sharded_model import base_under
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


def build(
    config: Mapping[str, Any],
    world: World,
    run_dir: Path,
    claim: Claim,
    stop: StopSignal,
    describe: Callable[[Draft], None] = lambda draft: None,
) -> Run:
    """Return the run that a config describes, ready to fit. Collective.

    `describe` is called once all is known and before the weights are read, which can take minutes.
    """
    drafted = draft(config, world, run_dir)
    try:
        describe(drafted)
        return assembled(drafted, config, run_dir, claim, stop)
    except BaseException:
        drafted.console.close()
        raise


def assembled(drafted: Draft, config: Mapping[str, Any], run_dir: Path, claim: Claim, stop: StopSignal) -> Run:
    """Return the run of a draft: its weights are read, and every other part is built."""
    parts, scorer, world, console = drafted.parts, drafted.scorer, drafted.world, drafted.console
    train, val, tokenizer, plan = drafted.train, drafted.val, drafted.tokenizer, drafted.plan
    model, settings, seed = parts["model"], parts["trainer"], config["seed"]
    console.working("weights ...")
    generation = world.broadcast(fill(scorer, model, drafted.model_config, seed, world))
    scorer.model.generation_config = ending(generation, learned_ends(train, tokenizer))
    base = base_under(parts, drafted.model_config, scorer, world)
    console.working("probing the model ...")
    probe(scorer, parts["data"].layout, world.device)
    console.working("")
    optimizer = parts["optim"](scorer)
    max_steps = drafted.max_steps
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
    loader = Loader(train, plan, drafted.row_layout, train.lengths, noise)
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
        evaluators=[] if val is None else evaluate_on(val, parts, scorer, tokenizer, drafted.row_layout, world),
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
            compiled=drafted.compiled,
            evaluates=val is not None,
            halves=settings.rows_per_microbatch == "auto" and world.device.type == "cuda",
        ),
    )
    return Run(trainer, tokenizer, train, val, run_dir)


def about_run(config: Mapping[str, Any], run_dir: Path, max_steps: int, say: Callable[[str], None]) -> About:
    """Return what trackers are told about a run."""
    name, group = names(run_dir)
    typed = read_yaml(run_dir / OVERRIDES)
    pairs = [unquoted(str(o)).lstrip("+~").partition("=") for o in typed] if isinstance(typed, list) else []
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
