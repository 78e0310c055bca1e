"""The wiring: each key of a config reaches the part that it is for, off its default. Nothing is trained."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from sftlab.checkpoints.pretrained import allocate
from sftlab.common.run_directory import Claim
from sftlab.common.tracker import Background
from sftlab.data.dataset import Data
from sftlab.data.formats.chat import Chat
from sftlab.data.loader import RowLayout
from sftlab.data.mixture import Mixture
from sftlab.parallel.world import World
from sftlab.training import build as wiring
from sftlab.training.build import Run, build, evaluate_on
from sftlab.training.preempt import StopSignal
from sftlab.training.rows import make_row_layout, preview_parts, read_data
from sftlab.training.validation import AnswerEvaluator, LossEvaluator
from tests.runs import compose
from tests.support import byte_tokenizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ODD = (
    "seed=3", "resume_despite_changes=true", "model.init=random", "tracker=tensorboard",
    "data.layout=packed", "data.row_length=256", "data.group_by_prefix=false", "data.shuffle=false",
    "optim.lr=0.25", "optim.weight_decay=0.5", "optim.betas=[0.5,0.75]", "optim.eps=1e-3",
    "schedule=wsd", "schedule.warmup_steps=2", "schedule.final_ratio=0.2", "schedule.decay_ratio=0.5",
    "parallel.param_dtype=bfloat16",
    "trainer.batch_size=5", "trainer.epochs=3", "trainer.rows_per_microbatch=3", "trainer.clip_grad_norm=0.3",
    "trainer.keep_checkpoints=4", "trainer.activation_checkpointing=full",
    "evaluation.num_answers=7", "evaluation.max_new_tokens=9", "evaluation.batch_size=4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("runs")


@contextmanager
def made(folder: Path, config: dict[str, Any], one: Any, **claim: Any) -> Iterator[Run]:
    """Build a run; close what it opened."""
    folder.mkdir(parents=True)
    found = build(config, one, folder, Claim(**claim), StopSignal(one, "the same command"))
    yield found
    found.trainer.console.close()
    found.trainer.metrics.close()


@pytest.fixture(scope="module")
def odd(run_dirs: Path, model_folder: Path, squad_files: Any, one: Any) -> Iterator[Run]:
    """A run with every setting off its default."""
    config = compose(run_dirs / "odd", model_folder, squad_files, *ODD)
    with made(run_dirs / "odd", config, one, source=Path("/from"), rewind=True) as found:
        yield found


@pytest.fixture(scope="module")
def plain(run_dirs: Path, model_folder: Path, squad_files: Any, one: Any) -> Iterator[Run]:
    """A run of the defaults, without validation; compiled, deterministic, to 4 steps."""
    config = compose(
        run_dirs / "plain", model_folder, squad_files, "trainer.max_steps=4", "trainer.deterministic=true",
        "trainer.compile=true", "data.val_path=null", "trainer.epochs=9",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        with made(run_dirs / "plain", config, one) as found:
            yield found
    torch.use_deterministic_algorithms(False)


def test_the_optimiser_and_its_schedule_have_their_options(odd: Run) -> None:
    trainer = odd.trainer
    assert trainer.base_lrs == [0.25, 0.25]
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.5, 0.0]
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)
    # 36 examples in steps of 5 are 8 steps an epoch: 24, the last 12 of which are the decay.
    assert trainer.ending.last_step == 24
    assert [trainer.schedule(s) for s in (1, 2, 13, 16, 24)] == pytest.approx([0.5, 1, 1, 0.8, 1 - 0.8 * 11 / 12])


def test_the_data_is_dealt_out_and_laid_out_as_it_says(odd: Run, one: Any) -> None:
    loader = odd.trainer.loader
    assert loader.examples is odd.train and len(odd.train) == 36
    assert loader.lengths is not None and loader.lengths.tolist() == [len(e) for e in odd.train]
    plan = loader.plan
    assert (plan.batch_size, plan.seed, plan.shuffle, plan.group_by_prefix) == (5, 3, False, False)
    assert np.array_equal(plan.groups, odd.train.groups)
    assert loader.row_layout == RowLayout("packed", 256, 3, rank=0, num_ranks=1, pad_token=3)


def test_the_seed_decides_the_order_and_the_random_weights(
    odd: Run, run_dirs: Path, model_folder: Path, squad_files: Any, one: Any
) -> None:
    typed = [o for o in ODD if o not in ("seed=3", "data.shuffle=false")]
    config = compose(run_dirs / "seed", model_folder, squad_files, *typed, "seed=4")
    with made(run_dirs / "seed", config, one) as other:
        first, second = (cast(Any, next(r.trainer.scorer.parameters())).full_tensor() for r in (odd, other))
        assert first.shape == second.shape and not torch.equal(first, second)
        plan = other.trainer.loader.plan
        assert plan.seed == 4 and plan.shuffle


def test_the_model_is_computed_in_the_dtype_and_recomputed_as_it_says(odd: Run, plain: Run) -> None:
    for run, expected in ((odd, [torch.bfloat16] * 2), (plain, [torch.float32])):  # once more in backward
        seen: list[torch.dtype] = []
        layer = run.trainer.scorer.model.model.layers[0]
        hook = layer.mlp.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0].dtype))
        with torch.compiler.set_stance("force_eager"):
            run.trainer.backward(run.trainer.loader.step(1).microbatches[0], 1.0)
        assert seen == expected
        hook.remove()
        run.trainer.optimizer.zero_grad()


def test_what_is_evaluated_and_how(odd: Run, one: Any) -> None:
    loss, answers = odd.trainer.evaluators
    assert isinstance(loss, LossEvaluator) and isinstance(answers, AnswerEvaluator)
    assert odd.val is not None and len(odd.val) == 12
    assert loss.examples is odd.val and loss.row_layout is odd.trainer.loader.row_layout
    assert (loss.plan.batch_size, loss.plan.shuffle, loss.plan.group_by_prefix) == (5, False, False)
    assert np.array_equal(loss.plan.groups, odd.val.groups)
    generator = answers.generator
    assert (generator.max_new_tokens, generator.batch_size, generator.gather) == (9, 4, "auto")
    assert generator.world.device == one.device and generator.ends == {1}
    assert generator.tokenizer is odd.tokenizer
    assert loss.scorer is generator.scorer is odd.trainer.scorer
    assert len(answers.examples) == 7 and {e.id for e in answers.examples} <= {e.id for e in odd.val}
    assert answers.source == "" and set(answers.score("tea", ["tea"])) == {"exact_match", "f1"}


def test_what_is_kept_and_where_it_is_written(odd: Run, run_dirs: Path, one: Any) -> None:
    trainer, folder = odd.trainer, run_dirs / "odd"
    kept = trainer.checkpoints
    assert (kept.folder, kept.keep, kept.world) == (folder / "checkpoints", 4, one)
    assert (kept.source, kept.rewind, kept.anyway) == (Path("/from"), True, True)
    assert kept.identity == {"data": odd.train.fingerprint}
    assert kept.sidecar is not None
    kept.sidecar(folder / "described")
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {
        p.name for p in (folder / "described").iterdir()
    }
    kept.say("a word")
    assert "a word" in (folder / "train.log").read_text()
    assert trainer.metrics.path == folder / "metrics.jsonl" and trainer.console.max_steps == 24
    assert [cast(Background, t).name for t in trainer.metrics.trackers] == ["report", "tensorboard"]
    assert (odd.run_dir, trainer.world, trainer.throughput.world) == (folder, one, one)
    assert trainer.settings.clip_grad_norm == 0.3
    assert isinstance(trainer.stop, StopSignal) and trainer.stop.go_on == "the same command"


def test_steps_where_set_decide_alone_and_a_compiled_run_has_fixed_shapes(plain: Run) -> None:
    trainer = plain.trainer
    assert trainer.ending.last_step == trainer.console.max_steps == 4
    assert trainer.schedule(4) == pytest.approx(0.5 * (1 + np.cos(np.pi * 3 / 4))), "of 4 steps"
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert trainer.loader.row_layout.fixed_shapes and not trainer.loader.row_layout.pin_memory
    assert all("forward" in vars(layer) for layer in trainer.scorer.model.model.layers)
    assert trainer.checkpoints.source is None and not trainer.checkpoints.rewind and not trainer.checkpoints.anyway


def test_without_validation_data_nothing_is_evaluated(plain: Run) -> None:
    assert plain.val is None and plain.trainer.evaluators == []


def test_a_rank_that_is_not_the_first_writes_nothing(
    run_dirs: Path, model_folder: Path, squad_files: Any, one: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that it is the second of one."""
    config = compose(run_dirs / "second", model_folder, squad_files, "tracker=tensorboard")
    other = World(1, 1, 0, one.device)
    with pytest.MonkeyPatch.context() as patched:

        def fill(scorer: Any, model: Any, config: Any, seed: int, world: World) -> Any:
            allocate(scorer, world.device)
            return scorer.model.generation_config  # what rank 0 would send

        patched.setattr(wiring, "fill", fill)
        patched.setattr(wiring, "probe", lambda scorer, layout, device: None)
        with made(run_dirs / "second", config, other) as found:
            trainer = found.trainer
            assert list((run_dirs / "second").iterdir()) == []
            assert trainer.metrics.path is None and list(trainer.metrics.trackers) == []
            assert trainer.console.log is None
            trainer.console.say("a word")
            assert capsys.readouterr().out == ""


