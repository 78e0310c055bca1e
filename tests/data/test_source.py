"""Rows from files of every kind, bad ones by name, and where validation comes from."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftlab.data.dataset import Data
from sftlab.data.examples import Examples
from sftlab.data.format import Format
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.formats.squad import Squad
from sftlab.data.formats.text import PlainText
from sftlab.data.loader import RowLayout
from sftlab.data.mixture import Mixture
from sftlab.data.opening import is_local, open_source
from sftlab.data.plan import Plan
from sftlab.data.report import report, write_skipped
from tests.kinds import tokenizer
from tests.support import byte_tokenizer, make_squad_file, read_jsonl

ROWS = [{"prompt": f"What is {i}?", "completion": f' it, is "{i}"\né'} for i in range(7)]
TOK = byte_tokenizer()
# datasets 5.2 leaves the file of a CSV to be closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)


def jsonl(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def squeezed(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def as_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS))
    return path


def as_csv(path: Path) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "rows.json": as_json,
    "lines.json": jsonl,  # one object a line, in spite of its name
    "rows.csv": as_csv,
    "rows.tsv": as_csv,
    "rows.parquet": as_parquet,
}


def texts(data: Examples) -> list[str]:
    return [TOK.decode(e.tokens, skip_special_tokens=True) for e in data]


def load(path: Path | str, format: Format | None = None, **settings: Any) -> Examples:
    data = Data(format or PromptCompletion(), str(path), num_workers=1, **settings)
    return data.examples(TOK, 1000)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("name", [*WRITERS, *(f"{n}.gz" for n in WRITERS if "parquet" not in n)])
def test_a_file_of_every_kind_has_the_same_examples(name: str, tmp_path: Path) -> None:
    path = WRITERS[name.removesuffix(".gz")](tmp_path / name.removesuffix(".gz"))
    path = squeezed(path) if name.endswith(".gz") else path
    found = load(path)
    assert texts(found) == [r["prompt"] + r["completion"] for r in ROWS]
    assert found.find_row(3) == 2 and str(path) in found.where(2) and found.where(2).endswith(("3", "4"))


def test_a_folder_and_a_glob_are_their_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "b.jsonl", ROWS[:2])
    squeezed(jsonl(tmp_path / "deep" / "c.jsonl", ROWS[4:]))
    jsonl(tmp_path / "a.jsonl", ROWS[2:4])
    (tmp_path / "README.md").write_text("not data")
    whole = [r["prompt"] + r["completion"] for r in ROWS]
    found = load(tmp_path)
    assert texts(found) == whole[2:4] + whole[:2] + whole[4:]
    assert found.where(3) == f"{tmp_path}/b.jsonl:2" and found.where(4) == f"{tmp_path}/deep/c.jsonl.gz:1"
    assert texts(load(f"{tmp_path}/*.jsonl")) == whole[2:4] + whole[:2]
    assert texts(load(f"{tmp_path}/**/c.*")) == whole[4:]
    assert len(load(tmp_path, limit=3)) == 3


def test_reading_by_range_is_reading_by_range(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "b.jsonl").write_text("\n\n" + "\n\n".join(json.dumps(r) for r in ROWS[3:]))  # empty lines, no end
    source = open_source(str(tmp_path), None, lambda d: d)
    assert len(source) == 7
    for start in range(8):
        for stop in range(start, 9):
            assert list(source.read_rows(start, stop)) == ROWS[start:stop]
    assert source.where(3) == f"{tmp_path}/b.jsonl:3" and source.where(6) == f"{tmp_path}/b.jsonl:9"


def test_digits_and_na_stay_text_in_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n007,NA\n1.50,null\n")
    assert texts(load(tmp_path / "a.csv")) == ["007NA", "1.50null"]


def test_a_changed_file_tokenizer_or_format_is_tokenised_anew_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    first = load(path)
    calls: list[Any] = []
    from sftlab.data import tokenise

    real = tokenise.Renderer
    monkeypatch.setattr(tokenise, "Renderer", lambda t, *rest: calls.append(t) or real(t, *rest))
    assert load(path).fingerprint == first.fingerprint and calls == []
    moved = path.rename(tmp_path / "b.jsonl")
    assert load(moved).fingerprint == first.fingerprint and calls == []  # the content counts
    jsonl(moved, [*ROWS[:-1], {"prompt": "other", "completion": "x"}])
    assert load(moved).fingerprint != first.fingerprint and len(calls) == 1
    assert load(moved, PromptCompletion("completion", "prompt")).fingerprint != first.fingerprint and len(calls) == 2
    other, _ = Data(PromptCompletion(), str(moved), num_workers=1).examples(byte_tokenizer(bos=False), 1000)
    assert other.fingerprint != first.fingerprint and len(calls) == 3


def test_several_workers_make_the_same_examples(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i} ", "completion": f"a{i}"} for i in range(2500)]
    path = jsonl(tmp_path / "many.jsonl", rows)
    one = load(path)
    two, _ = Data(PromptCompletion(group_chars=255), str(path), num_workers=2).examples(TOK, 1000)
    assert [e.tokens.tolist() for e in two] == [e.tokens.tolist() for e in one]
    assert [e.id for e in two][2499] == f"{path}:2500"


# Validation ---------------------------------------------------------------------------------------------------------


def test_validation_from_a_file_or_in_whole_groups_of_the_training_data(tmp_path: Path) -> None:
    train = make_squad_file(tmp_path / "train.jsonl", 12, 3)
    held = make_squad_file(tmp_path / "val.jsonl", 2, 3, seed=1)
    mine, val = Data(Squad(), str(train), val_path=str(held)).examples(TOK, 1000)
    assert val is not None and (len(mine), len(val)) == (36, 6)
    assert Data(Squad(), str(train)).examples(TOK, 1000)[1] is None
    for num in (1, 7, 12):
        mine, val = Data(Squad(), str(train), val_examples=num).examples(TOK, 1000)
        assert val is not None and num <= len(val) < num + 3 and len(mine) + len(val) == 36
        assert not set(mine.groups.tolist()) & set(val.groups.tolist())  # nothing leaks
        assert sorted(e.id for e in [*mine, *val]) == sorted(r["id"] for r in read_jsonl(train))
    again = Data(Squad(), str(train), val_examples=12).examples(TOK, 1000)[1]
    assert again is not None and val is not None and [e.id for e in again] == [e.id for e in val]
    with pytest.raises(ValueError, match="leaves no training example of 36: whole prefix groups are held out"):
        Data(Squad(), str(train), val_examples=36).examples(TOK, 1000)
    with pytest.raises(ValueError, match=r"data.val_examples and data.val_path both say"):
        Data(Squad(), str(train), val_examples=3, val_path=str(held))


def test_a_mixture_meets_every_source_in_proportion_to_its_weight(tmp_path: Path) -> None:
    make_squad_file(tmp_path / "squad.jsonl", 4, 3)
    jsonl(tmp_path / "pairs.jsonl")
    sources = {
        "squad": Data(Squad(), str(tmp_path / "squad.jsonl"), val_examples=2),
        "pairs": Data(PromptCompletion(), str(tmp_path / "pairs.jsonl")),
    }
    train, val = Mixture(sources, {"squad": 1, "pairs": 3}).examples(TOK, 1000)
    assert val is not None and list(val.parts) == ["squad"]
    names = ["pairs" if e.id.startswith(str(tmp_path)) else "squad" for e in train]
    squads = 12 - len(val)
    assert (names.count("squad"), names.count("pairs")) == (squads, 3 * squads)
    times = [[e.id for e in train].count(f"{tmp_path}/pairs.jsonl:{i}") for i in range(1, 8)]
    assert max(times) - min(times) <= 1
    whole, _ = Mixture(sources).examples(TOK, 1000)
    assert len(whole) == squads + 7 and whole.fingerprint != train.fingerprint
    assert train.where(len(train) - 1).startswith("pairs: ")
    only, _ = Mixture(sources, {"squad": 0, "pairs": 1}).examples(TOK, 1000)
    assert list(only.parts) == ["pairs"] and len(only) == 7


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 0, "b": 0}, "data.weights sum to zero"),
        ({"a": -1, "b": 1}, "data.weights.a=-1: expected a number of at least 0"),
        ({"a": 1, "c": 1}, "data.weights.c: there is no such source; there are a, b"),
        ({"a": float("nan")}, "data.weights.a=nan"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError) as error:
        Mixture({"a": Data(Squad(), "a"), "b": Data(Squad(), "b")}, weights)
    assert said in str(error.value)


# Bad input ----------------------------------------------------------------------------------------------------------

GOOD = json.dumps(ROWS[0]).encode()
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
BAD_LINES: list[tuple[Format, bytes, str]] = [
    (PromptCompletion(), b'{"prompt": "a", ', "this line is not JSON"),
    (PromptCompletion(), b'{"prompt": "caf\xe9", "completion": "b"}', "this line is not UTF-8"),
    (PromptCompletion(), b"[1, 2]", "expected a JSON object, found list"),
    (PromptCompletion(), b'{"question": "a"}', "no field 'prompt'; it has 'question'"),
    (PromptCompletion(), b'{"prompt": "a", "completion": ""}', "field 'completion' is empty"),
    (Chat(), b'{"messages": [{"role": "robot", "content": "x"}]}', "message 1 has the unknown role 'robot'"),
    (Chat(), b'{"messages": [{"role": "assistant", "content": "x"}]}', "starts with the assistant"),
    (Chat(), b'{"messages": [{"role": "user", "content": "x"}]}', "has no assistant turn"),
    (Chat(), b'{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}', "Error: no"),
]


def chatty() -> Any:
    tok = tokenizer("qwen")
    tok.chat_template = (
        "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{%- endif %}" + tok.chat_template
    )
    return tok


@pytest.mark.parametrize(("format", "line", "said"), BAD_LINES, ids=[s[:30] for _, _, s in BAD_LINES])
def test_a_bad_row_is_named_with_its_file_and_line_or_skipped_and_listed(
    format: Format, line: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(CHAT).encode() if isinstance(format, Chat) else GOOD
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ValueError) as error:
        Data(format, str(path)).examples(chatty(), 1000)
    assert str(error.value).startswith(f"{path}:3: ") and said in str(error.value)
    found, _ = Data(format, str(path), on_error="skip").examples(chatty(), 1000)
    assert (len(found), found.num_skipped) == (2, 1)
    with pytest.raises(ValueError, match="row=2 is no training example: it was skipped"):
        found.find_row(2)
    write_skipped(tmp_path / "skipped.jsonl", [found, None])
    (listed,) = read_jsonl(tmp_path / "skipped.jsonl")
    assert listed["where"] == f"{path}:3" and said in listed["reason"]


def test_a_bad_row_of_a_table_and_of_a_document_are_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(ValueError, match=r"a.csv row 2: field 'completion' is empty"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], "x"]))
    with pytest.raises(ValueError, match=r"a.json row 2: expected a JSON object, found str"):
        load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n \n", "it holds no row"),
        ("none.json", b"[]", "it holds no row"),
        ("half.json", b'[{"prompt"', "this is not JSON"),
        ("latin.json", b'[{"prompt": "caf\xe9"}]', "this is not UTF-8"),
        ("other.json", b'{"rows": []}', "expected a JSON list of rows"),
        ("torn.parquet", b"PAR1 and no more", "cannot read this file"),
        ("page.html", b"<html>", "cannot read a .html; expected .jsonl"),
        ("torn.jsonl.gz", b"\x1f\x8b\x08 no", "torn.jsonl.gz"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("packed.jsonl", b"\x1f\x8b\x08 rows", "it is compressed: name it packed.jsonl.gz"),
        ("packed.csv", b"\x28\xb5\x2f\xfd rows", "it is compressed: name it packed.csv.zst"),
        ("wide.csv", "prompt,completion\na,b\n".encode("utf-16"), "it is UTF-16, and UTF-8 is expected"),
        ("mac.csv", b"prompt,completion\ra,b\r", "its lines end in a carriage return alone"),
        ("list.jsonl", b'[{"prompt": "a", "completion": "b"}]\n', "One list of all rows is a .json"),
        ("pretty.jsonl", b'{\n  "prompt": "a",\n  "completion": "b"\n}\n', "jq -c . FILE"),
        ("semi.csv", b"prompt;completion\na;b\n", "its header is one cell, 'prompt;completion'"),
        ("semi.tsv", b"prompt,completion\na,b\n", "Write it with '\\t' between them"),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_a_first_line_that_is_a_list_is_one_bad_row_where_others_follow(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2]\n" + "".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match=r"a.jsonl:1: expected a JSON object, found list"):
        load(path)
    assert len(load(path, on_error="skip")) == len(ROWS)


def test_one_column_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"words, many"\nhello there\n')
    (row,) = open_source(str(tmp_path / "a.csv"), None, list).read_rows(0, 9)
    assert row == {"words, many": "hello there"}


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"none\.parquet: the file holds no row"):
        load(path)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load(f"{tmp_path}/*.jsonl")
    with pytest.raises(FileNotFoundError, match="the folder holds no file that can be read"):
        load(tmp_path)


def test_a_row_of_two_megabytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], {"prompt": "word " * 400_000, "completion": "x"}, ROWS[1]])
    with pytest.raises(ValueError) as error:
        load(path)
    said = str(error.value)
    assert "1 of 3 examples are longer than data.max_length=1000" in said and f"{path}:2, has " in said
    assert "data.overlong=drop or truncate" in said and len(said) < 600
    dropped = load(path, overlong="drop")
    assert len(dropped) == 2 and dropped.num_dropped == 1
    cut = load(path, overlong="truncate")  # nothing supervised is left of it
    assert len(cut) == 2 and list(cut.dropped) == ["no supervised token"]


# The account --------------------------------------------------------------------------------------------------------


def test_gauntlet_05_14_every_row_and_every_supervised_token_is_trained_or_reported(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [
        {"prompt": f"q{i}" * (1 + i % 9), "completion": f" a{i}" * (1 + i % 7)} for i in range(60)
    ]
    rows[5] = {"prompt": "q" * 300, "completion": "lost"}  # fully masked once truncated
    rows[6] = {"prompt": "bad", "completion": ""}
    path = jsonl(tmp_path / "a.jsonl", rows)
    everything = Data(PromptCompletion(), str(path), on_error="skip").examples(TOK, 10_000)[0]
    all_targets = sum(int(e.supervised.sum()) for e in everything)
    for overlong in ("drop", "truncate"):
        train = Data(PromptCompletion(), str(path), on_error="skip", overlong=overlong).examples(TOK, 30)[0]
        plan = Plan(train.groups, 7, 0)
        for layout in ("tree", "packed", "padded"):
            row_layout = RowLayout(layout, 64, 2, 0, 1, pad_token=2)
            trained = 0.0
            ids: list[str] = []
            for step in range(1, plan.steps_per_epoch + 1):
                indices = plan.examples(step)
                made = row_layout.arrange([train[int(i)] for i in indices], indices)
                trained += sum(float(b.weight.sum()) for b in made.microbatches)
                ids += [train[int(i)].id for i in indices]
            assert len(set(ids)) == len(ids) == len(train)
            (account,) = report(train, None, plan, row_layout).accounts["training"].values()
            assert account.supervised_tokens == trained
            assert (
                account.rows
                == 60
                == account.kept + account.skipped.count + sum(f.count for f in account.dropped.values())
            )
            assert account.skipped.count == 1 and f"{path}:7: " in account.skipped.examples[0]
        full = {e.id: e for e in everything}
        lost = {i: int(full[i].supervised.sum()) for i in full if i not in ids}
        by_cut = sum(int(full[e.id].supervised.sum() - e.supervised.sum()) for e in train)
        assert trained + sum(lost.values()) + by_cut == all_targets
        named = [name for f in account.dropped.values() for name in f.examples]
        assert set(named) <= set(lost) and sum(f.count for f in account.dropped.values()) == len(lost)
        if overlong == "truncate":
            assert account.dropped["no supervised token"].examples == [f"{path}:6", *named[1:]]
            assert account.truncated.count == sum(len(full[e.id]) > 30 for e in train) > 0
            assert account.end_not_supervised.count == account.truncated.count
        else:
            assert "longer than max_length" in account.dropped and by_cut == 0


def test_gauntlet_05_examples_without_a_target_are_dropped_counted_and_named(tmp_path: Path) -> None:
    silent = {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0}]}
    path = jsonl(tmp_path / "a.jsonl", [CHAT, silent, CHAT])
    found, _ = Data(Chat(), str(path)).examples(chatty(), 1000)
    assert len(found) == 2 and all(e.supervised.any() for e in found)
    (account,) = (
        report(found, None, Plan(found.groups, 2, 0), RowLayout("tree", 512, 1, 0, 1, 0)).accounts["training"].values()
    )
    assert account.dropped["no supervised token"].examples == [f"{path}:2"]
    with pytest.raises(ValueError, match="row=2 is no training example: no supervised token"):
        found.find_row(2)
    with pytest.raises(ValueError, match=r"no example is left of 1: 0 longer than max_length, 1 with no supervised"):
        Data(Chat(), str(jsonl(tmp_path / "b.jsonl", [silent]))).examples(chatty(), 1000)


def test_the_report_counts_duplicates_and_overlap(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[1], ROWS[1]])
    held = jsonl(tmp_path / "v.jsonl", [ROWS[2], {"prompt": "new", "completion": "x"}])
    train, val = Data(PromptCompletion(), str(path), val_path=str(held)).examples(TOK, 1000)
    found = report(train, val, Plan(train.groups, 4, 0), RowLayout("tree", 512, 1, 0, 1, 0))
    (account,) = found.accounts["training"].values()
    assert account.duplicates.count == 2 and account.duplicates.examples == [f"{path}:8", f"{path}:9"]
    assert (found.overlap.count, found.overlap.examples) == (1, [f"{held}:1"])
    assert sum(found.lengths.values()) == 9 == sum(found.supervised_lengths.values())
    assert found.arrangement.tokens == sum(map(len, train)) == account.tokens
    assert found.arrangement.nodes < account.tokens and found.arrangement.predictions <= account.supervised_tokens


def test_text_without_a_common_beginning_is_not_shared(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": f"{i} tells of the keeper"} for i in range(9)])
    found = load(path, PlainText())
    assert np.array_equal([int(e.supervised.sum()) for e in found], found.lengths - 1)


# Content ------------------------------------------------------------------------------------------------------------


def opened(path: Path | str) -> Any:
    return open_source(str(path), None, lambda document: document)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    contents = {
        "a.jsonl": b'{"prompt": "1"}\n{"prompt": "2"}\n',
        "a.json": b'[{"prompt": "1"}, {"prompt": "2"}]',
        "a.csv": b"prompt\n1\n2\n",
        "a.tsv": b"prompt\n1\n2\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(mark + content)
        assert list(opened(tmp_path / name).read_rows(0, 9)) == [{"prompt": "1"}, {"prompt": "2"}], name


def test_a_cell_may_hold_separators_line_ends_and_nothing(tmp_path: Path) -> None:
    rows = [{"a": "x,\ty", "b": "two\nlines"}, {"a": "", "b": '"quoted"'}, {"a": "nan", "b": "1e5"}]
    import csv

    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["a", "b"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        assert list(opened(tmp_path / name).read_rows(0, 3)) == rows


def test_a_source_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder, names in ((first, "ab"), (second, "ba")):
        folder.mkdir()
        for name, rows in zip(names, (ROWS[:2], ROWS[2:5]), strict=True):
            jsonl(folder / f"{name}.jsonl", rows)
            (folder / f"{name}.json").write_text(json.dumps(rows))
    prints = {name: opened(folder / name).fingerprint for folder in (first, second) for name in ("a.jsonl", "a.json")}
    assert opened(first / "a.jsonl").fingerprint == opened(second / "b.jsonl").fingerprint
    assert opened(first / "a.json").fingerprint == opened(second / "b.json").fingerprint
    assert opened(first / "a.jsonl").fingerprint != prints["a.jsonl"]
    assert opened(first / "a.json").fingerprint != prints["a.json"]
    folders = [opened(f"{folder}/*.jsonl") for folder in (first, second)]
    assert folders[0].fingerprint != folders[1].fingerprint, "the same files in another order are another source"
    assert opened(f"{first}/*.jsonl").fingerprint == folders[0].fingerprint


def test_three_files_are_read_across_the_one_between(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:3]), ("c", ROWS[3:])):
        jsonl(tmp_path / f"{name}.jsonl", rows)
    source = opened(tmp_path)
    for start in range(8):
        for stop in range(start, 8):
            assert list(source.read_rows(start, stop)) == ROWS[start:stop]
    assert [source.where(i).rpartition("/")[2] for i in range(7)] == [
        *("a.jsonl:1", "a.jsonl:2", "b.jsonl:1"),
        *(f"c.jsonl:{i}" for i in (1, 2, 3, 4)),
    ]
    with pytest.raises(IndexError):
        source.where(7)
    documents = tmp_path / "documents"
    documents.mkdir()
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:3]), ("c", ROWS[3:])):
        (documents / f"{name}.json").write_text(json.dumps(rows))
    for start in range(8):
        for stop in range(start, 8):
            assert list(opened(documents).read_rows(start, stop)) == ROWS[start:stop]


@pytest.mark.parametrize("path", ["rows", "a/b/c", "./b", "a/b.jsonl", "a/b.json.gz", "~/rows"])
def test_what_cannot_be_a_hub_id_is_not_looked_for_there(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: asked.append(name))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(path, "train", lambda document: document)
    assert asked == []
    open_source("some/rows", "train", lambda document: document)
    assert asked == ["some/rows"]


def test_a_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "a.jsonl")
    assert len(opened("~/a.jsonl")) == 7 and len(load("~/a.jsonl")) == 7
    assert is_local("~/a.jsonl") and is_local("some/*.jsonl") and is_local(str(tmp_path))
    assert not is_local("~/b.jsonl") and not is_local("some/rows")


def test_a_torn_archive_and_a_wrong_text_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(("prompt,completion\n" + "a,b\n" * 2000).encode())
    for name, content in (
        ("half.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 900)[:40]),
        ("half.csv.gz", whole[: len(whole) // 2]),
        ("latin.csv", b"pr\xe9,completion\na,b\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot read this file: "):
            load(tmp_path / name)
