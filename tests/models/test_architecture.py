"""One model of each kind: the attention it gets, the rows it takes, its loss beside its own, and the true refusal."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sftlab.data.batch import collate
from sftlab.data.forest import lay_out
from sftlab.inference.decoding import decode
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.sharded import Generator
from sftlab.models.architecture import NO_LIMIT, attention, body, cached_attention, longest_text
from sftlab.models.decoder import decoder_blocks
from sftlab.models.load import Model
from sftlab.models.probe import probe
from sftlab.models.scorer import Scorer
from tests.support import byte_tokenizer, random_examples

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16} | ENDS
LLAMA = {**SIZE, "num_attention_heads": 2, "num_key_value_heads": 2}
OLD = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, **ENDS}
GEMMA = {
    **LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28
} | {"patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
# What each needs: a name of the attention on a CPU, and why its examples need rows of their own.
TREE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("sdpa_by_blocks", LLAMA),
    "gemma2": ("eager", {**LLAMA, "sliding_window": 4, "attn_logit_softcapping": 5.0}),
    "gpt_oss": ("eager", {**LLAMA, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("eager", OLD),
    "codegen": ("eager", OLD),
    "xglm": ("eager", {"vocab_size": 320, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32, **ENDS}),
    "llama4_text": (
        "sdpa_by_blocks",
        {
            **LLAMA,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "num_hidden_layers": 4,
        },
    ),
    "phimoe": ("sdpa_by_blocks", {**LLAMA, "num_local_experts": 4, "input_jitter_noise": 0.1}),
    # Models of text and images, whose windows and caps stand in the config of their text part.
    "gemma3": ("sdpa_by_blocks", {"text_config": GEMMA | {"model_type": "gemma3_text"}, "vision_config": VISION}),
    "gemma4": (
        "sdpa_by_blocks",
        {
            "text_config": GEMMA
            | {"model_type": "gemma4_text", "global_head_dim": 32, "hidden_size_per_layer_input": 8}
            | {"vocab_size_per_layer_input": 320, "final_logit_softcapping": 5.0}
        },
    ),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("counts positions by itself", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 2, **ENDS}),
    "mpt": ("counts positions by itself", {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 2, **ENDS}),
    "blenderbot": (
        "counts positions by itself",
        {"vocab_size": 320, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
        | ENDS,
    ),
    "mamba": ("layers of type linear_attention", {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2} | ENDS),
    "lfm2": ("layers of type conv", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "gpt_neo": (
        r"cuts windows by itself, along the row \(window_size=4\)",
        {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 4, **ENDS}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "doge": (r"\(keep_window_size=8\)", {**LLAMA, "keep_window_size": 8}),
}
BIDIRECTIONAL = {
    "bert": LLAMA,
    "xlnet": {"vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32, **ENDS},
}


def built(kind: str, shape: dict[str, Any], loud: float = 3.0) -> Scorer:
    """Return a random model whose answers differ from prompt to prompt, as a run builds it on a CPU."""
    option = Model("x", init="random", architecture={"model_type": kind, **shape})
    model = option.load_weights(option.load_config(CPU), 0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("self_attn.A"):
                p.copy_(torch.linspace(0.5, 1.0, len(p)))  # it begins as 0, and Doge chooses its keys among equals
            p.mul_(loud)
    return Scorer(model).train()


def own_nll(scorer: Scorer, examples: list[Any]) -> float:
    """Return the sum of nll by the model's own forward in evaluation mode, one example at a time."""
    model, nll = scorer.model.eval(), 0.0
    for e in examples:
        ids = torch.from_numpy(e.tokens.astype(np.int64))
        at = np.flatnonzero(e.supervised)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nll += float(nn.functional.cross_entropy(logits[at - 1], ids[at], reduction="sum"))
    scorer.train()
    return nll


def check(scorer: Scorer, layout: str) -> None:
    """Compare a step's loss with the model's own, and find finite gradients."""
    probe(scorer, layout, CPU)
    examples = random_examples(6, longest=24)
    rows = lay_out(examples, layout, 160)
    nll = scorer(collate(rows, len(rows), 160, pad_token=3)).nll
    with torch.no_grad():
        assert float(nll) == pytest.approx(own_nll(scorer, examples), rel=1e-5)
    nll.backward()
    assert all(torch.isfinite(p.grad).all() for p in scorer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", TREE)
def test_these_train_in_rows_of_several_examples(kind: str) -> None:
    name, shape = TREE[kind]
    scorer = built(kind, shape)
    assert scorer.model.config._attn_implementation == name and scorer.apart is None
    for layout in ("tree", "padded"):
        check(scorer, layout)


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.filterwarnings("ignore")
def test_these_train_in_rows_of_one_example_and_say_why(kind: str) -> None:
    why, shape = PADDED[kind]
    scorer = built(kind, shape, loud=1.5)
    for layout in ("tree", "packed"):
        with pytest.raises(ValueError, match=rf"{why}.*: data\.layout={layout} would mix .* Use data\.layout=padded"):
            probe(scorer, layout, CPU)
    check(scorer, "padded")


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
@pytest.mark.filterwarnings("ignore")
def test_a_bidirectional_model_is_refused_as_that(kind: str) -> None:
    scorer = built(kind, BIDIRECTIONAL[kind])
    with pytest.raises(ValueError, match=r"sees later tokens: .* name a causal one in model\.name_or_path"):
        probe(scorer, "padded", CPU)


@pytest.mark.parametrize(("kind", "loud"), [*((kind, 3.0) for kind in TREE), *((kind, 1.5) for kind in PADDED)])
@pytest.mark.filterwarnings("ignore")
def test_gauntlet_41_in_run_answers_and_decoding_are_those_of_plain_transformers(kind: str, loud: float) -> None:
    scorer, tokenizer = built(kind, (TREE | PADDED)[kind][1], loud), byte_tokenizer()
    prompts = [e.tokens for e in random_examples(5, longest=30)]
    with torch.no_grad():
        plain = [plain_answer(scorer, p) for p in prompts]
    assert len({tuple(p) for p in plain}) > 2
    texts = [tokenizer.decode(p, skip_special_tokens=True).strip() for p in plain]
    generator = Generator(scorer, tokenizer, frozenset({1}), cast(Any, None), max_new_tokens=6, gather=True)
    assert generator.answers(prompts) == texts
    decoded = dict(decode(scorer.eval(), prompts, DecodingSettings(max_new_tokens=6), frozenset({1})))
    assert [decoded[i] for i in range(len(prompts))] == plain


def plain_answer(scorer: Scorer, prompt: Any) -> list[int]:
    """Return the greedy tokens of transformers for one prompt, without the end."""
    model, ids = scorer.model.eval(), torch.tensor(prompt[None].astype(int))
    own = model.config._attn_implementation
    model.config._attn_implementation = cached_attention(model.config)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=2
    )
    model.config._attn_implementation = own
    scorer.train()
    return [t for t in out[0, len(prompt) :].tolist() if t != 1]


