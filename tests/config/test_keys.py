"""What is typed takes effect: from a key on train's command line to what the run does, in this process.

The expected values are worked out here by hand or with plain torch; nothing is patched.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load

from sftlab import export, preview, train
from sftlab.checkpoints.manifest import Reader
from sftlab.common.run_directory import Claim
from sftlab.config.groups import CONF
from sftlab.config.overrides import inside
from sftlab.config.start import START_TIME
from sftlab.data.template import prepare_tokenizer
from sftlab.parallel.world import world
from sftlab.training.build import Run, build, component
from sftlab.training.preempt import StopSignal
from sftlab.training.rows import preview_parts
from sftlab.training.run import run as run_config
from tests.support import TEXT, byte_tokenizer, make_model_folder, read_jsonl

Files = tuple[Path, Path]
Typed = Callable[..., Path]
BATCH, EXAMPLES = 6, 36  # 12 passages with 3 questions each


def settings(given: tuple[str, ...], model: Path, data: Files) -> list[str]:
    """Return the overrides of a run of one step on a tiny model, without those that are given."""
    rest = {
        "model": "hf",
        "model.name_or_path": model,
        "data": "squad",
        "data.path": data[0],
        "data.val_path": data[1],
        "trainer.batch_size": BATCH,
        "trainer.max_steps": 1,
        "evaluation.num_answers": 0,
        "tracker": "none",
    }
    keys = {a.lstrip("+").partition("=")[0] for a in given}
    if "data" in keys:
        keys |= {"data.path", "data.val_path"}
    return [*(f"{key}={value}" for key, value in rest.items() if key not in keys), *given]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, squad_files: Files) -> Typed:
    """Type `train` with a tiny model in an empty folder; return the directory of the run that it leaves."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Path:
        before = set(tmp_path.rglob("config.yaml"))
        monkeypatch.setattr(sys, "argv", ["sftlab-train", *settings(arguments, model_folder, squad_files)])
        train.main()
        after = sorted(set(tmp_path.rglob("config.yaml")) - before)
        return after[0].parent if after else tmp_path / next(a for a in arguments if "run_dir=" in a).split("=")[1]

    return run


