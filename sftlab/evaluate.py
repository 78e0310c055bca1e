"""python -m sftlab.evaluate run=DIR: scores of a trained model with its predictions, the base model's beside them."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sftlab.config import groups, start
from sftlab.inference.trained_model import Trained, resolve

OWN = "own"


def evaluate(cfg: DictConfig) -> None:
    """Evaluate on data, or run tasks."""
    from hydra.core.hydra_config import HydraConfig

    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    choice = str(HydraConfig.get().runtime.choices["data"])
    for key in ("limit", "max_new_tokens", "batch_size"):
        if given[key] is not None and (type(given[key]) is not int or given[key] < 1):
            raise ValueError(f"{key}={given[key]}: expected a whole number of at least 1")
    trained = resolve(given["run"])
    if given["tasks"]:
        on_tasks(trained, given)
    else:
        on_data(trained, given, choice)


def on_data(trained: Trained, given: Mapping[Any, Any], choice: str) -> None:
    """Measure the model, and its base where asked, on a data option; leave lines and scores, show a table."""
    from sftlab.data.example import Example
    from sftlab.data.store import fingerprint
    from sftlab.inference.decoding import Decoding
    from sftlab.inference.loaded_model import Inference
    from sftlab.parallel.world import world
    from sftlab.scoring.example_lines import Measurement
    from sftlab.scoring.scores_json import compare, show, write_report
    from sftlab.training.build import component
    from sftlab.training.run import quiet_libraries

    own = choice == OWN
    if not given["data"]:
        raise ValueError(f"run={given['run']} names a model without its run's data: say which, data=squad for one")
    name = own_name(trained) if own else choice
    data = component("data", given["data"])
    if own and not data.has_validation:
        raise ValueError("the run has no validation data of its own: name some, data.val_path=FILE or another data=")
    part = f"-{given['limit']}" if given["limit"] else ""  # a quick look leaves what the whole gave alone
    folder = Path(given["output_dir"] or trained.folder / "evaluate" / f"{name}{part}")
    tokenizer = trained.load_tokenizer()
    new_tokens = given["max_new_tokens"] or (own and trained.config and trained.config["evaluation"]["max_new_tokens"])
    how = Decoding(max_new_tokens=new_tokens or 256, batch_size=given["batch_size"])

    with world(timeout_min=24 * 60) as here:  # a rank that is done waits for the slowest
        quiet_libraries(here)
        folder.mkdir(parents=True, exist_ok=True)
        config = trained.load_config().get_text_config()
        longest = config.max_position_embeddings
        examples = data.evaluated(tokenizer, min(data.max_length or longest, longest))
        chosen: list[Example] = chosen_of(examples, given["limit"], given["answers"])
        measure = Measurement(chosen, how, data.format.score, here)
        settings = {
            "data": fingerprint(examples.store.fingerprint, examples.kept.tolist()),
            "limit": given["limit"],
            "answers": given["answers"],
            "max_length": examples.max_length,
            "max_new_tokens": how.max_new_tokens,
        }
        models = {"predictions": trained} | ({"baseline": trained.base} if given["baseline"] else {})
        lines = {
            file: measure(
                lambda model=model: Inference.load(model, here.device, tokenizer),  # type: ignore[misc]
                folder / f"{file}.jsonl",
                settings | {"model": model.fingerprint},
            )
            for file, model in models.items()
        }
        if here.is_main:
            report = {"run": trained.given, "model": trained.model, "data": name, "settings": settings}
            report |= {"base_model": trained.base.model} if given["baseline"] else {}
            report |= compare(lines["predictions"], lines.get("baseline"), [e.group for e in chosen])
            write_report(folder / "scores.json", report)
            show(f"{trained.given} on {name}: {len(chosen):,} examples", report)
            print(f"predictions and scores are in {folder}")


def chosen_of(examples: Any, limit: int | None, answers: bool) -> list[Any]:
    """Return the examples to measure: all, or a sample of them, which is the same every time, in the data's order."""
    from dataclasses import replace

    from sftlab.data.plan import shuffled

    indices = range(len(examples)) if limit is None else sorted(shuffled(len(examples), 0, 0)[:limit].tolist())
    chosen = [examples[i] for i in indices]
    return chosen if answers else [replace(e, references=()) for e in chosen]


def on_tasks(trained: Trained, given: Mapping[Any, Any]) -> None:
    """Run tasks of the LM Evaluation Harness on the model, and on its base where asked."""
    import os

    import torch

    from sftlab.inference.loaded_model import Inference
    from sftlab.scoring.example_lines import write_lines
    from sftlab.scoring.lm_eval_harness import run_tasks
    from sftlab.scoring.scores_json import compare, show, write_report
    from sftlab.training.run import quiet_transformers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tasks= runs in one process: start it without torchrun")
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {key: given[key] for key in ("tasks_path", "num_fewshot", "limit", "batch_size")}
    models = [trained, trained.base] if given["baseline"] else [trained]
    results = [run_tasks(Inference.load(model, device), given["tasks"], **settings) for model in models]
    for name, task in results[0].items():
        folder = Path(given["output_dir"] or trained.folder / "evaluate") / name
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / "predictions.jsonl", task.lines)
        report = {"run": trained.given, "model": trained.model, "data": name, "settings": settings}
        if given["baseline"]:
            base = results[1][name]
            write_lines(folder / "baseline.jsonl", base.lines)
            report |= {"base_model": trained.base.model}
            report |= compare(task.lines, base.lines, scores=task.scores, base_scores=base.scores)
        else:
            report |= compare(task.lines, None, scores=task.scores)
        write_report(folder / "scores.json", report)
        show(f"{trained.given} on {name}: {len(task.lines):,} documents", report)
        print(f"predictions and scores are in {folder}")


def own_name(trained: Trained) -> str:
    """Return what the run's data is called: its option, by the overrides or by its path; else `validation`."""
    assert trained.config is not None
    overrides = trained.run_dir and trained.run_dir / "overrides.yaml"
    if overrides and overrides.is_file():
        for override in yaml.safe_load(overrides.read_text(encoding="utf-8")) or ():
            key, _, value = override.partition("=")
            if key == "data":
                return str(value)
    path = trained.config["data"].get("path")
    for option in groups.options("data"):
        if yaml.safe_load((groups.CONF / "data" / f"{option}.yaml").read_text(encoding="utf-8")).get("path") == path:
            return option
    return "validation"


def offer_own_data(arguments: list[str]) -> None:
    """Make the run's own data an option, data=own, so that its keys can be overridden like any other's."""
    from hydra.core.config_store import ConfigStore

    run = next((a.removeprefix("run=") for a in reversed(arguments) if a.startswith("run=")), None)
    data: dict[str, Any] = {}
    if run:
        with suppress(ValueError, OSError):  # shown when the command runs; --help must work all the same
            data = dict((resolve(run).config or {}).get("data") or {})
    ConfigStore.instance().store(group="data", name=OWN, node=data)


def main() -> None:
    """Entry point."""
    offer_own_data(sys.argv[1:])
    start.main(evaluate, "evaluate")


if __name__ == "__main__":
    main()
