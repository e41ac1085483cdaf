"""LoRA and DoRA: where they go, what mlx-lm makes of what is written, and dropout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from mlx_fd.config import Config, ModelOptions, override  # noqa: E402
from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.models.lora import LoraDropout, dropping, lora_keys, put_lora  # noqa: E402
from mlx_fd.models.outline import build  # noqa: E402
from mlx_fd.models.student import make_student, save_student  # noqa: E402
from mlx_fd.models.view import block_states, find_view  # noqa: E402
from support.architectures import config_of, make_architecture  # noqa: E402
from support.tiny import make_model_dir  # noqa: E402

QWEN3_30B_A3B: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48},
    **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
    **{"num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    **{"vocab_size": 151936, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1e6, "max_position_embeddings": 262144, "norm_topk_prob": True},
    **{"quantization": {"group_size": 64, "bits": 4}},
}


def trained(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def modules_of(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0].partition("layers.")[2][2:] for name in trained(model)}


def test_a_mixture_of_experts_trains_its_attention() -> None:
    """830 million numbers, on every expert, were what mlx-lm's own choice comes to."""
    model = build({**QWEN3_30B_A3B, "num_hidden_layers": 4})
    put_lora(model, ModelOptions(lora_rank=16))
    assert modules_of(model) == {f"self_attn.{x}_proj" for x in "qkvo"}
    # Rank 16 on q and o (2048 x 4096) and k and v (2048 x 512) of each layer.
    each = 16 * 2 * ((2048 + 4096) + (2048 + 512))
    assert sum(array.size for array in trained(model).values()) == 4 * each
    assert 48 * each == 13_369_344


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qwen2_moe", {f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")}),
        ("gpt_oss", set()),
    ],
)
def test_shared_parts_train_and_routers_do_not(name: str, more: set[str]) -> None:
    model = build(config_of(name))
    keys = set(lora_keys(model, ModelOptions()) or ())
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    assert attention | more <= keys
    assert not any("switch" in key or "experts" in key or "router" in key for key in keys)
    assert "mlp.gate" not in keys


def test_what_a_block_reads_itself_keeps_its_module() -> None:
    """Gemma 3n's blocks clip weights of their own, which died with LoRA in their place."""
    model = build(config_of("gemma3n"))
    put_lora(model, ModelOptions())
    assert not any("_coefs" in name for name in trained(model))
    assert any("altup.modality_router" in name for name in trained(model))
    block_states(model, mx.array([[1, 2]]))


def test_dense_models_are_left_to_mlx_lm(tmp_path: Path) -> None:
    model = build(config_of("llama"))
    assert lora_keys(model, ModelOptions()) is None
    put_lora(model, ModelOptions(lora_layers=1))
    assert len(trained(model)) == 2 * 7
    assert lora_keys(model, ModelOptions()) is None, "nor once they have LoRA"


