"""Small random models of mlx-lm's architectures, as directories that mlx-lm opens like any other.

Each configuration has the keys that the architecture's published config.json has, with small
sizes, and every kind of layer that the family has (attention of both kinds, a recurrence, dense and
mixed experts). Scales, soft caps and multipliers are set to values that matter at these sizes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402

import mlx_fd  # noqa: E402

TOKENIZER = Path(mlx_fd.__file__).parent / "models" / "tiny" / "expert"
_TINY = json.loads((TOKENIZER / "config.json").read_text())
VOCAB = _TINY["vocab_size"]
# Long enough for two turns, short enough that both of them run out of it.
WINDOW = 24
Config = dict[str, Any]

_BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_EXPERTS: Config = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_MOE_ROUTED: Config = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": None,
    "moe_layer_freq": 1,
}
_GATED_DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
_INDEXER: Config = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512}
_GRANITE: Config = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_MAMBA2: Config = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_expand": 1,
}
_LINEAR: Config = {
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
}
_V5_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_KIND = {"sliding_attention": _V5_ROPE, "full_attention": _V5_ROPE}


def _text(**more: Any) -> Config:
    """The keys that most configurations share, and more; ``None`` leaves a key out."""
    return {key: value for key, value in {**_BASE, **more}.items() if value is not None}


def _wrapped(model_type: str, text: Config, **more: Any) -> Config:
    """A multimodal model's configuration: the language model's is in ``text_config``."""
    return {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", **text},
        "vision_config": {"hidden_size": 32},
        **more,
    }


_QWEN3 = _text(tie_word_embeddings=True)
_QWEN3_MOE = _text(**_EXPERTS, decoder_sparse_step=1, mlp_only_layers=[0], tie_word_embeddings=True)
_QWEN3_5 = _text(
    **_GATED_DELTA,
    tie_word_embeddings=True,
    rope_parameters={
        "type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
    rope_theta=None,
)
_GEMMA2 = _text(
    attn_logit_softcapping=20.0, final_logit_softcapping=10.0, query_pre_attn_scalar=16, head_dim=16
)
_GEMMA3 = _text(
    query_pre_attn_scalar=16,
    sliding_window=WINDOW,
    sliding_window_pattern=2,
    rope_local_base_freq=10000.0,
    rope_theta=1e6,
)
_GEMMA3N = _text(
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=16,
    sliding_window=WINDOW,
    rope_local_base_freq=10000.0,
    final_logit_softcapping=10.0,
    layer_types=_SLIDING,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    altup_num_inputs=2,
    altup_coef_clip=120.0,
    altup_correct_scale=True,
    altup_active_idx=0,
    laurel_rank=8,
    intermediate_size=[96] * 4,
)
_GEMMA4 = _text(
    global_head_dim=32,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=16,
    num_kv_shared_layers=2,
    sliding_window=WINDOW,
    layer_types=_SLIDING,
    final_logit_softcapping=10.0,
    rope_theta=None,
)
_LLAMA4 = _text(
    attention_bias=False,
    attention_chunk_size=WINDOW,
    interleave_moe_layer_step=2,
    intermediate_size=32,
    intermediate_size_mlp=96,
    num_experts_per_tok=1,
    num_local_experts=4,
    use_qk_norm=True,
) | {"rope_scaling": None}
_MINISTRAL3 = _text(
    layer_types=_SLIDING,
    sliding_window=WINDOW,
    tie_word_embeddings=False,
    rope_theta=None,
    rope_parameters={
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 1e6,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
)
_LFM2 = _text(
    norm_eps=1e-5,
    conv_bias=False,
    conv_L_cache=3,
    block_dim=64,
    block_ff_dim=96,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention"] * 2,
    rope_theta=1e6,
)
_KIMI_LINEAR = _text(
    **_LATENT | {"head_dim": 16, "q_lora_rank": None},
    linear_attn_config=_LINEAR,
    model_max_length=4096,
    num_experts=4,
    num_experts_per_token=2,
    num_shared_experts=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    mla_use_nope=True,
)
_DEEPSEEK_V3 = _text(**_MOE_ROUTED, **_LATENT)

# By name, which is the model_type unless the configuration has one.
ARCHITECTURES: dict[str, Config] = {
    "llama": _text(tie_word_embeddings=False, rope_theta=500000.0),
    "llama_tied": _text(model_type="llama", tie_word_embeddings=True, attention_bias=True),
    "llama_sliding": _text(model_type="llama", sliding_window=WINDOW, layer_types=_SLIDING),
    "mistral": _text(tie_word_embeddings=False),
    "mistral3": _wrapped(
        "mistral3", _text(model_type="mistral", tie_word_embeddings=False), vocab_size=VOCAB
    ),
    "ministral3": _MINISTRAL3,
    "mistral3_ministral3": _wrapped("mistral3", {**_MINISTRAL3, "model_type": "ministral3"}),
    "mistral4": _text(
        **_MOE_ROUTED,
        **_LATENT,
        rope_parameters=_MINISTRAL3["rope_parameters"],
        rope_theta=None,
    ),
    "mixtral": _text(num_local_experts=4, num_experts_per_tok=2),
    "qwen": _text(kv_channels=16, layer_norm_epsilon=1e-5, no_bias=True, intermediate_size=192),
    "qwen2": _text(tie_word_embeddings=True),
    "qwen2_untied": _text(model_type="qwen2", tie_word_embeddings=False),
    "qwen2_moe": _text(**{**_EXPERTS, "norm_topk_prob": False}, shared_expert_intermediate_size=32),
    "qwen2_vl": _wrapped("qwen2_vl", _text(model_type="qwen2", tie_word_embeddings=False)),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl": _wrapped("qwen3_vl", _QWEN3),
    "qwen3_vl_moe": _wrapped("qwen3_vl_moe", {**_QWEN3_MOE, "tie_word_embeddings": False}),
    "qwen3_next": _text(
        **_GATED_DELTA,
        **_EXPERTS,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[1],
        partial_rotary_factor=0.5,
    ),
    "qwen3_5": _wrapped("qwen3_5", _QWEN3_5, tie_word_embeddings=True),
    "qwen3_5_moe": _wrapped(
        "qwen3_5_moe",
        {
            **_QWEN3_5,
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "tie_word_embeddings": False,
        },
    ),
    "gemma": _text(),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _wrapped("gemma3", _GEMMA3, vocab_size=VOCAB),
    "gemma3n": _wrapped("gemma3n", _GEMMA3N),
    "gemma4_text": _GEMMA4,
    "gemma4": _wrapped("gemma4", _GEMMA4, vocab_size=VOCAB),
    "gemma4_moe": _wrapped(
        "gemma4",
        {
            **_GEMMA4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        vocab_size=VOCAB,
    ),
    "recurrent_gemma": _text(
        attention_bias=False,
        conv1d_width=4,
        logits_soft_cap=10.0,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
        num_key_value_heads=1,
    ),
    "gpt_oss": _text(
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        rope_theta=150000.0,
    ),
    "phi": _text(layer_norm_eps=1e-5, partial_rotary_factor=0.5, num_key_value_heads=4),
    "phi3": _text(tie_word_embeddings=False, original_max_position_embeddings=4096),
    "phimoe": _text(
        num_local_experts=4,
        num_experts_per_tok=2,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    ),
    "smollm3": _text(tie_word_embeddings=True, no_rope_layer_interval=2),
    "olmo2": _text(tie_word_embeddings=False, rope_theta=500000.0),
    "olmo3": _text(sliding_window=WINDOW, layer_types=_SLIDING, tie_word_embeddings=False),
    "olmoe": _text(num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "olmo_hybrid": _text(
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=True,
        layer_types=["linear_attention", "full_attention"] * 2,
        attention_bias=False,
        tie_word_embeddings=False,
        rope_parameters=_V5_ROPE,
        num_key_value_heads=4,
    ),
    "granite": _text(**_GRANITE, mlp_bias=False),
    "granitemoe": _text(**_GRANITE, num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": _text(
        **_GRANITE,
        **_MAMBA2,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        position_embedding_type="nope",
    ),
    "falcon_h1": _text(
        **_MAMBA2,
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        embedding_multiplier=4.0,
        tie_word_embeddings=True,
    ),
    "nemotron": _text(hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5),
    "nemotron_h": _text(
        hybrid_override_pattern="M*M-",
        attention_bias=False,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=1,
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=[0.0, 100.0],
    ),
    "nemotron-nas": _text(
        num_hidden_layers=3,
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    ),
    "llama4": _wrapped("llama4", _LLAMA4),
    "llama4_text": _text(
        intermediate_size_mlp=96,
        tie_word_embeddings=False,
        no_rope_layers=[1, 1, 1, 0],
        use_qk_norm=True,
    ),
    "lfm2": _LFM2,
    "lfm2-vl": _wrapped("lfm2-vl", {**_LFM2, "model_type": "lfm2"}),
    "lfm2_moe": {
        **_LFM2,
        **_EXPERTS,
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    "deepseek": _text(**{**_MOE_ROUTED, "norm_topk_prob": False}),
    "deepseek_v2": _text(
        **{**_MOE_ROUTED, "norm_topk_prob": False},
        **_LATENT,
        topk_method="greedy",
        rope_scaling={
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": {**_DEEPSEEK_V3, **_INDEXER},
    "kimi_vl": _wrapped("kimi_vl", _DEEPSEEK_V3),
    "kimi_k25": _wrapped("kimi_k25", {**_DEEPSEEK_V3, "model_type": "kimi_k2"}),
    "kimi_linear": _KIMI_LINEAR,
    "longcat_flash": _text(
        **_LATENT,
        attention_method="MLA",
        zero_expert_type="identity",
        ffn_hidden_size=96,
        moe_topk=2,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        num_layers=2,
        routed_scaling_factor=1.5,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_bias=False,
        num_hidden_layers=None,
    ),
    "exaone": _text(
        num_layers=4, layer_norm_epsilon=1e-5, tie_word_embeddings=False, num_hidden_layers=None
    ),
    "exaone4": _text(
        sliding_window=WINDOW,
        sliding_window_pattern="LG",
        layer_types=_SLIDING,
        tie_word_embeddings=True,
        rope_scaling={"rope_type": "default"},
    ),
    "exaone_moe": _text(
        **_EXPERTS,
        num_shared_experts=1,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        is_moe_layer=[False, True, True, True],
    ),
    "glm": _text(tie_word_embeddings=False),
    "glm4": _text(attention_bias=True, partial_rotary_factor=0.5),
    "glm4_moe": _text(
        **_MOE_ROUTED,
        rope_scaling={"type": "default"},
        use_qk_norm=True,
        tie_word_embeddings=False,
        attention_bias=True,
        partial_rotary_factor=0.5,
    ),
    "glm4_moe_lite": _text(**_MOE_ROUTED, **_LATENT),
    "glm_moe_dsa": _text(
        **_MOE_ROUTED,
        **_LATENT,
        **_INDEXER,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        attention_bias=False,
        rope_parameters=_V5_ROPE,
    ),
    "cohere": _text(logit_scale=0.25, layer_norm_eps=1e-5, use_qk_norm=True),
    "cohere2": _text(
        logit_scale=0.25,
        layer_norm_eps=1e-5,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
    ),
    "minicpm": _text(scale_depth=1.4, scale_emb=6, dim_model_base=16),
    "minicpm3": _text(
        **_LATENT,
        scale_depth=1.4,
        scale_emb=6,
        dim_model_base=16,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 4096,
        },
    ),
    "minimax": _text(
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=0, rotary_dim=8
    ),
    "mimo": _text(),
    "mimo_v2_flash": _text(
        **_MOE_ROUTED,
        hybrid_layer_pattern=[0, 1, 0, 1],
        moe_layer_freq=[0, 1, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        layernorm_epsilon=1e-5,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        v_head_dim=16,
        swa_head_dim=16,
        swa_v_head_dim=16,
        partial_rotary_factor=0.5,
    ),
    "ernie4_5": _text(use_bias=False, tie_word_embeddings=True),
    "ernie4_5_moe": _text(
        use_bias=False,
        tie_word_embeddings=True,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=1,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
    ),
    "hunyuan_v1_dense": _text(
        rope_scaling={"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}, tie_word_embeddings=True
    ),
    "hunyuan": _text(
        attention_bias=False,
        moe_topk=2,
        num_experts=4,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    ),
    "internlm2": _text(bias=False),
    "internlm3": _text(),
    "seed_oss": _text(attention_bias=True, tie_word_embeddings=False),
    "dots1": _text(**_MOE_ROUTED, scoring_func="noaux_tc"),
    "apertus": _text(
        mlp_bias=False,
        attention_bias=False,
        post_norm=False,
        qk_norm=True,
        tie_word_embeddings=False,
    ),
    "helium": _text(attention_bias=False, mlp_bias=False, tie_word_embeddings=False),
    "bailing_moe": _text(**_EXPERTS, num_shared_experts=1, first_k_dense_replace=1),
    "bailing_moe_linear": _text(
        **_EXPERTS,
        num_shared_experts=1,
        first_k_dense_replace=1,
        layer_group_size=2,
        group_norm_size=2,
        num_key_value_heads=4,
    ),
    "afmoe": _text(
        **_EXPERTS,
        layer_types=_SLIDING,
        num_shared_experts=1,
        num_dense_layers=1,
        sliding_window=WINDOW,
    ),
    "afm7": _text(
        hidden_dim=64,
        num_layers=4,
        num_kv_reuse_layers=2,
        num_heads=4,
        num_kv_heads=2,
        num_hidden_layers=None,
        hidden_size=None,
    ),
    "laguna": _text(
        **_EXPERTS,
        shared_expert_intermediate_size=32,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        rope_parameters=_ROPE_BY_KIND,
    ),
    "step3p5": _text(
        num_attention_groups=2,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        moe_layers_enum="1,2,3",
    ),
    "solar_open": _text(**_MOE_ROUTED, tie_word_embeddings=False, partial_rotary_factor=1.0),
    "telechat3": _text(),
    "youtu_llm": _text(**_LATENT),
    "stablelm": _text(use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-5),
    "starcoder2": _text(norm_epsilon=1e-5, tie_word_embeddings=True),
    "nanochat": _text(num_key_value_heads=4, intermediate_size=256),
    "muse_glimmer": _text(
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        final_logit_softcapping=10.0,
        output_multiplier=0.5,
    ),
    "baichuan_m1": _text(
        sliding_window=WINDOW, sliding_window_layers=[0, 2], conv_window=2, head_dim=None
    ),
    "klear": _text(
        model_type="Klear",
        **_EXPERTS,
        attention_bias=False,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
        n_shared_experts=1,
    ),
    "gpt2": {
        "vocab_size": VOCAB,
        "n_ctx": 1024,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_bigcode": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_inner": 96,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": _text(
        layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.25, num_key_value_heads=4
    ),
    "gptj": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 1024,
        "rotary_dim": 8,
        "layer_norm_epsilon": 1e-5,
    },
    "mamba": _text(
        state_size=8,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=4,
        tie_word_embeddings=True,
        intermediate_size=128,
    ),
    "mamba2": _text(
        num_heads=4,
        head_dim=32,
        state_size=16,
        intermediate_size=128,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
        time_step_limit=[0.0, 100.0],
        time_step_rank="auto",
    ),
    "jamba": _text(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    "rwkv7": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "norm_eps": 1e-5,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
        "tie_word_embeddings": False,
    },
    "plamo2": _text(
        hidden_size_per_head=16,
        attention_window_size=WINDOW,
        full_attention_idx=[3],
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_num_heads=4,
        mamba_step=2,
        mamba_chunk_size=256,
        mamba_enabled=True,
        tie_word_embeddings=True,
    ),
    "openelm": {
        "vocab_size": VOCAB,
        "head_dim": 16,
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "iquestloopcoder": _text(loop_num=2, loop_window_size=WINDOW),
    "mellum": _text(
        **_EXPERTS,
        tie_word_embeddings=False,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        rope_parameters=_ROPE_BY_KIND,
        rope_theta=None,
    ),
    "spark2_5": _text(
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        rope_parameters=_ROPE_BY_KIND,
        rope_theta=None,
        tie_word_embeddings=True,
    ),
    "gear": _text(
        layer_types=["sliding_attention", "conv_mixer", "full_attention", "conv_mixer"],
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        final_logit_softcapping=10.0,
    ),
    "nanbeige": _text(tie_word_embeddings=False),
    "plamo": _text(n_shared_head=2, num_key_value_heads=None),
    "plamo3": _text(window_size=WINDOW, sliding_window_pattern=2, tie_word_embeddings=True),
    "talkie": _text(num_key_value_heads=None),
    "lille-130m": {
        "vocab_size": VOCAB,
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 3,
        "rope_theta": 10000.0,
    },
    "longcat_flash_ngram": _text(
        **_LATENT,
        ffn_hidden_size=96,
        moe_topk=2,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        num_layers=2,
        routed_scaling_factor=1.5,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        num_hidden_layers=None,
        ngram_vocab_size_ratio=2,
        emb_neighbor_num=3,
        emb_split_num=2,
    ),
    "pixtral": _wrapped("pixtral", _text(model_type="mistral", tie_word_embeddings=False)),
    "bailing_hybrid": _text(
        **_LATENT | {"head_dim": 16, "moe_layer_freq": None},
        **_EXPERTS,
        num_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        layer_group_size=2,
        group_norm_size=2,
        routed_scaling_factor=1.5,
    ),
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "n_layers": 3,
        "n_heads": 4,
    },
    "phixtral": {
        "vocab_size": VOCAB,
        "num_vocab": VOCAB,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 3,
        "rotary_dim": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
    "kimi_k3": _wrapped("kimi_k3", {**_KIMI_LINEAR, "model_type": "kimi_linear"}),
}


def config_of(name: str) -> Config:
    """An architecture's config.json."""
    return {
        "model_type": name,
        "architectures": ["ForCausalLM"],
        "eos_token_id": _TINY["eos_token_id"],
        **ARCHITECTURES[name],
    }