def test_a_preview_is_of_the_run_that_would_be(odd: Run, run_dirs: Path, model_folder: Path, squad_files: Any) -> None:
    tokenizer, train, val, plan, row_layout = preview_parts(
        compose(run_dirs / "odd", model_folder, squad_files, *ODD), CPU
    )
    assert (len(train), len(val or ())) == (36, 12) and len(tokenizer) == len(odd.tokenizer)
    assert row_layout == odd.trainer.loader.row_layout
    for key in ("batch_size", "seed", "shuffle", "group_by_prefix"):
        assert getattr(plan, key) == getattr(odd.trainer.loader.plan, key)


def test_each_source_of_a_mixture_is_answered_under_its_name_by_its_own_score(one: Any) -> None:
    def part(num: int, references: tuple[str, ...]) -> Any:
        return [SimpleNamespace(references=references, num_prompt=1, tokens=[1]) for _ in range(num)]

    parts = {"b": part(9, ("x",)), "none": part(4, ()), "a": part(2, ("y",))}
    val: Any = SimpleNamespace(parts=parts, groups=np.zeros(15))
    formats = {name: SimpleNamespace(score=f"the score of {name}") for name in parts}
    settings = SimpleNamespace(num_answers=3, max_new_tokens=5, batch_size=6, gather="auto")
    data = SimpleNamespace(groups_prefixes=True, formats=formats)
    given = {"data": data, "evaluation": settings, "trainer": SimpleNamespace(batch_size=4)}
    scorer: Any = SimpleNamespace(model=SimpleNamespace(generation_config=GenerationConfig(eos_token_id=7)))
    row_layout, tokenizer = cast(Any, object()), byte_tokenizer()
    loss, *answers = evaluate_on(val, given, scorer, tokenizer, row_layout, one)
    assert isinstance(loss, LossEvaluator) and (loss.plan.batch_size, loss.plan.group_by_prefix) == (4, True)
    found = [(a.source, a.score, len(a.examples)) for a in answers if isinstance(a, AnswerEvaluator)]
    assert found == [("b", "the score of b", 3), ("a", "the score of a", 2)], "none has no answers to compare with"
    settings.num_answers = 0
    assert len(evaluate_on(val, given, scorer, tokenizer, row_layout, one)) == 1


