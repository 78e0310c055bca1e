"""Score a model on labelled data, and its base model if asked: predictions.jsonl, scores.json and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml
from sftlab.config.groups import CONF, options
from sftlab.data.example_set import ExampleSet
from sftlab.data.format import Format
from sftlab.data.plan import shuffled
from sftlab.data.template import prepare_tokenizer
from sftlab.inference.decoding import DecodingSettings
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import TrainedModel
from sftlab.parallel.world import world
from sftlab.scoring.example_lines import Measurement, Score
from sftlab.scoring.scores_json import compare_scores, show_scores, write_report
from sftlab.training.build import component
from sftlab.training.run import quiet_libraries


def evaluate_on_data(trained: TrainedModel, given: Mapping[Any, Any], option: str | None) -> None:
    """Measure the model, and its base if asked, on a data option; write lines and scores, and show a table.

    `option` names the data option; None means the run's own validation data.
    """
    if not given["data"]:
        raise ValueError(f"run={given['run']} names a model without its run's data: name some, such as data=squad")
    name = option or own_name(trained)
    data = component("data", given["data"])
    if option is None and not data.has_validation:
        raise ValueError("the run has no validation data of its own: set data.val_path=FILE or another data=")
    part = f"-{given['limit']}" if given["limit"] else ""  # so that a quick look overwrites nothing
    folder = Path(given["output_dir"] or trained.folder / "evaluate" / f"{name}{part}")
    tokenizer = trained.load_tokenizer()
    of_run = (trained.config or {}).get("evaluation", {}).get("max_new_tokens") if option is None else None
    decoding = DecodingSettings(max_new_tokens=given["max_new_tokens"] or of_run or 256, batch_size=given["batch_size"])

    with world(timeout_min=24 * 60) as here:  # a rank that is done waits for the slowest
        quiet_libraries(here)
        folder.mkdir(parents=True, exist_ok=True)
        positions = trained.load_config().get_text_config().max_position_embeddings
        max_length = min(data.max_length or positions, positions)
        prepare_tokenizer(tokenizer, list(data.formats.values()))
        examples = data.evaluated(tokenizer, max_length)
        indices = chosen_of(examples, given["limit"])
        chosen = [examples[i] if given["answers"] else replace(examples[i], references=()) for i in indices]
        scores = [score_of(data.formats, examples.source_of(i)) for i in indices]
        measure = Measurement(chosen, decoding, scores, here)
        settings = {
            "data": examples.fingerprint,
            "limit": given["limit"],
            "answers": given["answers"],
            "max_length": max_length,
            "max_new_tokens": decoding.max_new_tokens,
        }
        models = {"predictions": trained} | ({"baseline": trained.base} if given["baseline"] else {})
        lines = {
            file: measure(
                lambda model=model: LoadedModel.load(model, here.device, tokenizer),  # type: ignore[misc]
                folder / f"{file}.jsonl",
                settings | {"model": model.fingerprint},
            )
            for file, model in models.items()
        }
        if here.is_main:
            report = {"run": trained.given, "model": trained.model, "data": name, "settings": settings}
            report |= {"base_model": trained.base.model} if given["baseline"] else {}
            report |= compare_scores(lines["predictions"], lines.get("baseline"), [e.group for e in chosen])
            write_report(folder / "scores.json", report)
            show_scores(f"{trained.given} on {name}: {len(chosen):,} examples", report)
            print(f"predictions and scores are in {folder}")


def chosen_of(examples: ExampleSet, limit: int | None) -> list[int]:
    """Return which examples to measure, in the data's order: all, or a sample that is the same every time."""
    if limit is None:
        return list(range(len(examples)))
    return sorted(int(i) for i in shuffled(len(examples), 0, 0)[:limit])


def score_of(formats: Mapping[str, Format], source: str) -> Score:
    """Return the function that scores a source's answers; a mixture's score names begin with the source."""

    def score(answer: str, references: Sequence[str]) -> dict[str, float]:
        return {
            f"{source}/{name}" if source else name: value
            for name, value in formats[source].score(answer, references).items()
        }

    return score


def own_name(trained: TrainedModel) -> str:
    """Return a name for the run's data: its option, found by the overrides or by its path, else `validation`."""
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
