"""The preview command: what it draws, what it writes, and that its numbers are the data's."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftlab import preview
from sftlab.data.example import Example
from sftlab.data.forest import lay_out, row, sort_key
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.painter import Painter, predicted, segments
from sftlab.data.plan import Plan
from tests.support import byte_tokenizer, make_squad_file, random_examples, read_jsonl

Show = Callable[..., str]


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model_folder: Path
) -> Show:
    """Run preview in an empty folder, in this process, on a tiny model's tokenizer; return what it printed."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> str:
        model = ("model=hf", f"model.name_or_path={model_folder}")
        monkeypatch.setattr(sys, "argv", ["sftlab-preview", *model, *arguments])
        preview.main()
        return capfd.readouterr().out

    return run


def refused(show: Show, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        show(*arguments)
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_numbers_of_the_report_are_the_datas(show: Show, tmp_path: Path) -> None:
    train, val = make_squad_file(tmp_path / "t.jsonl", 10), make_squad_file(tmp_path / "v.jsonl", 2, seed=1)
    rows = read_jsonl(train)
    with train.open("a") as file:
        file.write(json.dumps(rows[4]) + "\n")
    with val.open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    out = show("data=squad", f"data.path={train}", f"data.val_path={val}", "output=all.jsonl", "trainer.batch_size=8")
    lines = read_jsonl(Path("all.jsonl"))
    assert [line["id"] for line in lines] == [
        r["id"] for r in [*rows, rows[4]]
    ]  # in source order, the source's own ids

    tok = byte_tokenizer()
    texts = []
    for line, r in zip(lines, [*rows, rows[4]], strict=True):
        assert line.keys() == {"id", "tokens", "supervised", "text", "supervised_text"}
        assert len(line["tokens"]) == len(line["supervised"]) and set(line["supervised"]) == {0, 1}
        prompt, answer = f"Context: {r['context']} Question: {r['question']} Answer:", r["answers"]["text"][0]
        assert line["tokens"] == [*tok(f"{prompt} {answer}").input_ids, tok.eos_token_id]  # unshifted
        assert line["text"] == f"<s>{prompt} {answer}</s>" and line["supervised_text"] == f" {answer}</s>"
        texts.append(tuple(line["tokens"]))
    tokens, supervised = sum(map(len, texts)), sum(sum(line["supervised"]) for line in lines)
    assert f"training  31 rows read, 31 kept, {tokens:,} tokens, {supervised:,} supervised" in out
    assert re.search(r"\b1 duplicates: \S*t\.jsonl:31 \(id p1q1\)", out)
    assert re.search(r"\b1 validation examples that are training examples too: \S*v\.jsonl:7 \(id p0q0\)", out)
    # Tokens after sharing, worked out from the texts: distinct beginnings, step by step.
    plan = Plan(np.array([hash(r["context"]) for r in [*rows, rows[4]]]), 8, 0)
    layout = next(line for line in out.splitlines() if line.startswith("layout"))
    before, after, num_rows, fill = re.match(
        r"layout  ([\d.,]+) tokens per example become ([\d.,]+) in (\d+) rows, ([\d.]+)% full", layout
    ).groups()  # type: ignore[union-attr]
    assert number(before) == pytest.approx(tokens / 31, abs=0.06)
    nodes = sum(len({texts[i][:n] for i in plan.examples(s) for n in range(1, len(texts[i]) + 1)}) for s in range(1, 5))
    assert number(after) == pytest.approx(nodes / 31, rel=0.15) and number(after) < 0.75 * number(before)
    assert int(num_rows) >= 4 and 0 < number(fill) <= 100
    lengths = [tuple(map(int, m.groups())) for m in re.finditer(r"^\s*(\d+)-(\d+)\s+(\d+)\s+█", out, re.M)]
    at = next(i for i in range(1, len(lengths)) if lengths[i][0] < lengths[i - 1][0])  # where the second begins
    for shown, values in (
        (lengths[:at], [len(t) for t in texts]),
        (lengths[at:], [sum(x["supervised"]) for x in lines]),
    ):
        for low, high, count in shown:
            assert count == sum(low <= v <= high for v in values)
        assert sum(count for _, _, count in shown) == 31


def test_rows_are_shown_with_what_is_supervised_and_any_row_by_number(show: Show, tmp_path: Path) -> None:
    train = make_squad_file(tmp_path / "t.jsonl", 10)
    out = show("data=squad", f"data.path={train}", "rows=2")
    assert out.count("tokens, ") >= 2 and f"{train}:1 (id p0q0)" in out and f"{train}:2 (id p0q1)" in out
    assert f"{train}:3" not in out.split("training")[0]
    answer = read_jsonl(train)[16]["answers"]["text"][0]
    out = show("data=squad", f"data.path={train}", "row=17")
    assert "t.jsonl:17 (id p5q1)" in out and "p0q0" not in out and f" {answer}</s>" in out and "<s>Context: " in out
    assert "step 1, one of its 1 rows: 30 examples, " in out  # the forest
    assert list(Path().iterdir()) == []  # it writes nothing that was not asked for


def test_colours_mark_what_is_supervised() -> None:
    from sftlab.data.painter import SPECIAL, SUPERVISED

    tok = byte_tokenizer()
    painter = Painter(Console(), tok)
    ids = np.array([*tok("the keeper").input_ids, tok.eos_token_id])
    text = painter.tokens(ids, np.arange(len(ids)) >= len(ids) - 2, 600)
    spans = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert text.plain == "<s>the keeper</s>"
    assert spans["<s>"] == SPECIAL
    assert [s for s, style in spans.items() if SUPERVISED in style][-1].endswith("</s>")


def test_a_row_is_drawn_as_the_forest_it_is() -> None:
    for seed in range(5):
        examples = sorted(random_examples(9, seed=seed), key=sort_key)
        drawn = row([examples])
        parts = segments(drawn)
        assert [i for a, b in parts for i in range(a, b)] == list(range(len(drawn)))
        for e, path in zip(examples, drawn.paths, strict=True):  # each example is a chain of whole stretches
            assert path.tolist() == [i for a, b in parts if a in path for i in range(a, b)]
            assert len(e) == len(path)
        weight = np.zeros(len(drawn))
        weight[predicted(drawn)] = drawn.weight
        expected = np.zeros(len(drawn))
        for e, path in zip(examples, drawn.paths, strict=True):
            expected[path] += e.supervised
        assert np.array_equal(weight, expected)


def test_the_drawing_names_counts_and_branches() -> None:
    tok = byte_tokenizer()
    stem = tok("the keeper counts two hundred steps and more of them").input_ids
    ends = [[*tok(f" {w}", add_special_tokens=False).input_ids, 1] for w in ("bread", "rye", "rye")]
    examples = []
    for i, end in enumerate(ends):
        tokens = np.array([*stem, *end], np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(stem), str(i), group=0))
    console = Console(record=True, width=200)
    plan = Plan(np.zeros(3, int), 3, 0)
    Painter(console, tok).forest(Loader(examples, plan, RowLayout("tree", 128, 1, 0, 1, 2)), 1)
    out = console.export_text()
    (made,) = lay_out(examples, "tree", 128)
    assert f"3 examples, " in out and f"{len(made)} here" in out  # noqa: F541
    assert out.count("the keeper counts") == 1 and out.count("rye") == 1 and out.count("counted 2 times") == 1
    assert f"{len(stem)} tokens in" not in out and "├──" in out and "└──" in out