def laid_out(
    layout: str, longest: tuple[int, int | None] = (200, 90), device: torch.device = CPU, **settings: Any
) -> RowLayout:
    """Return how training and validation examples of these lengths are arranged."""
    train, val = (SimpleNamespace(lengths=np.array([5, n])) if n is not None else None for n in longest)
    data = SimpleNamespace(layout=layout, row_length=settings.pop("row_length", None))
    tokenizer = SimpleNamespace(all_special_ids=settings.pop("special", range(7)))
    chosen = SimpleNamespace(**{"rows_per_microbatch": "auto", "compile": False, "batch_size": 100, **settings})
    joined = chosen.__dict__.pop("joined", False)
    return make_row_layout(data, chosen, tokenizer, cast(Any, train), cast(Any, val), device, 2, 5, joined)


def test_a_packed_microbatch_is_a_row_of_4096_tokens_or_of_the_longest_example() -> None:
    for layout in ("packed", "tree"):
        assert laid_out(layout) == RowLayout(layout, 4096, 1, 2, 5, pad_token=7)
        assert laid_out(layout, (5000, 90)).row_length == 5120  # up to a multiple of 128
        assert laid_out(layout, (90, 5000)).row_length == 5120
        assert laid_out(layout, (5000, None)).row_length == 5120
        assert laid_out(layout, row_length=640).row_length == 640
        assert laid_out(layout, rows_per_microbatch=3).rows_per_microbatch == 3