def test_each_architecture_gets_the_fastest_attention_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    llama, gpt2, oss, gptj = (AutoConfig.for_model(kind) for kind in ("llama", "gpt2", "gpt_oss", "gptj"))
    assert [attention(c, CUDA) for c in (llama, gpt2, oss, gptj)] == [
        "flex_by_reach",
        "sdpa",
        "flex_by_reach",
        "eager",
    ]
    assert [attention(c, CPU) for c in (llama, oss, gptj)] == ["sdpa_by_blocks", "eager", "eager"]
    assert [cached_attention(c) for c in (llama, oss, gptj)] == ["sdpa", "eager", "eager"]
    assert attention(llama, CPU, "eager") == "eager"
    with pytest.raises(
        ValueError, match=r"attention=sdpa is impossible for gpt_oss on cuda: .* sinks\. .*flex or eager"
    ):
        attention(oss, CUDA, "sdpa")
    with pytest.raises(ValueError, match="attention=blocks is impossible for llama on cuda: it needs a CPU"):
        attention(llama, CUDA, "blocks")


def test_a_text_is_as_long_as_positions_or_the_tokenizer_allow() -> None:
    tokenizer = SimpleNamespace(model_max_length=700)
    llama, bloom, xlnet = (AutoConfig.for_model(kind) for kind in ("llama", "bloom", "xlnet"))
    assert (longest_text(llama), longest_text(llama, tokenizer)) == (2048, 2048)
    assert longest_text(bloom, tokenizer) == longest_text(xlnet, tokenizer) == 700
    assert longest_text(bloom) == longest_text(bloom, SimpleNamespace(model_max_length=int(1e30))) == NO_LIMIT


def test_noise_is_off_and_a_threshold_of_the_routing_is_not() -> None:
    phimoe, dbrx = (
        Model("x", init="random", architecture={"model_type": kind, **shape}).load_config(CPU)
        for kind, shape in (("phimoe", TREE["phimoe"][1]), ("dbrx", {"ffn_config": {"moe_jitter_eps": 0.1}}))
    )
    assert (phimoe.input_jitter_noise, phimoe.router_jitter_noise) == (0.0, 0.01)
    assert dbrx.ffn_config.moe_jitter_eps == 0.0


def test_a_model_that_draws_in_training_mode_trains_in_evaluation_mode() -> None:
    scorer = built("llama", LLAMA)

    def noise(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
        return made + 0.1 * torch.randn_like(made) if module.training else made

    scorer.model.model.layers[0].mlp.register_forward_hook(noise)
    check(scorer, "tree")
    assert scorer.noisy and scorer.train().training and not scorer.model.training


def test_masks_that_a_model_misreads_are_not_given_to_it() -> None:
    scorer = built("llama", LLAMA)

    def misread(module: nn.Module, given: Any, named: dict[str, Any]) -> Any:
        if named.get("attention_mask") is not None:
            raise RuntimeError("four dimensions are two too many")

    scorer.model.model.register_forward_pre_hook(misread, with_kwargs=True)
    with pytest.raises(
        ValueError, match=r"does not take the masks of rows \(RuntimeError: four.* Use data\.layout=padded"
    ):
        probe(scorer, "tree", CPU)
    check(scorer, "padded")


def test_the_decoder_blocks_are_a_list_that_lies_in_no_other() -> None:
    experts = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in range(3)
    )
    model = nn.ModuleDict({"layers": experts})
    assert [block for _, _, block in decoder_blocks(model)] == list(experts)
    assert body(built("llama4_text", TREE["llama4_text"][1]).model).__class__.__name__ == "Llama4TextModel"


def test_an_mlp_that_is_not_the_last_to_run_is_not_trimmed() -> None:
    scorer = built("llama", LLAMA)
    assert len(scorer.scored_only) == 1
    probe(scorer, "tree", CPU)
    assert len(scorer.scored_only) == 1
    layers = scorer.model.model.layers
    layers[1].register_forward_hook(lambda module, given, made: made + made.cumsum(1) * 0.1)
    probe(scorer, "padded", CPU)
    assert scorer.scored_only == ()
