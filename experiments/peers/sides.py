"""What the sides share: the rows in the order in which they are trained, and the one line that each side prints.

A side is a process of its own: `python experiments/peers/NAME_side.py --model FOLDER --data FILE --steps N ...`. It
runs on the torch of the interpreter that started it, and trains rows in SQuAD's schema in batches of `--batch`. Its
last line is `RESULT {...}`.
"""

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not counted
IGNORED = -100  # the label of a token that is not learned


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of the arguments that every side takes."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--model", required=True, help="folder with the weights and the tokenizer")
    made.add_argument("--data", required=True, help="JSONL in SQuAD's schema")
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--batch", type=int, default=16, help="examples per step")
    made.add_argument("--lr", type=float, default=1e-4)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument(
        "--order", choices=["given", "own"], default="own", help="given: the file's, so that losses compare"
    )
    return made


def rows(path: str, num: int) -> list[dict[str, Any]]:
    """Return `num` rows, from the first on, and over again where the file has fewer."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return (found * (num // len(found) + 1))[:num]


def texts(row: dict[str, Any]) -> tuple[str, str]:
    """Return the prompt and the completion of a row, as sftlab words them."""
    return f"Context: {row['context']} Question: {row['question']} Answer:", f" {row['answers']['text'][0]}"


def tokenised(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a row; labels are IGNORED before the answer."""
    prompt, completion = texts(row)
    asked = tokenizer(prompt).input_ids
    answer = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return asked + answer, [IGNORED] * len(asked) + answer


def shuffled(found: list[Any]) -> list[Any]:
    """Return a list in a random order, always the same one."""
    found = list(found)
    random.Random(0).shuffle(found)
    return found


class Clock:
    """Marks the start of every step. The device is waited for after the warm-up and at the end, and not in between."""

    def __init__(self, device: str, batch: int) -> None:
        self.device, self.batch = device, batch
        self.began_s = time.perf_counter()
        self.marks: list[float] = []
        self.losses: list[Any] = []

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def step(self) -> None:
        """Mark the start of a step, or the end of the last one."""
        if len(self.marks) in (1, WARM_UP):
            self.wait()
        self.marks.append(time.perf_counter())

    def report(self, **more: Any) -> None:
        """Print the side's result. `losses` may be tensors; they are read now."""
        import torch
        import transformers

        self.wait()
        self.step()
        ends = self.marks[WARM_UP:]
        steps = [b - a for a, b in pairwise(ends)]
        result = {
            "examples_per_s": self.batch * len(steps) / (ends[-1] - ends[0]),
            "step_s_median": statistics.median(steps),
            "first_step_s": self.marks[1] - self.began_s,
            "losses": [float(loss) for loss in self.losses],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **more.pop("versions", {}),
            },
        }
        print("RESULT " + json.dumps(result | more), flush=True)


def folder_of(path: str) -> Path:
    """Return a new folder beside a file, for what a side writes."""
    made = Path(path).parent / f"side_{time.time_ns()}"
    made.mkdir()
    return made
