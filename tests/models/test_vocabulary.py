"""Added tokens get rows in embedding and head: the same however the weights come in and over however many ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab.checkpoints import pretrained
from sftlab.checkpoints.pretrained import WRAPPER
from sftlab.models.load import Model
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World
from tests.checkpoints.test_pretrained import SIZE, filled, saved
from tests.support import byte_tokenizer, make_model_folder, run_distributed

KINDS = ("llama", "llama tied", "phi", "gpt2", "mixtral")  # phi's head has a bias; mixtral's files are loaded whole
TOKENS = ["<|im_start|>", "<|im_end|>"]
ADDED: dict[str, Any] = {"add_tokens": TOKENS, "add_words": ["Oakgate bread"], "vocabulary_multiple": 16}
HELD, KNOWN, SIZE_NOW = (
    SIZE["vocab_size"],
    320,
    336,
)  # 321 rows in the files, of which a tokenizer of 320 uses all but 1


def whole(scorer: Scorer) -> dict[str, Tensor]:
    """Return every tensor of a model, gathered. Collective."""
    found = {}
    for name, value in scorer.model.named_parameters(remove_duplicate=False):
        found[name.replace(WRAPPER, "")] = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
    return found


def folder_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    saved(kind, folder, dtype)
    byte_tokenizer().save_pretrained(folder)
    return folder


def expected(folder: Path, pieces: bool) -> dict[str, Tensor]:
    """Return what plain transformers loads, with the new rows worked out one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    old = byte_tokenizer()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(p) for part in (embedding, head) for p in part.parameters()}
    found = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        value = value.detach()
        if id(model.get_parameter(name)) in own:
            mean = value[:KNOWN].double().mean(0)
            value = torch.cat([value, mean.float().expand(SIZE_NOW - HELD, *value.shape[1:])])
            for number, token in enumerate([*TOKENS, "Oakgate bread"], KNOWN):
                rows = value[old(token, add_special_tokens=False)["input_ids"]].double()
                value[number] = rows.mean(0) if pieces else mean
        found[name] = value
    return found


def wrong(found: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ by more than the last bit of a mean."""
    assert found.keys() == right.keys()
    return [n for n, v in right.items() if v.shape != found[n].shape or (v - found[n]).abs().max() > 1e-8]


@pytest.mark.parametrize("start", ["mean", "pieces"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_begin_as_asked_and_all_others_stay(kind: str, start: str, one: World, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    scorer, _ = filled(one, Model(str(folder), new_rows_from=start, **ADDED))
    assert scorer.model.config.vocab_size == SIZE_NOW
    assert wrong(whole(scorer), expected(folder, start == "pieces")) == []
    tied = scorer.model.get_output_embeddings().weight is scorer.model.get_input_embeddings().weight
    assert tied == bool(scorer.model.config.tie_word_embeddings)


def on_a_rank(world: World, folders: list[str], start: str) -> list[dict[str, Tensor]]:
    return [whole(filled(world, Model(f, new_rows_from=start, **ADDED))[0]) for f in folders]


@pytest.mark.parametrize("start", ["mean", "pieces"])
def test_the_same_rows_to_the_bit_on_any_number_of_ranks(start: str, one: World, tmp_path: Path) -> None:
    folders = [str(folder_of(kind, tmp_path / kind, torch.bfloat16)) for kind in KINDS]
    alone = on_a_rank(one, folders, start)
    for ranks in (2, 3):
        for found in run_distributed(on_a_rank, ranks, folders, start):
            for ours, theirs in zip(alone, found, strict=True):
                assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_files_are_still_read_by_parts(one: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "broadcast_weights", lambda *given: pytest.fail("the model is loaded whole"))
    for kind in ("llama tied", "phi"):
        filled(one, Model(str(folder_of(kind, tmp_path / kind)), **ADDED))


def test_a_row_that_no_token_had_is_begun_anew_and_one_that_a_token_has_is_not(one: World, tmp_path: Path) -> None:
    """Models are padded to a multiple, so a new token may find a row. A second run on the result changes nothing."""
    make_model_folder(tmp_path / "padded", vocab=384)
    scorer, _ = filled(one, Model(str(tmp_path / "padded"), add_tokens=TOKENS))
    found = scorer.model.get_input_embeddings().weight.full_tensor().detach()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").get_input_embeddings().weight.detach()
    assert found.shape == before.shape and torch.equal(found[:320], before[:320])
    assert torch.equal(found[322:], before[322:])
    assert torch.equal(found[320], before[:320].double().mean(0).float()) and torch.equal(found[320], found[321])

    scorer.model.save_pretrained(tmp_path / "trained", state_dict=whole(scorer))
    Model(str(tmp_path / "padded"), add_tokens=TOKENS).load_tokenizer().save_pretrained(tmp_path / "trained")
    again, _ = filled(one, Model(str(tmp_path / "trained"), add_tokens=TOKENS, new_rows_from="pieces"))
    assert torch.equal(again.model.get_input_embeddings().weight.full_tensor(), found)


def test_a_tokenizer_that_is_larger_than_the_model(one: World, tmp_path: Path) -> None:
    make_model_folder(tmp_path, vocab=300)
    model = Model(str(tmp_path), vocabulary_multiple=1)
    scorer, _ = filled(one, model)
    assert scorer.model.get_input_embeddings().weight.shape[0] == len(model.load_tokenizer()) == 320


def test_special_tokens_and_words(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path))
    added = Model(folder, add_tokens=["<|im_start|>", "<|im_end|>"], add_words=["Oakgate bread"])
    tokenizer = added.load_tokenizer()
    ids = tokenizer("<|im_start|>an Oakgate bread<|im_end|>", add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-2], ids[-1]) == (320, 322, 321)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "an Oakgate bread"
    tokenizer.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("an<|im_end|>").input_ids[-1] == 321


def test_an_untrained_model_has_the_rows_too(one: World, tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    scorer, _ = filled(one, Model(str(tmp_path), init="random", **ADDED))
    assert len(scorer.model.get_input_embeddings().weight) == SIZE_NOW


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"add_tokens": ["<a>", "<a>"]}, "model.add_tokens, model.add_words: '<a>' is blank, or there twice"),
        ({"add_words": ["<a>", "<a>"]}, "model.add_tokens, model.add_words: '<a>' is blank, or there twice"),
        ({"add_words": [" "]}, "model.add_tokens, model.add_words: ' ' is blank, or there twice"),
        ({"new_rows_from": "zero"}, "model.new_rows_from=zero: expected mean or pieces"),
        ({"vocabulary_multiple": 0}, "model.vocabulary_multiple=0: expected at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_added(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Model("x", **given)
