"""The parts: what each runs, for how long it may, what it must reach on one H100 or H200, and its line in the table."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sftlab.benchmarking.benchmark  # noqa: F401  the parts are forks of a process that has imported all they need
from experiments.gpu import checks
from experiments.gpu.bench import Bench, command, run_command
from sftlab.assets import locate
from sftlab.benchmarking.cases import write_stand_in
from sftlab.benchmarking.hardware import hardware, software
from sftlab.benchmarking.words import Words
from sftlab.parallel.world import world

REPO = Path(__file__).parents[2]
CHECKPOINTING = ("none", "full", "selective")  # of trainer.activation_checkpointing


@dataclass(frozen=True)
class Part:
    """One part. `must` holds what its values must reach on a GPU, by name: (least, most)."""

    name: str
    title: str
    limit_s: float
    run: Callable[[Bench], dict[str, Any]]
    said: Callable[[Mapping[str, Any]], str]
    must: Mapping[str, tuple[float | None, float | None]]


def prepare(bench: Bench) -> dict[str, Any]:
    """Write the data; return the machine, the versions, commit and date."""
    make_data(bench)
    with world() as here:
        return {**software(), "hardware": hardware(here), "cuda": here.device.type == "cuda"}


def missed(part: Part, values: Mapping[str, Any], tiny: bool) -> list[str]:
    """Return what a part did not reach. Speeds are asked for on a GPU only; `same` is asked for everywhere."""
    found = [] if values.get("same", True) else ["not the same"]
    for name, (least, most) in part.must.items() if not tiny else ():
        value = values.get(name)
        if value is None:
            found.append(f"no {name}")
        elif (least is not None and value < least) or (most is not None and value > most):
            found.append(f"{name} {value:.4g}, asked for {least if least is not None else most:g}")
    return found


def make_data(bench: Bench) -> None:
    """Write generated questions of SQuAD's sizes for training and validation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.tokenizer or locate("asset://demo/model"))
    for name, num, seed in (("train", 128 if bench.tiny else 8192, 0), ("validation", 16 if bench.tiny else 2048, 1)):
        folder = bench.out / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_stand_in("squad", folder, Words(tokenizer, seed), num, 0.2 if bench.tiny else 1.0)


# What each part runs


