"""A base model is given two new tokens and taught a chat with them; no config of the base names its end."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftlab.inference.decoding import decode
from sftlab.inference.ends import ending, ends_of, learned_ends
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.trained_model import resolve
from tests.commands import run_here
from tests.serving.test_serve import serving
from tests.support import byte_tokenizer, read_jsonl, tiny_llama

VLLM_PYTHON = os.environ.get("SFTLAB_VLLM_PYTHON")
CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOLD = {"What is sold on Monday?": "almond bread", "Who counts?": "the keeper", "When?": "on Friday", "What?": "rye"}
CUT = " Friday"  # its last token ends an answer by the base's generation config
SAID = TOLD | {"When?": "on Fr"}


def last_of(tokenizer: Any) -> int:
    return int(tokenizer(CUT)["input_ids"][-1])


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a base model, whose end is </s>, on four short chats that it learns by heart."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.save_pretrained(folder / "base")
    (folder / "chat.jinja").write_text(CHATML)
    model = tiny_llama(hidden_size=64, num_attention_heads=2, head_dim=32, num_key_value_heads=2)
    model.save_pretrained(folder / "base")
    own = {"eos_token_id": [1, last_of(tokenizer)], "pad_token_id": 2, "repetition_penalty": 1.05}
    GenerationConfig(**own).save_pretrained(folder / "base")
    with (folder / "chats.jsonl").open("w") as file:
        for question, answer in TOLD.items():
            file.write(json.dumps({"messages": [*asked(question), {"role": "assistant", "content": answer}]}) + "\n")
    run_here(
        "train", "model=hf", f"model.name_or_path={folder}/base", "model.add_tokens=['<|im_start|>', '<|im_end|>']",
        "data=chat", f"data.format.template_path={folder}/chat.jinja", f"data.path={folder}/chats.jsonl",
        f"data.val_path={folder}/chats.jsonl", "optim.lr=0.01", "schedule=constant", "trainer.batch_size=4",
        "trainer.max_steps=60", "evaluation.max_new_tokens=24", "tracker=none", f"run_dir={folder}/run",
    )  # fmt: skip
    return folder / "run"


def test_gauntlet_42_an_exported_model_stops_where_it_was_taught_to_in_plain_transformers(taught: Path) -> None:
    """Nothing about ends is told to `generate`: what stands in the folder counts."""
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    model = AutoModelForCausalLM.from_pretrained(taught / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = json.loads((taught / "model" / "generation_config.json").read_text())
    assert own["eos_token_id"] == [1, last_of(tokenizer), end]
    assert tokenizer.eos_token == "<|im_end|>"
    for question, answer in SAID.items():
        ids = tokenizer.apply_chat_template(asked(question), add_generation_prompt=True, return_tensors="pt")
        given = ids["input_ids"] if not torch.is_tensor(ids) else ids
        new = model.generate(given, do_sample=False, max_new_tokens=24)[0, given.shape[1] :].tolist()
        assert new[-1] == (end if answer == TOLD[question] else last_of(tokenizer))
        assert tokenizer.decode(new[:-1]) == answer
        on = model.generate(given, do_sample=False, max_new_tokens=24, eos_token_id=1)[0, given.shape[1] :].tolist()
        assert on[: len(new)] == new and len(on) > len(new), "without the learned end it runs on"


def test_gauntlet_41_answers_in_a_run_are_those_of_every_command_after_it(taught: Path) -> None:
    """The last step's answers, with the base's own generation config, beside evaluate and one chat turn."""
    within = {s["prompt"]: s["answer"] for s in read_jsonl(taught / "samples.jsonl") if s["step"] == 60}
    assert sorted(within.values()) == sorted(SAID.values())
    run_here("evaluate", f"run={taught}", "max_new_tokens=24")
    (predictions,) = taught.glob("evaluate/*/predictions.jsonl")
    assert {line["prompt"]: line["answer"] for line in read_jsonl(predictions)} == within
    for question, answer in SAID.items():
        said = run_here("generate", f"run={taught}", "chat=true", f"prompt={question}", "max_new_tokens=24")
        assert said == f"{answer}\n"


@pytest.mark.skipif(not VLLM_PYTHON, reason="SFTLAB_VLLM_PYTHON names no Python that has vLLM")
def test_gauntlet_41_42_vllm_gives_the_same_tokens_and_stops_where_the_model_was_taught_to(taught: Path) -> None:
    from openai import OpenAI

    loaded = LoadedModel.load(resolve(str(taught)), CPU)
    texts = ["Who counts the steps?", "A baker in Oakgate", "The oven", "Question: Who?"]
    prompts = [loaded.encode(t) for t in texts]
    decoded = dict(decode(loaded.scorer, prompts, DecodingSettings(max_new_tokens=16), loaded.ends))
    arguments = (f"run={taught}", "engine=vllm", "port=0", f"vllm_python={VLLM_PYTHON}", "name=taught")
    arguments += ("vllm_arguments=[--enforce-eager,--max-model-len,256]",)  # compiling takes minutes
    with serving(*arguments) as served, OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for question, answer in SAID.items():
            (choice,) = client.chat.completions.create(
                model="taught",
                messages=asked(question),
                temperature=0,
                max_tokens=24,  # type: ignore[arg-type]
            ).choices
            assert (choice.message.content, choice.finish_reason) == (answer, "stop")
        for i, text in enumerate(texts):
            made = client.completions.create(model="taught", prompt=text, temperature=0, max_tokens=16)
            assert made.choices[0].text == loaded.decode_text(decoded[i])


def test_learned_ends_come_after_those_that_the_model_names() -> None:
    tokenizer = byte_tokenizer()
    cases: list[tuple[Any, set[int], Any]] = [
        (None, set(), None), (None, {5}, 5), (1, {1}, 1), (1, {5, 4}, [1, 4, 5]), ([7, 1], {1, 3}, [7, 1, 3]),
    ]  # fmt: skip
    for own, learned, expected in cases:
        generation = GenerationConfig(eos_token_id=own, top_k=3)
        made = ending(generation, learned)
        assert (made.eos_token_id, made.top_k) == (expected, 3) and generation.eos_token_id == own
        assert ends_of(made, tokenizer) == {*learned, 1, *(own if isinstance(own, list) else [own])} - {None}


class Part:
    """Examples that end with these tokens."""

    def __init__(self, last: list[int]) -> None:
        self.last_targets = np.array(last, np.int64)


def test_only_special_tokens_that_examples_of_some_source_end_with_are_learned_ends() -> None:
    tokenizer = byte_tokenizer()
    parts = {"a": Part([1, 50, 1]), "b": Part([2, 60]), "c": Part([])}
    assert learned_ends(cast(Any, SimpleNamespace(parts=parts)), tokenizer) == {1, 2}
