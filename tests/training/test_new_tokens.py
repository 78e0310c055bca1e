"""A base model is taught a chat template with two tokens that it never had; it is exported with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import run_here
from tests.runs import measured
from tests.support import command, make_model_folder

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ANSWER = "Rye bread."


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and what is typed to train in it."""
    folder = tmp_path_factory.mktemp("chat")
    make_model_folder(folder / "base", tied=False)
    (folder / "chatml.jinja").write_text(TEMPLATE)
    with (folder / "chat.jsonl").open("w") as file:
        for day in ("Monday", "Friday", "the oven", "Oakgate"):
            said = [("user", f"What is sold on {day}?"), ("assistant", ANSWER)]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")
    return folder, [
        "model=hf",
        f"model.name_or_path={folder}/base",
        "model.add_tokens=['<|im_start|>','<|im_end|>']",
        "model.new_rows_from=pieces",
        "model.vocabulary_multiple=64",
        "data=chat",
        f"data.path={folder}/chat.jsonl",
        f"data.format.template_path={folder}/chatml.jinja",
        "data.val_examples=1",
        "optim.lr=0.01",
        "trainer.batch_size=4",
        "trainer.max_steps=40",
        "trainer.save_every=20",
        "tracker=none",
    ]


@pytest.fixture(scope="module")
def run(typed: tuple[Path, list[str]]) -> Path:
    folder, arguments = typed
    run_here("train", *arguments, f"run_dir={folder}/run", "evaluation.max_new_tokens=24")
    return folder / "run"


def question(tokenizer: Any) -> Any:
    said = [{"role": "user", "content": "What is sold on Friday?"}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def test_what_is_exported_knows_the_tokens(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (len(tokenizer), model.config.vocab_size, tokenizer.eos_token) == (322, 384, "<|im_end|>")
    asked = question(tokenizer)
    assert {320, 321} <= set(asked["input_ids"][0].tolist())
    out = model.generate(**asked, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    out = out[0, asked["input_ids"].shape[1] :]
    assert out[-1] == 321 and tokenizer.decode(out, skip_special_tokens=True) == ANSWER


def test_the_base_beside_it_has_the_rows_that_training_began_with(run: Path, tmp_path: Path) -> None:
    run_here("evaluate", f"run={run}", "baseline=true", "answers=false", f"output_dir={tmp_path}")
    report = json.loads((tmp_path / "scores.json").read_text())
    values = measured(run, "val/loss")
    assert report["baseline"]["loss"] == pytest.approx(values[0, "val/loss"], rel=1e-5)
    assert report["scores"]["loss"] == pytest.approx(values[40, "val/loss"], rel=1e-5)


def test_a_run_resumed_on_two_ranks_ends_where_a_straight_one_does(typed: tuple[Path, list[str]], run: Path) -> None:
    folder, arguments = typed
    given = (*arguments, f"run_dir={folder}/two", f"resume={run}/checkpoints/step_00000020", "evaluation.num_answers=0")
    done = command("train", *given, ranks=2)
    assert done.returncode == 0, done.stderr
    straight, resumed = (load_file(r / "model" / "model.safetensors") for r in (run, folder / "two"))
    assert straight.keys() == resumed.keys() and len(straight["lm_head.weight"]) == 384
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5, msg=name)
    losses = measured(folder / "two", "train/loss")
    assert min(step for step, _ in losses) == 21
    assert losses[21, "train/loss"] == pytest.approx(measured(run)[21, "train/loss"], rel=1e-5)
