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
from sftlab.data.plan import Plan
from sftlab.data.template import prepare_tokenizer
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
    long = source(tmp_path, "l", 4, longest=50, val_path=held.path)
    sources = {"long": long, "short": source(tmp_path, "s", 2)}
    train, val = Mixture(sources, overlong="drop").examples(TOK, 20)
    assert texts(train) == ["l 1", "l 2", "l 3", "s 0", "s 1"] and texts(val) == ["v 1", "v 2"]
    assert (train.num_dropped, train.num_truncated, train.num_skipped) == (1, 0, 0)
    sources["long"] = source(tmp_path, "l", 4, longest=50)
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
    mixture = Mixture(sources, {"zero": 0, "some": 2})
    tok = byte_tokenizer()
    prepare_tokenizer(tok, list(mixture.formats.values()))
    train, _ = mixture.examples(tok, 1000)
    assert texts(train) == ["s 0", "s 1", "s 2"] and list(train.parts) == list(mixture.formats) == ["some"]
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
    assert mixture.has_validation and not Mixture(sources, {"plain": 1, "out": 1}).has_validation, "of a source in use"
    assert texts(mixture.evaluated(TOK, 1000)) == ["v 0", "v 1", "v 2"]
    with pytest.raises(ValueError, match=r"^no source of this mixture has .*: set data\.sources\.NAME\.val_path=FILE$"):
        Mixture(sources, {"plain": 1}).evaluated(TOK, 1000)
    assert mixture.described_path == ", ".join(str(tmp_path / f"{n}.jsonl") for n in "pho")


def test_a_source_that_is_wrong_is_called_by_its_key(tmp_path: Path) -> None:
    good = source(tmp_path, "g", 3)
    for key, wrong in (
        ("path", source(tmp_path, "none", 1)),
        ("val_path", source(tmp_path, "t", 3, val_path=str(tmp_path / "none.jsonl"))),
    ):
        (tmp_path / "none.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=rf"^data\.sources\.bad\.{key}=.*none\.jsonl: no such file"):
            Mixture({"good": good, "bad": wrong}).examples(TOK, 1000)
        source(tmp_path, "none", 1)
    with pytest.raises(ValueError, match=r"^data\.sources\.bad\.val_examples=3 leaves no training example of 3"):
        Mixture({"good": good, "bad": source(tmp_path, "h", 3, val_examples=3)}).examples(TOK, 1000)


def test_sources_joined_are_one_sequence(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "b", "completion": ""}\n{"prompt": "bbbb", "completion": "1 2 3"}\n'
    )
    sources = {
        "long": source(tmp_path, "l", 3, longest=200),
        "bad": Data(PromptCompletion(), str(tmp_path / "bad.jsonl"), on_error="skip"),
    }
    train, _ = Mixture(sources, {"bad": 4, "long": 1}, overlong="truncate", group_by_prefix=True).examples(TOK, 25)
    assert isinstance(train, MixedExamples)
    assert train.lengths.tolist() == [len(e) for e in train] and len(set(train.lengths.tolist())) > 1
    assert train.groups.tolist() == [e.group for e in train] and len(set(train.groups.tolist())) == 2
    # The first of the long ones loses its answer to the cut.
    assert (len(train), train.num_dropped, train.num_truncated, train.num_skipped) == (10, 1, 0, 1)
    assert [train.source_of(i) for i in (0, 1, 2, 9)] == ["long", "long", "bad", "bad"]
    assert train.where(0) == f"long: {tmp_path}/l.jsonl:2" and train.where(9) == f"bad: {tmp_path}/bad.jsonl:2"
    assert (train.find_row(1), train.find_row(10)) == (0, 9)
    for row in (0, 11):
        with pytest.raises(ValueError, match=f"row={row}: the mixture has examples 1 to 10"):
            train.find_row(row)
    turned = MixedExamples(train.sources, train.part[::-1].copy(), train.member[::-1].copy())
    moved = MixedExamples(train.sources, train.part, np.roll(train.member, 1))
    assert len({train.fingerprint, turned.fingerprint, moved.fingerprint}) == 3
    zeros = np.zeros(2, int)
    first, second = (MixedExamples(train.sources, np.array(part), zeros) for part in ([0, 1], [1, 0]))
    assert first.fingerprint != second.fingerprint, "the same places of other sources"


def test_truncated_examples_of_all_sources_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "word " * 40}) + "\n")
    sources = {"a": source(tmp_path, "s", 2), "b": Data(PromptCompletion(), str(path))}
    train, _ = Mixture(sources, overlong="truncate").examples(TOK, 25)
    assert (train.num_truncated, train.num_dropped, train.lengths.max()) == (1, 0, 25)


def test_a_setting_of_a_source_that_the_mixture_decides_is_refused(tmp_path: Path) -> None:
    for key, value in (
        ("layout", "packed"),
        ("max_length", 9),
        ("overlong", "drop"),
        ("row_length", 99),
        ("shuffle", False),
    ):
        with pytest.raises(
            ValueError, match=rf"data.sources.a.{key}={value} has no effect: in a mixture it is data.{key}"
        ):
            Mixture({"a": Data(PromptCompletion(), "x", **{key: value})})
    Mixture({"a": Data(PromptCompletion(), "x", group_by_prefix=True, limit=3, on_error="skip")})


def test_the_first_rows_of_a_mixture_are_those_of_its_first_source(tmp_path: Path) -> None:
    mixture = Mixture({"b": source(tmp_path, "b", 9), "a": source(tmp_path, "a", 9)}, {"a": 1, "b": 1})
    few = mixture.first(TOK, 4, 99)
    assert few is not None and texts(few) == [f"b {i}" for i in range(4)] and few.where(0).startswith("b: ")
    assert Mixture({"a": source(tmp_path, "a", 9, longest=90, limit=1)}, overlong="drop").first(TOK, 4, 9) is None


def test_examples_meet_in_a_step_as_each_source_says(tmp_path: Path) -> None:
    said = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": [{**said[0], "content": f"no {i}"}, *said[1:]]}) + "\n" for i in range(8))
    )
    apart = Data(Chat(template_path="asset://chat.jinja", turns="apart"), str(path), group_by_prefix=True)
    sources = {"plain": source(tmp_path, "p", 24), "chat": apart}
    tok = byte_tokenizer()
    prepare_tokenizer(tok, [apart.format])

    def met(mixture: Mixture) -> list[int]:
        """How many conversations each step has turns of."""
        train, _ = mixture.examples(tok, 1000)
        plan = Plan(train.groups, 12, 0, group_by_prefix=mixture.groups_prefixes)
        chats = [
            [int(train.groups[i]) for i in plan.examples(s) if train.source_of(int(i)) == "chat"] for s in (1, 2, 3, 4)
        ]
        assert sum(map(len, chats)) == 24
        return [len(set(groups)) - len(groups) // 3 for groups in chats]

    assert sum(met(Mixture(sources))) <= 2, "the three turns of a conversation are in one step"
    train, _ = Mixture(sources).examples(tok, 1000)
    assert len(set(train.groups[train.part == 0].tolist())) == 24, "those of the other source are dealt one by one"
    assert sum(met(Mixture(sources, group_by_prefix=True))) <= 2
    with_none = Mixture({"plain": sources["plain"]})
    assert not with_none.groups_prefixes and not Mixture(sources, group_by_prefix=False).groups_prefixes
