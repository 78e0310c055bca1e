"""Tiny shapes: what each size is called in the configs of 190 families, and what some families need besides."""

from typing import Any

from transformers import AutoConfig

VOCABULARY = 1088
NAMES = {
    64: "hidden_size d_model n_embd dim model_dim embedding_size attention_hidden_size word_embed_proj_dim embed_dim "
    "hidden_dim",
    128: "intermediate_size ffn_dim n_inner feed_forward_size decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size lru_width d_ff d_inner",
    4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "num_blocks attention_heads",
    2: "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_k moe_topk decoder_layers "
    "num_global_key_value_heads encoder_layers linear_num_key_heads",
    16: "head_dim attention_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim kv_channels "
    "global_head_dim d_kv mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim",
    8: "qk_rope_head_dim rotary_dim index_head_dim",
    32: "moe_intermediate_size q_lora_rank kv_lora_rank expert_ffn_hidden_size moe_shared_expert_intermediate_size "
    "num_codebooks_dim index_topk_dim time_step_rank",
    512: "max_position_embeddings n_positions max_seq_len n_ctx context_length max_sequence_length seq_length "
    "original_max_position_embeddings",
    VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
OTHERS = {
    "linear_num_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 32,
    "attention_window": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_shared_experts": 1,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 0,
}
BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "attention_layers")  # made again
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LATENT = {"head_dim": 8, "qk_rope_head_dim": 8, "partial_rotary_factor": 1.0, "num_key_value_heads": 4} | ROPE
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
DENSE = {"head_dim": 16, "layer_types": None} | ROPE
GEMMA_4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": None,
}
BY_TYPE = {kind: ROPE["rope_parameters"] for kind in ("sliding_attention", "full_attention")}
NEEDS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT
    | {"head_dim": 16, "layer_group_size": 2, "num_experts_per_token": 2, "linear_num_heads": 4, "linear_head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "bloom": {"n_head": 4},
    "codegen": {"rotary_dim": 8, "n_head": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4, "rope_parameters": BY_TYPE},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "prompt_types": 8, "segment_types": 4},
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT
    | {"q_lora_rank": 32, "num_experts_per_tok": 2, "topk_method": "greedy", "n_routed_experts": 4},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "diffllama": {"num_key_value_heads": 2},
    "doge": {"num_experts": 4},
    "dots3_note_text": LATENT | {"layer_types": ["sliding_attention"] * 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
    },
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 16},
    "hunyuan_v1_dense": DENSE,
    "hunyuan_v1_moe": DENSE | {"moe_topk": 2, "num_experts": 4},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"num_key_value_heads": 4, "num_hidden_layers": 2},
    "kimi_linear": LINEAR | {"linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4},
    "lfm2": CONVOLUTION | {"full_attn_idxs": None, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "llama4_text": {
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
    },
    "longcat_flash": LATENT | {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "minicpm3": LATENT,
    "minimax": LINEAR | {"block_size": 8},
    "ministral": DENSE,
    "moshi": {"sliding_window": 512},  # transformers' cache cuts at the window and its mask does not: two answers
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"hybrid_override_pattern": "M*-M", "layers_block_type": None},
    "olmo_hybrid": LINEAR,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {"rope_scaling": None},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 32,
        "num_key_value_heads": 1,
    },
    "reformer": {"is_decoder": True},
    "rwkv": {"num_hidden_layers": 2},
    "xlnet": {"n_layer": 2},
    "xlstm": {
        "num_blocks": 2,
        "num_hidden_layers": 2,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    },
    "youtu": LATENT,
}


def tiny_config(family: str) -> Any:
    """Return a tiny config of a family of transformers."""
    kind = type(AutoConfig.for_model(family))
    default = kind()
    if (text := getattr(default, "text_config", None)) is not None and default.get_text_config() is not default:
        parts = {"text_config": type(text)(**tiny_settings(text)).to_dict()}
        if (eyes := getattr(default, "vision_config", None)) is not None:
            parts["vision_config"] = type(eyes)(**tiny_settings(eyes)).to_dict()
        return kind(**parts)
    settings = tiny_settings(default)
    if getattr(default, "is_encoder_decoder", False):
        settings |= {"encoder_layers": 2, "decoder_layers": 2}
    for drop in ((), ("layer_types",), ("rope_scaling",), BY_LAYER):
        settings = {key: value for key, value in settings.items() if key not in drop}
        try:
            return kind(**settings)
        except Exception as error:
            last = error
    raise last


def tiny_settings(config: Any) -> dict[str, Any]:
    """Return settings that make a config tiny."""
    settings: dict[str, Any] = {}
    for name in set(vars(config)) | set(type(config).attribute_map):
        try:
            value = getattr(config, name, None)
        except Exception:  # of transformers, for what differs from layer to layer, as Gemma 4's head_dim
            value = config.to_dict().get(name)
        if name in OTHERS and value is not None:
            settings[name] = OTHERS[name]
        elif name in SIZES and isinstance(value, (int, float)) and not isinstance(value, bool):
            settings[name] = SIZES[name]
        elif name in BY_LAYER:
            settings[name] = None
    return settings | NEEDS.get(config.model_type, {})
