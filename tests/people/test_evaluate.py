"""The evaluate command: scores, predictions, ranks, going on after a stop, the base model beside, and tasks."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftlab.data.example import Example
from sftlab.data.formats.squad import Squad
from sftlab.inference.decoding import DecodingSettings
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import resolve
from sftlab.scoring.bootstrap import differences, scores_of
from sftlab.scoring.example_lines import Measurement, losses
from tests.people.conftest import Typed
from tests.support import command, random_examples, read_jsonl

# (answer, references, exact match, F1) as SQuAD's own evaluate-v1.1.py gives them for each.
OFFICIAL: list[tuple[str, list[str], int, float]] = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos", "Broncos"], 1, 1.0),
    ("the  Denver broncos!", ["Carolina Panthers", "Denver Broncos"], 1, 1.0),
    ("Broncos of Denver", ["Denver Broncos"], 0, 0.8),
    ("a an the", ["the"], 1, 0),
    ("", ["nothing"], 0, 0),
    ("theatre", ["the atre", "a theatre"], 1, 1.0),
    ("1,000", ["1000"], 1, 1.0),
    ("twenty-one", ["twenty one", "21"], 0, 0),
    ("Saint Bernadette Soubirous in 1858", ["Saint Bernadette Soubirous"], 0, 0.7499999999999999),
    ("to to to be", ["to be or not to be", "be"], 0, 0.6),
    ("caf\u00e9 \u2018quoted\u2019", ["cafe quoted", "caf\u00e9"], 0, 0.6666666666666666),
    ("L'Oreal's", ["LOreals", "l oreal s"], 1, 1.0),
    ("The A-Team", ["ateam", "a team"], 1, 1.0),
    ("gold and silver", ["silver", "gold", "golden"], 0, 0.5),
    ("ANSWER", ["answer.", "an answer"], 1, 1.0),
    ("\u00dcber den the", ["\u00fcber den", "uber"], 1, 1.0),
    ("\u2002spaces\u2003here ", ["spaces here"], 1, 1.0),
]
OFFICIAL_TOTALS = {"exact_match": 58.8235294117647, "f1": 72.45098039215686}


def scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def evaluated(*arguments: str, ranks: int = 1, cwd: Path | None = None) -> str:
    done = command("evaluate", *arguments, ranks=ranks, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.parametrize(("answer", "references", "exact", "f1"), OFFICIAL)
def test_squad_scores_are_the_official_script_s(answer: str, references: list[str], exact: int, f1: float) -> None:
    assert Squad().score(answer, references) == {"exact_match": exact, "f1": f1}


def test_squad_totals_are_the_official_script_s() -> None:
    lines = [{"scores": Squad().score(answer, references)} for answer, references, *_ in OFFICIAL]
    for name, value in scores_of(lines).items():
        assert 100 * value == pytest.approx(OFFICIAL_TOTALS[name], rel=2.3e-16, abs=0)  # one unit in the last place


@pytest.fixture(scope="module")
def own(demo_run: Path) -> Path:
    """The demo run evaluated on its own validation data, the base model beside it."""
    shown = evaluated(f"run={demo_run}", "baseline=true")
    assert "exact_match" in shown and "95 % interval" in shown and "250 examples" in shown
    return demo_run / "evaluate" / "demo"


def test_the_loss_is_the_run_s_own(own: Path, demo_run: Path) -> None:
    """Gauntlet 4 over commands: other batches, another layout, the same number."""
    last = [line for line in read_jsonl(demo_run / "metrics.jsonl") if "val/loss" in line]
    report = scores(own)
    for name in ("loss", "perplexity", "token_accuracy"):
        assert report["scores"][name] == pytest.approx(last[-1][f"val/{name}"], rel=1e-6)
        assert report["baseline"][name] == pytest.approx(last[0][f"val/{name}"], rel=1e-6)  # before training
    assert report["difference"]["loss"]["high"] < 0  # 100 steps do help


def test_predictions_hold_what_the_scores_are_made_of(own: Path, demo_run: Path) -> None:
    lines, report = read_jsonl(own / "predictions.jsonl"), scores(own)
    assert [line["index"] for line in lines] == list(range(250)) and report["examples"] == 250
    assert len({line["id"] for line in lines}) == 250
    for line in lines:
        assert line["scores"] == Squad().score(line["answer"], line["references"])
        assert line["prompt"].startswith("Context: ") and line["prompt"].endswith(" Answer:")
    for name in ("exact_match", "f1"):
        assert report["scores"][name] == sum(line["scores"][name] for line in lines) / 250
    loaded = LoadedModel.load(resolve(str(demo_run)), torch.device("cpu"))
    for line in lines[::50]:
        inputs = loaded.tokenizer(line["prompt"], return_tensors="pt")
        out = loaded.scorer.model.generate(**inputs, do_sample=False, max_new_tokens=32)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == line["answer"]


def test_two_ranks_give_what_one_does(own: Path, demo_run: Path, tmp_path: Path) -> None:
    evaluated(f"run={demo_run}", f"output_dir={tmp_path}", ranks=2)
    one, two = read_jsonl(own / "predictions.jsonl"), read_jsonl(tmp_path / "predictions.jsonl")
    for a, b in zip(one, two, strict=True):
        assert a.pop("nll") == pytest.approx(b.pop("nll"), rel=1e-4, abs=1e-5)
        assert a == b
    assert scores(own)["scores"] == pytest.approx(scores(tmp_path)["scores"], rel=1e-6)


def test_a_sample_of_other_data_and_no_answers(demo_run: Path, squad_files: tuple[Path, Path], tmp_path: Path) -> None:
    _, validation = squad_files
    shown = evaluated(f"run={demo_run}", "data=squad", f"data.path={validation}", "limit=5", "answers=false")
    assert "5 examples" in shown
    report = scores(demo_run / "evaluate" / "squad-5")
    assert set(report["scores"]) == {"loss", "perplexity", "token_accuracy"} and report["data"] == "squad"
    indices = [line["id"] for line in read_jsonl(demo_run / "evaluate" / "squad-5" / "predictions.jsonl")]
    assert len(set(indices)) == 5 and indices != [f"p{p}q{q}" for p in range(4) for q in range(3)][:5]


def test_a_model_folder_without_its_run(model_folder: Path, squad_files: tuple[Path, Path], tmp_path: Path) -> None:
    done = command("evaluate", f"run={model_folder}", cwd=tmp_path)
    assert done.returncode == 1 and "say which, data=squad" in done.stderr
    evaluated(f"run={model_folder}", "data=squad", f"data.path={squad_files[1]}", "max_new_tokens=4", cwd=tmp_path)
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert scores(folder / "evaluate" / "squad")["examples"] == 12


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
        self.measure = Measurement(examples, DecodingSettings(max_new_tokens=3, batch_size=4), self.score, world)

    def score(self, answer: str, references: Any) -> dict[str, float]:
        self.scored.append(answer)
        return {"exact_match": 0.5}

    def load(self) -> LoadedModel:
        self.loads += 1
        return self.inference

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

    monkeypatch.setattr(counted, "measure", replace(counted.measure, score=stopped))
    with pytest.raises(KeyboardInterrupt):
        counted(path, seed=1)
    assert not path.exists()
    (part,) = (tmp_path / ".predictions.parts").glob("*.jsonl")
    with part.open("a") as file:
        file.write('{"index": 3, "torn')  # as a kill leaves it
    done = len(part.read_text().splitlines()) - 1
    assert 9 <= done < 30

    monkeypatch.setattr(counted, "measure", replace(counted.measure, score=score))
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


def line(value: float, **more: Any) -> dict[str, Any]:
    return {"scores": {"f1": value}, "nll": 10 * value, "targets": 5, "correct": 2, **more}


def test_intervals_of_equal_models_and_of_a_constant_gap_are_points() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(200)
    ours = [line(v) for v in values]
    for gap in differences(ours, ours, range(200)).values():
        assert gap == {"value": 0, "low": 0, "high": 0}
    found = differences([line(v + 0.25) for v in values], ours, range(200))
    assert found["f1"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    assert found["loss"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert list(found) == ["loss", "token_accuracy", "f1"]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Questions of one passage share their luck: over groups 95 % of the intervals hold, over questions far fewer."""
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "questions": 0}
    rounds, groups = 100, np.repeat(np.arange(60), 5)
    for _ in range(rounds):
        luck = np.repeat(rng.normal(size=60), 5)
        ours, theirs = [{"scores": {"f1": v}} for v in luck + rng.normal(size=300)], [{"scores": {"f1": 0.0}}] * 300
        for name, of in (("groups", groups), ("questions", np.arange(300))):
            gap = differences(ours, theirs, of.tolist())["f1"]
            covered[name] += gap["low"] <= 0 <= gap["high"]
    assert 0.87 < covered["groups"] / rounds < 1
    assert covered["questions"] / rounds < 0.8