def test_chosen_modules_alone_train() -> None:
    model = build(config_of("qwen3_moe"))
    options = ModelOptions(lora_keys=("self_attn.q_proj", "mlp.switch_mlp.down_proj"))
    put_lora(model, options)
    assert modules_of(model) == set(options.lora_keys)
    wrong = ModelOptions(lora_keys=("q_proj",))
    with pytest.raises(UserError, match=r"no module|'q_proj'.*self_attn\.q_proj"):
        put_lora(build(config_of("llama")), wrong)
    with pytest.raises(UserError, match="lora_keys and lora_dropout are of LoRA"):
        override(Config(), {"train": "full", "lora_dropout": 0.1}, "test")
    assert override(Config(), {"lora_keys": ["a.b"]}, "test").models.lora_keys == ("a.b",)
    for value in (["a", "a"], [1], "a", [""]):
        with pytest.raises(UserError, match="lora_keys must be a list"):
            override(Config(), {"lora_keys": value}, "test")


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"train": "dora", "lora_dropout": 0.3}),
        ("llama", {"lora_keys": ("self_attn.q_proj", "mlp.up_proj"), "lora_layers": 2}),
        ("qwen3_moe", {"train": "dora"}),
        ("qwen3_moe", {"lora_keys": ("mlp.switch_mlp.up_proj",)}),
    ],
)
def test_mlx_lm_opens_what_is_written(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    """Unchanged, with the logits of the student that was saved."""
    path = make_architecture(tmp_path / "m", arch)
    models = ModelOptions(lora_rank=4, **options)
    loaded = load(path)
    student = make_student(loaded.view, 8, models, seed=3)
    mx.random.seed(1)
    student.model.update(
        tree_unflatten(
            [
                (name, value + 0.1 * mx.random.normal(value.shape))
                for name, value in trained(student.model).items()
            ]
        )
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_student(student, models, path, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == models.train
    assert config["lora_parameters"]["dropout"] == models.lora_dropout
    model, _ = mlx_lm.load(str(path), adapter_path=str(folder))
    ids = mx.array([[3, 5, 7, 11]])
    mine = student.model(ids)
    assert mx.abs(model(ids) - mine).max().item() < 1e-4
    base, _ = mlx_lm.load(str(path))
    assert mx.abs(base(ids) - mine).max().item() > 1e-2


def test_dora_begins_as_the_base_and_learns_lengths(tmp_path: Path) -> None:
    path = make_model_dir(tmp_path / "m")
    loaded = load(path)
    ids = mx.array([[3, 5, 7, 11]])
    before = loaded.model(ids)
    student = make_student(loaded.view, 8, ModelOptions(train="dora"), seed=0)
    assert mx.abs(student.model(ids) - before).max().item() < 1e-4
    parts = {name.rpartition(".")[2] for name in trained(student.model)}
    assert parts == {"lora_a", "lora_b", "m"}


def test_dora_is_refused_where_mlx_lm_has_none() -> None:
    experts = ModelOptions(train="dora", lora_keys=("mlp.switch_mlp.up_proj",))
    with pytest.raises(UserError, match=r"no DoRA for mlp\.switch_mlp\.up_proj"):
        put_lora(build(config_of("qwen3_moe")), experts)
    six = {**config_of("llama"), "quantization": {"group_size": 32, "bits": 6}}
    with pytest.raises(UserError, match="6-bit"):
        put_lora(build(six), ModelOptions(train="dora"))


# ------------------------------------------------------------------------------------ dropout


def test_a_student_in_which_nothing_would_train_is_refused() -> None:
    """BitNet's ternary layers take no LoRA: the run would go through and learn nothing."""
    model = build({**config_of("llama"), "model_type": "bitnet"})
    with pytest.raises(UserError, match="none of the blocks that train has a module for LoRA"):
        put_lora(model, ModelOptions(lora_rank=2))


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    drop = LoraDropout(0.25, seed=3)
    x = mx.ones((200, 200))
    assert mx.array_equal(drop(x), x), "outside of a step"
    drop.drop(0, 0)
    y = drop(x)
    share = float((y == 0).mean().item())
    # Four standard deviations of 40,000 draws.
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)
    assert set(y.flatten().tolist()) == {0.0, float(mx.array(1) / mx.array(0.75))}
    assert mx.array_equal(drop(x), y), "the same again within a step"
    drop.drop(0, 1)
    assert not mx.array_equal(drop(x), y)
    drop.drop(0, 0)
    assert mx.array_equal(drop(x), y), "whatever came between"
    drop.drop()
    assert mx.array_equal(drop(x), x)


def test_a_recomputed_block_drops_what_it_had_dropped(tmp_path: Path) -> None:
    """The gradient with recomputed activations is the one without; and no random state moves."""
    model = build({**config_of("llama"), "torch_dtype": "float32"})
    mx.random.seed(0)
    put_lora(model, ModelOptions(lora_dropout=0.5, lora_rank=4), seed=7)
    model.update(
        tree_unflatten(
            [
                (name, 0.2 * mx.random.normal(value.shape))
                for name, value in trained(model).items()
                if name.endswith("lora_b")
            ]
        )
    )
    tokens, view = mx.array([[3, 5, 7, 11, 2]]), find_view(model)

    def gradient(recompute: bool, step: int) -> dict[str, mx.array]:
        def loss() -> mx.array:
            return (view.forward(tokens, recompute=recompute).layers[-1] ** 2).sum()

        state = [mx.array(part) for part in mx.random.state]
        with dropping(model, step, 0):
            _, found = nn.value_and_grad(model, loss)()
            mx.eval(found)
        assert all(map(mx.array_equal, state, mx.random.state))
        return dict(tree_flatten(found))

    plain, again, other = gradient(False, 4), gradient(True, 4), gradient(False, 5)
    for name, value in plain.items():
        assert mx.allclose(value, again[name], rtol=1e-4, atol=1e-5), name
    assert any(not mx.allclose(value, other[name]) for name, value in plain.items())
    names = [module._seed for module in model.modules() if isinstance(module, LoraDropout)]
    assert len(set(names)) == len(names) == 7 * 4
