"""python -m sftlab.evaluate run=DIR: scores of a trained model with its predictions, the base model's beside them."""

import sys
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sftlab.common import revisions
from sftlab.config import groups, start
from sftlab.config.errors import complain
from sftlab.config.latest import settle
from sftlab.config.trust import literally
from sftlab.inference.trained_model import config_near, resolve

OWN = "own"  # the data option that stands for the run's own validation data
HELP = {"--help", "-h", "--hydra-help", "--version", "-sc", "--shell-completion"}  # these open no run


def evaluate(cfg: DictConfig) -> None:
    """Evaluate on data, or on tasks of the LM Evaluation Harness."""
    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    for key in ("limit", "max_new_tokens", "batch_size"):
        if given[key] is not None and (type(given[key]) is not int or given[key] < 1):
            raise ValueError(f"{key}={given[key]}: expected a whole number of at least 1")
    trained = resolve(given["run"], given["trust"])
    if given["tasks"]:
        from sftlab.scoring.on_tasks import evaluate_on_tasks

        evaluate_on_tasks(trained, given)
    else:
        from sftlab.scoring.on_data import evaluate_on_data

        choice = start.chosen_option("data")
        given["data"] = revisions.with_commits({"data": given["data"]}, revisions.read(trained.run_dir))["data"]
        evaluate_on_data(trained, given, None if choice == OWN else choice)


def offer_own_data(arguments: list[str]) -> None:
    """Make the run's own data an option, data=own, so that its keys can be overridden like any other's.

    Only its config is read, and it stays data: no interpolation in it is resolved, no defaults list composed.
    """
    run = next((a.removeprefix("run=") for a in reversed(arguments) if a.startswith("run=")), None)
    data: Any = {}
    if run and not HELP.intersection(arguments):
        with suppress(ValueError, OSError):  # shown when the command runs
            data = config_near(run).get("data")
    own = literally(data) if isinstance(data, dict) and "defaults" not in data else {}
    groups.offer_option("data", OWN, own)


def main() -> None:
    """Entry point."""
    try:
        sys.argv[1:] = settle(sys.argv[1:], "evaluate")  # before its data is looked for
    except ValueError as error:
        complain(str(error))
        sys.exit(1)
    offer_own_data(sys.argv[1:])
    start.main(evaluate, "evaluate")


if __name__ == "__main__":
    main()
