"""What a report says a run changes, for configs composed by Hydra itself."""

from pathlib import Path

from sftlab.config.defaults import differences_from_defaults
from tests.runs import compose


def found(*overrides: str) -> dict[str, tuple[str, str]]:
    config = compose(Path("out"), Path("m"), (Path("a.jsonl"), Path("b.jsonl")), *overrides)
    typed = ["run_dir=out", "model.name_or_path=m", "data=squad", "data.path=a.jsonl", "tracker=none", *overrides]
    return {key: (old, new) for key, old, new in differences_from_defaults(config, typed)}


def test_only_what_differs_from_the_options_that_were_chosen() -> None:
    assert found() == {
        "data": ("demo", "squad"), "tracker": ("tensorboard", "none"),
        "model.name_or_path": ("asset://demo/model", "m"),
        "data.path": ("rajpurkar/squad", "a.jsonl"), "data.val_path": ("null", "b.jsonl"),
        "trainer.batch_size": ("32", "12"), "evaluation.num_answers": ("64", "2"),
        "evaluation.max_new_tokens": ("32", "3"), "optim.lr": ("0.001", "0.01"),
    }  # fmt: skip
    assert found("optim.lr=0.5", "schedule=wsd", "tracker=[tensorboard,none]").items() >= {
        "optim.lr": ("0.001", "0.5"), "schedule": ("cosine", "wsd"),
    }.items()  # fmt: skip
