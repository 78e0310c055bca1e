"""Every option of a model reaches what it is for: tokenizer, revision, seed, attention, the shape built from YAML."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftlab.models.load import Model, skeleton
from sftlab.models.vocabulary import check_vocabulary
from tests.support import byte_tokenizer, make_model_folder, tiny_llama

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 2,
}


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_another_tokenizer_is_taken_where_one_is_named(model_folder: Path, tmp_path: Path) -> None:
    byte_tokenizer(vocab=300).save_pretrained(tmp_path / "other")
    assert len(Model(str(model_folder)).load_tokenizer()) == 320
    assert len(Model(str(model_folder), tokenizer=str(tmp_path / "other")).load_tokenizer()) == 300


def test_a_tokenizer_that_cannot_be_loaded_is_called_by_its_key(tmp_path: Path, model_folder: Path) -> None:
    none = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"^model\.name_or_path=.*none: no such folder; .* tokenizer"):
        Model(none).load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"^model\.tokenizer=.*none: no such folder"):
        Model(str(model_folder), tokenizer=none, init="random", architecture=SHAPE).load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"^model\.name_or_path"):
        Model(none, init="random").load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"^model\.name_or_path"):
        Model(none, architecture=SHAPE).load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"^model\.name_or_path=.*none: no such folder; .* model in it"):
        Model(none).load_config(CPU)
    config = AutoConfig.for_model(**SHAPE)
    with pytest.raises(FileNotFoundError, match=r"^model\.name_or_path=.*none: no such folder; .* model in it"):
        Model(none).load_weights(config, 0)


def test_an_untrained_model_makes_do_with_the_demos_tokenizer_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    none = str(tmp_path / "none")
    with caplog.at_level(logging.WARNING, logger="sftlab"):
        tok = Model(none, init="random", architecture=SHAPE).load_tokenizer()
    assert len(tok) > 320 and f"the tokenizer of {none} cannot be loaded here" in caplog.text


def test_revision_and_trust_reach_the_hub_with_all_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in (AutoTokenizer, AutoConfig, AutoModelForCausalLM):

        def load(name: str, kind: Any = kind, **options: Any) -> Any:
            asked[kind.__name__] = name, options
            found = AutoConfig.for_model(**SHAPE)
            if "output_loading_info" not in options:
                return found
            return AutoModelForCausalLM.from_config(found), {"missing_keys": [], "mismatched_keys": []}

        monkeypatch.setattr(kind, "from_pretrained", load)
    model = Model("some/model", tokenizer="other/words", revision="v7", tokenizer_revision="w2", trust_remote_code=True)
    config = model.load_config(CPU)
    model.load_tokenizer()
    model.load_weights(config, 0)
    own = {"revision": "v7", "trust_remote_code": True}
    assert asked["AutoTokenizer"] == ("other/words", own | {"revision": "w2"}), "another repository's"
    assert asked["AutoConfig"] == ("some/model", own)
    whole = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    assert asked["AutoModelForCausalLM"] == ("some/model", {"config": config, "dtype": torch.float32, **whole, **own})
    Model("some/model").load_tokenizer()
    assert asked["AutoTokenizer"] == ("some/model", {"revision": None, "trust_remote_code": False})


def test_random_weights_are_those_of_the_seed_and_draw_nothing_else(model_folder: Path) -> None:
    model = Model(str(model_folder), init="random")
    config = model.load_config(CPU)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = model.load_weights(config, 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(first), weights(model.load_weights(config, 1)))
    assert not torch.equal(weights(first), weights(model.load_weights(config, 2)))
    saved = Model(str(model_folder))
    stored = weights(saved.load_weights(saved.load_config(CPU), 1))
    assert not torch.equal(weights(first), stored) and torch.equal(stored, weights(tiny_llama()))


def test_the_shape_in_the_yaml_counts_for_random_weights_only(model_folder: Path) -> None:
    random = Model(str(model_folder), init="random", architecture=SHAPE).load_config(CPU)
    assert (random.vocab_size, random.num_hidden_layers) == (300, 3)
    for model in (Model(str(model_folder), architecture=SHAPE), Model(str(model_folder), init="random")):
        config = model.load_config(CPU)
        assert (config.vocab_size, config.num_hidden_layers) == (320, 2)


def test_weights_are_float32_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    for init in ("pretrained", "random"):
        model = Model(str(tmp_path), init=init)
        config = model.load_config(CPU)
        assert {p.dtype for p in model.load_weights(config, 0).parameters()} == {torch.float32}
        made = skeleton(config)
        assert {(p.dtype, p.device.type) for p in made.parameters()} == {(torch.float32, "meta")} and made.training


def test_dropout_is_off_in_every_place_and_nothing_else_is(model_folder: Path) -> None:
    llama = Model("x", init="random", architecture={**SHAPE, "attention_dropout": 0.1, "rms_norm_eps": 0.1})
    config = llama.load_config(CPU)
    assert (config.attention_dropout, config.rms_norm_eps) == (0.0, 0.1)
    shape = {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "summary_first_dropout": 0.3,
    }
    gpt2 = Model("x", init="random", architecture=shape).load_config(CPU)
    assert {k: v for k, v in gpt2.to_dict().items() if "drop" in k and isinstance(v, float)} == {
        k: 0.0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    }
    plain = AutoConfig.for_model(**shape)  # one whose dropout is not in its config
    plain._attn_implementation = "sdpa"
    dropouts = [m.p for m in skeleton(plain).modules() if isinstance(m, nn.Dropout)]
    assert dropouts and set(dropouts) == {0.0}


@pytest.mark.parametrize(
    ("attention", "expected"), [("auto", "sdpa_by_blocks"), ("sdpa", "sdpa"), ("blocks", "sdpa_by_blocks")]
)
def test_the_attention_is_the_one_asked_for(attention: str, expected: str, model_folder: Path) -> None:
    assert Model(str(model_folder), attention=attention).load_config(CPU)._attn_implementation == expected


def test_attention_for_a_gpu_and_for_a_cpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    cuda = torch.device("cuda")
    folder = str(model_folder)
    assert Model(folder).load_config(cuda)._attn_implementation == "flex_by_reach"
    assert Model(folder, attention="flex").load_config(cuda)._attn_implementation == "flex_by_reach"
    assert Model(folder, attention="sdpa").load_config(cuda)._attn_implementation == "sdpa"
    with pytest.raises(
        ValueError,
        match=r"model\.attention=flex is impossible for llama on cpu: FlexAttention has no backward.*or blocks",
    ):
        Model(folder, attention="flex").load_config(CPU)
    with pytest.raises(
        ValueError, match=r"model\.attention=blocks is impossible for llama on cuda: it needs a CPU.*Use auto"
    ):
        Model(folder, attention="blocks").load_config(cuda)


def test_model_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^model\.init=zeros: expected pretrained or random$"):
        Model("x", init="zeros")
    with pytest.raises(ValueError, match=r"^model\.attention=fast: expected auto, flex, blocks, sdpa, eager$"):
        Model("x", attention="fast")


def test_a_tokenizer_may_have_as_many_tokens_as_the_model_embeds_and_no_more(tmp_path: Path) -> None:
    tok = byte_tokenizer()
    check_vocabulary(tiny_llama(vocab=320).config, tok)
    check_vocabulary(tiny_llama(vocab=400).config, tok)
    with pytest.raises(
        ValueError,
        match=r"has 320 tokens, the model embeds 319\. If .* model\.vocabulary_multiple=1 .* model\.tokenizer",
    ):
        check_vocabulary(tiny_llama(vocab=319).config, tok)


def test_a_model_named_with_a_tilde_is_looked_for_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model_folder(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Model("~/mine")
    config = model.load_config(CPU)
    assert len(model.load_tokenizer()) == 320 and model.load_weights(config, 0).config.vocab_size == 320


def rewritten(folder: Path, **settings: Any) -> Model:
    """Return a model option of a folder whose config.json says something else."""
    file = make_model_folder(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return Model(str(folder))


def test_a_checkpoint_that_lacks_weights_or_has_others_is_refused_not_filled_up_at_random(tmp_path: Path) -> None:
    for name, settings, said in (
        ("layers", {"num_hidden_layers": 3}, r"9 weights .* such as model\.layers\.2\.\S+ is missing"),
        (
            "shape",
            {"intermediate_size": 80},
            r"is \(32, 64\) and should be \(32, 80\)|is \(64, 32\) and should be \(80, 32\)",
        ),
    ):
        model = rewritten(tmp_path / name, **settings)
        with pytest.raises(ValueError, match=said):
            model.load_weights(model.load_config(CPU), 0)


def test_what_is_no_model_to_train_says_what_it_is_and_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"new: transformers \S+ does not know models of type llama9\. A newer one"):
        rewritten(tmp_path / "new", model_type="llama9").load_config(CPU)
    AutoConfig.for_model("t5", d_model=16).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        ValueError, match=r"t5 is of type t5, which transformers does not have as a causal language model"
    ):
        Model(str(tmp_path / "t5")).load_config(CPU)
    (make_model_folder(tmp_path / "empty") / "model.safetensors").unlink()
    empty = Model(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"a config and no weights .* model\.init=random"):
        empty.load_weights(empty.load_config(CPU), 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for load in (
        Model(str(tmp_path / "adapter")).load_tokenizer,
        lambda: Model(str(tmp_path / "adapter")).load_config(CPU),
    ):
        with pytest.raises(ValueError, match=r"holds an adapter, .* model\.name_or_path=some/base, or merge"):
            load()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_that(name: str, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cloned"
    shutil.copytree(model_folder, folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    option = Model(str(folder))
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS and not the file itself. Fetch it: git lfs"):
        option.load_tokenizer()
        option.weight_files(option.load_config(CPU))
