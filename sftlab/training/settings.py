"""The settings of a run that belong to no component: cadence, batch, evaluation. Their types are checked here."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings under `trainer.`. `batch_size` counts examples per optimiser step over all ranks.

    If `max_steps` is set, `epochs` is ignored. With `eval_every` 0 the run is evaluated only before training and at the
    end; with `save_every` 0 it is saved only at the end.
    """

    batch_size: int
    epochs: int = 1
    max_steps: int | None = None
    rows_per_microbatch: int | None = None
    clip_grad_norm: float | None = 1.0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    on_failed_save: str = "continue"
    skip_nonfinite: int = 0
    compile: bool | str = "auto"
    activation_checkpointing: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "epochs": 1, "rows_per_microbatch": 1, "log_every": 1, "keep_checkpoints": 1}
        least |= {"eval_every": 0, "save_every": 0, "skip_nonfinite": 0, "max_steps": 1}
        for key in ("max_steps", "rows_per_microbatch"):
            if getattr(self, key) is None:
                del least[key]
        check_counts("trainer", self, least)
        if self.on_failed_save not in ("continue", "stop"):
            raise ValueError(f"trainer.on_failed_save={self.on_failed_save}: expected continue or stop")
        if type(self.compile) is not bool and self.compile != "auto":
            raise ValueError(f"trainer.compile={self.compile}: expected auto, true or false")
        for key in ("activation_checkpointing", "deterministic"):
            if type(getattr(self, key)) is not bool:
                raise ValueError(f"trainer.{key}={getattr(self, key)}: expected true or false")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(
                f"trainer.clip_grad_norm={self.clip_grad_norm}: expected a number above 0, or null for none"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The settings under `evaluation.`: how many validation examples are answered by generation (0: none), and how."""

    num_answers: int = 64
    max_new_tokens: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_counts("evaluation", self, {"num_answers": 0, "max_new_tokens": 1, "batch_size": 1})


def check_counts(group: str, settings: object, least: Mapping[str, int]) -> None:
    """Raise ValueError for a setting that is not a whole number, or is below its minimum."""
    for key, low in least.items():
        value = getattr(settings, key)
        if type(value) is not int or value < low:
            raise ValueError(f"{group}.{key}={value}: expected a whole number of at least {low}")
