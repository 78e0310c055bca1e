"""Files of prompts: what a row asks, which row is at fault, and answers that are gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftlab.data.formats.squad import Squad
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.prompts import Request, answer_file, read_requests, read_rows, request
from sftlab.inference.trained_model import TrainedModel
from tests.asymmetric import model_that_listens, reciter
from tests.support import read_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTION = [{"role": "user", "content": "Wer zählt?"}]


@pytest.fixture(scope="module")
def listens(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = model_that_listens(tmp_path_factory.mktemp("listens"), TEMPLATE)
    return LoadedModel.load(TrainedModel(str(folder), str(folder)), torch.device("cpu"))


@pytest.fixture(scope="module")
def talks_on(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """It says " rye", the mark that ends a turn, and then more: a prompt's answer goes on, a turn's does not."""
    folder = reciter(tmp_path_factory.mktemp("talks"), " rye<pad> bread", after=":")
    found = LoadedModel.load(TrainedModel(str(folder), str(folder)), torch.device("cpu"))
    found.tokenizer.chat_template = TEMPLATE
    return found


def test_a_row_asks_with_its_prompt_its_messages_or_its_fields_in_this_order(listens: LoadedModel) -> None:
    fields: dict[str, Any] = {"context": "The light turns.", "question": "What turns?"}
    row = {"prompt": "as it stands", "messages": QUESTION, **fields}
    first = request(listens, row, Squad())
    assert (first.text, first.chat) == ("as it stands", False)
    assert first.tokens.tolist() == listens.encode("as it stands").tolist()
    second = request(listens, {k: v for k, v in row.items() if k != "prompt"}, Squad())
    assert (second.text, second.chat) == ('[{"role": "user", "content": "Wer zählt?"}]', True)
    assert second.tokens.tolist() == listens.encode_chat(QUESTION).tolist()
    third = request(listens, fields, Squad())
    assert (third.text, third.chat) == ("Context: The light turns. Question: What turns? Answer:", False)
    with pytest.raises(ValueError, match=r"no field 'prompt' or 'messages'; it has 'context', 'question'"):
        request(listens, fields, None)


def test_only_an_answer_at_the_end_of_a_conversation_is_left_out(listens: LoadedModel) -> None:
    answered = [*QUESTION, {"role": "assistant", "content": "The keeper."}]
    assert request(listens, {"messages": answered}, None).text == json.dumps(QUESTION, ensure_ascii=False)
    asked_again = [*answered, {"role": "user", "content": "Who?"}]
    assert request(listens, {"messages": asked_again}, None).text == json.dumps(asked_again, ensure_ascii=False)


def test_the_row_at_fault_is_named_by_its_line_in_the_file(listens: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one"}\n\n  \n{"prompt": "two"}\n')
    assert [where for where, _ in read_rows(file)] == [f"{file}:1", f"{file}:4"]
    file.write_text('{"prompt": "one"}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:3: expected a JSON object, found list"):
        read_requests(listens, file, None)
    file.write_text('\n{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no field 'prompt'"):
        read_requests(listens, file, None)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"it holds no prompt"):
        read_requests(listens, file, None)


def asked(loaded: LoadedModel, *texts: str) -> list[Request]:
    return [request(loaded, {"prompt": text}, None) for text in texts]


@pytest.mark.parametrize(
    "odd",
    [
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "a", "n": ' + "7" * 5000 + "}",
        '{"prompt": "a \\ud83d"}',
        '{"messages": ["a"]}',
        '{"messages": [{"role": "user", "content": "\\udfff"}]}',
    ],
)
def test_an_odd_row_is_named_whatever_it_holds(listens: LoadedModel, tmp_path: Path, odd: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{odd}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: ") as error:
        read_requests(listens, file, None)
    str(error.value).encode()


def test_samples_are_the_same_whether_a_file_was_answered_at_once_or_gone_on_with(
    listens: LoadedModel, tmp_path: Path
) -> None:
    requests = asked(listens, "one: ", "two: a longer one", "three", "four, the longest of all of them")
    how = DecodingSettings(max_new_tokens=6, temperature=1.5, batch_size=1)
    assert answer_file(listens, requests, tmp_path / "whole.jsonl", how, {"seed": 0}) == 0
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]  # though the longest was answered first
    (tmp_path / "torn.jsonl").write_text(lines[3] + lines[0] + lines[1][:9])
    assert answer_file(listens, requests, tmp_path / "torn.jsonl", how, {"seed": 0}) == 2
    assert (tmp_path / "torn.jsonl").read_text() == "".join(lines)
    assert answer_file(listens, requests, tmp_path / "torn.jsonl", how, {"seed": 0}) == 4
    assert not list(tmp_path.glob(".*"))


def test_each_batch_is_in_the_file_when_the_next_one_begins(listens: LoadedModel, tmp_path: Path) -> None:
    requests = asked(listens, "one", "two, longer", "three, the longest")
    seen: list[int] = []
    output = tmp_path / "new" / "answers.jsonl"
    prefill = listens.scorer.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(len(read_jsonl(output))) if given[0].shape[1] > 1 else None
    )
    try:
        answer_file(listens, requests, output, DecodingSettings(max_new_tokens=2, batch_size=1), {})
    finally:
        prefill.remove()
    assert seen == [0, 1, 2]


def test_a_turn_ends_at_its_mark_and_a_prompt_s_answer_does_not(talks_on: LoadedModel, tmp_path: Path) -> None:
    how = DecodingSettings(max_new_tokens=20)
    chats = [request(talks_on, {"messages": QUESTION}, None)]
    answer_file(talks_on, chats, tmp_path / "chats.jsonl", how, {"seed": 3})
    answer_file(talks_on, asked(talks_on, "Answer:"), tmp_path / "prompts.jsonl", how, {"seed": 4})
    (turn,), (text,) = read_jsonl(tmp_path / "chats.jsonl"), read_jsonl(tmp_path / "prompts.jsonl")
    assert turn == {"index": 0, "prompt": chats[0].text, "answer": "rye", "seed": 3}
    assert text == {"index": 0, "prompt": "Answer:", "answer": "rye bread", "seed": 4}


@pytest.mark.parametrize(
    "there",
    [
        '{"index": 0, "prompt": "one", "answer": "", "seed": 1}\n',
        '{"index": 0, "prompt": "two", "answer": "", "seed": 0}\n',
        '{"index": 7, "prompt": "one", "answer": "", "seed": 0}\n',
        '{"index": 0, "prompt": "one", "answer": ""}\n',
        "words\n",
        "[1]\n",
    ],
    ids=["other settings", "another prompt", "one too many", "no settings", "text", "a list"],
)
def test_a_file_of_something_else_is_left_alone(there: str, listens: LoadedModel, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(there)
    with pytest.raises(ValueError, match="name another file, or delete it"):
        answer_file(listens, asked(listens, "one"), output, DecodingSettings(max_new_tokens=1), {"seed": 0})
    assert output.read_text() == there
