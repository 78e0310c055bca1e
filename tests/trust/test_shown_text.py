"""What is shown is text: escape sequences, markup, Markdown and HTML of a folder are seen and not obeyed."""

import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from sftlab.common.metrics import Metrics
from sftlab.common.terminal import Terminal
from sftlab.common.words import markdown_code, markdown_text, plain
from sftlab.config.errors import complain
from sftlab.scoring.scores_json import show_scores
from sftlab.sweeps import report, tables
from sftlab.sweeps.ranking import ranked
from sftlab.sweeps.record import Sweep
from sftlab.trackers.tensorboard import markdown
from sftlab.training.console import Console
from sftlab.training.validation import Sample
from tests.asymmetric import write_point
from tests.commands import Typed

SEQUENCES = {
    "a title": "\x1b]0;TITLE\x07",
    "the clipboard": "\x1b]52;c;cm0gLXJm\x1b\\",
    "a colour": "\x1b[31mred",
    "a cleared screen": "\x1b[2J\x1b[H",
    "one-byte codes": "\x9b31m\x9d0;T\x9c",
    "a rewritten line": "good\rbad",
    "backspaces": "abc\x08\x08\x08xyz",
    "the other direction": "user\u202etxt.exe",
    "what is not seen": "a\u200bb\u2060c\U000e0041",
    "a link": "\x1b]8;;http://e\x1b\\here\x1b]8;;\x1b\\",
}
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060\U000e0041]")


@pytest.mark.parametrize("how", SEQUENCES)
def test_no_place_that_shows_text_passes_a_control_character_on(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = SEQUENCES[how]
    write_point(tmp_path / "s", 0, [f"name={bad}", "optim.lr=1"], [], "failed")
    summary = json.loads((tmp_path / "s/0/summary.json").read_text())
    (tmp_path / "s/0/summary.json").write_text(json.dumps(summary | {"error": f"oops {bad}"}))
    found = Sweep.read(tmp_path / "s").observed({})
    console = Terminal(soft_wrap=True, width=200)
    console.print(tables.status(found, "val/loss"))
    for line in tables.failures(found):
        console.print(line)
    show_scores(f"run {bad}", {"scores": {f"f1{bad}": 0.5}})
    complain(f"error {bad}")
    log = Console(1, tmp_path / "train.log")
    log.say(f"said {bad}")
    log.facts("title", {"model": bad})
    log.evaluation(1, {f"val/{bad}": 1.0}, [Sample("1", bad, bad, (bad,))])
    log.answers()
    log.close()
    out, error = capfd.readouterr()
    assert "oops" in out and "said" in out and "f1" in out and "error" in error
    assert not OBEYED.search(out + error + (tmp_path / "train.log").read_text())
    assert plain(bad) in out.replace("\n", "") or how in ("a rewritten line", "backspaces", "a title")


def test_half_of_a_pair_in_a_point_s_files_keeps_nothing_from_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """No encoding can write it: the status of the whole sweep failed."""
    from sftlab import sweep

    write_point(tmp_path / "s", 0, ["optim.lr=1"], [], "failed")
    write_point(tmp_path / "s", 1, ["optim.lr=2"], [{"step": 1, "time_s": 1, "val/loss": 1.0, "val/\ud800": 1}])
    (tmp_path / "s/0/summary.json").write_text('{"status": "failed", "error": "oops \\ud800"}')
    monkeypatch.setattr("sys.argv", ["sweep", f"dir={tmp_path / 's'}"])
    sweep.main()
    assert rb"oops \ud800" in capfdbinary.readouterr().out and (tmp_path / "s/report.html").is_file()


def test_rich_s_markup_and_emoji_in_a_text_are_text() -> None:
    console = Terminal(file=io.StringIO(), width=200)
    console.print("[link=http://e]here[/link] [red]x[/] :smiley: [/nothing]")
    assert console.file.getvalue() == "[link=http://e]here[/link] [red]x[/] :smiley: [/nothing]\n"  # type: ignore[attr-defined]


def test_a_terminal_s_own_colours_stay() -> None:
    from rich.text import Text

    console = Terminal(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text("a\x1b]0;T\x07b", "red"))
    assert console.file.getvalue() == "\x1b[31ma\\x1b]0;Tb\x1b[0m\n"  # type: ignore[attr-defined]


MARKUP = {
    "an image": "![x](http://evil/pixel.png)",
    "a link": "[click](javascript:alert(1))",
    "HTML": "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "a comment": "<!-- hidden -->",
    "an entity": "&lt;script&gt;",
    "a cell": "a | b |\n| c | d",
    "a heading": "x\n# Free money\n",
    "code": "`a` ``b`` ```\n```",
    "a reference": "[a][b]\n\n[b]: http://evil",
    "struck out": "~~gone~~",
}


@pytest.mark.parametrize("how", MARKUP)
def test_markdown_shows_a_text_as_it_is(how: str) -> None:
    """Rendered by a Markdown library, what the text asks for is not there, and what it says is."""
    text = MARKUP[how]
    for made in (markdown_text(text), markdown_code(text)):
        html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"| a |\n| --- |\n| {made} |\n")
        assert html.count("<td>") == 1 and html.count("<tr>") == 2
        assert not re.search(r"<(img|a|script|h\d|s)\b|<!--", html)
        shown = re.sub(r"<[^>]*>", "", html.split("<td>")[1])
        import html as library

        assert library.unescape(shown).split() == text.split()