def start(bench: Bench) -> dict[str, Any]:
    """Run README's own command, with generated data and untrained weights, for some steps; then end it."""
    steps = 3 if bench.tiny else 8
    run_dir = bench.fresh("start")
    typed = [*bench.model, *bench.squad, *bench.validation, f"run_dir={run_dir}"]
    if bench.tiny:
        typed += ["trainer.batch_size=8", "evaluation.num_answers=2", "evaluation.max_new_tokens=4"]
    began_s = time.monotonic()
    process = subprocess.Popen(command("train", *typed), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reader = threading.Thread(target=timestamp, args=(process, began_s))
    reader.start()
    lines: list[dict[str, Any]] = []
    first_s = None
    try:
        while process.poll() is None and len(trained(lines)) < steps:
            time.sleep(0.1)
            lines = read_lines(run_dir / "metrics.jsonl")
            if trained(lines) and first_s is None:
                first_s = time.monotonic() - began_s
    finally:
        process.kill()
        process.wait()
        reader.join()
    if first_s is None:
        raise RuntimeError(f"{' '.join(typed)} ended with {process.returncode} before its first step")
    ends = [line["time_s"] for line in trained(lines)]
    return {"first_step_s": first_s, "steps": len(ends), "later_step_s": (ends[-1] - ends[0]) / max(1, len(ends) - 1)}


def timestamp(process: "subprocess.Popen[str]", began_s: float) -> None:
    """Print a process's lines, each with the seconds since `began_s`: where the time to the first step goes."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"{time.monotonic() - began_s:5.1f} s  {line}", end="", flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics so far."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of steps."""
    return [line for line in lines if "train/loss" in line]


def benchmark(bench: Bench, case: str, name: str, *more: str) -> dict[str, Any]:
    """Return what `sftlab.benchmark` measured of one layout."""
    output = bench.out / "benchmarks" / f"{name}.json"
    small = ("scale=0.05", "trainer.batch_size=4", "warm_up=1", "windows=1", "steps_per_window=2") if bench.tiny else ()
    run_command("benchmark", f"case={case}", *bench.model, *small, f"output={output}", *more)
    values = json.loads(output.read_text(encoding="utf-8"))["layouts"]["tree"]
    return {**values, "longest_over_median": values["step_s_max"] / values["step_s_median"]}


def measured(case: str, name: str, *more: str) -> Callable[[Bench], dict[str, Any]]:
    """Return a part that runs a benchmark."""
    return lambda bench: benchmark(bench, case, name, f"profile={bench.out}/benchmarks/{name}.txt", *more)


def said_benchmark(v: Mapping[str, Any]) -> str:
    """Return a benchmark in one line."""
    mfu = "" if v["mfu"] is None else f", MFU {v['mfu']:.1%}"
    return (
        f"{v['examples_per_s']:,.1f} examples/s, {v['tokens_per_s']:,.0f} tokens/s{mfu}, {v['of_matrix_rate']:.0%} of "
        f"the matrix rate, padding {v['padding']:.1%}, {v['peak_gib']:.1f} GiB, first step {v['first_step_s']:.1f} s, "
        f"longest step {v['longest_over_median']:.1f} x median, {v['graphs_after_warm_up']} graphs after warm-up"
    )


def memory(bench: Bench) -> dict[str, Any]:
    """Return peak memory and rate with each activation checkpointing, and the largest microbatch that fits."""
    found: dict[str, Any] = {}
    for choice in CHECKPOINTING:
        more = (f"trainer.activation_checkpointing={choice}", "warm_up=1", "windows=1", "steps_per_window=2")
        values = benchmark(bench, "dense", f"memory_{choice}", *more, "trainer.compile=false")
        found[f"checkpointing={choice}"] = {k: values[k] for k in ("peak_gib", "tokens_per_s")}
    return found | {"largest_rows": checks.largest_rows(bench)}


def said_memory(v: Mapping[str, Any]) -> str:
    """Return the memory of each kind of checkpointing in one line."""
    kinds = {k: found for k, found in v.items() if k.startswith("checkpointing")}
    each = [f"{k}: {found['peak_gib']:.1f} GiB, {found['tokens_per_s']:,.0f} tokens/s" for k, found in kinds.items()]
    return f"{'; '.join(each)}; {v['largest_rows']['rows']} rows of {v['largest_rows']['row_length']} tokens fit"


def peers(bench: Bench) -> dict[str, Any]:
    """Return what experiments/peers/compare.py measured in one round, every side on the same steps."""
    output = bench.out / "peers.full.json"
    typed = [sys.executable, str(REPO / "experiments" / "peers" / "compare.py"), "--order", "given", "--rounds", "1"]
    typed += ["--data", str(bench.out / "data" / "train" / "squad.jsonl"), "--out", str(output)]
    typed += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    typed += ["--size", "tiny", "--steps", "4", "--batch", "4"] if bench.tiny else ["--size", "1b", "--steps", "14"]
    typed += [] if bench.tiny else ["--batch", "64", "--timeout", "90"]
    typed += ["--sides", "tree,expert"] if bench.tiny else ["--sides", "tree,trl_best,expert,automodel,trl"]
    typed += ["--peers", bench.peers] if bench.peers else []
    typed += ["--tokenizer", bench.tokenizer] if bench.tokenizer else []
    subprocess.run(typed, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    sides = json.loads(output.read_text(encoding="utf-8"))["sides"]
    rates = {name: side.get("examples_per_s") for name, side in sides.items()}
    trl = max((rates[n] for n in ("trl", "trl_best") if rates.get(n)), default=None)
    return {
        "examples_per_s": rates,
        "first_loss": {name: side["losses"][0] for name, side in sides.items() if side["rounds"]},
        "failed": {name: side["failed"] for name, side in sides.items() if side["failed"]},
        "times_trl": rates["tree"] / trl if trl and rates["tree"] else None,
    }


def said_peers(v: Mapping[str, Any]) -> str:
    """Return every side's rate in one line."""
    rates = ", ".join(
        f"{name} {'failed' if rate is None else f'{rate:.1f}'}" for name, rate in v["examples_per_s"].items()
    )
    return f"examples/s: {rates}" + (f"; {v['times_trl']:.1f} times TRL" if v["times_trl"] else "")


FIRST = (None, 60.0)
SQUAD = {"examples_per_s": (1450.0, None), "longest_over_median": (None, 2.0), "graphs_after_warm_up": (None, 0.0)}
DENSE = {"mfu": (0.55, None), "longest_over_median": (None, 2.0), "graphs_after_warm_up": (None, 0.0)}
EAGER = {"first_step_s": (None, 30.0)}
PARTS = {
    part.name: part
    for part in (
        Part(
            "start",
            "README's command, to its first steps",
            90,
            start,
            lambda v: f"first step after {v['first_step_s']:.1f} s, then {v['later_step_s']:.2f} s per step",
            {"first_step_s": FIRST},
        ),
        Part("squad", "SQuAD, as shipped", 90, measured("squad", "squad"), said_benchmark, SQUAD),
        Part("dense", "full rows, as shipped", 80, measured("dense", "dense"), said_benchmark, DENSE),
        Part(
            "squad_eager",
            "SQuAD without compile",
            60,
            measured("squad", "squad_eager", "trainer.compile=false", "windows=2"),
            said_benchmark,
            EAGER,
        ),
        Part(
            "dense_eager",
            "full rows without compile",
            50,
            measured("dense", "dense_eager", "trainer.compile=false", "windows=2"),
            said_benchmark,
            EAGER,
        ),
        Part("memory", "activation checkpointing, largest microbatch", 90, memory, said_memory, {}),
        Part("equality", "tree = packed = padded", 60, checks.equality, checks.said_equality, {}),
        Part("isolation", "documents of a row, in bfloat16", 40, checks.isolation, checks.said_isolation, {}),
        Part("resume", "bit-equal with trainer.deterministic=true", 60, checks.resume, checks.said_resume, {}),
        Part("save", "what a save costs the loop", 60, checks.save, checks.said_save, {"stall_s": (None, 1.0)}),
        Part("answers", "evaluation and answers", 45, checks.answers, checks.said_answers, {}),
        Part("peers", "TRL, an expert's loop, NeMo AutoModel", 240, peers, said_peers, {"times_trl": (6.0, None)}),
    )
}
