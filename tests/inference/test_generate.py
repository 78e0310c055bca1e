"""The generate command: prompts as they are typed, files of prompts, a chat."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sftlab.common.words import plain
from sftlab.config.groups import CONF
from sftlab.config.overrides import GIVEN, quote
from sftlab.data.formats.squad import Squad
from sftlab.data.render import Renderer
from sftlab.generate import DECODING
from sftlab.inference import chat
from sftlab.inference.chat import stream
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.prompts import request
from sftlab.inference.trained_model import resolve
from tests.asymmetric import reciter
from tests.commands import TEMPLATE, Typed
from tests.support import byte_tokenizer, command, read_jsonl

# Everything that a shell hands on and a config language trips over.
ODD = """Context: it's "odd", [a, b] = {c: ${run}} \\${x} \\ #! 100% é <|im_end|>,
, prompt=2 Question: who, 'then'? Answer:"""
CONTEXT, QUESTION = "Sailors know the light. Its keeper, Ravi Merrow, talks to the waves.", "Who is the keeper?"
PROMPT = f"Context: {CONTEXT} Question: {QUESTION} Answer:"


@pytest.fixture(scope="module")
def loaded(demo_run: Path) -> LoadedModel:
    return LoadedModel.load(resolve(str(demo_run)), torch.device("cpu"))


def greedy(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """What transformers makes of a prompt by itself."""
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    model = loaded.scorer.model
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return str(loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    "text", [ODD, PROMPT, "'quoted'", '"quoted"', "null", "[1,2]", "${oc.env:HOME}", "a=b", "\\", "-1"]
)
def test_a_prompt_is_taken_literally(text: str, demo_run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("sftlab.inference.prompts.request", lambda *given: seen.append(given[1]) or request(*given))
    typed("generate", f"run={demo_run}", f"prompt={text}", "max_new_tokens=1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    typed("generate", f"run={demo_run}", "prompt=-", "max_new_tokens=1")
    assert seen == [{"prompt": text}] * 2


def test_the_answer_is_that_of_transformers(demo_run: Path, typed: Typed, loaded: LoadedModel) -> None:
    answer = typed("generate", f"run={demo_run}", f"prompt={PROMPT}", "max_new_tokens=12")
    assert answer == greedy(loaded, PROMPT, 12) + "\n" and answer.strip()
    fields = typed(
        "generate", f"run={demo_run}", f"fields.context={CONTEXT}", f"fields.question={QUESTION}", "max_new_tokens=12"
    )
    assert fields == answer
    model = typed("generate", f"run={demo_run}/model", f"prompt={PROMPT}", "max_new_tokens=12")
    assert model == answer


def test_gauntlet_09_11_a_prompt_has_the_tokens_it_was_trained_on(loaded: LoadedModel) -> None:
    fields = {"context": CONTEXT, "question": QUESTION, "answers": {"text": ["Ravi Merrow"]}}
    renderer = Renderer(loaded.tokenizer)
    (example,) = renderer.examples(renderer.render(Squad().to_text(fields)), ["here"])
    trained_on = example.tokens[: example.num_prompt].tolist()
    asked = request(loaded, {"context": CONTEXT, "question": QUESTION}, Squad())
    assert asked.tokens.tolist() == trained_on == loaded.encode(PROMPT).tolist()
    assert trained_on[0] == loaded.tokenizer.bos_token_id and trained_on.count(trained_on[0]) == 1
    assert loaded.encode(loaded.tokenizer.bos_token + PROMPT).tolist() == trained_on  # never two
    assert loaded.tokenizer.eos_token_id not in trained_on


def test_a_file_of_prompts_goes_on_where_it_was_left(
    demo_run: Path, typed: Typed, refused: Typed, tmp_path: Path
) -> None:
    rows = [
        {"prompt": PROMPT},
        {"context": CONTEXT, "question": "Who talks to the waves?"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "not shown"}]},
        {"prompt": ODD},
    ]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "answers.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    arguments = ["generate", f"run={demo_run}", f"prompts={prompts}", f"output={output}", "max_new_tokens=6"]
    assert "4 answers in" in typed(*arguments)
    whole = output.read_text()
    lines = read_jsonl(output)
    assert [line["index"] for line in lines] == [0, 1, 2, 3] and lines[3]["prompt"] == ODD
    assert lines[1]["prompt"] == f"Context: {CONTEXT} Question: Who talks to the waves? Answer:"
    assert "not shown" not in lines[2]["prompt"]

    marked = whole.splitlines()[2].replace('"answer": "', '"answer": "kept ')
    output.write_text(f"{marked}\n{whole.splitlines()[0]}\n" + whole.splitlines()[1][:20])  # torn by a kill
    assert "2 of them from an earlier run" in typed(*arguments)
    assert output.read_text() == whole.replace(whole.splitlines()[2], marked)

    for other in ("max_new_tokens=5", "temperature=0.5", f"run={demo_run}/model"):
        assert "name another file, or delete it" in refused(*arguments, other)
    prompts.write_text("\n".join(json.dumps(r) for r in rows[1:]))
    assert "name another file, or delete it" in refused(*arguments)


def test_a_text_file_is_a_prompt_a_line(demo_run: Path, typed: Typed, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text(f"{PROMPT}\n\nanother, with [brackets]\n")
    typed("generate", f"run={demo_run}", f"prompts={prompts}", f"output={output}", "max_new_tokens=4")
    assert [line["prompt"] for line in read_jsonl(output)] == [PROMPT, "another, with [brackets]"]


def test_a_chat_remembers_and_streams(listening_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LoadedModel.load(resolve(str(listening_run)), torch.device("cpu"))
    shown: list[str] = []
    asked: list[Any] = []
    monkeypatch.setattr(chat, "show", shown.append)
    encode = LoadedModel.encode_chat
    monkeypatch.setattr(
        LoadedModel, "encode_chat", lambda self, m: asked.append([dict(x) for x in m]) or encode(self, m)
    )
    how = DecodingSettings(max_new_tokens=12, temperature=9.0)
    chat.converse(model, ["one", "two", "/new", "three", "/exit", "four"], how, chat.opening("be brief"))
    roles = [[m["role"] for m in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    said = "".join(shown)
    assert said.startswith(asked[1][2]["content"].rstrip("\n")) and asked[1][2]["content"].strip()
    assert len(shown) > 6  # in pieces, as they are made


def test_the_demo_s_turns_end_at_their_mark(loaded: LoadedModel) -> None:
    assert loaded.turn_ends() - loaded.ends == {loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_one_turn_of_a_chat(demo_run: Path, typed: Typed, loaded: LoadedModel) -> None:
    answer = typed("generate", f"run={demo_run}", "chat=true", "prompt=Hello, [you]", "max_new_tokens=3")
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello, [you]"}], add_generation_prompt=True, tokenize=False
    )
    assert answer.strip() == greedy(loaded, prompt.removeprefix(loaded.tokenizer.bos_token), 3)


def test_bad_input(demo_run: Path, model_folder: Path, refused: Typed, tmp_path: Path) -> None:
    run = f"run={demo_run}"
    assert "context holds 4096" in refused("generate", run, f"prompt={'word ' * 5000}")
    assert "ask one thing" in refused("generate", run)
    assert "ask one thing" in refused("generate", run, "prompt=a", f"prompts={tmp_path}/none.txt")
    assert "needs output=FILE" in refused("generate", run, f"prompts={tmp_path}/none.txt")
    assert "no such file" in refused("generate", run, f"prompts={tmp_path}/none.txt", f"output={tmp_path}/o")
    assert "run= is missing" in refused("generate", "prompt=a")
    assert "did you mean temperature" in refused("generate", run, "prompt=a", "temprature=1")
    assert "no field 'question'" in refused("generate", run, "fields.context=a")
    assert "no chat template" in refused("generate", f"run={model_folder}", "chat=true", "prompt=a")
    assert "use prompt=" in refused("generate", f"run={model_folder}", "fields.context=a")
    assert "top_p=2" in refused("generate", run, "prompt=a", "top_p=2")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    files = (f"prompts={tmp_path}/bad.jsonl", f"output={tmp_path}/o.jsonl")
    assert "bad.jsonl:2: this line is not JSON" in refused("generate", run, *files)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "bad.jsonl:2: no field 'context'" in refused("generate", run, *files)
    assert not (tmp_path / "o.jsonl").exists()


def test_quoting_leaves_other_keys_to_hydra() -> None:
    assert quote("temperature=0.5", False) == "temperature=0.5"
    assert quote("fields.question=a, b", False) == "+fields.question='${given:fields.question}'"
    assert GIVEN["fields.question"] == "a, b"


def test_help_is_quick_and_shows_examples(tmp_path: Path) -> None:
    shown = command("generate", "--help", cwd=tmp_path, cold=True).stdout
    assert shown.count("  python -m sftlab.generate") == 4 and "hydra" not in shown.lower()


def sampled(run: Path, texts: list[str], **how: Any) -> list[str]:
    """What the library itself makes of these prompts with these settings."""
    model = LoadedModel.load(resolve(str(run)), torch.device("cpu"))
    found = dict(decode(model.scorer, [model.encode(t) for t in texts], DecodingSettings(**how), model.ends))
    return [model.decode_text(found[i]).strip() for i in range(len(texts))]


HOT = {"temperature": 9.0, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("key", "value"), [("max_new_tokens", 5), ("temperature", 6.0), ("top_k", 2), ("top_p", 0.25), ("seed", 11)]
)
def test_each_setting_of_sampling_reaches_the_answer(key: str, value: Any, listening_run: Path, typed: Typed) -> None:
    usual, changed = (sampled(listening_run, ["Who counts?"], **how)[0] for how in (HOT, HOT | {key: value}))
    assert usual != changed  # or the test would not see the setting
    given = [f"{k}={v}" for k, v in (HOT | {key: value}).items()]
    assert typed("generate", f"run={listening_run}", "prompt=Who counts?", *given) == plain(changed) + "\n"


def test_settings_that_are_not_given_are_those_of_decoding(listening_run: Path) -> None:
    command_s = yaml.safe_load((CONF / "generate.yaml").read_text())
    assert {key: command_s[key] for key in DECODING} == {key: getattr(DecodingSettings(), key) for key in DECODING}


def test_as_many_prompts_are_decoded_together_as_asked(
    listening_run: Path, typed: Typed, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo is longer\nthree is the longest of them\nfour\nfive\n")
    files = (f"prompts={tmp_path}/prompts.txt", f"output={tmp_path}/answers.jsonl", "max_new_tokens=2")
    typed("generate", f"run={listening_run}", *files, "batch_size=2")
    assert [rows for rows, columns in shapes if columns > 1] == [2, 2, 1]
    shapes.clear()
    (tmp_path / "answers.jsonl").unlink()
    typed("generate", f"run={listening_run}", *files)
    assert [rows for rows, columns in shapes if columns > 1] == [5]


def test_a_file_is_answered_with_every_setting_and_each_is_written_beside_the_answers(
    listening_run: Path, typed: Typed, tmp_path: Path
) -> None:
    how = {"max_new_tokens": 7, "temperature": 8.0, "top_k": 40, "top_p": 0.9, "seed": 3}
    (tmp_path / "prompts.txt").write_text("Who?\nWhat is it?\n")
    files = (f"prompts={tmp_path}/prompts.txt", f"output={tmp_path}/answers.jsonl")
    typed("generate", f"run={listening_run}", *files, *(f"{k}={v}" for k, v in how.items()))
    expected = sampled(listening_run, ["Who?", "What is it?"], **how)
    assert read_jsonl(tmp_path / "answers.jsonl") == [
        {"index": i, "prompt": prompt, "answer": answer, "run": str(listening_run), **how}
        for i, (prompt, answer) in enumerate(zip(("Who?", "What is it?"), expected, strict=True))
    ]


@pytest.mark.parametrize("other", ["top_k=3", "top_p=0.5", "seed=1", "max_new_tokens=3"])
def test_answers_made_with_other_settings_are_not_gone_on_with(
    other: str, listening_run: Path, typed: Typed, refused: Typed, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("Who?\n")
    files = (f"prompts={tmp_path}/prompts.txt", f"output={tmp_path}/answers.jsonl")
    arguments = ("generate", f"run={listening_run}", *files, "max_new_tokens=2")
    typed(*arguments)
    assert "1 of them from an earlier run" in typed(*arguments, "batch_size=7")
    assert "name another file" in refused(*arguments, other)


def test_a_system_message_is_heard(listening_run: Path, typed: Typed) -> None:
    def turn(*more: str) -> str:
        arguments = ("chat=true", "prompt=Who?", "max_new_tokens=6", "temperature=0.1")
        return typed("generate", f"run={listening_run}", *arguments, *more)

    model = LoadedModel.load(resolve(str(listening_run)), torch.device("cpu"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    how = DecodingSettings(max_new_tokens=6, temperature=0.1)
    ((_, tokens),) = decode(model.scorer, [model.encode_chat(messages)], how, model.turn_ends())
    usual, brief = turn(), turn("system=Be brief.")
    assert brief.split() == plain(model.decode_text(tokens)).split() and usual != brief


@pytest.fixture(scope="module")
def says_rye(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that says " rye", its turn's end, and then " bread" to who does not stop there."""
    folder = reciter(tmp_path_factory.mktemp("says_rye"), " rye<pad> bread", after=":")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_is_held_over_standard_input(
    says_rye: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line but an empty one is answered; a turn ends at its mark; what is too long is said, and left out."""
    lines = ["hello", "", "w" * 2100, "again", "/new", "bye", "/exit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    said = typed("generate", f"run={says_rye}", "chat=true", "max_new_tokens=20")
    first, too_long, second, third, *rest = said.split("\n")
    assert (first, second, third, rest) == (" rye", " rye", " rye", [""])
    assert "context holds 2048" in too_long and "/new starts another conversation" in too_long


def test_one_turn_ends_at_its_mark_and_a_prompt_s_answer_at_the_end_of_text(says_rye: Path, typed: Typed) -> None:
    assert typed("generate", f"run={says_rye}", "chat=true", "prompt=Hello") == " rye\n"
    assert typed("generate", f"run={says_rye}", "prompt=Answer:") == "rye bread\n"
    assert typed("generate", f"run={says_rye}", "chat=true", "prompt=Hello", "max_new_tokens=2") == " ry\n"


def test_a_turn_of_a_chat_may_come_from_standard_input(
    listening_run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", f"run={listening_run}", "chat=true", "max_new_tokens=4")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who counts?\n"))
    assert typed(*arguments, "prompt=-") == typed(*arguments, "prompt=Who counts?")


def test_what_cannot_be_asked_together_is_refused(
    listening_run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"run={listening_run}"
    assert "not chat=true" in refused("generate", run, "prompts=a.txt", "output=b.jsonl", "chat=true")
    assert "ask one thing" in refused("generate", run, "prompt=a", "fields.question=b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused("generate", run, "prompt=a")


def test_words_are_shown_once_each_as_they_become_whole(listening_run: Path) -> None:
    model = LoadedModel.load(resolve(str(listening_run)), torch.device("cpu"))
    shown: list[str] = []
    how = DecodingSettings(max_new_tokens=30, temperature=9.0, seed=2)
    answer = stream(model, [{"role": "user", "content": "Who?"}], how, shown.append)
    assert "".join(shown).strip() == answer.strip() and len(shown) > 5


def test_a_conversation_hears_its_own_earlier_turns(listening_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LoadedModel.load(resolve(str(listening_run)), torch.device("cpu"))
    how = DecodingSettings(max_new_tokens=5)
    shown: list[str] = []
    monkeypatch.setattr(chat, "show", shown.append)
    chat.converse(model, ["Who?", "Why?"], how, chat.opening(None))
    messages = [{"role": "user", "content": "Who?"}]
    messages.append({"role": "assistant", "content": stream(model, messages, how, lambda text: None)})
    messages.append({"role": "user", "content": "Why?"})
    second = stream(model, messages, how, lambda text: None)
    said = "".join(shown).split("\n")
    assert "".join(shown).endswith(f"{second}\n") and len(said) >= 3
    assert chat.opening(None) == chat.opening("") == []
