"""The evaluate command: scores, predictions, ranks, going on after a stop, the base model beside, and tasks."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sftlab.config import groups
from sftlab.data.formats.squad import Squad
from sftlab.data.plan import shuffled
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import TrainedModel, resolve
from sftlab.scoring.bootstrap import scores_of
from sftlab.scoring.on_data import own_name
from tests.commands import Typed, run_here
from tests.support import command, read_jsonl

SAMPLE = 60  # questions of the demo's 250 that are answered where an answer is what matters

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


@pytest.mark.parametrize(("answer", "references", "exact", "f1"), OFFICIAL)
def test_squad_scores_are_the_official_script_s(answer: str, references: list[str], exact: int, f1: float) -> None:
    assert Squad().score(answer, references) == {"exact_match": exact, "f1": f1}


def test_squad_totals_are_the_official_script_s() -> None:
    lines = [{"scores": Squad().score(answer, references)} for answer, references, *_ in OFFICIAL]
    for name, value in scores_of(lines).items():
        assert 100 * value == pytest.approx(OFFICIAL_TOTALS[name], rel=2.3e-16, abs=0)  # one unit in the last place


@pytest.fixture(scope="module")
def own(demo_run: Path) -> Path:
    """The demo run asked a sample of its own validation questions."""
    shown = run_here("evaluate", f"run={demo_run}", f"limit={SAMPLE}")
    assert "exact_match" in shown and f"on demo: {SAMPLE} examples" in shown
    return demo_run / "evaluate" / f"demo-{SAMPLE}"


def test_the_loss_is_the_run_s_own(demo_run: Path) -> None:
    """Gauntlet 4 over commands: other batches, another layout, the same number."""
    last = [line for line in read_jsonl(demo_run / "metrics.jsonl") if "val/loss" in line]
    shown = run_here("evaluate", f"run={demo_run}", "baseline=true", "answers=false")
    assert "95 % interval" in shown and "on demo: 250 examples" in shown
    report = scores(demo_run / "evaluate" / "demo")
    for name in ("loss", "perplexity", "token_accuracy"):
        assert report["scores"][name] == pytest.approx(last[-1][f"val/{name}"], rel=1e-6)
        assert report["baseline"][name] == pytest.approx(last[0][f"val/{name}"], rel=1e-6)  # before training
    assert report["difference"]["loss"]["high"] < 0  # 40 steps do help


def test_predictions_hold_what_the_scores_are_made_of(own: Path, demo_run: Path) -> None:
    lines, report = read_jsonl(own / "predictions.jsonl"), scores(own)
    assert [line["index"] for line in lines] == list(range(SAMPLE)) and report["examples"] == SAMPLE
    assert len({line["id"] for line in lines}) == SAMPLE
    for line in lines:
        assert line["scores"] == Squad().score(line["answer"], line["references"])
        assert line["prompt"].startswith("Context: ") and line["prompt"].endswith(" Answer:")
    for name in ("exact_match", "f1"):
        assert report["scores"][name] == sum(line["scores"][name] for line in lines) / SAMPLE
    loaded = LoadedModel.load(resolve(str(demo_run)), torch.device("cpu"))
    for line in lines[::20]:
        inputs = loaded.tokenizer(line["prompt"], return_tensors="pt")
        out = loaded.scorer.model.generate(**inputs, do_sample=False, max_new_tokens=32)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == line["answer"]


def test_two_ranks_give_what_one_does(own: Path, demo_run: Path, tmp_path: Path) -> None:
    done = command("evaluate", f"run={demo_run}", f"limit={SAMPLE}", f"output_dir={tmp_path}", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = read_jsonl(own / "predictions.jsonl"), read_jsonl(tmp_path / "predictions.jsonl")
    for a, b in zip(one, two, strict=True):
        assert a.pop("nll") == pytest.approx(b.pop("nll"), rel=1e-4, abs=1e-5)
        assert a == b
    assert scores(own)["scores"] == pytest.approx(scores(tmp_path)["scores"], rel=1e-6)


def test_a_sample_of_other_data_and_no_answers(demo_run: Path, squad_files: tuple[Path, Path], tmp_path: Path) -> None:
    _, validation = squad_files
    shown = run_here("evaluate", f"run={demo_run}", "data=squad", f"data.path={validation}", "limit=5", "answers=false")
    assert "5 examples" in shown
    report = scores(demo_run / "evaluate" / "squad-5")
    assert set(report["scores"]) == {"loss", "perplexity", "token_accuracy"} and report["data"] == "squad"
    indices = [line["id"] for line in read_jsonl(demo_run / "evaluate" / "squad-5" / "predictions.jsonl")]
    assert len(set(indices)) == 5 and indices != [f"p{p}q{q}" for p in range(4) for q in range(3)][:5]


def test_a_model_folder_without_its_run(
    model_folder: Path, squad_files: tuple[Path, Path], tmp_path: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name some, such as data=squad" in refused("evaluate", f"run={model_folder}")
    run_here("evaluate", f"run={model_folder}", "data=squad", f"data.path={squad_files[1]}", "max_new_tokens=4")
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert scores(folder / "evaluate" / "squad")["examples"] == 12


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


@pytest.mark.filterwarnings("ignore")  # of the harness's own
def test_a_task_scores_as_on_the_harness_s_own_command_line(
    demo_run: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.__main__ import cli_evaluate

    shown = run_here("evaluate", f"run={demo_run}", "tasks=[keepers]", f"tasks_path={task_folder}", "baseline=true")
    assert f"keepers: {DOCUMENTS} documents" in shown
    report = scores(demo_run / "evaluate" / "keepers")
    lines = read_jsonl(demo_run / "evaluate" / "keepers" / "predictions.jsonl")
    assert len(lines) == DOCUMENTS and report["scores"]["acc"] == np.mean([line["scores"]["acc"] for line in lines])
    assert report["examples"] == DOCUMENTS and report["base_model"] == "asset://demo/model"
    right = report["scores"]["acc"]
    spread = math.sqrt(right * (1 - right) / (DOCUMENTS - 1))
    assert report["scores"]["acc_stderr"] == pytest.approx(spread)
    gap = report["difference"]["acc"]
    assert gap["low"] <= gap["value"] == report["scores"]["acc"] - report["baseline"]["acc"] <= gap["high"]

    (tmp_path / "model").symlink_to(demo_run / "model")  # its command line splits at commas
    theirs = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path}/model", "--tasks", "keepers"]
    theirs += ["--include_path", str(task_folder), "--device", "cpu", "--output_path", str(tmp_path / "theirs.json")]
    monkeypatch.setattr(sys, "argv", theirs)
    cli_evaluate()
    (found,) = tmp_path.rglob("theirs*.json")
    assert json.loads(found.read_text())["results"]["keepers"]["acc,none"] == report["scores"]["acc"]


def test_an_unknown_task_and_a_missing_harness(demo_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tasks=hellaswog: no such task" in refused("evaluate", f"run={demo_run}", "tasks=[hellaswog]")
    assert "no such folder" in refused("evaluate", f"run={demo_run}", "tasks=[a]", "tasks_path=nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'sftlab[lm-eval]'" in refused("evaluate", f"run={demo_run}", "tasks=[hellaswag]")


# The model of `rye_run` says " rye bread" to every question. After a token of that speech (and after "Answer:") the one
# that follows has probability 1/2 and every other one 1/638; after any other token each has 1/320. The base knows
# nothing: 1/320 everywhere. Tokens of the four answers, each with the end of text, by what they cost:
#   " rye bread"       7 x ln 2
#   " rye"             3 x ln 2, and the end where "bread" was expected, ln 638
#   " clocks"          the space, ln 2; c after it, ln 638; five more letters and the end, 6 x ln 320
#   " the rye bread"   " the", ln 638; the space after it, ln 320; then 6 x ln 2
LN2, LN638, LN320 = math.log(2), math.log(638), math.log(320)
OVEN, SHOP = (11 * LN2 + 2 * LN638 + 6 * LN320, 19), (6 * LN2 + LN638 + LN320, 8)


def test_every_number_of_an_evaluation_is_the_one_worked_out_by_hand(
    rye_run: Path, typed: Typed, tmp_path: Path
) -> None:
    """Three questions on one passage and one on another: the intervals reach from one passage's gap to the other's."""
    shown = typed("evaluate", f"run={rye_run}", "baseline=true", "max_new_tokens=20", f"output_dir={tmp_path}")
    report = scores(tmp_path)
    loss = (OVEN[0] + SHOP[0]) / 27
    assert report["scores"] == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 17 / 27, "exact_match": 0.5, "f1": 2 / 3},
        rel=1e-5,
    )
    assert report["baseline"] == pytest.approx(
        {"loss": LN320, "perplexity": 320, "token_accuracy": 0, "exact_match": 0, "f1": 0}, rel=1e-5
    )
    by_hand = {
        "loss": (loss - LN320, OVEN[0] / 19 - LN320, SHOP[0] / 8 - LN320),
        "token_accuracy": (17 / 27, 11 / 19, 6 / 8),
        "exact_match": (1 / 2, 1 / 3, 1.0),
        "f1": (2 / 3, 5 / 9, 1.0),
    }
    for name, (value, oven, shop) in by_hand.items():
        expected = {"value": value, "low": min(oven, shop), "high": max(oven, shop)}
        assert report["difference"][name] == pytest.approx(expected, rel=1e-4), name
    assert list(report["difference"]) == list(by_hand)
    base = str(rye_run.parent / "base")
    assert (report["run"], report["model"]) == (str(rye_run), str(rye_run / "model"))
    assert (report["base_model"], report["data"], report["examples"]) == (base, "validation", 4)
    words = [line.split() for line in shown.splitlines()]
    assert ["exact_match", "0.0000", "0.5000", "+0.5000", "+0.3333", "to", "+1.0000"] in words
    assert ["perplexity", "320.0000", f"{math.exp(loss):.4f}"] in words
    assert f"{rye_run} on validation: 4 examples" in shown and str(tmp_path) in shown
    ours, theirs = read_jsonl(tmp_path / "predictions.jsonl"), read_jsonl(tmp_path / "baseline.jsonl")
    assert [(line["id"], line["answer"], line["targets"], line["correct"]) for line in ours] == [
        ("a", "rye bread", 7, 7),
        ("b", "rye bread", 4, 3),
        ("c", "rye bread", 8, 1),
        ("d", "rye bread", 8, 6),
    ]
    assert {line["answer"] for line in theirs} == {""} and len(theirs) == 4


def test_a_run_on_a_mixture_is_scored_source_by_source(rye_run: Path, typed: Typed, tmp_path: Path) -> None:
    """The model says " rye bread" to all: half right on its own questions, and right on those of the other source."""
    shutil.copytree(rye_run / "model", tmp_path / "run" / "model")
    config = yaml.safe_load((rye_run / "config.yaml").read_text())
    row = {"context": "An oven.", "question": "What?", "answers": {"text": ["rye bread"], "answer_start": [0]}}
    rows = [{"id": f"r{i}", **row} for i in range(2)]
    (tmp_path / "right.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sources = {"half": config["data"], "right": config["data"] | {"val_path": str(tmp_path / "right.jsonl")}}
    config["data"] = {"_target_": "sftlab.data.mixture.Mixture", "sources": sources, "weights": {"half": 1, "right": 1}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    typed("evaluate", f"run={tmp_path}/run", "max_new_tokens=20", f"output_dir={tmp_path}/out")
    found = scores(tmp_path / "out")
    assert {name: value for name, value in found["scores"].items() if "/" in name} == pytest.approx(
        {"half/exact_match": 0.5, "half/f1": 2 / 3, "right/exact_match": 1.0, "right/f1": 1.0}
    )
    assert not {"exact_match", "f1"} & set(found["scores"]) and found["examples"] == 6
    lines = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [next(iter(line["scores"])) for line in lines] == ["half/exact_match"] * 4 + ["right/exact_match"] * 2

    typed("evaluate", f"run={tmp_path}/run", "max_new_tokens=20", f"output_dir={tmp_path}/two", "limit=2")
    sample = sorted(shuffled(6, 0, 0)[:2].tolist())
    assert read_jsonl(tmp_path / "two" / "predictions.jsonl") == [
        lines[i] | {"index": n, "nll": pytest.approx(lines[i]["nll"], rel=1e-4)} for n, i in enumerate(sample)
    ]


def test_an_answer_is_as_long_as_its_run_allows_unless_said_otherwise(
    rye_run: Path, typed: Typed, tmp_path: Path
) -> None:
    """The run's own evaluation takes 3 tokens; other data has no such setting, and 256 are enough for the whole."""
    questions = rye_run.parent / "questions.jsonl"
    other = ("data=squad", f"data.path={questions}")
    for number, (arguments, tokens, answer) in enumerate(
        [
            ((), 3, "rye"),
            (("max_new_tokens=2",), 2, "ry"),
            (other, 256, "rye bread"),
            ((*other, "max_new_tokens=5"), 5, "rye bre"),
        ]
    ):
        folder = tmp_path / str(number)
        typed("evaluate", f"run={rye_run}", f"output_dir={folder}", *arguments)
        assert {line["answer"] for line in read_jsonl(folder / "predictions.jsonl")} == {answer}
        assert scores(folder)["settings"]["max_new_tokens"] == tokens
        assert scores(folder)["data"] == ("squad" if other[0] in arguments else "validation")


