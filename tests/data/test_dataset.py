"""Where training and validation examples come from: the hub's splits, subsets and revisions, files, held-out rows."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sftlab.data.dataset import Data
from sftlab.data.examples import Examples
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.mixture import Mixture
from sftlab.data.template import prepare_tokenizer
from tests.support import byte_tokenizer

TOK = byte_tokenizer()
SIZES = {"train": 5, "validation": 3, "test": 2}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose rows say what was asked of it: repository, subset, split and revision."""

    def load_dataset(name: str, subset: str | None = None, *, split: str, revision: str | None) -> Any:
        said = f"{name} {subset} {split} {revision}"
        return datasets.Dataset.from_list([{"prompt": said, "completion": f" {i}"} for i in range(SIZES[split])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def data(path: Path | str, **settings: Any) -> Data:
    return Data(PromptCompletion(), str(path), num_workers=1, **settings)


def texts(examples: Any) -> list[str] | None:
    return None if examples is None else [TOK.decode(e.tokens, skip_special_tokens=True) for e in examples]


def numbered(said: str, num: int) -> list[str]:
    return [f"{said} {i}" for i in range(num)]


def jsonl(path: Path, num: int, said: str = "q") -> Path:
    path.write_text("".join(json.dumps({"prompt": said, "completion": f" {i}"}) + "\n" for i in range(num)))
    return path


@pytest.mark.usefixtures("hub")
def test_subset_split_and_revision_reach_the_hub() -> None:
    train, val = data("some/rows", split="test", subset="main", revision="v2").load(TOK)
    assert (texts(train), val) == (numbered("some/rows main test v2", 2), None)
    train, val = data("some/rows", subset="main", revision="v2", val_split="validation", limit=1).load(TOK)
    assert texts(train) == numbered("some/rows main train v2", 1)
    assert texts(val) == numbered("some/rows main validation v2", 3), "the limit is the training data's"
    train, val = data("some/rows", split="test", val_path="other/rows", revision="v3").load(TOK)
    assert (texts(train), texts(val)) == (numbered("some/rows None test v3", 2), numbered("other/rows None test v3", 2))
    _, val = data("some/rows", val_path="other/rows", val_split="validation").load(TOK)
    assert texts(val) == numbered("other/rows None validation None", 3)


@pytest.mark.usefixtures("hub")
def test_what_an_evaluation_reads() -> None:
    def evaluated(**settings: Any) -> list[str] | None:
        return texts(data("some/rows", **settings).evaluated(TOK, 1000))

    assert evaluated(val_split="validation", limit=1, subset="s") == numbered("some/rows s validation None", 3)
    assert evaluated(val_path="other/rows", split="test", limit=1) == numbered("other/rows None test None", 2)
    assert evaluated(val_path="other/rows", val_split="validation") == numbered("other/rows None validation None", 3)
    assert evaluated(limit=1) == numbered("some/rows None train None", 5), "without validation data, all of it"


def test_what_an_evaluation_reads_of_files(tmp_path: Path) -> None:
    here, held = jsonl(tmp_path / "a.jsonl", 6, "mine"), jsonl(tmp_path / "b.jsonl", 4, "held")
    assert texts(data(here, val_path=str(held), limit=2).evaluated(TOK, 1000)) == numbered("held", 4)
    assert texts(data(here, val_split="validation?", limit=2).evaluated(TOK, 1000)) == numbered("mine", 6)
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " x"}) + "\n" for i in range(9)))
    _, val = data(path, val_examples=4).examples(TOK, 1000)
    assert texts(data(path, val_examples=4).evaluated(TOK, 1000)) == texts(val) and len(val or ()) == 4


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({}, False),
        ({"val_path": "x.jsonl"}, True),
        ({"val_examples": 1}, True),
        ({"val_split": "validation?"}, True),
    ],
)
def test_whether_there_is_validation_data(settings: dict[str, Any], has: bool, tmp_path: Path) -> None:
    assert data("some/rows", **settings).has_validation is has
    local = data(jsonl(tmp_path / "a.jsonl", 2), **settings)
    assert local.has_validation is (has and "val_split" not in settings), "a file has no splits"


