"""A mixture: weights by name and not by place, counts worked out by hand, and what of a source counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftlab.data.dataset import Data
from sftlab.data.examples import MixedExamples
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.mixture import Mixture, draw, quotas
from tests.support import byte_tokenizer

TOK = byte_tokenizer()


def source(folder: Path, name: str, num: int, longest: int = 1, **settings: Any) -> Data:
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": name * (longest if i == 0 else 1), "completion": f" {i}"} for i in range(num)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Data(PromptCompletion(), str(path), num_workers=1, **settings)


def texts(examples: Any) -> list[str]:
    return [TOK.decode(e.tokens, skip_special_tokens=True) for e in examples]


def test_weights_go_by_the_sources_names_and_not_by_their_order(tmp_path: Path) -> None:
    sources = {"zeta": source(tmp_path, "z", 4), "alpha": source(tmp_path, "a", 6), "mid": source(tmp_path, "m", 2)}
    train, val = Mixture(sources, {"mid": 5, "alpha": 1, "zeta": 2}).examples(TOK, 1000)
    counts = [sum(t.startswith(name) for t in texts(train)) for name in "zam"]
    assert counts == [12, 6, 30] and val is None  # alpha, of the lowest weight, is met once
    assert texts(train)[:3] == ["z 0"] * 3 and texts(train)[12:18] == [f"a {i}" for i in range(6)]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 20], [1, 1], [20, 20]),
        ([3, 5], [2, 1], [10, 5]),
        ([10, 1, 1], [0.5, 0.3, 0.2], [10, 6, 4]),
        ([7, 1, 1], [4, 2, 1], [7, 4, 2]),  # 13 in all: 7.43, 3.71 and 1.86, so the two last are rounded up
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([5], [0.3], [5]),
    ],
)
def test_how_often_each_source_is_drawn_from(sizes: list[int], weights: list[float], expected: list[int]) -> None:
    assert quotas(sizes, weights) == expected


def test_a_source_is_repeated_whole_and_then_some_of_it() -> None:
    assert draw(4, 4).tolist() == [0, 1, 2, 3]
    drawn = draw(5, 13).tolist()
    assert drawn == sorted(drawn) and sorted(np.bincount(drawn).tolist()) == [2, 2, 3, 3, 3]
    assert np.bincount(draw(5, 13)).tolist() != [3, 3, 3, 2, 2], "not always the first ones"


def test_how_examples_lie_is_the_mixtures_to_say(tmp_path: Path) -> None:
    held = source(tmp_path, "v", 3, longest=50)
    long = source(tmp_path, "l", 4, longest=50, val_path=held.path, overlong="error")
    sources = {"long": long, "short": source(tmp_path, "s", 2, overlong="truncate")}
    train, val = Mixture(sources, overlong="drop").examples(TOK, 20)
    assert texts(train) == ["l 1", "l 2", "l 3", "s 0", "s 1"] and texts(val) == ["v 1", "v 2"]
    assert (train.num_dropped, train.num_truncated, train.num_skipped) == (1, 0, 0)
    sources["long"] = source(tmp_path, "l", 4, longest=50, overlong="drop")
    with pytest.raises(ValueError, match=r"l\.jsonl:1, has \d+\. Raise data.max_length"):
        Mixture(sources).examples(TOK, 20)
    for wrong in ({"layout": "bushy"}, {"overlong": "shorten"}):
        with pytest.raises(ValueError, match=f"data.{next(iter(wrong))}="):
            Mixture(sources, **wrong)  # type: ignore[arg-type]


def test_a_source_without_weight_is_not_even_opened(tmp_path: Path) -> None:
    sources = {
        "none": Data(Chat(), str(tmp_path / "none.jsonl")),  # it would need a chat template, too
        "some": source(tmp_path, "s", 3),
        "zero": Data(PromptCompletion(), str(tmp_path / "zero.jsonl")),
    }
    train, _ = Mixture(sources, {"zero": 0, "some": 2}).examples(TOK, 1000)
    assert texts(train) == ["s 0", "s 1", "s 2"] and list(train.parts) == ["some"]
    with pytest.raises(ValueError, match="a mixture needs at least one source"):
        Mixture({})


def test_validation_is_every_sources_own_each_once(tmp_path: Path) -> None:
    held = source(tmp_path, "v", 3)
    sources = {
        "plain": source(tmp_path, "p", 2),
        "held": source(tmp_path, "h", 4, val_path=held.path),
        "out": source(tmp_path, "o", 6, limit=5),
    }
    train, val = Mixture(sources, {"out": 1, "held": 9, "plain": 2}).examples(TOK, 1000)
    assert isinstance(val, MixedExamples) and list(val.parts) == ["held"] and texts(val) == ["v 0", "v 1", "v 2"]
    assert [sum(t.startswith(n) for t in texts(train)) for n in "pho"] == [10, 45, 5]
    mixture = Mixture(sources)
    assert list(mixture.formats) == ["plain", "held", "out"]
    assert mixture.path == ", ".join(str(tmp_path / f"{n}.jsonl") for n in "pho")


def test_sources_joined_are_one_sequence(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "b", "completion": ""}\n{"prompt": "bbbb", "completion": "1 2 3"}\n'
    )
    sources = {
        "long": source(tmp_path, "l", 3, longest=200),
        "bad": Data(PromptCompletion(), str(tmp_path / "bad.jsonl"), on_error="skip"),
    }
    train, _ = Mixture(sources, {"bad": 4, "long": 1}, overlong="truncate").examples(TOK, 25)
    assert isinstance(train, MixedExamples)
    assert train.lengths.tolist() == [len(e) for e in train] and len(set(train.lengths.tolist())) > 1
    assert train.groups.tolist() == [e.group for e in train] and len(set(train.groups.tolist())) == 2
    # The first of the long ones loses its answer to the cut.
    assert (len(train), train.num_dropped, train.num_truncated, train.num_skipped) == (10, 1, 0, 1)
    assert train.where(0) == f"long: {tmp_path}/l.jsonl:2" and train.where(9) == f"bad: {tmp_path}/bad.jsonl:2"
    assert (train.find_row(1), train.find_row(10)) == (0, 9)
    for row in (0, 11):
        with pytest.raises(ValueError, match=f"row={row}: the mixture has examples 1 to 10"):
            train.find_row(row)
    turned = MixedExamples(train.parts, train.part[::-1].copy(), train.member[::-1].copy())
    moved = MixedExamples(train.parts, train.part, np.roll(train.member, 1))
    assert len({train.fingerprint, turned.fingerprint, moved.fingerprint}) == 3
    zeros = np.zeros(2, int)
    first, second = (MixedExamples(train.parts, np.array(part), zeros) for part in ([0, 1], [1, 0]))
    assert first.fingerprint != second.fingerprint, "the same places of other sources"


def test_truncated_examples_of_all_sources_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "word " * 40}) + "\n")
    sources = {"a": source(tmp_path, "s", 2), "b": Data(PromptCompletion(), str(path))}
    train, _ = Mixture(sources, overlong="truncate").examples(TOK, 25)
    assert (train.num_truncated, train.num_dropped, train.lengths.max()) == (1, 0, 25)
