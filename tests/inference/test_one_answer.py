"""One prompt, one model, one answer: every way to an answer, beside plain transformers, one prompt at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from sftlab.inference import chat
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DRAWN, REFUSED, DecodingSettings, refuse, refuse_in_vllm
from sftlab.inference.own_rows import alike
from sftlab.inference.sharded import Generator
from sftlab.inference.trained_model import resolve
from sftlab.models.scorer import Scorer
from sftlab.serving.engine import Engine, Sampling
from tests.support import byte_tokenizer, random_examples, tiny_llama

CPU = torch.device("cpu")
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, **ENDS}
LLAMA = {**SIZE, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8
}  # fmt: skip
BAILING = {
    "layer_group_size": 2, "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, **ENDS},
    "gemma2": {**LLAMA, "sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
    "gemma3_text": {**LLAMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {**MOE, "sliding_window": 6},
    "mixtral": MOE,
    "bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 2, **ENDS},
    "mamba": SIZE,
    "rwkv": {**SIZE, "attention_hidden_size": 32},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**LLAMA, **HYBRID},
    "bailing_hybrid": {**LLAMA, **BAILING},
    "qwen3_next": {**LLAMA, **LINEAR, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
}
# What a generation_config.json may ask for, each on its own changing some answers.
RULES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "eos_token_id": [1, *range(200, 260)],
    "suppress_tokens": list(range(90, 200)),
    "begin_suppress_tokens": list(range(3, 260)),
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 2.0,
    "min_new_tokens": 5,
    "min_length": 24,
    "bad_words_ids": [[t] for t in range(100, 200)],
    "sequence_bias": [[[t], 9.0] for t in range(60, 70)],
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": [1, 3.0],
}
NEW = 8


def saved(kind: str, folder: Path, **rules: Any) -> Path:
    """Write a random model, so loud that answers differ from prompt to prompt, and its generation config."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
        model.get_output_embeddings().weight.mul_(3.0)
    model.save_pretrained(folder)
    GenerationConfig(**({"eos_token_id": 1, "pad_token_id": 2} | rules)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path, prompts: list[Any]) -> list[list[int]]:
    """What plain transformers makes of each prompt alone, up to the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = model.generation_config.eos_token_id
    ends = {1, *(own if isinstance(own, list) else [own])}
    found = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None].astype(np.int64))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        new = out[0, len(prompt) :].tolist()
        found.append(new[:-1] if new[-1] in ends else new)
    return found


def every_way(folder: Path, prompts: list[Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the answers of each way, as text."""
    loaded = LoadedModel.load(resolve(str(folder)), CPU)
    how = DecodingSettings(max_new_tokens=NEW, batch_size=3)
    decoded = dict(decode(loaded.scorer, prompts, how, loaded.ends))
    yield "generate and evaluate", [loaded.decode_text(decoded[i]) for i in range(len(prompts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "encode_chat", lambda self, messages: messages)
        yield "chat", [chat.stream(loaded, cast(Any, p), how, lambda text: None) for p in prompts]
    engine, greedy = Engine(loaded), Sampling(NEW, temperature=0.0)
    yield "serve", ["".join(s.text for s in engine.answer(p.tolist(), greedy, loaded.ends)) for p in prompts]
    scorer = LoadedModel.load(resolve(str(folder)), CPU).scorer.train()
    within = Generator(scorer, loaded.tokenizer, loaded.ends, cast(Any, None), NEW, 3, gather=True)
    yield "in-run", within.answers(prompts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_gauntlet_41_every_way_to_an_answer_gives_the_tokens_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path, repetition_penalty=1.3, suppress_tokens=[5, 6], eos_token_id=[1, *range(40, 60)])
    prompts = [e.tokens for e in random_examples(6, longest=20)]
    tokens = plain(folder, prompts)
    assert len({tuple(t) for t in tokens}) > 3
    tokenizer = byte_tokenizer()
    expected = [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    for way, found in every_way(folder, prompts):
        assert [f.strip() for f in found] == [e.strip() for e in expected], way


@pytest.mark.parametrize(
    ("kind", "rule"), [*(("llama", rule) for rule in RULES), ("mamba", "repetition_penalty"), ("mamba", "min_length")]
)
@pytest.mark.filterwarnings("ignore")
def test_gauntlet_41_a_rule_of_the_generation_config_counts_as_in_plain_transformers(
    kind: str, rule: str, tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path, eos_token_id=[1, *range(40, 90)])
    prompts = [e.tokens for e in random_examples(6, longest=20)]
    free = plain(folder, prompts)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {rule: RULES[rule]}))
    expected = plain(folder, prompts)
    assert expected != free, "the rule changes nothing, so nothing is tested"
    loaded = LoadedModel.load(resolve(str(folder)), CPU)
    found = dict(decode(loaded.scorer, prompts, DecodingSettings(max_new_tokens=NEW, batch_size=4), loaded.ends))
    assert [found[i] for i in range(len(prompts))] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_way_to_an_answer_does_is_refused_by_name_by_all(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"stop_strings": ["a"], "watermarking_config": {"bias": 2.0}, "force_words_ids": [[3]]}
    values |= dict.fromkeys(("use_mtp", "token_healing"), True) | {"constraints": ["c"], "dola_layers": "low"}
    generation = GenerationConfig()
    for neutral in (None, *REFUSED[name]):
        setattr(generation, name, neutral)
        refuse(generation)
    setattr(generation, name, values.get(name, 3))
    with pytest.raises(ValueError, match=rf"asks for {name}=.*, which sftlab does not do"):
        refuse(generation)
    model = tiny_llama()
    setattr(model.generation_config, name, values.get(name, 3))
    with pytest.raises(ValueError, match=rf"asks for {name}="):
        list(decode(Scorer(model), [np.array([5])], DecodingSettings(), frozenset()))


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("repetition_penalty", "eos_token_id")])
def test_a_rule_that_vllm_would_leave_out_is_refused_for_vllm(rule: str) -> None:
    with pytest.raises(ValueError, match=rf"asks for {rule}=.*, which vLLM does not read.* Use engine=transformers"):
        refuse_in_vllm(GenerationConfig(**{rule: RULES[rule]}))
    refuse_in_vllm(GenerationConfig(repetition_penalty=1.1, eos_token_id=[1, 2], temperature=0.3, do_sample=True))