@pytest.fixture
def refused(typed: Typed, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Type `train`, see that it exits with 1; return its error."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            typed(*arguments)
        assert stop.value.code == 1
        return capfd.readouterr().err

    return run


def column(run_dir: Path, name: str) -> dict[int, Any]:
    """Return a metric by step."""
    return {line["step"]: line[name] for line in read_jsonl(run_dir / "metrics.jsonl") if name in line}


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name."""
    entries = Reader(checkpoint).read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if hasattr(e, "size")
    }
    with world():
        load(found, storage_reader=Reader(checkpoint))
    return found


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*"))


def composed(*overrides: str) -> dict[str, Any]:
    """Return the resolved config of `train` with these overrides."""
    OmegaConf.register_new_resolver("inside", inside, replace=True)
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(CONF), version_base="1.3"):
        patch.setenv(START_TIME, "now")
        config = OmegaConf.to_container(compose("train", list(overrides)), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(k): v for k, v in config.items()}


@contextmanager
def built(run_dir: Path, model: Path, data: Files, *overrides: str) -> Iterator[Run]:
    """Yield the parts of a run as `build` wires them from a composed config, in a world of one."""
    config = composed(*settings(overrides, model, data))
    run_dir.mkdir()
    with world() as here, StopSignal(here, "") as stop:
        made = build(config, here, run_dir, Claim(), stop)
        try:
            yield made
        finally:
            made.trainer.checkpoints.close()
            made.trainer.console.close()
            made.trainer.metrics.close()


# The optimiser and the schedule


@pytest.mark.parametrize("clip", [0.05, None], ids=["clipped", "not clipped"])
def test_the_first_update_is_that_of_adamw_with_what_was_typed(
    clip: float | None, typed: Typed, model_folder: Path
) -> None:
    """After one step the moments are those of the clipped gradient alone, so the update can be worked out from them."""
    lr, decay, betas, eps = 0.02, 0.5, (0.7, 0.8), 0.001
    folder = typed(
        "optim.lr=0.02",
        "optim.weight_decay=0.5",
        "optim.betas=[0.7,0.8]",
        "optim.eps=0.001",
        "schedule=constant",
        f"trainer.clip_grad_norm={'null' if clip is None else clip}",
    )
    (norm,) = column(folder, "train/grad_norm").values()
    state = saved(folder / "checkpoints/step_00000001")
    before, after = load_file(model_folder / "model.safetensors"), load_file(folder / "model/model.safetensors")
    squares = 0.0
    for name, weight in before.items():
        first, second = (state[f"optimizer.state.model.{name}.{m}"] for m in ("exp_avg", "exp_avg_sq"))
        gradient = first / (1 - betas[0])
        squares += float(gradient.double().square().sum())
        torch.testing.assert_close(second, (1 - betas[1]) * gradient.square(), rtol=1e-4, atol=1e-12)
        kept = weight * (1 - lr * (decay if "proj" in name else 0.0))
        torch.testing.assert_close(after[name], kept - lr * gradient / (gradient.abs() + eps), rtol=1e-4, atol=1e-6)
    assert norm > 0.2  # or clipping to 0.05 would do nothing
    assert math.sqrt(squares) == pytest.approx(norm if clip is None else clip, rel=1e-4)


WARM = ("schedule.warmup_steps=2", "schedule.final_ratio=0.2")


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        (("schedule=constant", "schedule.warmup_steps=4"), [0.25, 0.5, 0.75, 1, 1, 1]),
        (("schedule=linear", *WARM), [0.5, 1, 1, 0.8, 0.6, 0.4]),
        (("schedule=cosine", *WARM), [0.5, 1, 1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5)]),
        (("schedule=wsd", *WARM, "schedule.decay_ratio=0.5"), [0.5, 1, 1, 1, 1 - 0.8 / 3, 1 - 1.6 / 3]),
    ],
    ids=["constant", "linear", "cosine", "wsd"],
)
def test_the_learning_rate_follows_the_schedule_that_was_typed(
    arguments: tuple[str, ...], factors: list[float], typed: Typed
) -> None:
    steps = ("trainer.max_steps=6", "trainer.batch_size=4")  # an epoch would be 9 steps
    folder = typed(*steps, "model.learning_rate=0.004", "data.val_path=null", *arguments)
    assert list(column(folder, "train/lr").values()) == pytest.approx([0.004 * f for f in factors], rel=1e-9)


# The cadence


def test_steps_are_logged_evaluated_and_saved_as_often_as_typed(typed: Typed) -> None:
    folder = typed(
        "run_dir=mine",
        "trainer.epochs=2",
        "trainer.max_steps=null",
        "trainer.batch_size=8",
        "trainer.log_every=3",
        "trainer.eval_every=4",
        "trainer.save_every=2",
        "trainer.keep_checkpoints=3",
    )
    assert folder.name == "mine" and folder.parent == Path.cwd()
    # 36 examples are 5 steps of at most 8 an epoch.
    assert sorted(column(folder, "train/loss")) == [3, 6, 9, 10]
    assert sorted(column(folder, "val/loss")) == [0, 4, 8, 10]
    assert column(folder, "train/examples")[3] == 8 and not (folder / "samples.jsonl").exists()
    kept = steps_of(folder)
    scores = {step: json.loads((folder / f"checkpoints/step_{step:08d}/checkpoint.json").read_text()) for step in kept}
    assert [s for s in kept if s >= 6] == [6, 8, 10]
    assert {s for s in kept if s < 6} <= {4} and all(scores[s]["score"] is not None for s in (4, 8, 10) if s in kept)


def test_the_default_cadence_is_every_step_and_the_end(typed: Typed) -> None:
    folder = typed("trainer.max_steps=2", "name=mine", "tracker=tensorboard")
    assert folder.parent == Path.cwd() / "runs" / "mine" and (folder / "tensorboard").is_dir()
    assert sorted(column(folder, "train/loss")) == [1, 2] and sorted(column(folder, "val/loss")) == [0, 2]
    assert steps_of(folder) == [2]
    other = typed("trainer.max_steps=1", "run_dir=other", "data.val_path=null", "tracker=none")
    assert not (other / "tensorboard").exists() and column(other, "val/loss") == {}


def test_a_number_that_is_none_is_skipped_as_often_as_typed(typed: Typed, refused: Callable[..., str]) -> None:
    """A learning rate of 1e30 leaves weights whose next loss is no number."""
    wild = ("optim.lr=1e30", "schedule=constant", "trainer.max_steps=3", "data.val_path=null")
    folder = typed(*wild, "trainer.skip_nonfinite=2")
    skipped = json.loads((folder / "summary.json").read_text())["skipped"]
    assert [s["step"] for s in skipped] == [2, 3] and all(len(s["examples"]) == BATCH for s in skipped)
    assert "step 3" in refused(*wild, "run_dir=once", "trainer.skip_nonfinite=1")
    assert "step 2" in refused(*wild, "run_dir=never")


@pytest.mark.parametrize(("typed_value", "steps"), [("continue", 3), ("stop", 2)])
def test_a_save_that_fails_stops_the_run_where_that_was_typed(
    typed_value: str, steps: int, tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    """A file lies where the checkpoints go. The second save finds out that the first has failed."""
    folder = tmp_path / "run"
    cadence = ("trainer.max_steps=3", "trainer.save_every=1", f"run_dir={folder}")
    config = composed(*settings((*cadence, f"trainer.on_failed_save={typed_value}"), model_folder, squad_files))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="could not be written"):
        run_config(config, [])
    assert sorted(column(folder, "train/loss")) == list(range(1, steps + 1))


# Beginning anew and going on


def test_resume_takes_up_another_run_and_resume_anyway_with_other_settings(
    typed: Typed, refused: Callable[..., str]
) -> None:
    first = typed("run_dir=first", "trainer.max_steps=2", "trainer.save_every=1")
    error = refused("run_dir=second", "trainer.max_steps=3", "resume=first")
    assert "trainer.max_steps" in error and "resume_despite_changes=true" in error and not Path("second").exists()
    second = typed("run_dir=second", "trainer.max_steps=3", "resume=first", "resume_despite_changes=true")
    assert sorted(column(second, "train/loss")) == [3]
    third = typed("run_dir=third", "trainer.max_steps=2", "resume=first/checkpoints/step_00000001")
    assert column(third, "train/loss") == {2: column(first, "train/loss")[2]}
    assert "resume=never" in refused("run_dir=first", "trainer.max_steps=2", "resume=never")
    assert "trainer.max_steps" in refused("run_dir=first", "trainer.max_steps=3")


def test_a_resume_with_changed_data_is_refused_unless_it_was_typed(
    typed: Typed, refused: Callable[..., str], squad_files: Files
) -> None:
    path = Path("rows.jsonl").absolute()
    rows = squad_files[0].read_text().splitlines()
    path.write_text("\n".join(rows[:12]))
    same = (f"data.path={path}", "trainer.max_steps=2", "data.val_path=null")
    typed("run_dir=first", *same, "trainer.save_every=1")
    path.write_text("\n".join(rows[3:15]))
    again = ("run_dir=second", *same, "resume=first/checkpoints/step_00000001")
    assert "was made with other data" in refused(*again)
    assert sorted(column(typed(*again, "resume_despite_changes=true"), "train/loss")) == [2]


def test_a_run_that_is_named_its_own_checkpoint_goes_back_to_it(typed: Typed) -> None:
    first = typed("run_dir=first", "trainer.max_steps=3", "trainer.save_every=1", "trainer.keep_checkpoints=3")
    losses = column(first, "train/loss")
    (first / "summary.json").unlink()
    typed("run_dir=first", "trainer.max_steps=3", "resume=first/checkpoints/step_00000001")
    log = (first / "train.log").read_text()
    assert "step_00000001, step 1" in log
    assert log.count("step 2/3") == 2 and log.count("step 1/3") == 1
    assert column(first, "train/loss") == losses


# What evaluation asks


def test_answers_are_as_many_and_as_long_as_typed(typed: Typed, model_folder: Path) -> None:
    tokenizer = byte_tokenizer()
    kinds = {}
    for answers, tokens in ((3, 1), (5, 6)):
        folder = typed(
            f"run_dir=asked{answers}", f"evaluation.num_answers={answers}", f"evaluation.max_new_tokens={tokens}"
        )
        samples = [s for s in read_jsonl(folder / "samples.jsonl") if s["step"] == 0]
        assert len(samples) == answers
        kinds[tokens] = {s["id"]: s["answer"] for s in samples}
    both = set(kinds[1]) & set(kinds[6])
    assert len(both) == 3, "a smaller sample is a part of a larger one"
    assert all(kinds[6][i].startswith(kinds[1][i]) for i in both)
    longest = {n: max(len(tokenizer(a, add_special_tokens=False).input_ids) for a in kinds[n].values()) for n in kinds}
    assert longest[1] <= 1 < longest[6]


# What build wires, seen in the parts


def test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed(
    tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    def first_step(name: str, *overrides: str) -> Any:
        with built(tmp_path / name, model_folder, squad_files, *overrides) as made:
            loader = made.trainer.loader
            return next(iter(loader.steps(1, 1))), loader.plan, made

    step, plan, made = first_step("in order", "data.shuffle=false", "data.layout=padded")
    assert step.indices.tolist() == [0, 1, 2, 3, 4, 5] and step.num_rows == BATCH
    assert sum(len(b.tokens) for b in step.microbatches) == BATCH
    lengths = made.train.lengths
    assert made.trainer.loader.row_layout.row_length == -(-max(lengths.max(), made.val.lengths.max()) // 128) * 128

    step, plan, _ = first_step("grouped", "seed=3", "data.layout=packed", "data.row_length=160")
    assert len(set(plan.groups[step.indices])) == 2, "6 questions on 2 passages"
    widths = [b.tokens.shape[1] for b in step.microbatches]
    assert max(widths) <= 160 and len(widths) == step.num_rows > 1
    grouped = plan.examples(1).tolist()

    step, plan, _ = first_step("mixed", "seed=3", "data.group_by_prefix=false", "data.layout=tree")
    assert len(set(plan.groups[step.indices])) > 2 and step.num_rows == 1
    assert first_step("other seed", "seed=4")[1].examples(1).tolist() != grouped
    assert first_step("same seed", "seed=3")[1].examples(1).tolist() == grouped


def test_rows_of_a_microbatch_are_as_many_as_typed(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    with built(
        tmp_path / "run", model_folder, squad_files, "data.layout=padded", "trainer.rows_per_microbatch=4"
    ) as made:
        step = next(iter(made.trainer.loader.steps(1, 1)))
        assert [len(b.tokens) for b in step.microbatches] == [4, 2]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # the compiler's own, on import
def test_the_models_own_switches_reach_it(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    with built(tmp_path / "plain", model_folder, squad_files) as made:
        weights = made.trainer.scorer.state_dict()
        for name, value in load_file(model_folder / "model.safetensors").items():
            assert torch.equal(weights[f"model.{name}"].to_local(), value)
        assert made.trainer.scorer.model.config._attn_implementation == "sdpa_by_blocks"
        assert made.trainer.base_lrs == [1e-5, 1e-5] and made.trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        assert not torch.are_deterministic_algorithms_enabled()
        names = [type(m).__name__ for m in made.trainer.scorer.modules()]
        assert "CheckpointWrapper" not in names and not made.trainer.loader.row_layout.fixed_shapes
        assert made.trainer.loader.lengths is not None
        assert made.trainer.loader.lengths.tolist() == [len(e) for e in made.train]
    with built(tmp_path / "recomputed", model_folder, squad_files, "trainer.activation_checkpointing=full") as made:
        model = made.trainer.scorer.model
        assert all(type(block).__name__.endswith("CheckpointWrapper") for block in model.model.layers)
        assert all("forward" not in vars(block) for block in model.model.layers)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            built(
                tmp_path / "switched",
                model_folder,
                squad_files,
                "model.attention=sdpa",
                "trainer.compile=true",
                "trainer.deterministic=true",
                "evaluation.num_answers=2",
                "evaluation.batch_size=3",
                "evaluation.max_new_tokens=7",
                "evaluation.gather=false",
            ) as made,
        ):
            model = made.trainer.scorer.model
            assert model.config._attn_implementation == "sdpa"
            assert not [m for m in model.modules() if type(m).__name__.endswith("CheckpointWrapper")]
            assert all("forward" in vars(block) for block in model.model.layers)
            assert made.trainer.loader.row_layout.fixed_shapes
            assert torch.are_deterministic_algorithms_enabled()
            generator = made.trainer.evaluators[1].generator  # type: ignore[attr-defined]
            assert (generator.batch_size, generator.max_new_tokens, generator.gather) == (3, 7, False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_random_weights_are_the_seeds_and_have_the_architecture_typed(
    tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    shape = (
        "{model_type:llama,vocab_size:330,hidden_size:16,intermediate_size:24,num_hidden_layers:3,"
        "num_attention_heads:2,num_key_value_heads:1,max_position_embeddings:512}"
    )

    def embeddings(name: str, *overrides: str) -> torch.Tensor:
        with built(tmp_path / name, model_folder, squad_files, *overrides) as made:
            return made.trainer.scorer.model.get_input_embeddings().weight.to_local().detach().clone()

    given = embeddings("given", "model.init=pretrained", "seed=5")
    drawn = embeddings("drawn", "model.init=random", "seed=5")
    assert given.shape == drawn.shape == (320, 32) and not torch.equal(given, drawn)
    assert torch.equal(embeddings("again", "model.init=random", "seed=5"), drawn)
    assert not torch.equal(embeddings("other", "model.init=random", "seed=6"), drawn)
    assert embeddings("small", "model.init=random", f"model.architecture={shape}").shape == (330, 16)


def test_the_tokenizer_typed_reads_the_data_and_goes_with_the_model(typed: Typed, tmp_path: Path) -> None:
    byte_tokenizer([TEXT], vocab=262).save_pretrained(tmp_path / "bytes")
    usual, other = typed("run_dir=usual"), typed("run_dir=other", "model.tokenizer=bytes")
    tokens = [json.loads((f / "data.json").read_text())["accounts"]["training"][""]["tokens"] for f in (usual, other)]
    assert tokens[1] > 1.2 * tokens[0], "without merges texts have more tokens"
    assert (other / "model/tokenizer.json").read_text() == (tmp_path / "bytes/tokenizer.json").read_text()


def test_computing_in_bfloat16_is_done_told_and_exported(typed: Typed) -> None:
    folder = typed("run_dir=half", "parallel.param_dtype=bfloat16")
    losses = [column(f, "val/loss")[0] for f in (folder, typed("run_dir=whole"))]
    assert 1e-5 < abs(losses[0] - losses[1]) < 0.02, "8 bits of a number are rounded, and no more"
    assert "compute in bfloat16" in (folder / "train.log").read_text()
    assert {t.dtype for t in load_file(folder / "model/model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for n, t in saved(folder / "checkpoints/step_00000001").items() if n.startswith("model.")} == {
        torch.float32
    }


# Which rows


def test_rows_are_read_kept_and_held_out_as_typed(
    tmp_path: Path, model_folder: Path, squad_files: Files, typed: Typed
) -> None:
    rows = read_jsonl(squad_files[0])
    bad = {**rows[3], "answers": {"text": [" "], "answer_start": [0]}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows[:3], bad, *rows[3:]]))
    folder = typed(
        f"data.path={path}",
        "data.val_path=null",
        "data.val_examples=5",
        "data.limit=22",
        "data.on_error=skip",
        "run_dir=some",
    )
    found = json.loads((folder / "data.json").read_text())
    counts = found["accounts"]["training"][""]
    assert counts["rows"] == 22 and counts["skipped"]["count"] == 1 and "rows.jsonl:4" in str(counts["skipped"])
    assert counts["kept"] == 22 - 1 - 6, "5 examples are held out in whole passages of 3"
    assert len(read_jsonl(folder / "skipped.jsonl")) == 1
    assert found["accounts"]["validation"][""]["kept"] == 6


def test_long_examples_are_treated_as_typed(typed: Typed, refused: Callable[..., str]) -> None:
    counts = {}
    for how in ("drop", "truncate"):
        folder = typed(f"run_dir={how}", "data.max_length=86", f"data.overlong={how}")
        counts[how] = json.loads((folder / "data.json").read_text())["accounts"]["training"][""]
    kept, cut = counts["truncate"]["kept"], counts["truncate"]["truncated"]["count"]
    assert counts["drop"]["kept"] == EXAMPLES - 14 and counts["drop"]["truncated"]["count"] == 0
    assert kept == EXAMPLES - 14 + cut and 0 < cut <= 14, "what is cut before its answer teaches nothing"
    assert "14 of 36 examples" in refused("run_dir=error", "data.max_length=86")


# A secret on the command line


def test_a_token_that_is_typed_is_refused_and_nothing_is_written(refused: Callable[..., str], tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 12
    error = refused("run_dir=leaky", f"model.revision={token}")
    assert error.startswith("error: model.revision holds a Hugging Face token") and token not in error
    assert list(tmp_path.iterdir()) == []


# How rows are laid out


def test_rows_are_as_long_and_as_many_as_the_longest_example_asks(
    tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    def parts(*overrides: str) -> Any:
        return preview_parts(composed(*settings(overrides, model_folder, squad_files)), torch.device("cpu"))

    def row_layout(*overrides: str) -> Any:
        return parts(*overrides)[4]

    long = tmp_path / "long.jsonl"  # a validation example of more tokens than any that is trained on
    row = read_jsonl(squad_files[1])[0]
    long.write_text(json.dumps({**row, "context": row["context"] * 9}) + "\n")
    padded = row_layout("data.layout=padded")
    assert (padded.row_length, padded.rows_per_microbatch, padded.fixed_shapes) == (128, 6, False)
    assert (padded.pad_token, padded.rank, padded.num_ranks) == (3, 0, 1)
    _, train_part, val, _, wider = parts("data.layout=padded", f"data.val_path={long}")
    longest = max(len(e) for e in val)
    assert wider.row_length == -(-longest // 128) * 128 > 128 > max(len(e) for e in train_part)
    tree = row_layout("trainer.compile=true")
    assert (tree.row_length, tree.rows_per_microbatch, tree.fixed_shapes) == (4096, 1, True)
    assert row_layout("data.row_length=640").row_length == 640
    assert row_layout("data.row_length=640", "data.layout=padded", "trainer.batch_size=9").rows_per_microbatch == 6
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({**row, "context": row["context"] * 90}) + "\n")
    shape = "{model_type:llama,vocab_size:320,max_position_embeddings:9999}"
    free = ("model.init=random", f"model.architecture={shape}", f"data.val_path={longer}")
    assert row_layout(*free).row_length > 4096 and row_layout(*free).row_length % 128 == 0


def test_no_example_is_longer_than_the_model_and_the_key_allow(
    tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    texts = (
        "data=text",
        lines(tmp_path / "texts.jsonl", {"text": TEXT}, {"text": TEXT[:30]}),
        "data.overlong=truncate",
    )

    def longest(positions: int, *overrides: str) -> int:
        shape = f"{{model_type:llama,vocab_size:320,max_position_embeddings:{positions}}}"
        random = ("model.init=random", f"model.architecture={shape}")
        config = composed(*settings((*random, *texts, *overrides), model_folder, squad_files))
        return max(len(e) for e in preview_parts(config, torch.device("cpu"))[1])

    assert 80 < longest(2048) < 200
    assert longest(70) == longest(70, "data.max_length=75") == 70
    assert longest(2048, "data.max_length=75") == longest(76, "data.max_length=75") == 75


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(refused: Callable[..., str]) -> None:
    shape = "{model_type:llama,vocab_size:319,hidden_size:16,num_attention_heads:2,num_hidden_layers:1}"
    error = refused("model.init=random", f"model.architecture={shape}")
    assert "has 320 tokens, the model embeds 319" in error


def test_rows_are_padded_with_the_first_token_that_is_not_special(
    tmp_path: Path, model_folder: Path, squad_files: Files
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = composed(*settings((f"model.tokenizer={tmp_path / 'tokenizer'}",), model_folder, squad_files))
    made, _, _, _, row_layout = preview_parts(config, torch.device("cpu"))
    assert made.pad_token_id is None and made.all_special_ids == [0, 1] and row_layout.pad_token == 2


# Several sources


def test_a_mixture_is_weighed_cut_and_laid_out_as_typed(
    tmp_path: Path, model_folder: Path, squad_files: Files, typed: Typed
) -> None:
    lines = [{"prompt": f"{word}?", "completion": f" {word * 3}"} for word in ("tea", "rye", "oak", "steps" * 30)]
    for name in ("pairs", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = (
        "data=mixture",
        "~data.sources.gsm8k",
        "+data@data.sources.pairs=prompt_completion",
        f"data.sources.squad.path={squad_files[0]}",
        f"data.sources.squad.val_path={squad_files[1]}",
        f"data.sources.pairs.path={tmp_path / 'pairs.jsonl'}",
        f"data.sources.pairs.val_path={tmp_path / 'held.jsonl'}",
        "data.max_length=90",
        "data.overlong=drop",
    )
    folder = typed(
        *sources, "data.weights={squad:1,pairs:2}", "evaluation.num_answers=2", "evaluation.max_new_tokens=2"
    )
    accounts = json.loads((folder / "data.json").read_text())["accounts"]["training"]
    kept = {name: account["kept"] for name, account in accounts.items()}
    assert set(kept) == {"squad", "pairs"} and kept["pairs"] == 3 and 10 < kept["squad"] < EXAMPLES
    epoch = 3 * kept["squad"]  # squad once, twice as many pairs
    assert f"({-(-epoch // BATCH)} per epoch)" in (folder / "train.log").read_text()
    scores = {name for line in read_jsonl(folder / "metrics.jsonl") for name in line if name.startswith("val/")}
    assert scores >= {"val/loss", "val/squad/exact_match", "val/squad/f1", "val/pairs/exact_match"}
    assert "val/pairs/f1" not in scores, "each source is scored by its own format"

    laid = ("data.layout=packed", "data.row_length=128", "data.shuffle=false", "data.group_by_prefix=true")
    with built(tmp_path / "laid", model_folder, squad_files, *sources, *laid) as made:
        loader = made.trainer.loader
        assert (loader.row_layout.layout, loader.row_layout.row_length) == ("packed", 128)
        assert (loader.plan.shuffle, loader.plan.group_by_prefix) == (False, True)
        assert loader.step(1).indices.tolist() == [0, 1, 2, 3, 4, 5] and len(made.train) == kept["squad"] + 3


# What a row means


def learned(*overrides: str) -> list[tuple[str, int]]:
    """Return the learned text and the prefix group of each training example of a data option."""
    tokenizer = byte_tokenizer()
    data = component("data", composed(*overrides)["data"])
    prepare_tokenizer(tokenizer, list(data.formats.values()))
    examples, _ = data.examples(tokenizer, 2048)
    return [(tokenizer.decode(e.tokens[e.supervised]), e.group) for e in examples]


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def test_the_columns_typed_are_read(tmp_path: Path) -> None:
    rows = [{"q": "ab1", "a": " one", "prompt": "x", "completion": "y"}, {"q": "ab2", "a": " two"}]
    columns = ("data=prompt_completion", "data.format.prompt=q", "data.format.completion=a")
    path = lines(tmp_path / "pairs.jsonl", *rows)
    assert [text for text, _ in learned(*columns, path)] == [" one</s>", " two</s>"]
    assert len({g for _, g in learned(*columns, "data.format.group_chars=2", path)}) == 1
    assert len({g for _, g in learned(*columns, "data.format.group_chars=3", path)}) == 2

    path = lines(tmp_path / "text.jsonl", {"body": "same, one", "text": "no"}, {"body": "same, two", "text": "no"})
    column_of = ("data=text", "data.format.column=body", path)
    assert [text for text, _ in learned(*column_of)] == ["same, one</s>", "same, two</s>"]
    assert len({g for _, g in learned(*column_of, "data.format.group_chars=6")}) == 1
    assert len({g for _, g in learned(*column_of, "data.format.group_chars=7")}) == 2


def test_the_instructions_columns_typed_are_read(tmp_path: Path) -> None:
    row = {"ask": "Add.", "about": "1 and 2", "reply": "3", "instruction": "x", "input": "y", "output": "z"}
    path = lines(tmp_path / "rows.jsonl", row)
    columns = ("data.format.instruction=ask", "data.format.input=about", "data.format.output=reply")
    config = composed("data=instruction", *columns, path)
    tokenizer = byte_tokenizer()
    (example,) = component("data", config["data"]).examples(tokenizer, 2048)[0]
    text = tokenizer.decode(example.tokens)
    assert "Add." in text and "1 and 2" in text and text.endswith("3</s>") and "x" not in text.split("Add.")[1][:9]
    (example,) = component("data", composed("data=instruction", "data.format.input=null", path)["data"]).examples(
        tokenizer, 2048
    )[0]
    assert "Input" not in tokenizer.decode(example.tokens) and tokenizer.decode(example.tokens).endswith("z</s>")
    both, alone = "data.format.with_input='{instruction}, {input}:'", "data.format.without_input='{instruction}:'"
    for typed, prompt in ((both, alone), "x, y:"), ((alone, "data.format.input=null"), "x:"):
        (example,) = component("data", composed("data=instruction", path, *typed)["data"]).examples(tokenizer, 2048)[0]
        assert tokenizer.decode(example.tokens) == f"<s>{prompt}z</s>"


def test_the_names_of_columns_typed_are_read(tmp_path: Path) -> None:
    row = {"passage": "Tea.", "frage": "Why?", "loesung": {"text": ["so"]}, "answers": 3}
    path = lines(tmp_path / "squad.jsonl", row)
    squad = ("data.format.columns.context=passage", "data.format.columns={question:frage,answers:loesung}")
    assert learned("data=squad", path, *squad)[0][0] == " so</s>"
    path = lines(tmp_path / "gsm.jsonl", {"question": "1?", "loesung": "so #### 1"})
    assert learned("data=gsm8k", path, "data.format.columns.answer=loesung")[0][0] == " so #### 1</s>"
    row = {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages": "no"}
    path = lines(tmp_path / "chat.jsonl", row)
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    chat = ("data=chat", f"data.format.template_path={mine}", "data.format.columns.messages=dialog")
    assert learned(*chat, path)[0][0] == "b</s>"
    path = lines(tmp_path / "rest.jsonl", {"p": "a", "c": "b", "prompt": "no", "key": "x", "completion": "no"})
    for typed in (
        ("data=prompt_completion", "data.format.columns={prompt: p, completion: c}"),
        ("data=instruction", "data.format.columns={instruction: p, output: c}"),
        ("data=text", "data.format.columns={text: c}"),
    ):
        assert learned(*typed, path)[0][0].endswith("b</s>")


def test_keys_that_nobody_reads_are_counted_where_that_was_typed(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a", "mood": "sad"}, {"role": "assistant", "content": "b"}]
    path = lines(tmp_path / "chat.jsonl", {"messages": turns})
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    chat = ("data=chat", f"data.format.template_path={mine}", path)
    with pytest.raises(ValueError, match="message 1 has the key 'mood'"):
        learned(*chat)
    assert learned(*chat, "data.unknown=count")[0][0] == "b</s>"


def test_a_wording_of_ones_own_is_made_of_columns(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "qa.jsonl", {"q": "Why?", "a": "So.", "s": "Be brief.", "frage": "Why?", "api": [{"name": "f"}]}
    )
    words = ("data=template", path, "data.format.prompt='Q: {q}, \\'x\\''", "data.format.completion=' {{ a }}'")
    assert [text for text, _ in learned(*words)] == [" So.</s>"]
    assert learned(*words, "data.format.group_chars=1")[0][1] != learned(*words, "data.format.group_chars=9")[0][1]
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ tools }}{{ mood }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}")
    chat = ("data.format.into=chat", f"data.format.template_path={mine}", "data.format.tools=api")
    assert learned(*words, *chat, "data.format.system='{s}'")[0][0] == " So.</s>"
    both = (
        "data.format.messages=[{role: user, content: '{q}'}, {role: assistant, content: '{a}'}, "
        "{role: user, content: more}, {role: assistant, content: '{s}'}]"
    )
    listed = ("data=template", path, both, *chat)
    assert learned(*listed)[0][0] == "So.</s>Be brief.</s>"
    assert learned(*listed, "data.format.supervise=last", "data.format.columns={q: frage}")[0][0] == "Be brief.</s>"
    assert [text for text, _ in learned(*listed, "data.format.turns=apart")] == ["So.</s>", "Be brief.</s>"]


def test_a_conversation_of_ones_own_wording_is_worded_as_one_of_chat(tmp_path: Path) -> None:
    path = lines(tmp_path / "qa.jsonl", {"q": "Why?", "a": "So."})
    mine = tmp_path / "mine.jinja"
    mine.write_text(
        "{{ strftime_now('%Y') }}{{ mood }}{% for m in messages %}[{{ m.role }}]"
        "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}</s>{% endfor %}"
    )
    thought = "'<think>hm</think>{a}'"
    turns = f"data.format.messages=[{{role: user, content: '{{q}}'}}, {{role: assistant, content: {thought}}}]"
    data = ("data=template", path, "data.format.into=chat", f"data.format.template_path={mine}", turns)
    assert learned(*data)[0][0] == "(hm)So.</s>"
    assert learned(*data, "data.format.reasoning=drop")[0][0] == "So.</s>"
    config = composed(*data, "data.format.date=2031-12-31", "data.format.template_kwargs={mood: glad}")
    tokenizer, (example, *_), *_ = preview_parts(config, torch.device("cpu"))
    assert "2031glad[user]Why?" in tokenizer.decode(example.tokens)


def test_the_turns_and_the_template_typed_are_learned(tmp_path: Path) -> None:
    turns = [("user", "one?"), ("assistant", "ONE"), ("user", "two?"), ("assistant", "TWO")]
    path = lines(tmp_path / "chat.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}")
    template = f"data.format.template_path={mine}"
    assert learned("data=chat", path, template)[0][0] == "ONE</s>TWO</s>"
    assert learned("data=chat", path, template, "data.format.supervise=last")[0][0] == "TWO</s>"


def test_conversations_are_worded_as_typed(tmp_path: Path) -> None:
    turns = [("user", "one?"), ("assistant", "ONE"), ("user", "two</s>?"), ("assistant", "TWO")]
    messages: list[dict[str, str]] = [{"role": r, "content": c} for r, c in turns]
    messages[1]["thinking"] = "hm"
    path = lines(tmp_path / "chat.jsonl", {"messages": messages})
    mine = tmp_path / "mine.jinja"
    mine.write_text(
        "{{ strftime_now('%Y') }}{{ mood }}{% for m in messages %}[{{ m.role }}]{% if m.thinking %}({{ m.thinking }})"
        "{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    data = ("data=chat", path, f"data.format.template_path={mine}")
    assert learned(*data)[0][0] == "(hm)ONE</s>TWO</s>"
    assert [text for text, _ in learned(*data, "data.format.turns=apart")] == ["(hm)ONE</s>", "TWO</s>"]
    assert learned(*data, "data.format.reasoning=context")[0][0] == "ONE</s>TWO</s>"
    assert learned(*data, "data.format.reasoning=drop")[0][0] == "ONE</s>TWO</s>"
    with pytest.raises(ValueError, match="holds </s>, which is a control token"):
        learned(*data, "data.control_tokens=error")
    config = composed(*data, "data.format.date=2031-12-31", "data.format.template_kwargs={mood: glad}")
    tokenizer, (example, *_), *_ = preview_parts(config, torch.device("cpu"))
    assert "2031glad[user]one?" in tokenizer.decode(example.tokens)
    with pytest.raises(ValueError, match=r"data\.format\.date=soon: expected YYYY-MM-DD"):
        learned(*data, "data.format.date=soon")
    with pytest.raises(ValueError, match=r"data\.control_tokens=no: expected one of count, error, escape"):
        learned(*data, "data.control_tokens=no")


def test_the_word_typed_is_learned_where_there_is_no_answer(tmp_path: Path) -> None:
    row = {"id": "1", "context": "Tea.", "question": "Why?", "answers": {"text": [], "answer_start": []}}
    path = lines(tmp_path / "rows.jsonl", row)
    assert learned("data=squad", path, "data.format.unanswerable=nobody knows")[0][0] == " nobody knows</s>"
    assert learned("data=squad", path)[0][0] == " unanswerable</s>"


# What comes from the hub


def test_the_hub_is_asked_for_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one border that a test without a network cannot cross: what `datasets` is asked for is written down."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"prompt": "a", "completion": options["split"]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = composed(
        "data=prompt_completion",
        "data.path=somebody/rows",
        "data.split='train[:50%]'",
        "data.subset=easy",
        "data.revision=v2",
        "data.val_split=held",
        "data.num_workers=1",
    )
    train_part, val = component("data", config["data"]).examples(byte_tokenizer(), 99)
    assert asked == [("somebody/rows", "easy", "train[:50%]", "v2"), ("somebody/rows", "easy", "held", "v2")]
    assert val is not None and len(train_part) == len(val) == 1
    assert [byte_tokenizer().decode(p[0].tokens[p[0].supervised]) for p in (train_part, val)] == [
        "train[:50%]</s>",
        "held</s>",
    ]


def test_the_models_revision_typed_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as the hub's client leaves it, with two revisions of one model."""
    from huggingface_hub import constants

    cache = tmp_path / "cache" / "models--somebody--model"
    (cache / "refs").mkdir(parents=True)
    for name, layers in (("main", 1), ("v2", 3)):
        (cache / "refs" / name).write_text(commit := name[0] * 40)
        make_model_folder(cache / "snapshots" / commit, layers=layers)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for chosen, layers in (((), 1), (("model.revision=v2",), 3)):
        model = component("model", composed("model=hf", "model.name_or_path=somebody/model", *chosen)["model"])
        config = model.load_config(torch.device("cpu"))
        assert config.num_hidden_layers == layers
        assert len(model.load_weights(config, 0).model.layers) == layers
        assert model.load_tokenizer().eos_token == "</s>"


# Other commands that take a run's keys, or its checkpoints


def test_preview_draws_the_step_that_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    words = ["first", "keeper", "almond", "Friday", "oven"]
    path = lines(tmp_path / "rows.jsonl", *({"prompt": f"{word}:", "completion": " yes"} for word in words))
    for step in (2, 3, 5):
        more = ("data=prompt_completion", path, "data.shuffle=false", "trainer.batch_size=1", "rows=1", f"step={step}")
        typed = settings(more, model_folder, (tmp_path, tmp_path))
        monkeypatch.setattr(sys, "argv", ["sftlab-preview", *typed])
        preview.main()
        shown = capfd.readouterr().out
        assert [word for word in words if word in shown] == ["first", words[step - 1]]


def test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = typed("run_dir=run", "trainer.max_steps=2", "trainer.save_every=1", "schedule=constant", "optim.lr=0.01")

    def exported(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sftlab-export", "run=run", *arguments])
        export.main()

    exported("step=1", "output=mine", "shard_size=60KB")
    first = {n: t for p in Path("mine").glob("*.safetensors") for n, t in load_file(p).items()}
    assert len(list(Path("mine").glob("*.safetensors"))) > 1 and Path("mine/model.safetensors.index.json").is_file()
    exported()
    last = load_file(folder / "export/step_00000002/model.safetensors")
    assert all(torch.equal(last[n], t) for n, t in load_file(folder / "model/model.safetensors").items())
    assert first.keys() == last.keys() and not any(torch.equal(first[n], last[n]) for n in last)
    exported("dtype=bfloat16", "output=half")
    half = load_file("half/model.safetensors")
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in last.items())
    assert "step 2, bfloat16: half" in capfd.readouterr().out
    Path("notes").mkdir()
    with pytest.raises(SystemExit):
        exported("output=notes")
    assert "is no model folder" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        exported("step=3")
    assert "this run has checkpoints of steps 1, 2" in capfd.readouterr().err


def test_a_sweeps_points_write_what_was_typed_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, squad_files: Files
) -> None:
    monkeypatch.chdir(tmp_path)
    points = ("optim.lr=0.001,0.002", "hydra.sweep.dir=swept", "data.val_path=null")
    monkeypatch.setattr(sys, "argv", ["sftlab-train", "-m", *settings(points, model_folder, squad_files)])
    train.main()
    for num, lr in enumerate((0.001, 0.002)):
        folder = tmp_path / "swept" / str(num)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["run_dir"], config["optim"]["lr"]) == (f"swept/{num}", lr)
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
        assert f"optim.lr={lr}" in overrides and "trainer.max_steps=1" in overrides
    monkeypatch.setattr(sys, "argv", [*sys.argv, "run_dir=elsewhere"])
    with pytest.raises(SystemExit):
        train.main()
    assert not Path("elsewhere").exists()