def test_bad_rows_and_long_ones_are_all_reported(show: Show, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "a" * i, "completion": "b"} for i in (5, 9, 300, 8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{\n")
    typed = ("data=prompt_completion", f"data.path={path}")
    assert f"{path}:5: this line is not JSON" in refused(show, capfd, *typed)
    out = show(*typed, "data.on_error=skip", "data.max_length=100")
    assert "5 rows read, 3 kept" in out and f"1 skipped: {path}:5: this line is not JSON" in out
    assert f"1 dropped, longer than max_length: {path}:3" in out
    assert "train would stop at an example longer than max_length" in out
    with pytest.raises(SystemExit):
        show(*typed, "data.on_error=skip", "data.max_length=100", "row=3")
    assert "row=3 is no training example: longer than max_length" in capfd.readouterr().err
    assert "row=9 is no training example: there are rows 1 to 5" in refused(
        show, capfd, *typed, "data.on_error=skip", "row=9"
    )


def test_a_picture(show: Show, tmp_path: Path) -> None:
    train = make_squad_file(tmp_path / "t.jsonl", 4)
    show("data=squad", f"data.path={train}", "picture=row.svg")
    assert Path("row.svg").read_text().startswith("<svg") and "sells" in Path("row.svg").read_text()


def pairs(path: Path, *said: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in said))
    return path


def test_the_step_that_is_asked_for_is_drawn_and_one_beyond_the_epoch_is_refused(
    show: Show, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = pairs(tmp_path / "t.jsonl", *((f"question {w}", "yes") for w in ("one", "two", "three", "four", "five")))
    typed = ("data=prompt_completion", f"data.path={path}", "data.shuffle=false", "trainer.batch_size=2", "rows=0")
    out = show(*typed, "step=3")
    heading, _, forest = out.split("training")[0].partition("\n")
    assert "step 3, one of its 1 rows: 1 examples" in heading and "five" in forest and "one" not in forest
    assert "oneyes" in show(*typed).split("training")[0]
    assert "step=0: expected a whole number of at least 1" in refused(show, capfd, *typed, "step=0")
    assert "step=4: an epoch has steps 1 to 3" in refused(show, capfd, *typed, "step=4")


def test_more_rows_than_there_are_and_the_row_asked_for_before_the_first_ones(show: Show, tmp_path: Path) -> None:
    path = pairs(tmp_path / "t.jsonl", *((f"question {i}", "yes") for i in range(4)))
    typed = ("data=prompt_completion", f"data.path={path}")
    titles = re.compile(rf"{re.escape(str(path))}:(\d+): \d+ tokens, (\d+) supervised")
    assert [m[0] for m in titles.findall(show(*typed, "rows=9"))] == ["1", "2", "3", "4"]
    assert [m[0] for m in titles.findall(show(*typed))] == ["1", "2", "3"]
    assert [m[0] for m in titles.findall(show(*typed, "rows=9", "row=4"))] == ["4"]


def test_what_overlong_says_is_left_as_it_is_unless_train_would_stop(show: Show, tmp_path: Path) -> None:
    path = pairs(tmp_path / "t.jsonl", ("a", "b"), ("a", "word " * 60), ("c", "d"))
    typed = ("data=prompt_completion", f"data.path={path}", "data.max_length=40")
    stops = "train would stop at an example longer"
    cut = show(*typed, "data.overlong=truncate")
    assert "3 rows read, 3 kept" in cut and f"1 truncated: {path}:2" in cut and stops not in cut
    dropped = show(*typed, "data.overlong=drop")
    assert "3 rows read, 2 kept" in dropped and stops not in dropped
    refused_by_train = show(*typed)
    assert "3 rows read, 2 kept" in refused_by_train and stops in refused_by_train
    assert stops not in show(*typed[:2])


def test_files_are_written_where_they_are_asked_for(show: Show, tmp_path: Path) -> None:
    path = pairs(tmp_path / "t.jsonl", ("a", "b"), ("c", "d"))
    out = show("data=prompt_completion", f"data.path={path}", f"output={tmp_path}/deep/all.jsonl")
    assert f"2 examples written to {tmp_path}/deep/all.jsonl" in " ".join(out.split())
    assert [line["supervised_text"] for line in read_jsonl(tmp_path / "deep" / "all.jsonl")] == ["b</s>", "d</s>"]
    assert list(Path().iterdir()) == []


def test_a_mixture_is_previewed_source_by_source(show: Show, tmp_path: Path) -> None:
    one, two = pairs(tmp_path / "one.jsonl", ("a", "b")), pairs(tmp_path / "two.jsonl", ("c", "d"), ("e", "f"))
    sources = [
        f"+data.sources.{n}={{_target_: sftlab.data.dataset.Data, path: {p}, format: "
        "{_target_: sftlab.data.formats.prompt_completion.PromptCompletion}}"
        for n, p in (("uno", one), ("due", two))
    ]
    out = show("data=mixture", "~data.sources.squad", "~data.sources.gsm8k", *sources, "data.weights={due: 1, uno: 2}")
    assert "training uno  1 rows read, 1 kept" in out and "training due  2 rows read, 2 kept" in out
    assert f"uno: {one}:1" in out and "6 examples, " in out  # one four times, and the two of the other


def test_a_setting_that_there_is_not_is_refused_with_the_one_that_was_meant(
    show: Show, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = pairs(tmp_path / "t.jsonl", ("a", "b"))
    assert "did you mean limit?" in refused(
        show, capfd, "data=prompt_completion", f"data.path={path}", "+data.limitt=3"
    )


def test_a_source_typed_by_its_name_is_the_only_one(show: Show, tmp_path: Path) -> None:
    path = pairs(tmp_path / "one.jsonl", ("a", "b"))
    out = show("data=mixture", "data.sources.mine=prompt_completion", f"data.sources.mine.path={path}")
    assert "training mine  1 rows read, 1 kept" in out and "squad" not in out and "gsm8k" not in out


def test_the_first_examples_are_shown_before_all_rows_are_read_and_once(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"row {i:04}", "yes") for i in range(1200)]
    path = pairs(tmp_path / "rows.jsonl", *rows)
    from sftlab.data import arrow
    from sftlab.data.dataset import Data

    shown: list[str] = []
    real = Data.examples

    def examples(self: Data, *arguments: Any) -> Any:
        shown.append(capfd.readouterr().out)
        return real(self, *arguments)

    monkeypatch.setattr(Data, "examples", examples)
    totals: list[int | None] = []
    bar = arrow.datasets.builder.hf_tqdm
    monkeypatch.setattr(
        arrow.datasets.builder, "hf_tqdm", lambda *a, **k: totals.append(k.get("total")) or bar(*a, **k)
    )
    after = show("data=prompt_completion", f"data.path={path}", "rows=2", "data.shuffle=false", "trainer.batch_size=4")
    assert [n for n in range(6) if f"row {n:04}" in shown[0]] == [0, 1]
    assert "rows.jsonl:1: " not in after and "training  1,200 rows read, 1,200 kept" in after
    assert totals[-2:] == [200, 1200], "the bar knows its end"
    more = show("data=prompt_completion", f"data.path={path}", "rows=203")
    assert "rows.jsonl:200: " in shown[1] and "rows.jsonl:201: " not in shown[1]
    assert all(f"rows.jsonl:{i}: " in more for i in (201, 202, 203)) and "rows.jsonl:204: " not in more


def test_every_turn_that_was_taken_apart_is_shown_and_the_proof_of_the_template(
    show: Show, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": r, "content": f"{r} {i}"} for i in range(2) for r in ("user", "assistant")]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": said}) + "\n")
    chat = ("data=chat", f"data.path={path}", "data.format.template_path=asset://chat.jinja", "trainer.batch_size=2")
    out = show(*chat, "data.format.turns=apart")
    assert out.count("chat.jsonl:1") == 2 and out.count("several turns") == 1 and "right, taken apart" in out
    said[1]["reasoning_content"] = "hm"
    path.write_text(json.dumps({"messages": said}) + "\n")
    with pytest.raises(SystemExit):
        show(*chat)
    shown = capfd.readouterr()
    assert "this template does not write reasoning" in shown.err
    assert re.search(r"reasoning +refused", shown.out) and re.search(r"several turns +right", shown.out)
