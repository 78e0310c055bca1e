"""The LM Evaluation Harness in this process: its tasks, prompts and scoring, on a model that is already loaded.

Source: https://github.com/EleutherAI/lm-evaluation-harness. Its own command line gives the same numbers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.inference.loaded_model import LoadedModel


@dataclass(frozen=True)
class Task:
    """The result of one task: its scores as the harness reports them, and one line per document."""

    scores: Mapping[str, float]
    lines: Sequence[Mapping[str, Any]]


def run_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    tasks_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Task]:
    """Return each task's results, by name.

    Raises: ValueError if the harness is not installed or does not know a task; FileNotFoundError if `tasks_path` is no
    folder.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(f"tasks= needs the LM Evaluation Harness ({error}): pip install 'sftlab[lm-eval]'") from error

    if tasks_path is not None and not Path(tasks_path).expanduser().is_dir():
        raise FileNotFoundError(f"tasks_path={tasks_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(Path(tasks_path).expanduser()) if tasks_path else None)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"tasks={','.join(unknown)}: no such task; lm_eval ls tasks lists them, and tasks_path=FOLDER adds your own"
        )
    model = HFLM(loaded.scorer.model, backend="causal", tokenizer=loaded.tokenizer, batch_size=batch_size)
    found: Any = simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
    )
    return {
        name: Task(numbers(result), lines_of(found["samples"].get(name, ())))
        for name, result in found["results"].items()
    }


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a task's numbers by the harness's names, without the suffix `,none` (no filter): `acc`, `acc_stderr`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in result.items()
        if "," in name and isinstance(value, int | float)
    }


def lines_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per document: its prompt, target and answer, and the scores of all filters."""
    lines: dict[int, dict[str, Any]] = {}
    for s in samples:
        line = lines.setdefault(
            s["doc_id"],
            {"index": s["doc_id"], "prompt": s["arguments"][0][0], "target": s["target"], "scores": {}},
        )
        suffix = "" if s["filter"] == "none" else f",{s['filter']}"
        values = {m: s[m] for m in s["metrics"] if isinstance(s.get(m), int | float)}
        line["scores"] |= {f"{name}{suffix}": float(value) for name, value in values.items()}
        line["answer"] = s["filtered_resps"]
    return [lines[i] for i in sorted(lines)]
