"""Score a model on tasks of the LM Evaluation Harness: the same files and table as on data, one folder per task."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftlab.common.files import make_folder, write_jsonl
from sftlab.common.hub import quiet_transformers
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import TrainedModel
from sftlab.parallel.world import device_of
from sftlab.scoring.lm_eval_harness import run_tasks
from sftlab.scoring.scores_json import compare_scores, show_scores, write_report


def evaluate_on_tasks(trained: TrainedModel, given: Mapping[Any, Any]) -> None:
    """Run tasks of the LM Evaluation Harness on the model, and on its base if asked."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tasks= runs in one process: start it without torchrun")
    quiet_transformers()
    device = device_of(0)
    settings = {key: given[key] for key in ("tasks_path", "num_fewshot", "limit", "batch_size")}
    models = [trained, trained.base] if given["baseline"] else [trained]
    results = [run_tasks(LoadedModel.load(model, device), given["tasks"], **settings) for model in models]
    for name, task in results[0].items():
        root = given["output_dir"]
        folder = make_folder(Path(root), name) if root else make_folder(trained.folder, "evaluate", name)
        write_jsonl(folder / "predictions.jsonl", task.lines)
        report = {"run": trained.given, "model": trained.model, "data": name, "settings": settings}
        if given["baseline"]:
            base = results[1][name]
            write_jsonl(folder / "baseline.jsonl", base.lines)
            report |= {"base_model": trained.base.model}
            report |= compare_scores(task.lines, base.lines, scores=task.scores, base_scores=base.scores)
        else:
            report |= compare_scores(task.lines, None, scores=task.scores)
        write_report(folder / "scores.json", report)
        show_scores(f"{trained.given} on {name}: {len(task.lines):,} documents", report)
        print(f"predictions and scores are in {folder}")