def test_a_file_is_not_split_by_val_split_and_refuses_one_that_must_be_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", 4)
    train, val = data(path, val_split="validation?").load(TOK)
    assert len(train) == 4 and val is None
    with pytest.raises(ValueError, match=r"data.val_split=validation: data.path=.*a.jsonl has no split validation"):
        data(path, val_split="validation").load(TOK)


@pytest.mark.usefixtures("hub")
def test_a_subset_and_a_split_with_a_question_mark_are_asked_of_the_hub_without_it() -> None:
    train, val = data("some/rows", subset="main?", val_split="validation?").load(TOK)
    assert (texts(train), texts(val)) == (
        numbered("some/rows main train None", 5),
        numbered("some/rows main validation None", 3),
    )


def test_the_limit_is_of_training_rows_and_not_of_validation(tmp_path: Path) -> None:
    train, val = data(jsonl(tmp_path / "a.jsonl", 6), val_path=str(jsonl(tmp_path / "b.jsonl", 4)), limit=2).load(TOK)
    assert val is not None and (len(train), len(val)) == (2, 4)


def test_examples_as_long_as_the_most_are_kept_in_both_splits(tmp_path: Path) -> None:
    rows = [{"prompt": "Q" * n, "completion": "A"} for n in (3, 9, 5)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    held = tmp_path / "b.jsonl"
    held.write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    lengths = data(path).load(TOK)[0].lengths
    most = sorted(lengths.tolist())[1]  # the middle one fits exactly

    def made(overlong: str) -> tuple[Examples, Examples]:
        train, val = data(path, val_path=str(held), overlong=overlong).examples(TOK, most)
        assert isinstance(train, Examples) and isinstance(val, Examples)
        return train, val

    train, val = made("drop")
    assert texts(train) == ["QQQA", "QQQQQA"] and texts(val) == ["QQQA"]
    assert (train.num_dropped, val.num_dropped) == (1, 1) and train.num_truncated == 0
    assert train.dropped["longer than max_length"].tolist() == [1]
    train, val = made("truncate")
    # What is cut loses its answer here, so nothing of it is learned.
    assert texts(train) == ["QQQA", "QQQQQA"] and train.dropped["no supervised token"].tolist() == [1]
    with pytest.raises(ValueError) as error:
        made("error")
    said = f"1 of 3 examples are longer than data.max_length={most} tokens; the longest, {path}:2, has {max(lengths)}."
    assert said in str(error.value)
    with pytest.raises(ValueError, match=r"b\.jsonl:2, has"):
        data(jsonl(tmp_path / "short.jsonl", 2), val_path=str(held)).examples(TOK, most)


def test_the_longest_of_several_overlong_examples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q" * n, "completion": "A"} for n in (1, 30, 90, 60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lengths = data(path).load(TOK)[0].lengths
    with pytest.raises(ValueError) as error:
        data(path).examples(TOK, int(lengths[0]))
    assert f"3 of 4 examples are longer than data.max_length={lengths[0]} tokens" in str(error.value)
    assert f"the longest, {path}:3, has {lengths.max()}. " in str(error.value)


def test_an_overlong_example_without_a_target_is_dropped_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 50, "weight": 0}]
    good = [turns[0], {"role": "assistant", "content": "Yo"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, good)))
    chat = Data(Chat(template_path="asset://chat.jinja"), str(path), overlong="drop")
    tok = byte_tokenizer()
    prepare_tokenizer(tok, [chat.format])
    train, _ = chat.examples(tok, 60)
    assert (len(train), train.num_dropped) == (1, 1)
    assert isinstance(train, Examples) and list(train.dropped) == ["longer than max_length"]


def test_what_is_dropped_of_the_rest_is_named_by_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{i} " * (40 if i % 3 == 0 else 1), "completion": "A"} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    train, val = data(path, val_examples=5, overlong="drop").examples(TOK, 20)
    assert isinstance(train, Examples) and isinstance(val, Examples)
    places: list[int] = []
    for split in (train, val):
        dropped = split.dropped.get("longer than max_length", np.empty(0, int)).tolist()
        assert all(i % 3 == 0 for i in dropped) and all(i % 3 for i in split.kept.tolist())
        places += [*split.kept.tolist(), *dropped]
    assert sorted(places) == list(range(12)) and train.num_dropped and len(train) < 8


