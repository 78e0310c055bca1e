"""A model that is loaded to answer: the tokens that end it, its dtype, and texts and chats as tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import TrainedModel
from tests.support import byte_tokenizer

CPU = torch.device("cpu")
MARKED = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}assistant:{% endif %}"
UNMARKED = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ASKING
MARKED_LATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n<pad>{% endfor %}" + ASKING


def loaded(folder: Path, tokenizer: Any = None) -> LoadedModel:
    return LoadedModel.load(TrainedModel(str(folder), str(folder)), CPU, tokenizer)


def with_template(model_folder: Path, template: str | None) -> LoadedModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return loaded(model_folder, tokenizer)


@pytest.mark.parametrize(("eos", "expected"), [([7, 9], {1, 7, 9}), (5, {1, 5}), (None, {1})])
def test_every_end_that_the_model_or_its_tokenizer_names_ends_a_text(
    eos: Any, expected: set[int], model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    config = json.loads((model_folder / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert loaded(tmp_path / "model").ends == expected


def test_a_model_is_loaded_for_inference_in_the_dtype_of_its_device(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    model = TrainedModel("", str(model_folder)).load_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    found = loaded(tmp_path / "model").scorer
    assert found.model.dtype == torch.float32  # a CPU computes in it, whatever the file holds
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert TrainedModel("", str(tmp_path / "model")).load_model().dtype == torch.bfloat16


def test_a_tokenizer_that_the_model_does_not_embed_is_refused(model_folder: Path) -> None:
    larger = byte_tokenizer()
    larger.add_tokens(["<one>", "<two>"])
    with pytest.raises(ValueError, match="has 322 tokens, the model embeds 320"):
        loaded(model_folder, larger)


def test_a_tokenizer_that_is_given_replaces_the_model_s_own(model_folder: Path) -> None:
    given = byte_tokenizer()
    assert loaded(model_folder, given).tokenizer is given
    assert loaded(model_folder).tokenizer is not given


def test_no_end_of_text_is_left_behind_a_prompt_but_one_that_was_typed(model_folder: Path) -> None:
    from tokenizers import processors

    plain = loaded(model_folder)
    assert plain.encode("who</s>").tolist() == [*plain.encode("who").tolist(), 1]
    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = loaded(model_folder, ending)
    assert found.encode("who").tolist() == plain.encode("who").tolist()
    assert found.encode("").tolist() == plain.encode("").tolist() == [0]
    assert loaded(model_folder, byte_tokenizer(bos=False)).encode("oo").tolist() == plain.encode("oo").tolist()[1:]


def test_a_chat_s_tokens_are_the_template_s_up_to_the_assistant_s_words(model_folder: Path) -> None:
    found = with_template(model_folder, MARKED + ASKING)
    asked = found.encode_chat([{"role": "user", "content": "Who counts?"}])
    expected = found.tokenizer("<s>user: Who counts?<pad>\nassistant:", add_special_tokens=False)["input_ids"]
    assert asked.tolist() == expected and expected.count(0) == 1 and asked.dtype == "int32"


@pytest.mark.parametrize(
    ("template", "more"),
    [(MARKED + ASKING, {2}), (UNMARKED, set()), (MARKED_LATE, set())],
    ids=["mark", "none", "late"],
)
def test_what_ends_a_turn_is_the_special_token_right_behind_it(
    template: str, more: set[int], model_folder: Path
) -> None:
    found = with_template(model_folder, template)
    assert found.ends == {1} and found.turn_ends() == {1} | more


def test_special_tokens_are_not_shown(model_folder: Path) -> None:
    found = loaded(model_folder)
    tokens = found.tokenizer("<s>the keeper<pad> counts</s>", add_special_tokens=False)["input_ids"]
    assert found.decode_text(tokens) == "the keeper counts"