def _random(name: str, value: mx.array, rng: np.random.Generator) -> mx.array:
    """A weight that shows where it is left out or in the wrong place."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    noise = rng.standard_normal(value.shape).astype(np.float32)
    if value.ndim < 2 or min(value.shape) == 1 or "norm" in name:
        # Norms, biases, decays and what else begins at a value of its own.
        return value.astype(mx.float32) + 0.1 * mx.array(noise)
    if "embed" in name or "wte" in name or "lm_head" in name:
        return mx.array(0.4 * noise)
    return mx.array(noise * 1.2 * value.shape[-1] ** -0.5)


def make_architecture(path: Path, name: str, *, seed: int = 1, **overrides: Any) -> Path:
    """Write a small random model with the tiny pair's tokenizer.

    Args:
        path: the directory to write.
        name: one of :data:`ARCHITECTURES`.
        seed: of the weights.
        **overrides: further entries of config.json.

    Returns:
        ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {**config_of(name), **overrides}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, path / file)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    mx.random.seed(seed)
    # A copy: some classes change the configuration that they are given.
    kind, arguments = _get_classes(json.loads(json.dumps(config)))
    model = kind(arguments.from_dict(json.loads(json.dumps(config))))
    rng = np.random.default_rng(seed)
    weights = {key: _random(key, value, rng) for key, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path