def test_a_last_row_that_was_skipped_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": ""}\n')
    train, _ = data(path, on_error="skip").load(TOK)
    with pytest.raises(ValueError, match="row=2 is no training example: it was skipped"):
        train.find_row(2)


def test_an_example_that_is_cut_keeps_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q", "completion": "x1y2z3"}, {"prompt": "Q1W2E3R4T5Y6", "completion": "A"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    whole, _ = data(path).load(TOK)
    most = whole[0].num_prompt + 2
    cut = whole.cut(most, "truncate")
    assert len(cut) == 1 and cut.lengths.tolist() == [most] and cut.truncated.tolist() == [0] and cut.num_truncated == 1
    assert cut[0].tokens.tolist() == whole[0].tokens[:most].tolist()
    assert cut[0].supervised.tolist() == whole[0].supervised[:most].tolist() and cut[0].num_prompt == most - 2
    short = whole.cut(1000, "truncate")
    assert short.truncated.tolist() == [] and len({whole.fingerprint, short.fingerprint, cut.fingerprint}) == 3
    prompt = Examples(whole.store, whole.kept, most)  # uncut, so that the second keeps its prompt alone
    assert prompt[1].num_prompt == most == len(prompt[1])


def test_examples_kept_in_another_order_or_number_have_another_fingerprint(tmp_path: Path) -> None:
    whole, _ = data(jsonl(tmp_path / "a.jsonl", 6)).load(TOK)
    orders = ([0, 1, 2], [0, 2, 1], [0, 1], [0, 1, 3])
    assert len({Examples(whole.store, np.array(o)).fingerprint for o in orders}) == 4


def test_a_held_out_row_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " x"}) + "\n" for i in range(9)))
    train, val = data(path, val_examples=4).examples(TOK, 1000)
    assert val is not None and (len(train), len(val)) == (5, 4)
    rows = [i for i in range(9) if f"{i} x" in (texts(val) or [])]
    with pytest.raises(ValueError, match=f"row={rows[0] + 1} is no training example: it is held out"):
        train.find_row(rows[0] + 1)
    assert val.find_row(rows[0] + 1) == 0 and val.find_row(rows[3] + 1) == 3


def test_a_path_that_is_not_there_is_called_by_its_key(tmp_path: Path) -> None:
    here = jsonl(tmp_path / "a.jsonl", 3)
    with pytest.raises(FileNotFoundError, match=r"^data\.path=.*none\.jsonl: no such file"):
        data(tmp_path / "none.jsonl", val_path=str(here)).load(TOK)
    with pytest.raises(FileNotFoundError, match=r"^data\.val_path=.*none\.jsonl: no such file"):
        data(here, val_path=str(tmp_path / "none.jsonl")).load(TOK)


def test_a_tokenizer_prepared_for_the_options_formats_reads_them_and_is_not_changed_by_it(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": said}) + "\n")
    chat = Data(Chat(template_path="asset://chat.jinja"), str(path))
    for option in (chat, Mixture({"chat": chat})):
        bare, tok = byte_tokenizer(), byte_tokenizer()
        with pytest.raises(ValueError, match="has no chat template"):
            option.examples(bare, 1000)
        prepare_tokenizer(tok, list(option.formats.values()))
        template = tok.chat_template
        train, _ = option.examples(tok, 1000)
        assert tok.chat_template == template and "Yo</s>" in tok.decode(train[0].tokens)
        assert bare.chat_template is None


def test_what_ships_with_the_package_is_found_by_its_short_name() -> None:
    demo = Data(Squad(), "asset://demo/train.jsonl.gz", val_path="asset://demo/validation.jsonl", limit=2)
    train, val = demo.load(TOK)
    assert val is not None and len(train) == 2 and len(val) > 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layout": "bushy"}, "data.layout=bushy: expected one of tree, packed, padded"),
        ({"overlong": "shorten"}, "data.overlong=shorten: expected one of error, drop, truncate"),
        ({"on_error": "ignore"}, "data.on_error=ignore: expected one of raise, skip"),
        ({"limit": 0}, "data.limit=0 counts rows: expected at least 1, or null for all"),
        ({"val_examples": -1}, "data.val_examples=-1 counts examples: expected at least 0"),
    ],
)
def test_settings_of_data_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        data("a", **settings)
    assert str(error.value) == said
    data("a", limit=1, val_examples=0)
