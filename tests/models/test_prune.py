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

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models.prune import kept_layers, prune, renamed  # noqa: E402


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
