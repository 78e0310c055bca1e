"""Score a model on labelled data, and its base model if asked: predictions.jsonl, scores.json and a table."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftlab.common.files import make_folder, read_yaml
from sftlab.config.groups import file_of_option, options
from sftlab.data.example_set import ExampleSet
from sftlab.data.format import Format
from sftlab.data.plan import shuffled
from sftlab.data.template import prepare_tokenizer
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.trained_model import TrainedModel
from sftlab.models.architecture import longest_text
from sftlab.parallel.world import world
from sftlab.scoring.example_lines import Measurement, Score
from sftlab.scoring.scores_json import compare_scores, show_scores, write_report
from sftlab.scoring.token_page import MOST_EXAMPLES, TokenPage
from sftlab.training.build import component
from sftlab.training.run import quiet_libraries


def evaluate_on_data(trained: TrainedModel, given: Mapping[Any, Any], option: str | None) -> None:
    """Measure the model, and its base if asked, on a data option; write lines and scores, and show a table.

    `option` names the data option; None means the run's own validation data.
    """
    if not given["data"]:
        raise ValueError(f"run={given['run']} names a model without its run's data: name some, such as data=squad")
    base = trained.base if given["tokens"] else None
    name = option or own_name(trained)
    data = component("data", given["data"])
    if option is None and not data.has_validation:
        raise ValueError("the run has no validation data of its own: set data.val_path=FILE or another data=")
    part = f"-{given['limit']}" if given["limit"] else ""  # so that a quick look overwrites nothing
    folder = results_folder(trained, given, f"{name}{part}")
    tokenizer = trained.load_tokenizer()
    of_run = (trained.config or {}).get("evaluation", {}).get("max_new_tokens") if option is None else None
    decoding = DecodingSettings(max_new_tokens=given["max_new_tokens"] or of_run or 256, batch_size=given["batch_size"])

    with world(timeout_min=24 * 60) as here:  # a rank that is done waits for the slowest
        quiet_libraries(here)
        positions = longest_text(trained.load_config(), tokenizer)
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
            if base is not None:
                shown = sorted(int(i) for i in shuffled(len(chosen), 0, 0)[:MOST_EXAMPLES])
                page = TokenPage(tokenizer, [chosen[i] for i in shown], decoding.batch_size)
                for when, model in (("before", base), ("after", trained)):
                    page.measure(when, LoadedModel.load(model, here.device, tokenizer).scorer)
                title = f"{trained.given} on {name}"
                print(f"every target's probability is in {page.write(folder / 'tokens.html', title, len(chosen))}")


def results_folder(trained: TrainedModel, given: Mapping[Any, Any], name: str) -> Path:
    """Return the folder for results, made: the one typed, else evaluate/NAME in the run, reached by no link."""
    if given["output_dir"]:
        folder = Path(given["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return make_folder(trained.folder, "evaluate", name)


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
            key, _, value = str(override).partition("=")
            if key == "data" and re.fullmatch(r"\w[\w.-]*", value):  # a name, not a path out of the run
                return str(value)
    path = trained.config["data"].get("path")
    for option in options("data") if path is not None else ():
        if read_yaml(file_of_option("data", option)).get("path") == path:
            return option
    return "validation"
