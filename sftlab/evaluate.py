"""python -m sftlab.evaluate run=DIR: scores of a trained model with its predictions, the base model's beside them."""

import sys
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sftlab.config import groups, start
from sftlab.inference.trained_model import resolve

OWN = "own"  # the data option that stands for the run's own validation data


def evaluate(cfg: DictConfig) -> None:
    """Evaluate on data, or on tasks of the LM Evaluation Harness."""
    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    for key in ("limit", "max_new_tokens", "batch_size"):
        if given[key] is not None and (type(given[key]) is not int or given[key] < 1):
            raise ValueError(f"{key}={given[key]}: expected a whole number of at least 1")
    trained = resolve(given["run"])
    if given["tasks"]:
        from sftlab.scoring.on_tasks import evaluate_on_tasks

        evaluate_on_tasks(trained, given)
    else:
        from sftlab.scoring.on_data import evaluate_on_data

        choice = start.chosen_option("data")
        evaluate_on_data(trained, given, None if choice == OWN else choice)


def offer_own_data(arguments: list[str]) -> None:
    """Make the run's own data an option, data=own, so that its keys can be overridden like any other's."""
    run = next((a.removeprefix("run=") for a in reversed(arguments) if a.startswith("run=")), None)
    data: dict[str, Any] = {}
    if run:
        with suppress(ValueError, OSError):  # shown when the command runs; --help must work all the same
            data = dict((resolve(run).config or {}).get("data") or {})
    groups.offer_option("data", OWN, data)


def main() -> None:
    """Entry point."""
    offer_own_data(sys.argv[1:])
    start.main(evaluate, "evaluate")


if __name__ == "__main__":
    main()
