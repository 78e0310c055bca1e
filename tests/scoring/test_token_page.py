"""tokens.html: the probability of every target before and after, where the numbers are known; nothing in it runs."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from sftlab.data.example import Example
from sftlab.scoring.token_page import TokenPage, token_texts
from tests.commands import Typed
from tests.scoring.test_evaluate import LN2, LN320, LN638
from tests.support import byte_tokenizer


class Page(HTMLParser):
    """What a browser sees: the titles and texts of targets by article, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.articles: list[list[tuple[str, str, dict[str, str | None]]]] = []
        self.elements: set[str] = set()
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        if tag == "article":
            self.articles.append([])
        if tag == "b":
            self.articles[-1].append(("", str(dict(attrs)["title"]), dict(attrs)))
        self.inside = tag == "b" or (tag == "i" and self.inside)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "b"

    def handle_data(self, data: str) -> None:
        if self.inside:
            text, *rest = self.articles[-1][-1]
            self.articles[-1][-1] = (text + data, *rest)  # type: ignore[assignment]


def test_the_page_says_what_was_worked_out_by_hand(rye_run: Path, typed: Typed, tmp_path: Path) -> None:
    """The base gives every token 1/320; the model is sure of " rye bread" by half, and of everything else hardly."""
    shown = typed("evaluate", f"run={rye_run}", "tokens=true", "answers=false", f"output_dir={tmp_path}")
    assert f"is in {tmp_path / 'tokens.html'}" in shown
    text = (tmp_path / "tokens.html").read_text()
    page = Page(text)
    assert [len(article) for article in page.articles] == [7, 4, 8, 8]
    tokenizer = AutoTokenizer.from_pretrained(rye_run / "model")
    first = page.articles[0]
    assert "".join(text for text, *_ in first) == " rye bread" + tokenizer.eos_token
    known = {-LN2: "0.5000", -LN638: f"{1 / 638:.4f}", -LN320: f"{1 / 320:.4f}"}
    for article in page.articles:
        for _, title, attrs in article:
            found = re.fullmatch(r"before ([\d.]+) \((-[\d.]+) nats\), after ([\d.]+) \((-[\d.]+) nats\)", title)
            assert found and (found[1], found[2]) == (f"{1 / 320:.4f}", f"{-LN320:.3f}")
            assert (found[4], found[3]) in {(f"{nats:.3f}", p) for nats, p in known.items()}
            assert attrs["class"] == ("up" if found[3] == "0.5000" else "down")
    assert {title.split("after ")[1] for _, title, _ in first} == {"0.5000 (-0.693 nats)"}
    assert "4 of 4 examples, 27 targets" in text and f"{-LN320:.3f} nats before training" in text
    mean = (17 * LN2 + 3 * LN638 + 7 * LN320) / 27
    assert f"-{mean:.3f} nats after; 63% of the targets" in text


def test_text_of_data_and_tokens_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    spoken = "<script>alert(1)</script><!--TITLE-->\x1b[31m é 🦊</b>"
    tokenizer = byte_tokenizer()
    ids = np.array([0, *tokenizer(spoken, add_special_tokens=False)["input_ids"], 1], np.int32)
    learned = np.arange(len(ids)) > 0
    page = TokenPage(
        tokenizer, [Example(ids, learned, "<img src=x>"), Example(ids, np.zeros(len(ids), bool), "none")], 4
    )
    page.nll = {when: [np.full(len(ids) - 1, n), np.zeros(0)] for when, n in (("before", 1.0), ("after", 0.25))}
    text = page.write(tmp_path / "tokens.html", "</title><script>", 2).read_text()
    found = Page(text)
    assert "script" not in found.elements and "img" not in found.elements and text.count("<!--") == 0
    assert "default-src 'none'" in text and "http" not in re.sub(r"http-equiv", "", text)
    assert "".join(t for t, *_ in found.articles[0]).replace("·", "") == spoken.replace("\x1b", "\\x1b") + "</s>"


@pytest.mark.parametrize("words", ["plain words", "naïve 🦊🦊 日本", "  two  spaces\n\nlines"])
def test_the_parts_of_a_text_make_the_text(words: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(words)["input_ids"]
    parts = token_texts(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) and len(parts) == len(ids)


def test_a_run_without_a_base_has_no_before(refused: Typed, model_folder: Path, squad_files: tuple[Path, Path]) -> None:
    given = ("evaluate", f"run={model_folder}", "data=squad", f"data.path={squad_files[1]}", "tokens=true")
    assert "its base is not known" in refused(*given)