def test_scores_of_nothing_supervised_are_nan_not_zero() -> None:
    found = scores_of([{"nll": 0.0, "targets": 0, "correct": 0}])
    assert math.isnan(found["loss"]) and math.isnan(found["token_accuracy"])


def test_bad_input(demo_run: Path, tmp_path: Path, refused: Typed) -> None:
    assert "no such folder" in refused("evaluate", f"run={tmp_path}/nothing")
    assert "is no run" in refused("evaluate", f"run={tmp_path}")
    assert "did you mean limit" in refused("evaluate", f"run={demo_run}", "limt=3")
    assert "limit=0: expected" in refused("evaluate", f"run={demo_run}", "limit=0")
    assert "no such option" in refused("evaluate", f"run={demo_run}", "data=squod")
    assert "did you mean data.val_path" in refused("evaluate", f"run={demo_run}", "data.valpath=x")
    assert "no validation data of its own" in refused("evaluate", f"run={demo_run}", "data.val_path=null")


DOCUMENTS = 24
TASK = """task: keepers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {documents}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Context: {{{{context}}}} Question: Who is the keeper? Answer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of our own on local data, as the harness defines tasks."""
    rng = np.random.default_rng(0)
    names = ["Selma Merrow", "Ravi Merrow", "Otto Crane", "Flora Crane", "Alma Pike"]
    with (tmp_path / "documents.jsonl").open("w") as file:
        for _ in range(DOCUMENTS):
            choices, gold = rng.permutation(names)[:4].tolist(), int(rng.integers(4))
            context = f"Its keeper, {choices[gold]}, talks to the waves. Sailors come from {choices[gold - 1]}."
            file.write(json.dumps({"context": context, "choices": choices, "gold": gold}) + "\n")
    (tmp_path / "keepers.yaml").write_text(TASK.format(documents=tmp_path / "documents.jsonl"))
    return tmp_path