def test_as_many_examples_are_computed_together_as_asked(
    rye_run: Path, typed: Typed, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    typed("evaluate", f"run={rye_run}", f"output_dir={tmp_path}/all")
    assert [rows for rows, columns in shapes if columns > 3] == [2, 2]  # two passages, scored and then answered
    shapes.clear()
    typed("evaluate", f"run={rye_run}", f"output_dir={tmp_path}/one", "batch_size=1")
    assert [rows for rows, columns in shapes if columns > 3] == [1] * 8
    assert scores(tmp_path / "one")["scores"] == pytest.approx(scores(tmp_path / "all")["scores"], rel=1e-5)


def test_a_limit_takes_the_same_sample_every_time_and_leaves_the_whole_alone(
    rye_run: Path, squad_files: tuple[Path, Path], typed: Typed
) -> None:
    other = ("evaluate", f"run={rye_run}", "data=squad", f"data.path={squad_files[1]}", "answers=false")
    typed(*other)
    sample = sorted(shuffled(12, 0, 0)[:5].tolist())
    assert sample != [0, 1, 2, 3, 4]
    assert "squad: 5 examples" in typed(*other, "limit=5")
    lines = read_jsonl(rye_run / "evaluate" / "squad-5" / "predictions.jsonl")
    assert [line["id"] for line in lines] == [f"p{i // 3}q{i % 3}" for i in sample]
    assert scores(rye_run / "evaluate" / "squad")["examples"] == 12


def test_no_line_of_other_settings_is_taken_for_one_of_these(
    rye_run: Path, listening_run: Path, typed: Typed, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    """Each differs in one setting from the one before, and gives in the same folder what it gives in one of its own."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join((rye_run.parent / "questions.jsonl").read_text().splitlines(keepends=True)[::-1]))
    before: list[dict[str, Any]] = []
    for number, arguments in enumerate(
        [
            ("max_new_tokens=9",),
            ("max_new_tokens=2",),
            ("max_new_tokens=2", "answers=false"),
            ("max_new_tokens=2", "answers=false", "data.max_length=70", "data.overlong=truncate"),
            ("max_new_tokens=2", "answers=false", "data.max_length=70", "data.overlong=truncate", "limit=2"),
            ("max_new_tokens=2",),
            ("max_new_tokens=2", f"data.val_path={questions}"),
            ("max_new_tokens=2", f"data.val_path={questions}", f"run={listening_run}"),
        ]
    ):
        for folder in (tmp_path / "same", tmp_path / str(number)):
            typed("evaluate", f"run={rye_run}", f"output_dir={folder}", *arguments)
        found, alone = (read_jsonl(tmp_path / f / "predictions.jsonl") for f in ("same", str(number)))
        assert found == alone and found != before
        before = found
    shapes.clear()
    typed("evaluate", f"run={rye_run}", f"output_dir={tmp_path}/same", *arguments)
    assert shapes == []  # the same again is only read


def test_an_example_longer_than_the_model_s_context_is_refused_whatever_the_data_allow(
    rye_run: Path, refused: Typed, tmp_path: Path
) -> None:
    row = {
        "id": "long",
        "context": "word " * 1500,
        "question": "Who?",
        "answers": {"text": ["word"], "answer_start": [0]},
    }
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    arguments = (f"data.val_path={tmp_path}/long.jsonl", "data.max_length=5000", f"output_dir={tmp_path}/out")
    assert "2048" in refused("evaluate", f"run={rye_run}", *arguments)


@pytest.mark.parametrize("key", ["limit", "max_new_tokens", "batch_size"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true"])
def test_counts_must_be_whole_and_at_least_one(key: str, value: str, rye_run: Path, refused: Typed) -> None:
    assert "expected a whole number of at least 1" in refused("evaluate", f"run={rye_run}", f"{key}={value}")


def test_the_run_s_data_have_the_name_of_their_option(
    rye_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(path: str, *overrides: str) -> str:
        (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        return own_name(TrainedModel("run", "model", tmp_path, {"data": {"path": path}}))

    assert named("elsewhere.jsonl", "optim=adamw", "data.limit=3", "data=gsm8k") == "gsm8k"
    assert named("rajpurkar/squad", "optim=adamw") == "squad"
    assert named("elsewhere.jsonl", "optim=adamw") == "validation"
    (tmp_path / "overrides.yaml").unlink()
    assert own_name(TrainedModel("run", "model", tmp_path, {"data": {"path": "asset://demo/train.jsonl.gz"}})) == "demo"
    assert own_name(TrainedModel("run", "model", tmp_path, {"data": {"sources": {}}})) == "validation"
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "another.yaml").write_text("path: elsewhere.jsonl\n")
    monkeypatch.setattr(groups, "installed", lambda: {"mine": tmp_path / "conf"})
    assert own_name(TrainedModel("run", "model", tmp_path, {"data": {"path": "elsewhere.jsonl"}})) == "another"


def test_a_base_that_is_not_known_is_said_before_anything_is_measured(
    rye_run: Path, refused: Typed, tmp_path: Path
) -> None:
    shutil.copytree(rye_run / "model", tmp_path / "alone")
    other = ("data=squad", f"data.path={rye_run.parent}/questions.jsonl", f"output_dir={tmp_path}/out")
    assert "its base is not known" in refused("evaluate", f"run={tmp_path}/alone", "baseline=true", *other)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_each_setting_of_a_task_reaches_the_harness(
    rye_run: Path, task_folder: Path, typed: Typed, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    settings = {"tasks_path": str(task_folder), "num_fewshot": 2, "limit": 5, "batch_size": 3}
    given = [f"{key}={value}" for key, value in settings.items()]
    out = tmp_path / "out"
    shown = typed("evaluate", f"run={rye_run}", "tasks=[keepers]", "baseline=true", f"output_dir={out}", *given)
    assert "keepers: 5 documents" in shown and scores(out / "keepers")["settings"] == settings
    lines = read_jsonl(out / "keepers" / "predictions.jsonl")
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["prompt"].count("Answer:") for line in lines] == [3] * 5  # two that are answered, and its own
    assert max(rows for rows, _ in shapes) == 3
    found = scores(out / "keepers")["scores"]
    right = sum(line["scores"]["acc"] for line in lines) / 5
    assert found["acc"] == right and found["acc_stderr"] == pytest.approx(math.sqrt(right * (1 - right) / 4))
    base = read_jsonl(out / "keepers" / "baseline.jsonl")
    assert [line["prompt"] for line in base] == [line["prompt"] for line in lines]
    assert all(line["answer"] != other["answer"] for line, other in zip(lines, base, strict=True))  # the likelihoods
    assert scores(out / "keepers")["base_model"] == str(rye_run.parent / "base")


def test_tasks_run_in_one_process(listening_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused("evaluate", f"run={listening_run}", "tasks=[a]")


def test_the_last_run_that_is_typed_counts(rye_run: Path, typed: Typed, tmp_path: Path) -> None:
    typed("evaluate", "run=nowhere", f"run={rye_run}", "answers=false", f"output_dir={tmp_path}")
    assert scores(tmp_path)["run"] == str(rye_run) and scores(tmp_path)["examples"] == 4


CALLING = (
    "{{ bos_token }}{{ tools | tojson if tools }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_calls_of_a_model_that_was_trained_to_call_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calling.jinja").write_text(CALLING)
    tools = [{"name": name, "parameters": {"type": "object"}} for name in ("add", "mul")]
    rows = []
    for name, word in (("add", "Add it."), ("mul", "Multiply.")):
        call = {"function": {"name": name, "arguments": {"a": 1}}}
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        rows.append({"messages": turns, "tools": tools})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = json.loads(json.dumps(rows))
    other[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"a": 2}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    run_here(
        "train", "data=chat", "data.path=train.jsonl", "data.val_path=train.jsonl", "run_dir=run", "tracker=none",
        "data.format.template_path=calling.jinja", "trainer.batch_size=2", "trainer.max_steps=60", "optim.lr=0.003",
        "evaluation.num_answers=2", "evaluation.max_new_tokens=40",
    )  # fmt: skip
    last = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/tool_name" in line][-1]
    assert (last["val/tool_name"], last["val/tool_valid_json"], last["val/tool_arguments"]) == (1, 1, 1)
    shown = run_here(
        "evaluate",
        "run=run",
        "data=chat",
        "data.path=other.jsonl",
        "data.format.template_path=calling.jinja",
        "max_new_tokens=40",
    )
    assert "tool_arguments" in shown
    (folder,) = [f.parent for f in (tmp_path / "run" / "evaluate").glob("*/scores.json")]
    found = scores(folder)["scores"]
    assert (found["tool_name"], found["tool_valid_json"], found["tool_arguments"]) == (1, 1, 0.5), found
