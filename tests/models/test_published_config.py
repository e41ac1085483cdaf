"""config.json as transformers writes it against what mlx-lm makes of it.

The reference is transformers itself: its own classes write the configurations, and what stands in
them is compared with the modules of the models that come out.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from support import tiny
from support.any_model import SIZES, build, edit_config, write_model
from support.architectures import config_of

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip
from mlx import nn  # isort: skip

from mlx_fd.errors import UserError
from mlx_fd.export.mlx_dir import write_model as export_model
from mlx_fd.export.source import open_source
from mlx_fd.models.config_check import check_model
from mlx_fd.models.context import context_length
from mlx_fd.models.loading import load, open_lazily
from mlx_fd.models.pairing import check_pair
from mlx_fd.models.published_config import (
    as_mlx_lm_reads,
    read_config,
    text_config,
)

HERE = Path("config.json")
IDS = mx.array([[(7 * i + 3) % 380 for i in range(60)]])
SOFT_CAPS = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16,
}
SIZES_5 = {key: SIZES[key] for key in SIZES if key not in ("head_dim", "rms_norm_eps")}
# Each with bases that no class has as its default.
FLAT = {"rope_theta": 54321.0, "rope_type": "default"}
BY_TYPE = {
    "full_attention": {"rope_theta": 654321.0, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 54321.0, "rope_type": "default"},
}
SOME_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WRITTEN: dict[str, tuple[str, dict[str, Any], set[float]]] = {
    "llama": ("LlamaConfig", {}, {54321.0}),
    "mistral": ("MistralConfig", {}, {54321.0}),
    "smollm3": ("SmolLM3Config", {}, {54321.0}),
    "olmo2": ("Olmo2Config", {}, {54321.0}),
    "phi3": ("Phi3Config", {}, {54321.0}),
    "gemma": ("GemmaConfig", {}, {54321.0}),
    "gemma2": ("Gemma2Config", {}, {54321.0}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 8, "rope_parameters": BY_TYPE},
        {54321.0, 654321.0},
    ),
    "qwen2": ("Qwen2Config", {}, {54321.0}),
    "qwen3": ("Qwen3Config", {}, {54321.0}),
    "qwen3_moe": ("Qwen3MoeConfig", SOME_EXPERTS, {54321.0}),
    "qwen3_next": ("Qwen3NextConfig", SOME_EXPERTS, {54321.0}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {}, {54321.0}),
    "granite": ("GraniteConfig", {}, {54321.0}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_expand": 2,
            "mamba_d_state": 16,
        },
        {54321.0},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}, {54321.0}),
    "olmo3": (
        "Olmo3Config",
        {"rope_parameters": dict.fromkeys(BY_TYPE, FLAT)},
        {54321.0},
    ),
    "cohere2": ("Cohere2Config", {}, {54321.0}),
    "exaone4": ("Exaone4Config", {}, {54321.0}),
    "starcoder2": ("Starcoder2Config", {}, {54321.0}),
    "glm4": ("Glm4Config", {}, {54321.0}),
    "stablelm": ("StableLmConfig", {}, {54321.0}),
    "gpt_neox": ("GPTNeoXConfig", {}, {54321.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, {54321.0}),
}


def plain_ropes(model: nn.Module) -> list[nn.RoPE]:
    return [module for _, module in model.named_modules() if type(module) is nn.RoPE]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_rotary_base_that_transformers_writes_is_the_one_used(
    tmp_path: Path, name: str
) -> None:
    class_name, more, bases = WRITTEN[name]
    made = getattr(transformers, class_name)(**{**SIZES_5, "rope_parameters": FLAT, **more})
    made.save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in published
    config = read_config(tmp_path)
    model = build(config)
    assert {rope.base for rope in plain_ropes(model)} == bases
    check_model(model, config, HERE)
    # What transformers wrote is still there: it reads the same model.
    part = config.get("text_config", config)
    assert part["rope_parameters"] == published["rope_parameters"]


WRAPPERS = {
    "Gemma3Config": ({"num_hidden_layers": 8, "rope_parameters": BY_TYPE}, {54321.0, 654321.0}),
    "Qwen3_5Config": ({"rope_parameters": FLAT}, {54321.0}),
    "Llama4Config": ({"rope_parameters": FLAT}, {54321.0}),
    "Mistral3Config": ({"model_type": "mistral", "rope_parameters": FLAT}, {54321.0}),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_language_models_in_multimodal_wrappers(tmp_path: Path, name: str) -> None:
    more, bases = WRAPPERS[name]
    getattr(transformers, name)(text_config={**SIZES_5, **more}).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    model = build(config)
    assert {rope.base for rope in plain_ropes(model)} == bases
    flat = text_config(config, HERE)
    assert flat["vocab_size"] == 400
    assert flat["hidden_size"] == 64
    assert flat["num_hidden_layers"] == len(model.layers)
    assert context_length(tmp_path) == 4096


def test_yarn_as_gpt_oss_and_ministral_have_it(tmp_path: Path) -> None:
    for name in ("GptOssConfig", "Ministral3Config"):
        made = getattr(transformers, name)(**SIZES_5, num_local_experts=4)
        made.rope_parameters["rope_theta"] = 54321.0
        made.save_pretrained(tmp_path)
        config = read_config(tmp_path)
        model = build(config)
        rope = model.layers[0].self_attn.rope
        assert type(rope).__name__ == "YarnRoPE"
        # YaRN leaves the fastest turns as they are: theta ** (2 i / dims).
        fastest = rope._freqs[:2].tolist()
        assert fastest == pytest.approx([1.0, 54321.0 ** (2 / rope.dims)], rel=1e-5)
        check_model(model, config, HERE)


@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "mistral", "qwen3", "smollm3", "olmo2", "phi3", "gemma2"]
)
def test_a_config_of_version_5_is_the_same_model(tmp_path: Path, arch: str) -> None:
    more: dict[str, Any] = {"gemma2": SOFT_CAPS, "phi3": {"original_max_position_embeddings": 4096}}
    config = {**SIZES, "model_type": arch, "tie_word_embeddings": False, "rope_theta": 5e5}
    path = write_model(tmp_path / "m", {**config, **more.get(arch, {})})
    before = mlx_lm.load(str(path))[0](IDS)
    edit_config(path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model, read = open_lazily(path)
    assert mx.array_equal(model(IDS), before)
    assert read["rope_theta"] == 5e5


def test_scaled_positions_of_version_5(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = {**SIZES, "model_type": "llama", "rope_theta": 5e5}
    plain = write_model(tmp_path / "p", config)
    scaled = write_model(tmp_path / "s", {**config, "rope_scaling": scaling})
    before = mlx_lm.load(str(scaled))[0](IDS)
    assert mx.abs(mlx_lm.load(str(plain))[0](IDS) - before).max() > 0.1
    parameters = {**scaling, "rope_theta": 5e5}
    edit_config(scaled, rope_theta=..., rope_scaling=..., rope_parameters=parameters)
    assert mx.array_equal(open_lazily(scaled)[0](IDS), before)


def test_smollm2_saved_by_version_5(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tiny.smollm2(tmp_path_factory)
    path = tmp_path / "m"
    shutil.copytree(source, path)
    base = json.loads((path / "config.json").read_text())["rope_theta"]
    parameters = {"rope_type": "default", "rope_theta": base}
    edit_config(path, rope_theta=..., rope_parameters=parameters)
    assert open_lazily(path)[0].args == open_lazily(source)[0].args
    assert open_lazily(path)[0].args.rope_theta == base == 1e5


def test_an_export_carries_the_right_values(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", {**SIZES, "model_type": "llama", "rope_theta": 5e5})
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    edit_config(path, rope_theta=..., rope_parameters=parameters)
    (tmp_path / "out").mkdir()
    export_model(open_source(str(path)), tmp_path / "out")
    # By mlx-lm alone, which knows nothing of rope_parameters.
    exported = mlx_lm.load(str(tmp_path / "out"))[0]
    assert mx.allclose(exported(IDS), open_lazily(path)[0](IDS), atol=1e-5)
    assert exported.args.rope_theta == 5e5


WINDOWS: dict[str, tuple[dict[str, Any], int]] = {
    "mistral's": ({"model_type": "mistral", "sliding_window": 512}, 512),
    "none": ({"model_type": "mistral", "sliding_window": None}, 4096),
    "switched off": (
        {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False},
        4096,
    ),
    "gemma2's, of which mlx-lm knows nothing": (
        {
            **{"model_type": "gemma2", "sliding_window": 512, **SOFT_CAPS},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        512,
    ),
    "of no layer": (
        {
            **{"model_type": "smollm3", "sliding_window": 512},
            "layer_types": ["full_attention"] * 4,
        },
        4096,
    ),
    "llama's layers": (
        {
            **{"model_type": "llama", "sliding_window": 512},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        4096,
    ),
    "gpt_oss's": ({"model_type": "gpt_oss", "sliding_window": 512, "rope_theta": 1e4}, 4096),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_context_is_no_longer_than_a_window_that_mlx_lm_passes_over(
    tmp_path: Path, name: str
) -> None:
    entries, length = WINDOWS[name]
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **entries}))
    assert context_length(tmp_path) == length


def test_mlx_lm_reads_beyond_gemma2s_window(tmp_path: Path) -> None:
    """What the limit is for: a token before the window changes what comes long after it."""
    config = {**SIZES, "model_type": "gemma2", "num_hidden_layers": 1, **SOFT_CAPS}
    path = write_model(tmp_path / "m", {**config, "sliding_window": 8})
    model = open_lazily(path)[0]
    other = mx.concatenate([mx.array([[399]]), IDS[:, 1:]], axis=1)
    assert mx.abs(model(IDS) - model(other))[0, -1].max() > 1e-4


# -------------------------------------------------------------------------- wrappers with weights


def test_vision_weights_are_not_loaded(tmp_path: Path) -> None:
    text = {**SIZES, "num_hidden_layers": 6, "model_type": "gemma3_text", "sliding_window": 32}
    config = {"model_type": "gemma3", "text_config": text, "vocab_size": 400}
    path = write_model(tmp_path / "m", {**config, "vision_config": {"hidden_size": 8}})
    weights = mx.load(str(path / "model.safetensors"))
    expected = mlx_lm.load(str(path))[0](IDS)
    vision = {f"vision_tower.encoder.layers.{i}.weight": mx.ones((8, 8)) for i in range(2)}
    mx.save_safetensors(str(path / "model.safetensors"), {**weights, **vision})
    # As published, only the language model says how large its vocabulary is.
    edit_config(path, vocab_size=...)
    loaded = load(path)
    assert mx.array_equal(loaded.model(IDS), expected)
    assert not [name for name, _ in loaded.model.named_modules() if "vision" in name]
    assert check_pair(path, path).expert_vocab == 400


def test_what_a_published_gemma_3_leaves_out() -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = as_mlx_lm_reads({"model_type": "gemma3", "text_config": text}, HERE)
    flat = text_config(config, HERE)
    # The sizes of the published 4B weights.
    assert flat["vocab_size"] == 262208
    assert (flat["num_attention_heads"], flat["num_key_value_heads"]) == (8, 4)
    assert (flat["head_dim"], flat["rope_theta"]) == (256, 1e6)
    assert flat["model_type"] == "gemma3_text"
    assert "vocab_size" not in text  # what is given stays as it is


def test_is_the_embedding_the_head(tmp_path: Path) -> None:
    """Where config.json does not say, the weights do; mlx-lm alone drops a head then."""
    for tied in (True, False):
        config = {**SIZES, "model_type": "llama", "tie_word_embeddings": tied}
        path = write_model(tmp_path / str(tied), config)
        before = mlx_lm.load(str(path))[0](IDS)
        edit_config(path, tie_word_embeddings=...)
        assert read_config(path)["tie_word_embeddings"] is tied
        assert mx.array_equal(open_lazily(path)[0](IDS), before)


def test_infinities_are_numbers() -> None:
    config = {**SIZES, "model_type": "llama", "limit": [0.0, {"__float__": "Infinity"}]}
    assert as_mlx_lm_reads(config, HERE)["limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("said", [{}, {"time_step_limit": [0.01, 10.0]}])
def test_granite_4s_recurrence_has_the_published_steps(said: dict[str, Any]) -> None:
    """Where config.json leaves the limit out, mlx-lm alone takes 0.001 to 100."""
    config = {**config_of("granitemoehybrid"), **said}
    assert "time_step_limit" not in config_of("granitemoehybrid")
    blocks = build(as_mlx_lm_reads(config, HERE)).layers
    limits = {tuple(block.mamba.time_step_limit) for block in blocks if "mamba" in block}
    assert limits == {tuple(said.get("time_step_limit", (0.0, float("inf"))))}


@pytest.mark.parametrize(
    ("name", "act"), [("gemma", "gelu"), ("gemma2", "gelu_pytorch_tanh"), ("gpt_oss", "silu")]
)
def test_an_activation_of_the_published_name_is_taken(name: str, act: str) -> None:
    """Two forms of GELU are one; that of gpt-oss is its own, whatever its config.json calls it."""
    config = as_mlx_lm_reads({**config_of(name), "hidden_act": act}, HERE)
    model = build(config)
    names = [key for key, _ in model.named_modules()]
    check_model(model, config, HERE)
    assert [key for key, _ in model.named_modules()] == names


@pytest.mark.parametrize("factor", [None, 1.1386294361119891])
def test_the_factor_of_attention_that_yarn_makes_is_taken(factor: float | None) -> None:
    """As OLMo 3 has it, and others leave it out."""
    scaling = {**YARN, "attention_factor": factor}
    entries = {"model_type": "llama", "rope_theta": 1e6, "rope_scaling": scaling}
    config = as_mlx_lm_reads({**SIZES, **entries}, HERE)
    check_model(build(config), config, HERE)


@pytest.mark.parametrize(
    ("entries", "original"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32768),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, 32768),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "original_max_position_embeddings": 16384,
            },
            16384,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            8192,
        ),
    ],
)
def test_yarn_begins_at_the_length_that_transformers_takes(
    entries: dict[str, Any], original: int
) -> None:
    """mlx-lm takes 4096 where the entry itself does not say."""
    sizes = {**SIZES, "model_type": "llama", "rope_theta": 1e6, "max_position_embeddings": 32768}
    model = build(as_mlx_lm_reads({**sizes, **entries}, HERE))
    rope = model.layers[0].self_attn.rope
    config = transformers.LlamaConfig(**{**sizes, **copy.deepcopy(entries)})
    if "original_max_position_embeddings" not in entries:
        assert config.rope_parameters["original_max_position_embeddings"] == original
    # YaRN's paper: what turns 32 times or more in that length stays as it is, what turns once or
    # less is slowed down whole.
    dims, base = rope.dims, 1e6
    plain = base ** (-np.arange(0, dims, 2) / dims)
    fast, slow = (
        dims * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1)
    )
    first, last = max(np.floor(fast), 0), min(np.ceil(slow), dims - 1)
    share = np.clip((np.arange(dims // 2) - first) / (last - first), 0, 1)
    wanted = plain * (1 - share) + plain / 4 * share
    assert np.allclose(1 / np.array(rope._freqs), wanted, rtol=1e-5)


LONGROPE = {"long_factor": [4.0, 8.0, 16.0, 32.0], "short_factor": [1.0, 1.1, 1.3, 1.7]}
PHI = {
    **{**SIZES, "model_type": "phi3", "rope_theta": 1e4, "head_dim": 16},
    **{"hidden_size": 64, "num_attention_heads": 4, "partial_rotary_factor": 0.5},
    **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
}


def longrope(x: np.ndarray, factors: list[float]) -> np.ndarray:
    """Queries or keys [..., L, d] of which the first dimensions are turned (LongRoPE's paper)."""
    dims, half = 2 * len(factors), len(factors)
    angles = np.arange(x.shape[-2])[:, None] / (factors * 1e4 ** (np.arange(0, dims, 2) / dims))
    scale = np.sqrt(1 + np.log(131072 / 4096) / np.log(4096))
    cos, sin = scale * np.cos(angles), scale * np.sin(angles)
    one, other, rest = x[..., :half], x[..., half:dims], x[..., dims:]
    return np.concatenate([one * cos - other * sin, other * cos + one * sin, rest], axis=-1)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_scaling": {"type": "longrope", **LONGROPE}},
        {"rope_scaling": {"type": "su", **LONGROPE}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONGROPE}},
    ],
)
def test_longrope_has_the_factors_of_short_texts(tmp_path: Path, entries: dict[str, Any]) -> None:
    """mlx-lm takes those of long texts always; the published models take them beyond 4096."""
    config = as_mlx_lm_reads({**PHI, **entries}, HERE)
    x = np.random.default_rng(0).standard_normal((1, 4, 300, 16)).astype(np.float32)
    made = np.array(build(config).layers[0].self_attn.rope(mx.array(x)))
    assert np.abs(made - longrope(x, LONGROPE["short_factor"])).max() < 1e-4
    assert np.abs(made - longrope(x, LONGROPE["long_factor"])).max() > 0.1
    # A model that was written with what mlx-lm reads is the same again.
    assert as_mlx_lm_reads(config, HERE) == config
    path = write_model(tmp_path / "m", {**PHI, **entries})
    assert context_length(path) == 4096
    edit_config(path, **config)
    assert context_length(path) == 4096
    same = {**LONGROPE, "long_factor": LONGROPE["short_factor"]}
    edit_config(path, **{**entries, "rope_scaling": {"type": "longrope", **same}})
    edit_config(path, rope_parameters=None)
    assert context_length(path) == 131072