def test_a_padded_microbatch_is_about_4096_tokens_in_rows_of_the_longest_example() -> None:
    assert laid_out("padded") == RowLayout("padded", 256, 16, 2, 5, pad_token=7)
    assert laid_out("padded", (90, 200)).row_length == 256
    assert laid_out("padded", (300, 90)).rows_per_microbatch == 10  # 384 tokens
    assert laid_out("padded", (9000, 90)).rows_per_microbatch == 1
    assert laid_out("padded", row_length=1000).rows_per_microbatch == 4
    assert laid_out("padded", rows_per_microbatch=2).rows_per_microbatch == 2


def test_shapes_are_fixed_where_they_are_compiled_and_memory_is_pinned_on_a_gpu_only() -> None:
    found = [(a.fixed_shapes, a.pin_memory) for a in (laid_out("tree"), laid_out("tree", compile=True))]
    assert found == [(False, False), (True, False)]
    gpu = laid_out("tree", device=CUDA)
    assert (gpu.fixed_shapes, gpu.pin_memory) == (True, True)


def test_a_gpus_microbatches_begin_at_32768_tokens_and_no_more_than_a_step_has() -> None:
    def rows(layout: str, **given: Any) -> tuple[int, bool]:
        made = laid_out(layout, device=CUDA, **given)
        return made.rows_per_microbatch, made.joined

    assert rows("tree", joined=True) == rows("packed", joined=True) == (8, True)
    assert rows("tree", joined=True, row_length=640) == (20, True), "51 rows would fit, a rank has 20 examples of 100"
    assert rows("tree", joined=True, batch_size=12) == (3, True)
    assert rows("tree", joined=True, rows_per_microbatch=2) == (2, True)
    assert rows("tree") == (1, False), "without FlexAttention a row is paid for whole"
    assert rows("padded", joined=True) == (20, False) and rows("padded", batch_size=1000) == (128, False)


def test_padding_is_the_first_token_that_is_not_special() -> None:
    assert [laid_out("tree", special=ids).pad_token for ids in ([], [0, 2], [5, 1, 0])] == [0, 1, 2]


@pytest.mark.parametrize(("max_length", "expected"), [(None, 2048), (100, 100), (5000, 2048)])
def test_no_example_is_longer_than_the_models_positions(max_length: int | None, expected: int) -> None:
    asked: list[Any] = []

    def examples(tokenizer: Any, most: int) -> tuple[str, str]:
        asked.append((tokenizer.name_or_path, most))
        return "train", "val"

    tokenizer = type("Tokenizer", (), {"name_or_path": "some", "__len__": lambda self: 320})()
    model = SimpleNamespace(load_tokenizer=lambda: tokenizer)
    text = SimpleNamespace(vocab_size=320, max_position_embeddings=2048)
    config = SimpleNamespace(get_text_config=lambda: text)
    data = SimpleNamespace(max_length=max_length, formats={}, examples=examples)
    assert read_data(model, data, config) == (tokenizer, "train", "val")
    assert asked == [("some", expected)]
    text.vocab_size = 319
    with pytest.raises(ValueError, match="has 320 tokens, the model embeds 319"):
        read_data(model, data, config)


def test_the_tokenizer_is_given_the_formats_template_before_anything_is_read(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": said}) + "\n")
    chat = Data(Chat(template_path="asset://chat.jinja"), str(path))
    text = SimpleNamespace(vocab_size=320, max_position_embeddings=2048)
    config = SimpleNamespace(get_text_config=lambda: text)
    for option in (chat, Mixture({"chat": chat})):
        tok, train, _ = read_data(SimpleNamespace(load_tokenizer=byte_tokenizer), option, config)
        assert tok.chat_template and "Yo</s>" in tok.decode(train[0].tokens)


def test_a_component_is_checked_before_it_is_made(caplog: pytest.LogCaptureFixture) -> None:
    node = {"_target_": "sftlab.training.settings.EvaluationSettings", "num_answers": 3}
    with caplog.at_level(logging.ERROR):
        assert wiring.component("evaluation", node).num_answers == 3
        with pytest.raises(ValueError, match=r"^evaluation\.answer: .*did you mean num_answers\?"):
            wiring.component("evaluation", {**node, "answer": 3})
