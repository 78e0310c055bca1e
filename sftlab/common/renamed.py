"""Names of earlier versions: where a `_target_` lies now, and what a key is called now.

A config that a run left behind is read in today's names. What a person types gets an error that says the new name.
"""

from collections.abc import Mapping
from typing import Any

MOVED = {
    "sftlab.optim.adamw": "sftlab.training.optim.adamw",
    **{f"sftlab.schedule.{n}": f"sftlab.training.schedule.{n}" for n in ("constant", "linear", "cosine", "wsd")},
    "sftlab.parallel.fsdp2": "sftlab.parallel.fsdp2.fsdp2",
    **{
        f"{m}.tensorboard": "sftlab.trackers.tensorboard.tensorboard"
        for m in ("sftlab.metrics", "sftlab.common.trackers")
    },
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
# Values that have another name now, or that a key no longer takes.
VALUES: dict[str, dict[Any, Any]] = {
    "trainer.activation_checkpointing": {False: "none", True: "full"},
    "trainer.rows_per_microbatch": {None: "auto"},
}
# Keys that runs of earlier versions do not have, and what they did.
ADDED: dict[str, Any] = {
    "data.control_tokens": "count",
    "data.format.reasoning": "learn",
    "data.format.turns": "auto",
    "trainer.export": "last",
}
DATA = "sftlab.data.dataset.Data"
MAYBE = ("subset", "val_split")  # these counted only where the path had them; now a `?` says so


def in_todays_names(node: Any, prefix: str = "") -> Any:
    """Return a config with the targets and keys of earlier versions replaced."""
    if isinstance(node, list):
        return [in_todays_names(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    made: dict[str, Any] = {}
    for key, value in node.items():
        renamed = KEYS.get(f"{prefix}{key}")
        new = renamed.rpartition(".")[2] if renamed else key
        known = MOVED.get(str(value), value) if key == "_target_" else in_todays_names(value, f"{prefix}{key}.")
        values = VALUES.get(f"{prefix}{key}", {})
        made[new] = values.get(known, known) if values and isinstance(known, str | bool | None) else known
    one: Any = made.get("tracker")
    if not prefix and isinstance(one, Mapping) and "_target_" in one:  # before there were several
        name = str(one["_target_"]).rpartition(".")[2]
        made["tracker"] = {} if name == "no_trackers" else {name: one}
    if made.get("_target_") == DATA and "unknown" not in made:  # written before `?` was known
        made |= {key: str(made[key]).removesuffix("?") + "?" for key in MAYBE if made.get(key)}
    if not prefix and "model" in made and "evaluation" in made and "launcher" in made:  # the whole config of a run
        made.setdefault("peft", {"_target_": "sftlab.models.adapters.NoAdapter"})
    return made
