"""Pruned checkpoints against the layers they were cut from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.models.backend import backend
from support import tiny

backend()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models.layer_kinds import nearest  # noqa: E402
from mlx_fd.models.loading import load_pair, open_lazily  # noqa: E402
from mlx_fd.models.prune import kept_layers, prune, renamed  # noqa: E402
from support.any_model import SIZES, write_model  # noqa: E402


@given(st.integers(1, 200), st.data())
def test_kept_layers_are_spread_evenly(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    kept = kept_layers(total, count)
    assert len(kept) == len(set(kept)) == count
    assert kept[0] == 0
    if count > 1:
        assert kept[-1] == total - 1
        steps = [b - a for a, b in itertools.pairwise(kept)]
        assert max(steps) - min(steps) <= 1


def test_kept_layers_by_hand() -> None:
    assert kept_layers(30, 15) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]
    assert kept_layers(4, 1) == [0]
    assert kept_layers(4, 4) == [0, 1, 2, 3]


def test_renamed() -> None:
    index = {0: 0, 7: 1, 11: 2}
    assert (
        renamed("model.layers.7.mlp.up_proj.weight", index) == "model.layers.1.mlp.up_proj.weight"
    )
    assert renamed("layers.11", index) == "layers.2"
    assert renamed("model.layers.1.mlp.up_proj.weight", index) is None
    assert renamed("model.layers.70.x", index) is None
    assert renamed("model.norm.weight", index) == "model.norm.weight"
    assert renamed("model.sublayers.7.x", index) == "model.sublayers.7.x"


@pytest.mark.parametrize("quantize", [None, (4, 32)])
@pytest.mark.parametrize("tie", [True, False])
def test_forward_is_that_of_the_kept_layers(
    tmp_path: Path, quantize: tuple[int, int] | None, tie: bool
) -> None:
    source = tiny.make_model_dir(tmp_path / "m", arch="qwen2", layers=5, tie=tie, quantize=quantize)
    prune(source, 3, tmp_path / "p")
    whole, _ = mlx_lm.load(str(source))
    cut, tokenizer = mlx_lm.load(str(tmp_path / "p"))
    ids = mx.array([tokenizer.encode("Tom has 3 apples")])
    hidden = whole.model.embed_tokens(ids)
    mask = nn.MultiHeadAttention.create_additive_causal_mask(ids.shape[1])
    for i in (0, 2, 4):
        hidden = whole.model.layers[i](hidden, mask, None)
    hidden = whole.model.norm(hidden)
    expected = whole.model.embed_tokens.as_linear(hidden) if tie else whole.lm_head(hidden)
    assert mx.allclose(cut(ids), expected, atol=1e-4)
    assert mx.abs(whole(ids) - expected).max() > 0.1


def test_configuration(tmp_path: Path) -> None:
    special = {"group_size": 32, "bits": 8}
    source = tiny.make_model_dir(
        tmp_path / "m",
        layers=4,
        quantize=(4, 32),
        layer_types=["full_attention", "full_attention"] + ["sliding_attention"] * 2,
        sliding_window=16,
    )
    config = json.loads((source / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key]["model.layers.1.mlp.up_proj"] = {"never": "kept"}
        config[key]["model.layers.3.mlp.up_proj"] = special
        config[key]["model.embed_tokens"] = special
    (source / "config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text("x")
    prune(source, 2, tmp_path / "p")
    pruned = json.loads((tmp_path / "p" / "config.json").read_text())
    assert pruned["num_hidden_layers"] == 2
    assert pruned["layer_types"] == ["full_attention", "sliding_attention"]
    for key in ("quantization", "quantization_config"):
        assert pruned[key] == {
            "group_size": 32,
            "bits": 4,
            "mode": "affine",
            "model.layers.1.mlp.up_proj": special,
            "model.embed_tokens": special,
        }
    assert pruned["mlx_fd"] == {"source": str(source), "layers": [0, 3]}
    unchanged = {"num_hidden_layers", "layer_types", "quantization", "quantization_config"}
    assert {k: v for k, v in pruned.items() if k not in unchanged | {"mlx_fd"}} == {
        k: v for k, v in config.items() if k not in unchanged
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "p" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "p" / "model.safetensors.index.json").read_text())
    stored = mx.load(str(tmp_path / "p" / "model.safetensors"))
    assert index["weight_map"] == dict.fromkeys(stored, "model.safetensors")


def test_sharded_checkpoints(tmp_path: Path) -> None:
    source = tiny.make_model_dir(tmp_path / "m", layers=4)
    weights = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    (source / "model.safetensors").unlink()
    for number in range(2):
        part = dict(list(weights.items())[number::2])
        mx.save_safetensors(str(source / f"model-0000{number + 1}-of-00002.safetensors"), part)
    prune(source, 2, tmp_path / "p")
    files = sorted((tmp_path / "p").glob("model*.safetensors"))
    assert len(files) == 2
    got = {name: array for file in files for name, array in mx.load(str(file)).items()}
    assert set(got) == {n for n in weights if "layers." not in n or n.split(".")[2] in "01"}
    for name, array in got.items():
        assert mx.array_equal(array, weights[name.replace("layers.1.", "layers.3.")])


def test_a_link_that_leads_out_of_the_model_is_not_copied(tmp_path: Path) -> None:
    model = tiny.make_model_dir(tmp_path / "m", layers=2)
    (tmp_path / "secret").write_text("mine")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes\.txt: is a link to"):
        prune(model, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (model / "notes.txt").unlink()
    (model / "notes.txt").symlink_to("config.json")
    prune(model, 1, tmp_path / "out")


def test_errors_leave_nothing(tmp_path: Path) -> None:
    source = tiny.make_model_dir(tmp_path / "m", layers=3)
    for layers in (0, 4):
        with pytest.raises(UserError, match="has 3 layers"):
            prune(source, layers, tmp_path / "p")
    (source / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        prune(source, 2, tmp_path / "p")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        prune(source, 2, tmp_path / "p")
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        prune(source, 2, tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# ----------------------------------------------------------------------- the kind of each layer

SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
SOFT_CAPS = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
# Architecture, entries, layers that stay, which.
MIXED: dict[str, tuple[dict[str, object], int, list[int] | None]] = {
    "smollm3 by its interval": (
        {"model_type": "smollm3", "num_hidden_layers": 12, "no_rope_layer_interval": 4},
        6,
        [0, 2, 4, 7, 9, 11],
    ),
    "smollm3 by its list": (
        {
            **{"model_type": "smollm3", "num_hidden_layers": 12, "no_rope_layer_interval": 4},
            "no_rope_layers": [1, 1, 1, 0] * 3,
        },
        6,
        [0, 2, 4, 7, 9, 11],
    ),
    "gemma3, deep as the 1B": (
        {
            **{"model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window": 32},
            **{"sliding_window_pattern": 6, "query_pre_attn_scalar": 16},
        },
        13,
        None,
    ),
    "gemma3 by its list": (
        {
            **{"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 32},
            "layer_types": SLIDING * 2,
        },
        4,
        None,
    ),
    "cohere2": (
        {
            **{"model_type": "cohere2", "num_hidden_layers": 8, "logit_scale": 0.0625},
            **{"layer_norm_eps": 1e-5, "sliding_window": 32, "sliding_window_pattern": 4},
        },
        4,
        None,
    ),
    "olmo3": (
        {
            **{"model_type": "olmo3", "num_hidden_layers": 8, "sliding_window": 32},
            **{"layer_types": SLIDING * 2, "rope_theta": 1e4, "tie_word_embeddings": False},
        },
        4,
        [0, 2, 5, 7],
    ),
    "gpt_oss": (
        {
            **{"model_type": "gpt_oss", "num_hidden_layers": 8, "sliding_window": 32},
            **{"layer_types": ["sliding_attention", "full_attention"] * 4, "rope_theta": 1e4},
            **{"num_local_experts": 4, "num_experts_per_tok": 2},
        },
        4,
        [0, 2, 5, 7],
    ),
    "gemma2": ({"model_type": "gemma2", "num_hidden_layers": 8, **SOFT_CAPS}, 4, [0, 2, 5, 7]),
    "minicpm": (
        {
            **{"model_type": "minicpm", "num_hidden_layers": 8, "scale_depth": 1.4},
            **{"scale_emb": 12, "dim_model_base": 16, "tie_word_embeddings": False},
        },
        4,
        [0, 2, 5, 7],
    ),
    "gemma4 without weights for all layers at once": (
        {
            **{"model_type": "gemma4_text", "num_hidden_layers": 6, "sliding_window": 32},
            **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 32},
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        },
        4,
        [0, 2, 3, 5],
    ),
    "qwen3_5": (
        {"model_type": "qwen3_5", "num_hidden_layers": 8, "full_attention_interval": 4, **LINEAR}
        | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
        4,
        None,
    ),
    "gpt2, whose layers are called h": (
        {
            **{"model_type": "gpt2", "n_layer": 5, "n_embd": 64, "n_head": 4, "n_ctx": 512},
            **{"n_positions": 512, "layer_norm_epsilon": 1e-5, "num_hidden_layers": 5},
        },
        3,
        [0, 2, 4],
    ),
    # The students that aliases bring, as deep as they are.
    "gemma-3-270m": (
        {
            **{"model_type": "gemma3_text", "num_hidden_layers": 18, "sliding_window": 32},
            "sliding_window_pattern": 6,
        },
        9,
        None,
    ),
    "qwen3.5-0.8b": (
        {"model_type": "qwen3_5", "num_hidden_layers": 24, "full_attention_interval": 4, **LINEAR},
        12,
        None,
    ),
    "gpt-oss-20b": (
        {
            **{"model_type": "gpt_oss", "num_hidden_layers": 24, "sliding_window": 32},
            **{"layer_types": ["sliding_attention", "full_attention"] * 12, "rope_theta": 1e4},
            **{"num_local_experts": 4, "num_experts_per_tok": 2},
        },
        6,
        [0, 5, 9, 14, 18, 23],
    ),
    "granite-4.0-h-350m": (
        {
            **{"model_type": "granitemoehybrid", "num_hidden_layers": 32, "rope_theta": 1e4},
            "layer_types": ["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)],
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "logits_scaling": 4.0},
            **{"residual_multiplier": 0.22, "position_embedding_type": "nope"},
            **{"attention_bias": False, "mamba_n_heads": 8, "mamba_d_head": 16},
            **{"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1},
            **{"mamba_conv_bias": True, "mamba_proj_bias": False, "shared_intermediate_size": 128},
            **{"num_local_experts": 0, "num_experts_per_tok": 0, "mlp_bias": False},
            "tie_word_embeddings": True,
        },
        16,
        [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31],
    ),
    "deepseek, whose first layers are dense": (
        {
            **{"model_type": "deepseek", "num_hidden_layers": 8, "first_k_dense_replace": 3},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            **{"n_shared_experts": 1, "num_key_value_heads": 4},
        },
        4,
        [0, 2, 5, 7],
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_layers_keep_their_kind(tmp_path: Path, name: str) -> None:
    """Each kept block, its cache and its weights are what they were in the whole model."""
    entries, count, expected = MIXED[name]
    source = write_model(tmp_path / "m", {**SIZES, **entries})
    prune(source, count, tmp_path / "p")
    whole, cut = open_lazily(source)[0], open_lazily(tmp_path / "p")[0]
    kept = json.loads((tmp_path / "p" / "config.json").read_text())["mlx_fd"]["layers"]
    assert len(kept) == count == len(cut.layers)
    assert kept == sorted(set(kept))
    assert expected is None or kept == expected
    caches = make_prompt_cache(whole), make_prompt_cache(cut)
    for new, old in enumerate(kept):
        one, other = whole.layers[old], cut.layers[new]
        assert type(caches[0][old]) is type(caches[1][new])
        assert getattr(caches[0][old], "max_size", 0) == getattr(caches[1][new], "max_size", 0)
        # The block alone, on the same states: what is not the same in it shows.
        states = mx.random.normal((1, 5, 64), key=mx.random.key(new))
        assert mx.array_equal(block_output(one, states), block_output(other, states))
    # And the blocks as the two models put them together.
    assert mx.isfinite(cut(mx.array([[5, 6, 7]]))).all()


def block_output(block: nn.Module, states: mx.array) -> mx.array:
    made = block(states, None, None)
    return made[0] if isinstance(made, tuple) else made


def test_the_kept_layers_are_the_nearest(tmp_path: Path) -> None:
    """Against all choices of the right kinds, one by one."""
    types = [(i + 1) % 3 == 0 for i in range(9)]
    kinds: list[dict[str, object]] = [{"full": full} for full in types]
    for count in range(1, 10):
        even = kept_layers(9, count)
        wanted = kinds[:count]
        cost = {
            choice: sum((a - b) ** 2 for a, b in zip(choice, even, strict=True))
            for choice in itertools.combinations(range(9), count)
            if [kinds[index] for index in choice] == wanted
        }
        chosen = nearest(kinds, wanted, even)
        assert cost[tuple(chosen)] == min(cost.values())
    assert nearest(kinds, [{"full": None}], [0]) == []


def test_a_cut_that_would_change_a_kind_is_refused(tmp_path: Path) -> None:
    # Each layer of Lightning attention forgets at a rate of its own, by its place among all.
    entries = {
        **{"model_type": "bailing_moe_linear", "num_hidden_layers": 8, "layer_group_size": 4},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"num_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1},
        **{"rope_theta": 1e4, "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True},
        **{"max_window_layers": 4, "n_group": 1, "topk_group": 1, "group_norm_size": 1},
        **{"tie_word_embeddings": False, "norm_head": False, "routed_scaling_factor": 1.0},
        **{"num_nextn_predict_layers": 0, "score_function": "sigmoid"},
    }
    source = write_model(tmp_path / "m", {**SIZES, **entries})
    with pytest.raises(UserError, match=r"no 4 of its 8 layers .*layer 2 .*its kind: .*_slope"):
        prune(source, 4, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_cut_without_the_layer_that_the_model_looks_for_is_refused(tmp_path: Path) -> None:
    entries, _, _ = MIXED["gemma3, deep as the 1B"]
    source = write_model(tmp_path / "m", {**SIZES, **entries})
    with pytest.raises(UserError, match=r"m:layers=3: no 3 of its 26 layers"):
        prune(source, 3, tmp_path / "p")


def test_a_language_model_is_cut_out_of_its_wrapper(tmp_path: Path) -> None:
    text = {**SIZES, "model_type": "gemma3_text", "sliding_window": 32, "num_hidden_layers": 6}
    text["sliding_window_pattern"] = 3
    source = write_model(
        tmp_path / "m", {"model_type": "gemma3", "vocab_size": 400, "text_config": text}
    )
    weights = mx.load(str(source / "model.safetensors"))
    vision = {f"vision_tower.encoder.layers.{i}.weight": mx.ones((8, 8)) for i in range(6)}
    mx.save_safetensors(str(source / "model.safetensors"), {**weights, **vision})
    prune(source, 3, tmp_path / "p")
    stored = mx.load(str(tmp_path / "p" / "model.safetensors"))
    assert not [name for name in stored if "vision" in name]
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    kept = config["mlx_fd"]["layers"]
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    for new, old in enumerate(kept):
        assert mx.array_equal(stored[name.format(new)], weights[name.format(old)])
    expert, student = load_pair(source, tmp_path / "p")
    # Of a pruned student's weights those of the expert are used.
    one = dict(tree_flatten(expert.model.parameters()))
    other = dict(tree_flatten(student.model.parameters()))
    assert other[name.format(1)] is one[name.format(kept[1])]


def test_weights_are_shared_whatever_the_layers_are_called(tmp_path: Path) -> None:
    entries, count, kept = MIXED["gpt2, whose layers are called h"]
    assert kept is not None
    source = write_model(tmp_path / "m", {**SIZES, **entries})
    prune(source, count, tmp_path / "p")
    for path, index in ((tmp_path / "p", kept), (source, range(5))):
        expert, student = load_pair(source, path)
        one = dict(tree_flatten(expert.model.parameters()))
        other = dict(tree_flatten(student.model.parameters()))
        assert len(student.model.layers) == len(index)
        for new, old in enumerate(index):
            name = "model.h.{}.mlp.c_fc.weight"
            assert other[name.format(new)] is one[name.format(old)]