@pytest.mark.parametrize("how", MARKUP)
def test_answers_for_trackers_are_cells_of_text(how: str) -> None:
    made = markdown([asdict(Sample("1", MARKUP[how], MARKUP[how], (MARKUP[how],)))])
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(made)
    assert html.count("<tr>") == 2 and html.count("<td>") == 3 and not re.search(r"<(img|a|script|s)\b", html)


@pytest.mark.parametrize("how", MARKUP)
def test_a_card_shows_what_a_run_says_of_itself(how: str, rye_run: Path, tmp_path: Path, typed: Typed) -> None:
    run, bad = tmp_path / "run", MARKUP[how]
    shutil.copytree(rye_run, run)
    scores = {"data": bad, "examples": 2, "scores": {bad: 0.5}}
    (run / "evaluate/x").mkdir(parents=True)
    (run / "evaluate/x/scores.json").write_text(json.dumps(scores))
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"git_commit": bad, "command": ["sftlab.train", f"name={bad}"], "packages": {"sftlab": bad}}
    (run / "environment.json").write_text(json.dumps(environment))
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name_or_path"], config["data"]["path"], config["seed"] = bad, bad, bad
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    typed("publish", f"run={run}", "repo_id=ada/rye", "dry_run=true")
    body = (run / "publish/README.md").read_text().split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
    links = set(re.findall(r'(?:href|src)="([^"]*)"', html))
    assert links <= {"loss.svg"} and not re.search(
        r"<(script|s)\b|<!--|onerror=[^&]*>", re.sub(r"&lt;.*?&gt;", "", html)
    )
    titles = re.findall(r"<h\d>(.*?)</h\d>", html)
    assert titles == ["rye", "Scores", "Use", "Training", "Reproduce", "Licence"]


def test_a_report_s_page_holds_texts_as_data_and_asks_no_network(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=http://evil>"
    lines: list[dict[str, Any]] = [{"step": 1, "time_s": 1.0, "val/loss": 1.0}]
    write_point(tmp_path, 0, [f"name={bad}"], lines)
    with (tmp_path / "0/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, bad: "x", "val/f1": None, "val/loss": [1], "val/x": True}) + "\n")
    summary = json.loads((tmp_path / "0/summary.json").read_text())
    summary |= {"error": bad, "last": {"step": 1, "val/loss": 1.0, "time_s": float("nan"), "val/f1": "high"}}
    (tmp_path / "0/summary.json").write_text(json.dumps(summary))
    found = Sweep.read(tmp_path).observed({})
    page = report.write_page(found, ranked(found, "val/loss"), "val/loss").read_text()
    assert "<img" not in page and page.count("<script") == 3 and bad not in page
    assert "default-src 'none'" in page.split("<style>")[0]
    sources = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert not sources


def test_texts_reach_trackers_struck(tmp_path: Path) -> None:
    class Kept:
        texts: list[str] = []  # noqa: RUF012

        def write_answers(self, step: int, answers: Any) -> None:
            self.texts += [a["answer"] for a in answers]

        def close(self, status: str) -> None:
            pass

    kept: Any = Kept()
    metrics = Metrics(tmp_path / "metrics.jsonl", [kept])
    metrics.write_answers(1, [Sample("1", "", "the token hf_" + "aB3" * 12, ())])
    metrics.close()
    assert kept.texts == ["the token [secret]"]


def test_an_answer_on_the_terminal_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    from sftlab.inference import chat
    from sftlab.serving import session

    chat.show("answer \x1b]0;T\x07\n")
    session.say("name \x1b[2J")
    assert capsys.readouterr().out == "answer \\x1b]0;T\\x07\nname \\x1b[2J\n"