def test_a_task_scores_as_on_the_harness_s_own_command_line(demo_run: Path, task_folder: Path, tmp_path: Path) -> None:
    shown = evaluated(f"run={demo_run}", "tasks=[keepers]", f"tasks_path={task_folder}", "baseline=true")
    assert f"keepers: {DOCUMENTS} documents" in shown
    report = scores(demo_run / "evaluate" / "keepers")
    lines = read_jsonl(demo_run / "evaluate" / "keepers" / "predictions.jsonl")
    assert len(lines) == DOCUMENTS and report["scores"]["acc"] == np.mean([line["scores"]["acc"] for line in lines])
    gap = report["difference"]["acc"]
    assert gap["low"] <= gap["value"] == report["scores"]["acc"] - report["baseline"]["acc"] <= gap["high"]

    (tmp_path / "model").symlink_to(demo_run / "model")  # its command line splits at commas
    theirs = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path}/model"]
    theirs += ["--tasks", "keepers", "--include_path", str(task_folder), "--device", "cpu"]
    subprocess.run([*theirs, "--output_path", str(tmp_path / "theirs.json")], check=True, capture_output=True)
    (found,) = tmp_path.rglob("theirs*.json")
    assert json.loads(found.read_text())["results"]["keepers"]["acc,none"] == report["scores"]["acc"]


def test_an_unknown_task_and_a_missing_harness(demo_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tasks=hellaswog: no such task" in refused("evaluate", f"run={demo_run}", "tasks=[hellaswog]")
    assert "no such folder" in refused("evaluate", f"run={demo_run}", "tasks=[a]", "tasks_path=nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'sftlab[lm-eval]'" in refused("evaluate", f"run={demo_run}", "tasks=[hellaswag]")
