"""Models in MLX's floating-point block formats, and what becomes of them in GGUF files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_fd.models.backend import backend
from support import trained
from support.architectures import make_architecture

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.mla import MultiLinear  # noqa: E402
from mlx_lm.models.switch_layers import SwitchLinear  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, hf, verify  # noqa: E402
from mlx_fd.export.source import fused, open_source  # noqa: E402
from mlx_fd.models.dense import dequantize  # noqa: E402
from mlx_fd.models.families import FAMILIES  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.gguf_layout import interleave, interleaved_heads, tensor_names  # noqa: E402
from mlx_fd.models.loading import load, open_lazily  # noqa: E402

MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def make(folder: Path, name: str, mode: str, **options: Any) -> Path:
    """A random model in one of MLX's modes; what is not quantised is in bfloat16."""
    model_dir = make_architecture(folder / "model", name, **options)
    group, bits = MODES[mode]
    model, _ = open_lazily(model_dir)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=group, bits=bits, mode=mode)
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    (model_dir / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(model_dir / "model.safetensors"), weights, metadata={"format": "mlx"})
    return model_dir


def write(model: Path, file: Path, kind: str) -> gguf_file.Written:
    source = open_source(str(model))
    return gguf_file.write_file(source, load(source.ref.model).tokenizer, file, kind=kind)


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_mxfp4_keeps_its_numbers_both_ways(tmp_path, name):
    """As the gguf package reads them, and read back as they were, to the bit."""
    model = make(tmp_path, name, "mxfp4")
    done = write(model, tmp_path / "m.gguf", "mxfp4")
    base, _ = open_lazily(model)
    quantized = {n: m for n, m in base.named_modules() if hasattr(m, "scales")}
    router = [n for n in quantized if n.endswith("router")]
    assert done.carried == done.kinds["mxfp4"] == len(quantized) - len(router) > 20
    found = tensors(tmp_path / "m.gguf")
    name_of = tensor_names(FAMILIES[name], 4)
    for module in quantized.keys() - set(router):
        part = quantized[module]
        wanted = np.array(
            mx.dequantize(
                part.weight, part.scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32
            )
        )
        file_name = name_of(f"{module}.weight")
        heads = interleaved_heads(FAMILIES[name], file_name, 4, 2)
        wanted = interleave(wanted, heads) if heads else wanted
        tensor = found[file_name]
        assert tensor.tensor_type.name == "MXFP4"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, wanted), module
    convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = (
        mx.load(str(path / "model.safetensors")) for path in (model, tmp_path / "back")
    )
    kept = [n for n in before if n.rpartition(".")[0] in quantized.keys() - set(router)]
    assert all(mx.array_equal(before[n], after[n]).item() for n in kept) and len(kept) > 40
    chat = verify.role_chat(load(model))
    ours, theirs = (verify.logits_of(load(path), chat) for path in (model, tmp_path / "back"))
    assert verify.agreement(ours, theirs).mean_kl < 1e-5