@pytest.mark.parametrize(
    ("types", "period"), [(["s", "s", "f"] * 2, 3), (["s", "f"] * 3, 2), (["f"] * 6, 1)]
)
def test_layer_types_as_a_period(types: list[str], period: int) -> None:
    names = {"s": "sliding_attention", "f": "full_attention"}
    config = {**SIZES, "num_hidden_layers": 6, "layer_types": [names[kind] for kind in types]}
    read = as_mlx_lm_reads({**config, "model_type": "gemma3_text"}, HERE)
    assert read["sliding_window_pattern"] == period
    model = build(read)
    assert [layer.self_attn.is_sliding for layer in model.layers] == [kind == "s" for kind in types]


# --------------------------------------------------------------------------------- what is refused

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two bases": (
        {"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta is 10000.0 and rope_parameters' rope_theta is 1000000.0",
    ),
    "two types": (
        {"model_type": "llama", "rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}},
        "rope_scaling is of the type yarn and rope_parameters of the type default",
    ),
    "two factors": (
        {
            **{"model_type": "llama", "rope_scaling": YARN},
            "rope_parameters": {**YARN, "factor": 8.0, "rope_theta": 1e6},
        },
        "rope_scaling's factor is 4.0 and rope_parameters' is 8.0",
    ),
    "not an object": ({"model_type": "llama", "rope_parameters": 3}, "rope_parameters is 3"),
    "no field for scaling": (
        {"model_type": "gemma2", **SOFT_CAPS, "rope_parameters": {**YARN, "rope_theta": 1e4}},
        r"scaled \(yarn\), and mlx-lm has no scaled positions for gemma2",
    ),
    "scaling that the class drops": (
        {"model_type": "phi3", "rope_scaling": {**YARN, "long_factor": [1], "short_factor": [1]}},
        r"without scaled positions.*scaled \(yarn\)",
    ),
    "scaling that the class never looks at": (
        {
            **{"model_type": "qwen3_moe", "rope_theta": 1e6, "rope_scaling": YARN},
            **{**SOME_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
            **{"norm_topk_prob": True, "tie_word_embeddings": True},
        },
        r"without scaled positions.*scaled \(yarn\)",
    ),
    "part of a head": (
        {"model_type": "glm", "partial_rotary_factor": 0.5},
        "turns all 16 dimensions of a head.*partial_rotary_factor 0.5",
    ),
    "a base that the class does not read": (
        {"model_type": "gptj", "rope_theta": 5e5, "n_head": 4, "n_embd": 64, "n_layer": 2}
        | {"n_positions": 64, "n_inner": 128, "layer_norm_epsilon": 1e-5, "rotary_dim": 8},
        "rotary base 10000.*500000.0",
    ),
    "another factor of attention": (
        {"model_type": "llama", "rope_theta": 1e6, "rope_scaling": {**YARN, "attention_factor": 1}},
        "multiplies queries and keys by 1.139, .* says attention_factor 1:",
    ),
    "two kinds of positions": (
        {"model_type": "llama", "rope_parameters": BY_TYPE},
        "positions of their own for sliding_attention",
    ),
    "no period": (
        {
            **{"model_type": "gemma3_text", "num_hidden_layers": 3},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "layer 1 in layer_types is 'sliding_attention'",
    ),
    "another period": (
        {
            **{"model_type": "gemma3_text", "sliding_window_pattern": 4},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "sliding_window_pattern is 4",
    ),
    "layers that turn positions by mlx-lm's own count": (
        {
            **{"model_type": "llama4", "num_hidden_layers": 4},
            "text_config": {
                **{**SIZES, "model_type": "llama4_text", "attention_bias": False},
                **{"attention_chunk_size": 32, "interleave_moe_layer_step": 2},
                **{"intermediate_size_mlp": 128, "num_experts_per_tok": 1, "rope_theta": 5e5},
                **{"num_local_experts": 4, "use_qk_norm": True, "no_rope_layers": [1, 0, 1, 0]},
            },
        },
        r"llama4_text model whose layer 1 turns positions.*0 for it in no_rope_layers",
    ),
    "layers of one type that are not of one kind": (
        {
            **{"model_type": "recurrent_gemma", "attention_bias": False, "conv1d_width": 4},
            **{"attention_window_size": 32, "logits_soft_cap": 30.0, "rope_theta": 1e4},
            **{"embeddings_scale_by_sqrt_dim": True, "block_types": ["recurrent", "attention"]},
            "layer_types": ["recurrent", "recurrent", "attention", "recurrent"],
        },
        r"whose layer 1 keeps a RotatingKVCache and an earlier one of its type a ArraysCache",
    ),
    "another activation": (
        {"model_type": "llama", "hidden_act": "relu"},
        r"llama model with the activation silu, and the configuration says 'relu'",
    ),
    "another activation of experts": (
        {
            **{"model_type": "qwen3_moe", "rope_theta": 1e6, "hidden_act": "gelu"},
            **{**SOME_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
            **{"norm_topk_prob": True, "tie_word_embeddings": True},
        },
        r"with the activation silu, and the configuration says 'gelu'",
    ),
    "experts' weights that the class does not normalise": (
        {"model_type": "qwen2_moe", "norm_topk_prob": True},
        "norm_topk_prob is True, which mlx-lm passes over for qwen2_moe",
    ),
    "queries that the class does not clip": (
        {"model_type": "olmoe", "clip_qkv": 8.0},
        "clip_qkv is 8.0, which mlx-lm passes over for olmoe",
    ),
    "logits that the class does not bound": (
        {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
        "final_logit_softcapping is 30.0, which mlx-lm passes over for gemma3_text",
    ),
    "no such architecture": ({"model_type": "nonesuch"}, "no architecture 'nonesuch'"),
    "no model_type": ({}, "has no model_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_cannot_be_told_is_refused(name: str) -> None:
    entries, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        config = as_mlx_lm_reads({**SIZES, **entries}, HERE)
        check_model(build(config), config, HERE)


def test_opening_a_directory_refuses_it(tmp_path: Path) -> None:
    more = {"model_type": "phi3", "original_max_position_embeddings": 64}
    path = write_model(tmp_path / "m", {**SIZES, **more})
    edit_config(path, rope_scaling={**YARN, "long_factor": [1], "short_factor": [1]})
    with pytest.raises(UserError, match=r"m/config\.json: .*scaled \(yarn\)"):
        load(path)
    edit_config(path, model_type="llama", rope_scaling={"rope_type": "spiral", "factor": 2.0})
    with pytest.raises(UserError, match=r"m cannot be loaded: .*RoPE type spiral"):
        load(path)


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in SIZES.items() if key != "hidden_size"}
    with pytest.raises(UserError, match=r"config\.json: has no hidden_size"):
        as_mlx_lm_reads({**config, "model_type": "llama"}, HERE)
