"""Seconds to answer SQuAD-format questions: sftlab's decoding beside transformers' `generate` on padded batches.

    python experiments/generation_speed/compare.py --run runs/demo/TIME

All sides answer the same prompts with the same model in this process, greedily, with the same batch size, lengths
sorted. Each round runs every side once, in an order that is reversed from round to round, so that a change of the
machine's mood hits all. A last line is the whole `sftlab.evaluate` command on the same questions, start included.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from sftlab.assets import FOLDER as ASSETS
from sftlab.data.formats.squad import Squad
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings, Prompt
from sftlab.inference.sharded import Generator
from sftlab.inference.trained_model import resolve

Answers = list[str]


def ours(loaded: LoadedModel, prompts: Sequence[Prompt], how: DecodingSettings) -> Answers:
    """Answer with sftlab's own decoding."""
    out = [""] * len(prompts)
    for i, tokens in decode(loaded.scorer, prompts, how, loaded.ends):
        out[i] = loaded.decode_text(tokens).strip()
    return out


def padded(loaded: LoadedModel, prompts: Sequence[Prompt], how: DecodingSettings) -> Answers:
    """Answer with transformers' `generate` on batches padded on the left, prompts of like length together."""
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pad = loaded.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, do_sample=False, eos_token_id=sorted(loaded.ends), pad_token_id=pad
    )
    for start in range(0, len(order), how.batch_size):
        chosen = order[start : start + how.batch_size]
        width = len(prompts[chosen[0]])
        tokens, mask = np.full((len(chosen), width), pad, np.int64), np.zeros((len(chosen), width), np.int64)
        for row, i in enumerate(chosen):
            tokens[row, width - len(prompts[i]) :], mask[row, width - len(prompts[i]) :] = prompts[i], 1
        with torch.no_grad():
            made = loaded.scorer.model.generate(
                input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), generation_config=config
            )
        for row, i in enumerate(chosen):
            out[i] = loaded.decode_text(made[row, width:].numpy()).strip()
    return out


def in_run(loaded: LoadedModel, prompts: Sequence[Prompt], how: DecodingSettings) -> Answers:
    """Answer as a run does."""
    rest = (how.max_new_tokens, how.batch_size, True)
    return Generator(loaded.scorer, loaded.tokenizer, loaded.ends, cast(Any, None), *rest).answers(prompts)


def timed(side: Callable[[], Answers]) -> tuple[float, Answers]:
    """Return seconds and answers."""
    began_s = time.perf_counter()
    answers = side()
    return time.perf_counter() - began_s, answers


def evaluate(run: str, rows: Sequence[Any], batch_size: int, max_new_tokens: int) -> float:
    """Return the wall seconds of the evaluate command on these rows, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        arguments = [f"run={run}", "data=squad", f"data.path={file}", f"output_dir={folder}/out"]
        arguments += [f"batch_size={batch_size}", f"max_new_tokens={max_new_tokens}"]
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}  # tokenising is part of it
        began_s = time.perf_counter()
        command = [sys.executable, "-m", "sftlab.evaluate", *arguments]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="asset://demo/model", help="run directory, model folder or hub id")
    parser.add_argument("--data", default=str(ASSETS / "demo" / "train.jsonl.gz"), help="JSONL in SQuAD's schema")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    opened = gzip.open if arguments.data.endswith(".gz") else open
    with opened(arguments.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: arguments.questions]
    loaded = LoadedModel.load(resolve(arguments.run), torch.device("cpu"))
    prompts = [loaded.encode(Squad().prompt_text(row)) for row in rows]
    how = DecodingSettings(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    alone = DecodingSettings(
        max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size, share_prefixes=False
    )
    sides: dict[str, Callable[[], Answers]] = {
        "sftlab, shared prefixes": lambda: ours(loaded, prompts, how),
        "sftlab, one row a prompt": lambda: ours(loaded, prompts, alone),
        "sftlab, in a run": lambda: in_run(loaded, prompts, how),
        "transformers generate, padded": lambda: padded(loaded, prompts, how),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Answers] = {}
    for side in sides.values():
        side()  # warm up
    for i in range(arguments.rounds):
        order = list(sides) if i % 2 == 0 else list(reversed(sides))
        for name in order:
            seconds, answers[name] = timed(sides[name])
            times[name].append(seconds)
        print(f"round {i + 1}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()), flush=True)

    theirs = answers["transformers generate, padded"]
    base = statistics.median(times["transformers generate, padded"])
    print(f"\n{len(prompts)} questions, {np.mean([len(p) for p in prompts]):.0f} tokens each, batches of", end=" ")
    print(f"{arguments.batch_size}, at most {arguments.max_new_tokens} new tokens; {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n")
    print("| | s, median | all rounds | times as fast as generate | same answers |\n|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        same = sum(a == b for a, b in zip(answers[name], theirs, strict=True))
        shown = ", ".join(f"{v:.2f}" for v in values)
        print(f"| {name} | {median:.2f} | {shown} | {base / median:.2f} | {same} of {len(theirs)} |")
    seconds = evaluate(arguments.run, rows, arguments.batch_size, arguments.max_new_tokens)
    print(f"\nsftlab.evaluate on them, from start to end: {seconds:.1f} s")


if __name__ == "__main__":
    main()
