"""Settings: what each may be, to the last value, and what it is where nobody sets it."""

from typing import Any

import pytest

from sftlab.training.settings import EvaluationSettings, TrainerSettings

LEAST = {
    "batch_size": 1, "epochs": 1, "max_steps": 1, "rows_per_microbatch": 1, "log_every": 1, "eval_every": 0,
    "save_every": 0, "keep_checkpoints": 1, "skip_nonfinite": 0,
}  # fmt: skip


def trainer(**settings: Any) -> TrainerSettings:
    return TrainerSettings(**{"batch_size": 4, **settings})


@pytest.mark.parametrize("key", LEAST)
def test_a_count_of_the_trainer_is_a_whole_number_and_not_too_small(key: str) -> None:
    least = LEAST[key]
    assert getattr(trainer(**{key: least}), key) == least
    for value in (least - 1, least + 0.5, True, "3"):
        with pytest.raises(ValueError, match=rf"^trainer\.{key}={value}: expected a whole number of at least {least}$"):
            trainer(**{key: value})


@pytest.mark.parametrize(("key", "least"), [("num_answers", 0), ("max_new_tokens", 1), ("batch_size", 1)])
def test_a_count_of_the_evaluation_is_a_whole_number_and_not_too_small(key: str, least: int) -> None:
    assert getattr(EvaluationSettings(**{key: least}), key) == least
    for value in (least - 1, 2.0, False, None):
        with pytest.raises(
            ValueError, match=rf"^evaluation\.{key}={value}: expected a whole number of at least {least}$"
        ):
            EvaluationSettings(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["max_steps", "clip_grad_norm"])
def test_what_may_be_left_out_may_be_null(key: str) -> None:
    assert getattr(trainer(**{key: None}), key) is None


@pytest.mark.parametrize("key", sorted(set(LEAST) - {"max_steps"}))
def test_other_counts_may_not(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.{key}=None"):
        trainer(**{key: None})


@pytest.mark.parametrize("key", ["compile", "deterministic", "profile"])
def test_a_switch_is_true_or_false_and_no_word(key: str) -> None:
    assert getattr(trainer(**{key: True}), key) is True
    for value in ("false", 0, None):
        with pytest.raises(
            ValueError, match=rf"^trainer\.{key}={value}: expected {'auto, ' if key == 'compile' else ''}true or false$"
        ):
            trainer(**{key: value})


def test_activations_are_kept_made_again_or_half_of_them() -> None:
    for word in ("none", "full", "selective"):
        assert trainer(activation_checkpointing=word).activation_checkpointing == word
    for value in (True, "half", None):
        with pytest.raises(ValueError, match=rf"=({value}): expected none, full \(what true was\) or selective$"):
            trainer(activation_checkpointing=value)


def test_a_failed_save_lets_a_run_go_on_or_stops_it() -> None:
    assert [trainer(on_failed_save=word).on_failed_save for word in ("continue", "stop")] == ["continue", "stop"]
    with pytest.raises(ValueError, match=r"^trainer\.on_failed_save=ignore: expected continue or stop$"):
        trainer(on_failed_save="ignore")


def test_gradients_are_clipped_to_a_norm_above_zero() -> None:
    assert trainer(clip_grad_norm=1e-3).clip_grad_norm == 1e-3
    for value in (0, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"^trainer\.clip_grad_norm={value}: expected a number above 0, or null"):
            trainer(clip_grad_norm=value)


def test_gather_is_auto_or_a_truth() -> None:
    assert [EvaluationSettings(gather=g).gather for g in ("auto", True, False)] == ["auto", True, False]
    for value in ("whole", 1, None):
        with pytest.raises(ValueError, match=rf"^evaluation\.gather={value}: expected auto, true or false$"):
            EvaluationSettings(gather=value)  # type: ignore[arg-type]


def test_what_a_setting_is_where_nobody_sets_it() -> None:
    assert vars(TrainerSettings(batch_size=4)) == {
        "batch_size": 4, "epochs": 1, "max_steps": None, "rows_per_microbatch": "auto", "clip_grad_norm": 1.0,
        "log_every": 1, "eval_every": 0, "save_every": 0, "keep_checkpoints": 2, "on_failed_save": "continue",
        "skip_nonfinite": 0, "compile": "auto", "activation_checkpointing": "none", "deterministic": False,
        "profile": False, "patience": None, "max_hours": None, "export": "last", "neftune_alpha": None,
    }  # fmt: skip
    assert vars(EvaluationSettings()) == {
        "num_answers": 64, "max_new_tokens": 32, "batch_size": 32, "gather": "auto",
    }  # fmt: skip
