"""The settings of a run that belong to no component: cadence, batch, evaluation. Their types are checked here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sftlab.common.values import Count, Positive, Whole


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings under `trainer.`. `batch_size` counts examples per optimiser step over all ranks.

    `rows_per_microbatch` is a number, or `auto`: on CUDA as many as fit in memory, found by the warm-up. If `max_steps`
    is set, `epochs` is ignored. With `eval_every` 0 the run is evaluated only before training and at the end; with
    `save_every` 0 it is saved only at the end. `patience` and `export` look at the validation loss.
    """

    batch_size: Count
    epochs: Count = 1
    max_steps: Count | None = None
    rows_per_microbatch: Count | Literal["auto"] = "auto"
    clip_grad_norm: Positive | None = 1.0
    neftune_alpha: Positive | None = None
    log_every: Count = 1
    eval_every: Whole = 0
    save_every: Whole = 0
    patience: Count | None = None
    max_hours: Positive | None = None
    export: Literal["last", "best"] = "last"
    keep_checkpoints: Count = 2
    on_failed_save: Literal["continue", "stop"] = "continue"
    skip_nonfinite: Whole = 0
    compile: bool | Literal["auto"] = "auto"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    deterministic: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "epochs": 1, "rows_per_microbatch": 1, "log_every": 1, "keep_checkpoints": 1}
        least |= {"eval_every": 0, "save_every": 0, "skip_nonfinite": 0, "max_steps": 1, "patience": 1}
        for key, automatic in (("max_steps", None), ("patience", None), ("rows_per_microbatch", "auto")):
            if getattr(self, key) == automatic:
                del least[key]
        check_counts("trainer", self, least)
        if self.max_hours is not None and not (type(self.max_hours) in (int, float) and self.max_hours > 0):
            raise ValueError(
                f"trainer.max_hours={self.max_hours}: expected a number of hours above 0, or null for no limit"
            )
        if self.neftune_alpha is not None and not (type(self.neftune_alpha) in (int, float) and self.neftune_alpha > 0):
            raise ValueError(
                f"trainer.neftune_alpha={self.neftune_alpha}: expected a number above 0 (5 is usual), or null"
            )
        if self.export not in ("last", "best"):
            raise ValueError(f"trainer.export={self.export}: expected last or best")
        if self.watches and self.eval_every == 0:
            raise ValueError(
                f"{self.watches} with trainer.eval_every=0, which evaluates at the end alone: set trainer.eval_every "
                "to a number of steps"
            )
        if self.on_failed_save not in ("continue", "stop"):
            raise ValueError(f"trainer.on_failed_save={self.on_failed_save}: expected continue or stop")
        if type(self.compile) is not bool and self.compile != "auto":
            raise ValueError(f"trainer.compile={self.compile}: expected auto, true or false")
        if self.activation_checkpointing not in ("none", "full", "selective"):
            raise ValueError(
                f"trainer.activation_checkpointing={self.activation_checkpointing}: expected none, "
                "full (what true was) or selective"
            )
        for key in ("deterministic", "profile"):
            if type(getattr(self, key)) is not bool:
                raise ValueError(f"trainer.{key}={getattr(self, key)}: expected true or false")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(
                f"trainer.clip_grad_norm={self.clip_grad_norm}: expected a number above 0, or null for none"
            )

    @property
    def watches(self) -> str:
        """The setting that needs validation losses during the run; empty if there is none."""
        if self.patience is not None:
            return f"trainer.patience={self.patience}"
        return "trainer.export=best" if self.export == "best" else ""

    def require_validation(self, there: bool) -> None:
        """Raise ValueError if a setting needs validation examples and the run has none."""
        if self.watches and not there:
            raise ValueError(
                f"{self.watches} needs validation examples, and this run has none: name them with data.val_path, or "
                "set some of the training examples aside with data.val_examples"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The settings under `evaluation.`: how many validation examples are answered by generation (0: none), and how.

    `gather` says where a sharded model is whole while it answers: true, false, or `auto`, whole if it fits.
    """

    num_answers: Whole = 64
    max_new_tokens: Count = 32
    batch_size: Count = 32
    gather: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if type(self.gather) is not bool and self.gather != "auto":
            raise ValueError(f"evaluation.gather={self.gather}: expected auto, true or false")
        check_counts("evaluation", self, {"num_answers": 0, "max_new_tokens": 1, "batch_size": 1})


def check_counts(group: str, settings: object, least: Mapping[str, int]) -> None:
    """Raise ValueError for a setting that is not a whole number, or is below its minimum."""
    for key, low in least.items():
        value = getattr(settings, key)
        if type(value) is not int or value < low:
            raise ValueError(f"{group}.{key}={value}: expected a whole number of at least {low}")
