"""Names of earlier versions: where a `_target_` lies now, and what a key is called now.

A config that a run left behind is read in today's names. What a person types gets an error that says the new name.
"""

from collections.abc import Mapping
from typing import Any

MOVED = {
    "sftlab.optim.adamw": "sftlab.training.optim.adamw",
    **{f"sftlab.schedule.{n}": f"sftlab.training.schedule.{n}" for n in ("constant", "linear", "cosine", "wsd")},
    "sftlab.parallel.fsdp2": "sftlab.parallel.fsdp2.fsdp2",
    **{f"sftlab.metrics.{n}": f"sftlab.common.trackers.{n}" for n in ("tensorboard", "no_trackers")},
    "sftlab.settings.TrainerSettings": "sftlab.training.settings.TrainerSettings",
    "sftlab.settings.EvaluationSettings": "sftlab.training.settings.EvaluationSettings",
    "sftlab.launcher.local.Local": "sftlab.launchers.local.Local",
    "sftlab.launcher.slurm.Slurm": "sftlab.launchers.slurm.Slurm",
}
KEYS = {
    "evaluation.answers": "evaluation.num_answers",
    "sweeper.n_trials": "sweeper.num_trials",
    "resume_anyway": "resume_despite_changes",
}


def in_todays_names(node: Any, prefix: str = "") -> Any:
    """Return a config with the targets and keys of earlier versions replaced."""
    if isinstance(node, list):
        return [in_todays_names(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    made = {}
    for key, value in node.items():
        new = KEYS.get(f"{prefix}{key}", f"{prefix}{key}").rpartition(".")[2]
        known = MOVED.get(value, value) if key == "_target_" else in_todays_names(value, f"{prefix}{key}.")
        made[new] = known
    return made
