"""Bombs and odd rows: files that inflate, lines without an end, values no parser takes, templates without an end."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftlab.common.time_limit import time_limit
from sftlab.data import limits, template
from sftlab.data.formats.chat import Chat
from sftlab.data.formats.prompt_completion import PromptCompletion
from sftlab.data.opening import open_source
from sftlab.data.store import store
from sftlab.data.template import SlowTemplate, prepare_tokenizer
from tests.support import byte_tokenizer

GOOD = {"prompt": "a", "completion": "b"}


def rows_of(document: Any) -> Any:
    return document


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches in an instant."""
    monkeypatch.setattr(limits, "INFLATED_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "ROW_BYTES", 1 << 16)


def bomb(path: Path, *parts: bytes, size: int = 4 << 20) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(parts[0])
        file.write(b" " * size)
        file.write(b"".join(parts[1:]))
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz"])
def test_a_gzip_that_inflates_beyond_every_honest_ratio_is_refused(tmp_path: Path, small: None, name: str) -> None:
    path = bomb(tmp_path / name, json.dumps(GOOD).encode() + b"\n", b"\n" + json.dumps(GOOD).encode())
    with pytest.raises(ValueError, match=r"bytes inflate to more than 1,0.*decompression bomb"):
        open_source(str(path), None, rows_of)


def test_members_of_a_gzip_are_counted_together(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n") + b"".join(gzip.compress(b" " * (300 << 10)) for _ in range(4)))
    with pytest.raises(ValueError, match="decompression bomb"):
        open_source(str(path), None, rows_of)


def test_an_honest_gzip_is_read(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(
            json.dumps({"prompt": f"{i * 7919}", "completion": f"{i * 104729}"}) + "\n" for i in range(60_000)
        )
    assert len(open_source(str(path), None, rows_of)) == 60_000


def test_a_parquet_file_whose_dictionary_inflates_is_refused(tmp_path: Path, small: None) -> None:
    """A few kilobytes, of which every row is one of two values of 100 kB: a gigabyte once read."""
    values = pa.DictionaryArray.from_arrays(pa.array([i % 2 for i in range(10_000)], pa.int32()), ["x" * 100_000, "y"])
    for column in (values, pa.StructArray.from_arrays([values], ["inner"])):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"prompt": column, "n": list(range(10_000))}), path)
        assert path.stat().st_size < 200_000
        with pytest.raises(ValueError, match="decompression bomb"):
            open_source(str(path), None, rows_of)


def test_a_parquet_file_whose_codec_inflates_is_refused(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": ["x" * 100_000 + str(i) for i in range(40)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match="decompression bomb"):
        open_source(str(path), None, rows_of)


def test_an_honest_parquet_file_with_repeated_contexts_is_read(tmp_path: Path, small: None) -> None:
    contexts = [f"passage {i // 5} " * 20 for i in range(2000)]
    pq.write_table(pa.table({"prompt": contexts, "completion": list(map(str, range(2000)))}), tmp_path / "a.parquet")
    assert len(open_source(str(tmp_path / "a.parquet"), None, rows_of)) == 2000


ODD = {
    "deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"prompt": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    "digits": b'{"prompt": "a", "completion": "b", "n": ' + b"7" * 5000 + b"}",
    "surrogate": b'{"prompt": "a \\ud83d", "completion": "b"}',
    "surrogate learned": b'{"prompt": "a", "completion": "b \\udfff"}',
    "surrogate id": b'{"prompt": "a", "completion": "b", "id": "\\ud800"}',
    "long": b'{"prompt": "' + b"x" * (1 << 17) + b'", "completion": "b"}',
    "no text": b'{"prompt": {"a": 1}, "completion": "b"}',
    "bytes": b'{"prompt": "\xff", "completion": "b"}',
    "torn": b'{"prompt": "a", ',
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_row_is_named_and_skipped_where_that_is_asked_for(tmp_path: Path, small: None, odd: str) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, ODD[odd], good]) + b"\n")
    source = open_source(str(path), None, rows_of)
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"a\.jsonl:2: ") as error:
        store(source, PromptCompletion(), tokenizer)
    str(error.value).encode()  # its words can be printed
    found = store(source, PromptCompletion(), tokenizer, on_error="skip")
    assert [s.where for s in found.skipped] == [f"{path}:2"] and len(found) == 2
    assert found[1].tokens.tolist() == found[0].tokens.tolist(), "what follows is read as if nothing had been"


def test_a_document_that_no_parser_takes_is_named(tmp_path: Path) -> None:
    for odd in ("deep", "digits"):
        (tmp_path / "a.json").write_bytes(b"[" + ODD[odd] + b"]")
        with pytest.raises(ValueError, match=r"a\.json: this cannot be read: "):
            open_source(str(tmp_path / "a.json"), None, rows_of)


LOOPS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro m(n) %}{% for i in range(30) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
    "{{ m(30) }}",
    "text": "{% for a in range(99999) %}{% for b in range(999) %}{{ messages | tojson }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("loops", LOOPS)
def test_a_template_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch, loops: str) -> None:
    monkeypatch.setattr(template, "TEMPLATE_S", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOPS[loops]
    began_s = time.monotonic()
    with pytest.raises(SlowTemplate, match=r"the chat template was stopped: it took longer than 0\.3 s"):
        prepare_tokenizer(tokenizer, [Chat()])
    assert time.monotonic() - began_s < 5


def test_a_template_that_loops_on_one_row_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "TEMPLATE_S", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% if m.content == 'boom' %}"
        + LOOPS["nested"]
        + "{% endif %}{% endfor %}"
    )
    rows = [[{"role": "user", "content": c}, {"role": "assistant", "content": "b"}] for c in ("a", "boom", "a")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    source = open_source(str(path), None, rows_of)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the chat template was stopped"):
        store(source, Chat(), tokenizer)
    found = store(source, Chat(), tokenizer, on_error="skip")
    assert [s.where for s in found.skipped] == [f"{path}:2"] and len(found) == 2


def test_the_time_limit_reaches_any_thread_and_nothing_after_its_block() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def forever() -> None:
        with time_limit(0.3, "it"):
            while True:
                pass

    with ThreadPoolExecutor(2) as pool:
        for end in [pool.submit(forever) for _ in range(2)]:
            with pytest.raises(TimeoutError, match=r"it took longer than 0\.3 s"):
                end.result(10)
        assert pool.submit(sum, range(10)).result(10) == 45
    with time_limit(0.1, "it"):
        pass
    until_s = time.monotonic() + 0.8
    while time.monotonic() < until_s:  # nothing is raised here any more
        pass


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """Counting each key took 40 s for one line of 300,000 keys, and grew with the square."""
    keys = ",".join(f'"k{i}": 1' for i in range(100_000))
    (tmp_path / "a.jsonl").write_text(f'{{{keys}, "k99999": 2}}\n')
    (tmp_path / "a.csv").write_text(",".join(f"k{i}" for i in range(100_000)) + "\n")
    began_s = time.process_time()
    (row,) = open_source(str(tmp_path / "a.jsonl"), None, list).read_rows(0, 1)  # type: ignore[arg-type]
    assert "has the key 'k99999' twice" in str(row)
    assert len(open_source(str(tmp_path / "a.csv"), None, list)) == 0  # type: ignore[arg-type]
    assert time.process_time() - began_s < 3
