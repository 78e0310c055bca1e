"""A model scored on labelled data: predictions.jsonl, scores.json and a table; the base model beside it where asked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml
from sftlab.config.groups import CONF, options
from sftlab.data.example import Example
from sftlab.data.plan import shuffled
from sftlab.data.store import fingerprint
from sftlab.inference.decoding import Decoding
from sftlab.inference.loaded_model import Inference
from sftlab.inference.trained_model import Trained
from sftlab.parallel.world import world
from sftlab.scoring.example_lines import Measurement
from sftlab.scoring.scores_json import compare, show, write_report
from sftlab.training.build import component
from sftlab.training.run import quiet_libraries


def evaluate_on_data(trained: Trained, given: Mapping[Any, Any], option: str | None) -> None:
    """Measure the model, and its base where asked, on a data option; leave lines and scores, show a table.

    `option` names the data option; None stands for the run's own validation data.
    """
    if not given["data"]:
        raise ValueError(f"run={given['run']} names a model without its run's data: say which, data=squad for one")
    name = option or own_name(trained)
    data = component("data", given["data"])
    if option is None and not data.has_validation:
        raise ValueError("the run has no validation data of its own: name some, data.val_path=FILE or another data=")
    part = f"-{given['limit']}" if given["limit"] else ""  # a quick look leaves what the whole gave alone
    folder = Path(given["output_dir"] or trained.folder / "evaluate" / f"{name}{part}")
    tokenizer = trained.load_tokenizer()
    new_tokens = given["max_new_tokens"] or (
        option is None and trained.config and trained.config["evaluation"]["max_new_tokens"]
    )
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
    indices = range(len(examples)) if limit is None else sorted(shuffled(len(examples), 0, 0)[:limit].tolist())
    chosen = [examples[i] for i in indices]
    return chosen if answers else [replace(e, references=()) for e in chosen]


def own_name(trained: Trained) -> str:
    """Return what the run's data is called: its option, by the overrides or by its path; else `validation`."""
    assert trained.config is not None
    overrides = trained.run_dir and trained.run_dir / "overrides.yaml"
    if overrides and overrides.is_file():
        for override in read_yaml(overrides) or ():
            key, _, value = override.partition("=")
            if key == "data":
                return str(value)
    path = trained.config["data"].get("path")
    for option in options("data"):
        if read_yaml(CONF / "data" / f"{option}.yaml").get("path") == path:
            return option
    return "validation"
