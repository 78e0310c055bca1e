"""Measuring a model on examples: sums that are exact, on several ranks, gone on with after a stop."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.common.files import read_jsonl as read_lines
from sftlab.data.example import Example
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.trained_model import resolve
from sftlab.scoring.example_lines import Measurement, endings, losses
from tests.asymmetric import reciter
from tests.support import byte_tokenizer, random_examples, read_jsonl, run_distributed


class Counted:
    """A measurement of random examples, with every model load and answered example counted."""

    def __init__(self, loaded: LoadedModel, world: Any, num: int = 30) -> None:
        examples = [
            Example(e.tokens, e.supervised, e.id, e.group, num_prompt=len(e), references=("a",) if i % 5 else ())
            for i, e in enumerate(random_examples(num, vocab=300))
        ]
        self.scored: list[str] = []
        self.loads = 0
        self.loaded = loaded
        self.measure = Measurement(
            examples, DecodingSettings(max_new_tokens=3, batch_size=4), [self.score] * num, world
        )

    def score(self, answer: str, references: Any) -> dict[str, float]:
        self.scored.append(answer)
        return {"exact_match": 0.5}

    def load(self) -> LoadedModel:
        self.loads += 1
        return self.loaded

    def __call__(self, path: Path, **settings: Any) -> list[dict[str, Any]]:
        self.loads, self.scored = 0, []
        return self.measure(self.load, path, settings)


@pytest.fixture
def counted(model_folder: Path, one: Any) -> Counted:
    return Counted(LoadedModel.load(resolve(str(model_folder)), torch.device("cpu")), one)


def test_a_stopped_evaluation_goes_on(counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predictions.jsonl"
    whole = counted(path, seed=1)
    assert len(whole) == 30 and len(counted.scored) == 24 and read_jsonl(path) == whole

    path.unlink()
    score = counted.score

    def stopped(answer: str, references: Any) -> dict[str, float]:
        if len(counted.scored) == 9:
            raise KeyboardInterrupt
        return score(answer, references)

    monkeypatch.setattr(counted, "measure", replace(counted.measure, scores=[stopped] * 30))
    with pytest.raises(KeyboardInterrupt):
        counted(path, seed=1)
    assert not path.exists()
    (part,) = (tmp_path / ".predictions.parts").glob("*.jsonl")
    with part.open("a") as file:
        file.write('{"index": 3, "torn')  # as a kill leaves it
    done = len(part.read_text().splitlines()) - 1
    assert 9 <= done < 30

    monkeypatch.setattr(counted, "measure", replace(counted.measure, scores=[score] * 30))
    again = counted(path, seed=1)
    assert len(counted.scored) == 30 - done and counted.loads == 1
    for a, b in zip(whole, again, strict=True):
        assert a.pop("nll") == pytest.approx(b.pop("nll"), rel=1e-4) and a == b
    assert list((tmp_path / ".predictions.parts").glob("*.jsonl")) == []


def test_what_is_there_is_used_if_it_is_of_the_same_settings(counted: Counted, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    whole = counted(path, model="a", max_new_tokens=3)
    assert counted(path, max_new_tokens=3, model="a") == whole and counted.loads == 0
    counted(path, model="b", max_new_tokens=3)
    assert counted.loads == 1 and len(counted.scored) == 24


def test_losses_are_those_of_separate_rows(model_folder: Path) -> None:
    scorer = LoadedModel.load(resolve(str(model_folder)), torch.device("cpu")).scorer
    examples = random_examples(20, seed=3)
    scorer.chunk = 7
    found = losses(scorer, examples, batch_size=6)
    for e, (nll, correct, targets) in zip(examples, found, strict=True):
        with torch.no_grad():
            logits = scorer.model(torch.from_numpy(e.tokens[None].astype(np.int64))).logits[0]
        at = np.flatnonzero(e.supervised)
        logs, wanted = logits.log_softmax(-1), torch.from_numpy(e.tokens[at].astype(np.int64))
        assert nll == pytest.approx(-float(logs[at - 1, wanted].sum()), rel=1e-5, abs=1e-5)
        assert correct == int((logits[at - 1].argmax(-1) == wanted).sum()) and targets == len(at)


def shared_unevenly(rank: Any, folder: str, model: str) -> dict[str, Any]:
    """Measure examples of unequal groups on this rank; return what it scored itself and what all got."""
    examples = [
        replace(e, group=(0 if i < 6 else i), num_prompt=len(e) // 2, references=(str(i),))
        for i, e in enumerate(random_examples(13, vocab=300))
    ]
    mine: list[int] = []

    def score(index: int, answer: str, references: Any) -> dict[str, float]:
        assert references == (str(index),), "each example is scored by its own function"
        mine.append(index)
        return {"rank": float(rank.rank)}

    loaded = LoadedModel.load(resolve(model), torch.device("cpu"))
    scores = [partial(score, i) for i in range(len(examples))]
    measure = Measurement(examples, DecodingSettings(max_new_tokens=2, batch_size=4), scores, rank)
    path = Path(folder) / "predictions.jsonl"
    whole = measure(lambda: loaded, path, {"model": "a"})
    lines = read_lines(path)
    again = measure(lambda: loaded, path, {"model": "a"})
    return {"mine": mine, "whole": whole, "file": lines, "again": again, "lengths": [len(e) for e in examples]}


def test_three_ranks_share_whole_groups_evenly_and_all_get_every_line(model_folder: Path, tmp_path: Path) -> None:
    """Six examples of one passage and seven of their own: the passage is one rank's, and every rank is told all."""
    found = run_distributed(shared_unevenly, 3, str(tmp_path), str(model_folder))
    parts = [set(f["mine"]) for f in found]
    assert sorted(i for f in found for i in f["mine"]) == list(range(13))
    assert [set(range(6)) <= p for p in parts].count(True) == 1
    lengths = found[0]["lengths"]
    tokens = [sum(lengths[i] for i in p) for p in parts]
    together, alone = sum(lengths[:6]), lengths[6:]
    shares = sorted(t for t, p in zip(tokens, parts, strict=True) if 0 not in p)
    assert shares[1] - shares[0] <= max(alone) and together in (min(tokens), max(tokens), together)
    for f in found:
        assert f["whole"] == f["file"] == f["again"] == found[0]["whole"]
        assert [line["index"] for line in f["whole"]] == list(range(13))
    assert {line["scores"]["rank"] for line in found[0]["whole"]} == {0.0, 1.0, 2.0}


