"""Generated data: the sizes it promises, whatever the tokenizer, and what of it is shared."""

import json
from pathlib import Path

import numpy as np
import pytest

from sftlab.benchmarking.cases import CALLS, CASES, FORKS, overrides, write_stand_in
from sftlab.benchmarking.words import Words
from tests.kinds import KINDS
from tests.kinds import tokenizer as tokenizer_of
from tests.support import byte_tokenizer, read_jsonl


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_as_many_tokens_as_asked_by_any_tokenizer(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    words = Words(tokenizer)
    longest = int(words.tokens.max())
    for num in (1, 30, 200, 3000):
        found = len(tokenizer(words.text(num), add_special_tokens=False).input_ids)
        assert abs(found - num) <= longest, num


def test_squad_is_several_questions_on_each_paragraph_with_the_answer_in_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = read_jsonl(write_stand_in("squad", tmp_path, Words(tokenizer), 1000, 1.0))
    paragraphs = {r["context"]: [q for q in rows if q["context"] == r["context"]] for r in rows}
    assert 1000 <= len(rows) < 1010 and 4.6 < len(rows) / len(paragraphs) < 5.2
    assert len({r["id"] for r in rows}) == len(rows) and len({r["question"] for r in rows}) > 0.9 * len(rows)
    assert all(r["context"].startswith(r["answers"]["text"][0]) for r in rows)
    lengths = np.array([len(tokenizer(c).input_ids) for c in paragraphs])
    assert 155 < lengths.mean() < 187 and 0.3 < np.log(lengths).std() < 0.48
    half = read_jsonl(write_stand_in("squad", tmp_path, Words(tokenizer), 1000, 0.5))
    assert 0.4 < np.mean([len(r["context"]) for r in half]) / np.mean([len(r["context"]) for r in rows]) < 0.6


def test_an_agents_traces_of_a_task_fork_late(tmp_path: Path) -> None:
    rows = read_jsonl(write_stand_in("agent", tmp_path, Words(byte_tokenizer()), 40, 0.05))
    assert len(rows) == 40
    for start in range(0, 40, FORKS):
        traces = [r["messages"] for r in rows[start : start + FORKS]]
        assert len({json.dumps(t) for t in traces}) == FORKS
        for t in traces:
            roles = [m["role"] for m in t]
            assert roles == ["system", "user", *["assistant", "tool"] * CALLS, "assistant"]
        for i, t in enumerate(traces[1:], 1):
            shared = max(sum(1 for _ in common(t, other)) for other in traces[:i])
            assert shared >= 2 + 2 * (CALLS // 2)
    assert len({r["messages"][0]["content"] for r in rows}) <= 3


def common(a: list[object], b: list[object]) -> list[object]:
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:end]


def test_chat_has_few_system_prompts_and_several_turns_and_dense_is_longer_than_a_row(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = read_jsonl(write_stand_in("chat", tmp_path, Words(tokenizer), 60, 0.1))
    assert len(rows) == 60 and len({r["messages"][0]["content"] for r in rows}) == 4
    assert {len(r["messages"]) for r in rows} == {5, 7, 9, 11}
    texts = [r["text"] for r in read_jsonl(write_stand_in("dense", tmp_path, Words(tokenizer), 3, 1.0))]
    assert len(set(texts)) == 3 and all(4096 < len(tokenizer(t).input_ids) < 4700 for t in texts)


def test_the_same_seed_gives_the_same_data_and_another_other_data(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    first, again, other = (
        write_stand_in("chat", tmp_path, Words(tokenizer, seed), 5, 0.1).read_text() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_case_gives_way_to_whatever_is_typed() -> None:
    assert overrides(["windows=2"]) == ["windows=2"]
    assert overrides(["case=null", "data=chat"]) == ["case=null", "data=chat"]
    assert overrides(["case=nothing"]) == ["case=nothing"]  # refused later, with the other settings
    made = overrides(["case=squad", "trainer.batch_size=8"])
    assert made == ["data=squad", "data.path=generated", "case=squad", "trainer.batch_size=8"]
    assert overrides(["case=squad", "data.path=mine.jsonl"])[:2] == ["trainer.batch_size=256", "data=squad"]
    assert "data.path=generated" not in overrides(["case=squad", "data.path=mine.jsonl"])
    with_data = overrides(["case=agent", "data=chat", "data.path=mine.jsonl"])
    assert with_data == ["trainer.batch_size=32", "case=agent", "data=chat", "data.path=mine.jsonl"]
    assert overrides(["case=squad", "case=dense"])[1] == "data=text"  # the last counts, as with every key
    assert set(CASES) == {"squad", "chat", "dense", "agent"}
