"""The wiring diagram: from a composed config to the parts of a run. The one place that calls hydra.utils.instantiate.

Every node with settings names its constructor (`_target_`), whose signature is its schema. The parts do not know about
configs. They are built in the order in which data flows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch.utils._triton import has_triton

from sftlab.checkpoints.hugging_face import broadcast_weights, write_all_but_weights
from sftlab.checkpoints.save_and_restore import Checkpoints
from sftlab.common.metrics import Metrics
from sftlab.common.run_directory import Claim
from sftlab.config.binding import COMPONENTS, check_node
from sftlab.data.example_set import ExampleSet
from sftlab.data.loader import NUM_LENGTHS, Loader, RowLayout, round_up
from sftlab.data.plan import Plan
from sftlab.data.template import prepare_tokenizer
from sftlab.inference.sharded import Generator
from sftlab.models.attention import expect_shapes
from sftlab.models.load import check_vocabulary, skeleton
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World
from sftlab.training.console import Console
from sftlab.training.preempt import StopSignal
from sftlab.training.throughput import Throughput
from sftlab.training.trainer import Trainer
from sftlab.training.validation import AnswerEvaluator, Evaluator, LossEvaluator, sample

MICROBATCH_TOKENS = 4096  # per rank, unless data.row_length or trainer.rows_per_microbatch says otherwise


def component(path: str, node: Any) -> Any:
    """Return the component that a node of a config describes. `path` is the node's key, such as `data.format`."""
    check_node(path, node)
    return instantiate(node, _convert_="all")


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
    parts = instantiate({name: config[name] for name in COMPONENTS}, _convert_="all")
    model, data, settings, seed = parts["model"], parts["data"], parts["trainer"], config["seed"]
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)

    model_config = model.load_config(world.device)
    tokenizer, train, val = read_data(model, data, model_config)

    scorer = Scorer(skeleton(model_config))
    compiled = compiles(settings.compile, world.device)
    scorer = parts["parallel"](
        scorer, world, compile=compiled, activation_checkpointing=settings.activation_checkpointing
    )
    generation = broadcast_weights(scorer, lambda: model.load_weights(model_config, seed), world)
    probe(scorer, data.layout, world.device)
    optimizer = parts["optim"](scorer)

    row_layout = make_row_layout(data, settings, tokenizer, train, val, world.device, world.rank, world.size)
    if row_layout.fixed_shapes:
        expect_shapes(2 * NUM_LENGTHS)  # each once with gradients, and once without for evaluation
    plan = Plan(train.groups, settings.batch_size, seed, data.shuffle, data.group_by_prefix)
    max_steps = settings.max_steps or settings.epochs * plan.steps_per_epoch

    console = Console(max_steps, run_dir / "train.log" if world.is_main else None, quiet=not world.is_main)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        settings.keep_checkpoints,
        world,
        console.say,
        source=claim.source,
        rewind=claim.rewind,
        identity={"data": train.fingerprint},
        anyway=config.get("resume_despite_changes", False),
        sidecar=partial(write_all_but_weights, scorer, tokenizer, generation=generation),
    )
    trainer = Trainer(
        scorer=scorer,
        optimizer=optimizer,
        schedule=partial(parts["schedule"], total_steps=max_steps),
        loader=Loader(train, plan, row_layout, train.lengths),
        evaluators=[] if val is None else evaluate_on(val, parts, scorer, tokenizer, row_layout, world),
        checkpoints=checkpoints,
        metrics=Metrics(run_dir / "metrics.jsonl", parts["tracker"](run_dir)) if world.is_main else Metrics(None),
        console=console,
        throughput=Throughput(scorer, world),
        world=world,
        settings=settings,
        max_steps=max_steps,
        stop=stop,
    )
    return Run(trainer, tokenizer, train, val, run_dir, data.described_path)


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
    plan = Plan(val.groups, parts["trainer"].batch_size, 0, shuffle=False, group_by_prefix=data.group_by_prefix)
    evaluators: list[Evaluator] = [LossEvaluator(scorer, val, plan, row_layout, world)]
    generator = Generator(scorer, tokenizer, world.device, evaluation.max_new_tokens, evaluation.batch_size)
    for name, part in val.parts.items():
        if answered := sample(part, evaluation.num_answers):
            evaluators.append(AnswerEvaluator(generator, answered, data.formats[name].score, world, name))
    return evaluators


def preview_parts(
    config: Mapping[str, Any], device: torch.device
) -> tuple[Any, ExampleSet, ExampleSet | None, Plan, RowLayout]:
    """Return the tokenizer, the training and validation examples, the plan and the row layout of a one-rank run."""
    parts = instantiate({name: config[name] for name in ("model", "data", "trainer")}, _convert_="all")
    model, data, settings = parts["model"], parts["data"], parts["trainer"]
    tokenizer, train, val = read_data(model, data, model.load_config(device))
    plan = Plan(train.groups, settings.batch_size, config["seed"], data.shuffle, data.group_by_prefix)
    return tokenizer, train, val, plan, make_row_layout(data, settings, tokenizer, train, val, device)


def read_data(model: Any, data: Any, model_config: Any) -> tuple[Any, ExampleSet, ExampleSet | None]:
    """Return the tokenizer, the training and the validation examples, none longer than the model's positions."""
    tokenizer = model.load_tokenizer()
    prepare_tokenizer(tokenizer, list(data.formats.values()))
    check_vocabulary(model_config, tokenizer)
    longest = model_config.get_text_config().max_position_embeddings
    return tokenizer, *data.examples(tokenizer, min(data.max_length or longest, longest))


def compiles(setting: bool | str, device: torch.device) -> bool:
    """Return whether the decoder blocks are compiled: as told; for `auto` on CUDA where Triton is installed."""
    return setting if isinstance(setting, bool) else device.type == "cuda" and has_triton()


def make_row_layout(
    data: Any,
    settings: Any,
    tokenizer: Any,
    train: ExampleSet,
    val: ExampleSet | None,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> RowLayout:
    """Return how the examples of a step become this rank's microbatches."""
    cuda = device.type == "cuda"
    alone = data.layout == "padded"
    longest = round_up(max(int(e.lengths.max()) for e in (train, val) if e is not None), 128)
    length = data.row_length or (longest if alone else max(longest, MICROBATCH_TOKENS))
    return RowLayout(
        layout=data.layout,
        row_length=length,
        rows_per_microbatch=settings.rows_per_microbatch or max(1, MICROBATCH_TOKENS // length if alone else 1),
        rank=rank,
        num_ranks=num_ranks,
        pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        fixed_shapes=cuda or compiles(settings.compile, device),
        pin_memory=cuda,
    )
