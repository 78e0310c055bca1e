"""Parts that look into a run: equal layouts, isolated documents, a bit-equal resume, the cost of saves and answers."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.gpu.bench import Bench, built, run_command, synchronise
from sftlab.data.batch import Batch
from sftlab.data.forest import LAYOUTS
from sftlab.parallel.world import local_part, world
from sftlab.training.trainer import Trainer
from sftlab.training.warm_up import reserved

SAME = 1e-5  # relative, in float32
GIVE_UP_ROWS = 4096


def batch_size(bench: Bench, large: int) -> str:
    """Return the override of a batch of `large` examples; of 8 in a tiny form."""
    return f"trainer.batch_size={8 if bench.tiny else large}"


def equality(bench: Bench) -> dict[str, Any]:
    """Compare the loss and the whole gradient of the first step over layouts, in float32 and in bfloat16."""
    found: dict[str, Any] = {}
    with world() as here:
        for dtype in ("float32", "bfloat16"):
            losses, gradients = {}, {}
            for layout in LAYOUTS:
                typed = [*bench.small_model, *bench.squad, batch_size(bench, 32), "trainer.compile=false"]
                typed += [f"data.layout={layout}", f"parallel.param_dtype={dtype}"]
                with built(here, bench.fresh(f"equality_{dtype}_{layout}"), *typed) as made:
                    losses[layout], gradients[layout] = first_gradient(made.trainer)
            found[dtype] = {
                "loss": losses,
                "loss_apart": max(abs(loss / losses["padded"] - 1) for loss in losses.values()),
                "gradient_apart": max(apart(g, gradients["padded"]) for g in gradients.values()),
            }
    exact = found["float32"]
    return {**found, "same": exact["loss_apart"] < SAME and exact["gradient_apart"] < 10 * SAME}


def first_gradient(trainer: Trainer) -> tuple[float, list[torch.Tensor]]:
    """Return the loss of step 1 and its gradient."""
    step = trainer.loader.step(1)
    total = 0.0
    for batch in step.microbatches:
        nll = trainer.scorer(batch.to(trainer.world.device)).nll
        (nll / step.num_targets).backward()
        total += float(nll.detach()) / step.num_targets
    return total, [local_part(p.grad).detach() for p in trainer.scorer.parameters() if p.grad is not None]


def apart(gradient: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Return the distance of two gradients, relative to the length of the second."""
    pairs = list(zip(gradient, reference, strict=True))
    distance = math.hypot(*(float((a.double() - b.double()).norm()) for a, b in pairs))
    return distance / math.hypot(*(float(b.double().norm()) for _, b in pairs))


def said_equality(v: Mapping[str, Any]) -> str:
    """Return the differences in one line."""
    each = (
        f"{d}: loss {v[d]['loss_apart']:.1e}, gradient {v[d]['gradient_apart']:.1e}" for d in ("float32", "bfloat16")
    )
    return f"relative differences, {'; '.join(each)}"


def isolation(bench: Bench) -> dict[str, Any]:
    """Edit a document, then a branch, in bfloat16; see that no hidden state outside of it changes by a bit."""
    found: dict[str, Any] = {}
    with world() as here:
        for layout in ("packed", "tree"):
            typed = [*bench.small_model, *bench.squad, batch_size(bench, 32), f"data.layout={layout}"]
            typed += ["parallel.param_dtype=bfloat16", "trainer.compile=false"]
            with built(here, bench.fresh(f"isolation_{layout}"), *typed) as made:
                found[layout] = edited(made.trainer, made.trainer.loader.step(1).microbatches[0].to(here.device))
                found["attention"] = made.trainer.scorer.model.config._attn_implementation
    same = all(found[layout]["outside"] == 0 and found[layout]["inside"] > 0 for layout in ("packed", "tree"))
    return {**found, "same": same}


@torch.no_grad()
def edited(trainer: Trainer, batch: Batch) -> dict[str, int]:
    """Return how many hidden states changed outside and inside of the second branch of the first row, when edited."""
    depth, reach = batch.position[0], batch.reach[0]
    jumps = (depth[1:] != depth[:-1] + 1).nonzero().flatten() + 1  # where a document or a branch begins
    start = int(jumps[0])
    end = int(reach[start])
    tokens = batch.tokens.clone()
    tokens[0, start:end] = tokens[0, start:end].roll(1) ^ 1
    before, after = (
        trainer.scorer(b, inside=lambda scorer, given: scorer.hidden(given))
        for b in (batch, replace(batch, tokens=tokens))
    )
    changed = (before != after).any(-1)
    return {
        "tokens": end - start,
        "inside": int(changed[start:end].sum()),
        "outside": int(changed.sum() - changed[start:end].sum()),
    }


def said_isolation(v: Mapping[str, Any]) -> str:
    """Return the changed states in one line."""
    each = (
        f"{k}: {v[k]['outside']} of the states outside changed, {v[k]['inside']} of {v[k]['tokens']} inside"
        for k in ("packed", "tree")
    )
    return f"{'; '.join(each)} ({v['attention']})"


def resume(bench: Bench) -> dict[str, Any]:
    """Train 6 steps, and from the checkpoint of step 3 the last 3 again; compare metrics and weights bit by bit."""
    whole, again = bench.fresh("resume_whole"), bench.fresh("resume_again")
    typed = [*bench.small_model, *bench.squad, batch_size(bench, 64), "trainer.max_steps=6", "trainer.save_every=3"]
    typed += ["trainer.deterministic=true", "trainer.compile=false", "tracker=none"]
    before = torch.are_deterministic_algorithms_enabled()
    try:
        run_command("train", *typed, f"run_dir={whole}")
        run_command("train", *typed, f"run_dir={again}", f"resume={whole}/checkpoints/step_00000003")
    finally:
        torch.use_deterministic_algorithms(before)
    steps = [numbers(whole), numbers(again)]
    apart = [step for step in (4, 5, 6) if steps[0][step] != steps[1][step]]
    weights = all(
        file.read_bytes() == (again / "model" / file.name).read_bytes()
        for file in (whole / "model").glob("*.safetensors")
    )
    return {
        "steps_apart": apart,
        "weights_equal": weights,
        "same": weights and not apart and sorted(steps[1]) == [4, 5, 6],
    }