def test_a_line_holds_its_own_example_s_numbers_whatever_the_order(counted: Counted, tmp_path: Path) -> None:
    """Examples with and without references lie in turn, and prompts of other lengths than their answers' order."""
    lines = counted(tmp_path / "predictions.jsonl", seed=1)
    examples = counted.measure.examples
    sums = losses(counted.loaded.scorer, examples, 4)
    assert [line["index"] for line in lines] == list(range(30))
    for line, e, (nll, correct, targets) in zip(lines, examples, sums, strict=True):
        assert (line["id"], line["correct"], line["targets"]) == (e.id, correct, targets)
        assert line["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-4)
        assert ("answer" in line) == bool(e.references)
        if e.references:
            assert line["prompt"] == counted.loaded.decode_text(e.tokens) and line["references"] == ["a"]
            assert line["scores"] == {"exact_match": 0.5}


def test_the_answer_is_asked_for_from_the_prompt_s_tokens_alone(counted: Counted, tmp_path: Path) -> None:
    half = [replace(e, num_prompt=len(e) // 2 + 1) for e in counted.measure.examples]
    lines = replace(counted.measure, examples=half)(counted.load, tmp_path / "predictions.jsonl", {})
    for line, e in zip(lines, half, strict=True):
        if e.references:
            assert line["prompt"] == counted.loaded.decode_text(e.tokens[: e.num_prompt])
    assert sum(line["targets"] for line in lines) == sum(int(e.supervised.sum()) for e in half)


def test_answers_end_at_the_special_token_with_which_examples_end() -> None:
    tokenizer = byte_tokenizer()

    def ending(token: int, supervised: bool = True) -> Example:
        marks = np.array([False, True, supervised])
        return Example(np.array([9, 2, token], np.int32), marks, "e")

    assert endings([ending(1), ending(2), ending(50)], tokenizer) == {1, 2}
    assert endings([ending(1), ending(2, supervised=False)], tokenizer) == {1}


def test_lines_that_several_stops_left_behind_are_all_kept(counted: Counted, tmp_path: Path) -> None:
    """Two ranks' files of an earlier stop, one of them torn: their whole lines are not measured again."""
    path = tmp_path / "predictions.jsonl"
    whole = counted(path, seed=1)
    text = path.read_text().splitlines(keepends=True)
    path.unlink()
    parts = tmp_path / ".predictions.parts"
    (parts / "00000.jsonl").write_text("".join(text[:7]) + text[7][:12])
    (parts / "00001.jsonl").write_text("".join(text[20:26]))
    again = counted(path, seed=1)
    assert len(counted.scored) == sum("answer" in line for line in whole[7:20] + whole[26:])
    assert [a["index"] for a in again] == list(range(30)) and read_jsonl(path) == again
    assert list(parts.glob("*.jsonl")) == []


def test_a_batch_of_a_measurement_holds_as_many_examples_as_asked(
    counted: Counted, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    apart = [Example(np.arange(3 + 40 * i, 33 + 40 * i, dtype=np.int32), np.arange(30) > 0, str(i)) for i in range(7)]
    one_by_one = replace(counted.measure, examples=apart, decoding=DecodingSettings(batch_size=3))
    one_by_one(counted.load, tmp_path / "predictions.jsonl", {})
    assert [rows for rows, _ in shapes] == [3, 3, 1]


def test_an_answer_ends_at_the_mark_with_which_the_examples_end(tmp_path: Path, one: Any) -> None:
    """The model goes on behind <pad>, which is no end of its own, but where the examples end."""
    folder = reciter(tmp_path / "model", " rye<pad> bread", after=":")
    loaded = LoadedModel.load(resolve(str(folder)), torch.device("cpu"))

    def answer(*closing: int) -> str:
        prompt = loaded.encode("Answer:")
        tokens = np.array([*prompt, 50, *closing], np.int32)
        example = Example(tokens, np.arange(len(tokens)) >= len(prompt), "e", 0, len(prompt), ("rye",))
        measure = Measurement([example], DecodingSettings(max_new_tokens=20), [lambda a, r: {}], one)
        (line,) = measure(lambda: loaded, tmp_path / "predictions.jsonl", {"closing": closing})
        return str(line["answer"])

    assert (answer(1), answer(2)) == ("rye bread", "rye")


def test_every_line_is_in_the_file_before_the_next_one_is_made(counted: Counted, tmp_path: Path) -> None:
    """A kill at any moment loses the line at hand and no other: the 6 without an answer come first."""
    seen: list[int] = []
    part = tmp_path / ".predictions.parts" / "00000.jsonl"

    def score(answer: str, references: Any) -> dict[str, float]:
        seen.append(len(part.read_text().splitlines()))
        return {}

    replace(counted.measure, scores=[score] * 30)(counted.load, tmp_path / "predictions.jsonl", {})
    assert seen == list(range(6, 30))


def test_a_sample_does_not_hang_on_what_was_measured_before(counted: Counted, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    measure = replace(counted.measure, decoding=DecodingSettings(max_new_tokens=4, temperature=3.0))
    whole = measure(counted.load, path, {})
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:11]))
    assert [line.get("answer") for line in measure(counted.load, path, {})] == [line.get("answer") for line in whole]
    assert len({line.get("answer") for line in whole}) > 12