@pytest.mark.parametrize(("name", "value"), [("min_p", 0.9), ("top_h", 0.05), ("typical_p", 0.05)])
def test_how_a_generation_config_asks_to_draw_counts_where_it_asks_for_drawing(name: str, value: float) -> None:
    assert name in DRAWN
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    prompts = [np.array([9, 10, 11], np.int32)] * 40

    def drawn(**own: Any) -> set[int]:
        model.generation_config = GenerationConfig(**own)
        how = DecodingSettings(max_new_tokens=1, temperature=2.0, batch_size=40)
        return {tokens[0] for _, tokens in decode(Scorer(model).eval(), prompts, how, frozenset())}

    assert drawn(**{name: value}) == drawn() and len(drawn()) > len(drawn(do_sample=True, **{name: value}))


def test_prompts_with_rows_of_their_own_are_batched_by_length() -> None:
    prompts = [np.zeros(n, np.int32) for n in (3, 9, 4, 9, 20, 8, 12)]
    batches = [[len(prompts[i]) for i in part] for part in alike(prompts, 3, 5)]
    assert batches == [[20], [12, 9, 9], [8, 4, 3]]
    assert [len(part) for part in alike(prompts, 7, 17)] == [7] and list(alike([], 3, 5)) == []


@pytest.mark.filterwarnings("ignore")
def test_rows_of_their_own_are_read_together_and_answered_as_alone(tmp_path: Path) -> None:
    """Prompts of 5 to 12 tokens are read from the first on in one batch, and none sees another's."""
    loaded = LoadedModel.load(resolve(str(saved("falcon_h1", tmp_path, eos_token_id=[1, *range(40, 160)]))), CPU)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 320, n).astype(np.int32) for n in (5, 12, 7, 7, 9, 12)]
    shapes: list[tuple[int, ...]] = []
    loaded.scorer.model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    how = DecodingSettings(max_new_tokens=NEW, batch_size=6)
    told: dict[int, list[int]] = {}
    together = dict(
        decode(loaded.scorer, prompts, how, loaded.ends, on_token=lambda i, t: told.setdefault(i, []).append(t))
    )
    assert shapes[0] == (6, 5) and set(shapes[1:]) == {(6, 1)} and len(shapes) <= 1 + 7 + NEW - 1
    assert {i: t for i, t in together.items() if t} == told and len({len(t) for t in together.values()}) > 1
    for i, prompt in enumerate(prompts):
        ((_, alone),) = decode(loaded.scorer, [prompt], how, loaded.ends)
        assert together[i] == alone