def numbers(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the training metrics of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("train/")}
        for line in lines
        if "train/loss" in line
    }


def said_resume(v: Mapping[str, Any]) -> str:
    """Return in words whether the resume was bit-equal."""
    return (
        "metrics and weights bit-equal"
        if v["same"]
        else f"steps apart: {v['steps_apart']}, weights equal: {v['weights_equal']}"
    )


def save(bench: Bench) -> dict[str, Any]:
    """Return what a save costs the loop: the call, and what the steps beside its writing lose."""
    num = 4
    with world() as here:
        typed = [*bench.model, *bench.squad, batch_size(bench, 64), "trainer.compile=false", "trainer.max_steps=20"]
        with built(here, bench.fresh("save"), *typed) as made:
            trainer = made.trainer
            trainer.warm_up()
            coming = trainer.loader.steps(1, 3 + 2 * num)
            alone = [timed(lambda s=s: trainer.train_step(s, next(coming))) for s in range(1, 4 + num)][3:]
            last = 3 + num
            call_s = timed(
                lambda: trainer.checkpoints.save(last, trainer.scorer, trainer.optimizer, trainer.progress(last))
            )
            beside = [timed(lambda s=s: trainer.train_step(s, next(coming))) for s in range(last + 1, last + 1 + num)]
            written_s = timed(trainer.checkpoints.wait)
    slower_s = sum(beside) - num * statistics.median(alone)
    return {
        "stall_s": call_s + max(0.0, slower_s),
        "call_s": call_s,
        "step_s": statistics.median(alone),
        "rest_s": written_s,
    }


def timed(act: Any) -> float:
    """Return the seconds that a call takes, the device's work included."""
    synchronise()
    began_s = time.perf_counter()
    act()
    synchronise()
    return time.perf_counter() - began_s


def said_save(v: Mapping[str, Any]) -> str:
    """Return the stall in one line."""
    lost = f"{v['stall_s']:.2f} s lost, {v['call_s']:.2f} s of them in the call"
    return f"{lost}; steps of {v['step_s']:.2f} s; written {v['rest_s']:.1f} s after those"


def answers(bench: Bench) -> dict[str, Any]:
    """Return the seconds of the validation loss and of the answers, each the second time."""
    few = ["evaluation.num_answers=4", "evaluation.max_new_tokens=4"] if bench.tiny else []
    with world() as here:
        typed = [*bench.model, *bench.squad, *bench.validation, batch_size(bench, 32), *few, "trainer.compile=false"]
        with built(here, bench.fresh("answers"), *typed) as made:
            found: dict[str, Any] = {"examples": len(made.val) if made.val is not None else 0}
            for evaluator in made.trainer.evaluators:
                name = type(evaluator).__name__
                found[f"{name}_first_s"], found[f"{name}_s"] = timed(evaluator), timed(evaluator)
    return found


def said_answers(v: Mapping[str, Any]) -> str:
    """Return the seconds in one line."""
    return f"loss over {v['examples']} examples {v['LossEvaluator_s']:.2f} s, answers {v['AnswerEvaluator_s']:.2f} s"


def largest_rows(bench: Bench) -> dict[str, int]:
    """Return the most rows of a microbatch that one step takes, doubled until memory runs out (tiny: up to 4).

    The memory of the optimiser's state is taken, as in a run, and rows lie end to end where the attention wants that.
    """
    most = 4 if bench.tiny else GIVE_UP_ROWS
    length = 256 if bench.tiny else 4096
    fits = 0
    with world() as here:
        typed = [*bench.model, *bench.squad, batch_size(bench, 64), "data.layout=packed", f"data.row_length={length}"]
        typed += ["trainer.compile=false", "trainer.rows_per_microbatch=1"]
        with built(here, bench.fresh("rows"), *typed) as made:
            warm_up, scorer = made.trainer.warm_up, made.trainer.scorer
            row = made.trainer.loader.step(1).microbatches[0]
            if warm_up.compiles:
                warm_up.trace()
            with reserved(made.trainer.optimizer):
                while 2 * max(fits, 1) <= most:
                    rows = 2 * fits or 1
                    try:
                        scorer(
                            repeated(row, rows, made.trainer.loader.row_layout.joined).to(here.device)
                        ).nll.backward()
                        synchronise()
                    except torch.OutOfMemoryError:
                        break
                    finally:
                        made.trainer.optimizer.zero_grad(set_to_none=True)
                    fits = rows
    return {"rows": fits, "row_length": int(row.tokens.shape[1])}


def repeated(batch: Batch, times: int, joined: bool) -> Batch:
    """Return a batch of one row repeated, `joined` end to end."""
    length = batch.tokens.numel()
    begins = torch.arange(times)[:, None] * length
    rows = {name: getattr(batch, name).repeat(times, 1) for name in ("tokens", "position", "reach")}
    if joined:
        rows["reach"] = rows["reach"] + begins.to(batch.reach.dtype)
        rows = {name: value.view(1, -1) for name, value in rows.items()}
    lists = {name: getattr(batch, name).repeat(times) for name in ("target", "weight")}
    return replace(batch, **rows, **lists, at=(batch.at + begins).flatten(), num_examples=batch.num_examples * times)
