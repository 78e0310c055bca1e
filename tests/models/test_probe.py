"""The start-up probe: models that would be wrong in silence are refused, with what to type."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from tests.support import tiny_llama

CPU = torch.device("cpu")
LAYOUTS = ("tree", "packed")
SIZE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {**SIZE, **HEADS, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "mamba": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
ORDINARY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1},
    "mistral": {**SIZE, **HEADS, "sliding_window": 4},
    "gemma3_text": {
        **SIZE,
        **HEADS,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {**SIZE, **HEADS, "logits_scaling": 8.0},
    # A cap that bends the logits of untrained weights; Gemma 2's own, 30, would be seen by trained ones only.
    "gemma2": {
        **SIZE,
        **HEADS,
        "head_dim": 16,
        "sliding_window": 4,
        "final_logit_softcapping": 0.1,
        "attn_logit_softcapping": None,
    },
    "cohere": {**SIZE, **HEADS, "logit_scale": 0.1, "bos_token_id": 0, "eos_token_id": 1},
    "qwen3_moe": {
        **SIZE,
        **HEADS,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def scorer_of(kind: str, settings: dict[str, Any], attention: str = "sdpa") -> Scorer:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, pad_token_id=2)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind != "mamba":
        model.config._attn_implementation = attention  # set here, because Gemma 2 cannot be made with SDPA
    return Scorer(model.train())


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_models_pass_in_every_layout(kind: str) -> None:
    scorer = scorer_of(kind, ORDINARY[kind])
    for layout in (*LAYOUTS, "padded"):
        probe(scorer, layout, CPU)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.filterwarnings("ignore")
def test_recurrent_models_are_refused_but_for_padded_rows(kind: str) -> None:
    scorer = scorer_of(kind, RECURRENT[kind])
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=rf"data\.layout={layout} would mix .* Use data\.layout=padded"):
            probe(scorer, layout, CPU)
    probe(scorer, "padded", CPU)


class Leak(nn.Module):
    """A convolution over the row, as an undeclared recurrent layer would have: tokens get something of the last."""

    def __init__(self, block: nn.Module, share: float) -> None:
        super().__init__()
        self.block, self.share = block, share

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shifted = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        return self.block(hidden + self.share * shifted, *args, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_leak_that_nothing_declares_is_found_by_its_numbers(layout: str) -> None:
    model = tiny_llama()
    model.config._attn_implementation = "sdpa"
    model.model.layers[0] = Leak(model.model.layers[0], 4e-3)
    with pytest.raises(ValueError, match=r"leaks between examples of a row: .* use data\.layout=padded"):
        probe(Scorer(model), layout, CPU)
    probe(Scorer(model), "padded", CPU)


def test_positions_that_do_not_restart_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.model.rotary_emb.forward

    def by_index(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(x, torch.arange(x.shape[1])[None] ** 2)  # relative distances depend on the place in the row

    monkeypatch.setattr(model.model.rotary_emb, "forward", by_index)
    with pytest.raises(ValueError, match=r"differently when another precedes it .* use data\.layout=padded"):
        probe(Scorer(model), "packed", CPU)


@pytest.mark.parametrize(("kind", "unread"), [("granite", {"scale": 1.0}), ("gemma2", {"cap": None})])
def test_logits_that_are_not_the_models_own_are_found(kind: str, unread: dict[str, Any]) -> None:
    scorer = scorer_of(kind, ORDINARY[kind])
    vars(scorer.loss).update(unread)
    for layout in (*LAYOUTS, "padded"):
        with pytest.raises(ValueError, match="changes its logits in a way that the scorer does not know"):
            probe(scorer, layout, CPU)


def test_it_costs_five_forwards_of_at_most_48_tokens_and_compiles_nothing() -> None:
    scorer = Scorer(tiny_llama())
    scorer.model.config._attn_implementation = "sdpa"
    seen: list[int] = []
    scorer.model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    scorer.model.model.layers[0].compile(backend=lambda graph, given: pytest.fail("this takes minutes on a GPU"))
    probe(scorer, "tree", CPU)
    assert seen == [48] * 3 + [32] * 2
    probe(scorer, "padded", CPU)
    assert seen[5:] == [48] * 3 + [32] * 2
    assert all(p.grad is None for p in scorer.parameters())


CAPPED = {**ORDINARY["gemma3_text"], "final_logit_softcapping": 0.05}  # low enough to bend an untrained model's logits


@pytest.mark.parametrize(("kind", "attention"), [("gemma3_text", "sdpa"), ("gemma2", "flex_by_reach")])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile", "ignore::DeprecationWarning")
def test_a_model_that_caps_its_logits_passes(kind: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftlab.models.flex.kernel", lambda: flex_attention)  # nothing is compiled on a CPU
    scorer = scorer_of(kind, CAPPED, attention)
    assert scorer.loss.cap == 0.05
    for layout in (*LAYOUTS, "padded"):
        probe(scorer, layout, CPU)


def test_a_cap_on_the_logits_that_the_scorer_does_not_know_is_found() -> None:
    scorer = scorer_of("gemma3_text", CAPPED)
    scorer.loss.cap = None
    with pytest.raises(ValueError, match="changes its logits in a way that the scorer does not know"):
        probe(scorer, "padded", CPU)


def test_a_leak_as_small_as_a_few_hundred_thousandths_is_found_and_rounding_is_not() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "sdpa"
    model.model.layers[0] = Leak(model.model.layers[0], 3e-5)
    with pytest.raises(ValueError, match=r"leaks between examples of a row: .* by [1-9]\.[0-9]e-05"):
        probe(Scorer(model), "packed", CPU)


def test_half_precision_may_be_as_far_off_as_its_rounding() -> None:
    half, whole = Scorer(tiny_llama().bfloat16()), Scorer(tiny_llama())
    half.loss.scale = whole.loss.scale = 1.01
    probe(half, "padded", CPU)
    with pytest.raises(ValueError, match="changes its logits in a way that the scorer does not know"):
        probe(whole, "padded", CPU)


def test_routed_experts_may_round_by_what_else_is_in_a_row() -> None:
    scorer = scorer_of("qwen3_moe", ORDINARY["qwen3_moe"])
    scorer.model.model.layers[0] = Leak(scorer.model.model.layers[0], 3e-5)
    probe(scorer, "packed", CPU)
    scorer.model.model.layers[0].share = 4e-3
    with pytest.raises(ValueError, match="leaks between examples of a row"):
        probe(scorer, "packed", CPU)


def test_a_model_that_cannot_take_rows_of_several_examples_is_told_so() -> None:
    scorer = Scorer(tiny_llama())

    def refuse(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] == 1:
            raise TypeError("one row at a time is not for me")

    scorer.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    said = r"does not take rows of several examples \(TypeError: one row .*\)\. .* use data\.layout=padded"
    with pytest.raises(ValueError, match=said):
        probe(scorer, "tree", CPU)
    assert scorer.apart is None
    probe(scorer, "padded", CPU)
    assert scorer.apart and scorer.apart.startswith("does not take rows of several examples"), (
        "so answers have their own"
    )


def test_it_costs_a_few_forwards_of_48_tokens_and_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    scorer, asked = Scorer(model), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    hook = lambda m, args, kwargs: asked.append(kwargs["input_ids"].numel())  # noqa: E731
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    probe(scorer, "tree", CPU)
    assert asked == [48] * 3 + [32] * 2
    asked.clear()
    probe(scorer, "padded", CPU)
    assert asked == [48] * 3 + [32] * 2
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_vocabulary_of_a_few_tokens_is_probed_within_it() -> None:
    probe(Scorer(tiny_llama(vocab=7)), "tree", CPU)


def test_a_run_of_a_recurrent_model_is_refused_before_it_trains(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command, from the config to the error; with padded rows the same model trains."""
    import sys

    from sftlab import train
    from tests.support import byte_tokenizer, make_squad_file, read_jsonl

    byte_tokenizer().save_pretrained(tmp_path / "model")
    scorer_of("lfm2", {**RECURRENT["lfm2"], "bos_token_id": 0, "eos_token_id": 1}).model.save_pretrained(
        tmp_path / "model"
    )
    data = make_squad_file(tmp_path / "train.jsonl", 4)
    typed = [
        "model=hf", f"model.name_or_path={tmp_path}/model", "data=squad", f"data.path={data}", "trainer.max_steps=2",
        "trainer.batch_size=4", "tracker=none", "optim.lr=0.01",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sftlab-train", *typed, "run_dir=tree"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1
    monkeypatch.setattr(sys, "argv", ["sftlab-train", *typed, "run_dir=padded", "data.layout=padded"])
    train.main()
    losses = [line["train/loss"] for line in read_jsonl(tmp_path / "padded" / "metrics.jsonl")]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_weights_that_are_no_numbers_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"its weights hold values that are no numbers, first in model\.norm\.weight"):
        probe(Scorer(model), "tree", CPU)