@pytest.mark.parametrize(
    ("mode", "kind", "kl"),
    [
        ("mxfp4", "f16", 1e-4),
        ("mxfp4", "mxfp4", 0.03),
        ("mxfp4", "q8_0", 0.03),
        ("nvfp4", "f16", 1e-4),
        ("nvfp4", "q8_0", 0.03),
        ("mxfp8", "bf16", 1e-3),
    ],
)
def test_llama_cpp_reads_every_mode(tmp_path, mode, kind, kl):
    """llama.cpp rounds what it multiplies with blocks to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = make(tmp_path, "llama", mode)
    done = write(model, tmp_path / "m.gguf", kind)
    # The nearest that keeps all numbers: a base in MXFP4 stays what it is.
    assert done.kinds == {("mxfp4" if (mode, kind) == ("mxfp4", "q8_0") else kind): 30}
    loaded = load(model)
    chat = verify.role_chat(loaded)
    engine = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=512, logits_all=True, verbose=False, n_threads=1
    )
    engine.eval(list(chat))
    theirs = np.array(engine.scores[: len(chat) - 1])
    assert verify.agreement(verify.logits_of(loaded, chat), theirs).mean_kl < kl


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 64, "q4_1"), (8, 32, "q8_0")])
def test_experts_in_affine_blocks(tmp_path, bits, group, kind):
    """Each expert's rows are blocks like any matrix's; what no block holds is rounded to one."""
    model_dir = make_architecture(
        tmp_path / "model", "qwen3_moe", mlp_only_layers=[], moe_intermediate_size=64
    )
    model, _ = open_lazily(model_dir)
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=group, bits=bits)
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization"] = {"group_size": group, "bits": bits}
    (model_dir / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(model_dir / "model.safetensors"), weights, metadata={"format": "mlx"})
    done = write(model_dir, tmp_path / "m.gguf", kind)
    # 8 bits of MLX have a bias of their own, which Q8_0 has not.
    assert done.carried == (29 if bits == 4 else 0) and done.kinds == {kind: 29, "f32": 4}
    wanted = dict(dequantize(model).named_modules())["model.layers.1.mlp.switch_mlp.up_proj"]
    tensor = tensors(tmp_path / "m.gguf")["blk.1.ffn_up_exps.weight"]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    difference = np.abs(found.reshape(wanted.weight.shape) - np.array(wanted.weight)).max()
    assert difference == 0 if bits == 4 else difference < 0.01
    convert(tmp_path / "m.gguf", tmp_path / "back")
    read = dict(dequantize(load(tmp_path / "back").model).named_modules())
    assert np.array_equal(read["model.layers.1.mlp.switch_mlp.up_proj"].weight, found)


def test_mxfp4_is_for_models_in_it(tmp_path):
    model = make(tmp_path, "llama", "nvfp4")
    with pytest.raises(UserError, match=r"none of this one is; choose q8_0"):
        write(model, tmp_path / "m.gguf", "mxfp4")


@pytest.mark.parametrize("mode", MODES)
def test_a_small_adapter_is_not_rounded_away(tmp_path, mode):
    """Fused in float32, whatever the base: in bfloat16 this one would be gone."""
    model = make(tmp_path, "llama", mode)
    run = trained.make_run(tmp_path / "run", model, strength=1e-5)
    module = "model.layers.1.mlp.up_proj"
    base, _ = open_lazily(model)
    part = dict(base.named_modules())[module]
    group, bits = MODES[mode]
    before = np.array(
        mx.dequantize(
            part.weight, part.scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32
        )
    ).astype(np.float64)
    after = np.array(dict(fused(open_source(str(run)).ref).named_modules())[module].weight)
    delta = trained.delta(run, module)
    assert np.abs(after - before - delta).max() < 1e-6 < np.abs(delta).max()


@pytest.mark.parametrize("touched", [False, True])
def test_the_experts_of_gpt_oss_stay_in_mxfp4(tmp_path, touched):
    """As the published ones are, which mlx-lm reads; trained experts are written as numbers."""
    model = make(tmp_path, "gpt_oss", "mxfp4")
    keys = ("self_attn.q_proj", "mlp.experts.up_proj" if touched else "self_attn.v_proj")
    run = trained.make_run(tmp_path / "run", model, strength=0.2, lora_keys=keys)
    source = open_source(str(run))
    loaded = load(model)
    chat = verify.role_chat(loaded)
    (tmp_path / "hf").mkdir()
    (tmp_path / "scratch").mkdir()
    hf.write_model(source, loaded.tokenizer, tmp_path / "hf", dtype="float32")
    assert hf.mlx_opens(source) is not touched
    written = mx.load(str(tmp_path / "hf" / "model.safetensors"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    before = "model.layers.1.mlp.experts.gate_up_proj"
    if touched:
        assert written[before].shape == (4, 64, 192) and "quantization_config" not in config
    else:
        assert written[f"{before}_blocks"].shape == (4, 192, 2, 16)
        assert written[f"{before}_scales"].shape == (4, 192, 2)
        assert config["quantization_config"]["quant_method"] == "mxfp4"
    back = load(hf.read_back(tmp_path / "hf", tmp_path / "scratch"))
    dense = fused(source.ref)
    wanted = verify.logits_of(dataclasses.replace(loaded, model=dense), chat)
    found = verify.agreement(wanted, verify.logits_of(back, chat))
    assert found.mean_kl < 1e-8
    assert verify.agreement(wanted, verify.logits_of(loaded, chat)).mean_kl > 1e-3


def test_a_global_scale_is_part_of_the_numbers():
    """nvfp4 of experts may have a scale of each expert's, which mlx-lm's dequantize_model drops."""
    mx.random.seed(0)
    experts = SwitchLinear(32, 16, 3, bias=True)
    experts.weight = 100 * experts.weight
    model = nn.Module()
    model.experts = experts.to_quantized(16, 4, "nvfp4", global_scale=True)
    dense = dequantize(model).experts
    assert dense.weight.dtype == mx.float32
    # The widest step of four bits is from 4 to 6, the largest.
    assert mx.abs(dense.weight - experts.weight).max() < 0.18 * mx.abs(experts.weight).max()
    assert mx.array_equal(dense.bias, experts.bias)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_matrices_of_latent_attention_are_dequantised_too(mode):
    """One of each head's (DeepSeek V3, GLM-4.7-Flash): left packed, no export of them opens."""
    mx.random.seed(0)
    block = nn.Module()
    block.unembed_out = MultiLinear(64, 32, 3)
    nn.quantize(block, group_size=32, bits=4, mode=mode)
    x = mx.random.normal((1, 3, 5, 64))
    wanted = block.unembed_out(x)
    dense = dequantize(block).unembed_out
    assert isinstance(dense, MultiLinear) and dense.weight.dtype == mx.float32
    assert mx.allclose(dense(x), wanted, atol=1e-5)
