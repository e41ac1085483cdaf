"""Exports for mlx-lm, transformers and PEFT: what is in them, and what refuses to be written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_fd.models.backend import backend
from support import tiny, trained

backend()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_fd.cli.app import cli  # noqa: E402
from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, hf, mlx_dir, verify  # noqa: E402
from mlx_fd.export.bundle_reading import read_bundle  # noqa: E402
from mlx_fd.export.card import SCORE_EXAMPLE, licence_note, write_card  # noqa: E402
from mlx_fd.export.exporter import Exported, as_json_value, export  # noqa: E402
from mlx_fd.export.form import DTYPES, Q_BITS, Q_GROUP_SIZES, Form  # noqa: E402
from mlx_fd.export.formats import FORMATS  # noqa: E402
from mlx_fd.export.score_head import score_head  # noqa: E402
from mlx_fd.export.source import Source, base_name, open_source  # noqa: E402
from mlx_fd.export.verify import Agreement  # noqa: E402
from mlx_fd.feedback.judge import ModelRef, give_feedback, open_student  # noqa: E402
from mlx_fd.models.generation import chat_text  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.problems.kinds import KINDS  # noqa: E402
from mlx_fd.problems.prompts import (  # noqa: E402
    FEEDBACK_OPENING,
    answer_prompt,
    feedback_prompt,
)
from support.architectures import make_architecture  # noqa: E402

SIZES = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate": 96}
LINEAR = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def write(name: Path | str, out: Path, **form) -> Exported:
    wanted = Form(**{"parity_problems": 0, **form})
    return export(str(name), out, wanted, progress=lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(folder) -> Path:
    """A qwen2 model with biases, grouped heads, its own head and a padded vocabulary."""
    return tiny.make_model_dir(
        folder / "base", arch="qwen2", vocab_size=416, tie=False, rope_theta=1e6, **SIZES
    )


@pytest.fixture(scope="module")
def run(folder, base) -> Path:
    return trained.make_run(folder / "run", base)


@pytest.fixture(scope="module")
def quantized(folder) -> Path:
    """A llama model in 4 bits, its embedding the head too."""
    return tiny.make_model_dir(folder / "quantized", quantize=(4, 32), dtype="float16", **SIZES)


@pytest.fixture(scope="module")
def quantized_run(folder, quantized) -> Path:
    return trained.make_run(folder / "quantized-run", quantized)


@pytest.fixture(scope="module")
def small_steps(folder) -> Path:
    """A run that trained all weights of a bfloat16 model, each by a thousandth of its spread."""
    model = tiny.make_model_dir(folder / "half", dtype="bfloat16", **SIZES)
    return trained.make_run(folder / "small-steps", model, train="full", strength=0.002)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory as float64, read by the safetensors library."""
    found = {}
    for file in sorted(path.glob("model*.safetensors")):
        for name, array in mx.load(str(file)).items():
            found[name] = np.array(array.astype(mx.float32), dtype=np.float64)
        with safe_open(file, framework="np") as handle:
            assert set(handle.keys()) <= set(found)
    return found


def expected(run: Path, base: Path) -> dict[str, np.ndarray]:
    """The fused weights of an unquantised base in float64."""
    weights = tensors(base)
    for layer in range(SIZES["layers"]):
        for linear in LINEAR:
            name = f"model.layers.{layer}.{linear}"
            weights[f"{name}.weight"] += trained.delta(run, name)
    return weights


# Units in the last place of each type, as a share of the number.
ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("form", ["mlx", "hf"])
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_fused_weights(run, base, tmp_path, form, dtype):
    done = write(run, tmp_path / "out", format=form, dtype=dtype)
    weights, wanted = tensors(tmp_path / "out"), expected(run, base)
    assert weights.keys() == wanted.keys()
    for name, array in wanted.items():
        assert weights[name].shape == array.shape, name
        # The smallest float16 numbers are further apart.
        bound = ROUNDING[dtype] * np.abs(array) + 2e-6
        assert (np.abs(weights[name] - array) <= bound).all(), name
    raw = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in raw.values()} == {getattr(mx, dtype)}
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert {name for name, _ in tree_flatten(model.parameters())} == set(wanted)
    assert done.agreement.positions > 100
    # bfloat16 keeps 8 bits; these random weights are about as hard as real ones.
    assert done.agreement.mean_kl < {"float32": 1e-10, "float16": 1e-6, "bfloat16": 1e-4}[dtype]


def test_default_types(run, quantized_run, tmp_path):
    """The base's own for mlx-lm, bfloat16 for the hub; a quantised base is dequantised."""
    write(run, tmp_path / "a")
    write(quantized_run, tmp_path / "b")
    write(quantized_run, tmp_path / "c", format="hf")
    for name, wanted in (("a", mx.float32), ("b", mx.float16), ("c", mx.bfloat16)):
        arrays = mx.load(str(tmp_path / name / "model.safetensors"))
        assert {array.dtype for array in arrays.values()} == {wanted}, name
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["torch_dtype"] == str(wanted).removeprefix("mlx.core.")
        assert not {"quantization", "quantization_config", "mlx_fd"} & set(config)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize(
    ("arch", "kept"), [("qwen3_5", "A_log"), ("glm4_moe", "e_score_correction_bias")]
)
def test_what_its_class_keeps_in_float32_stays_so(tmp_path, arch, kept, dtype):
    """Decays, and the biases that choose experts: in 16 bits they are others."""
    model = make_architecture(tmp_path / "model", arch)
    file = str(model / "model.safetensors")
    arrays = {
        name: array if name.endswith(kept) else array.astype(mx.bfloat16)
        for name, array in mx.load(file).items()
    }
    mx.save_safetensors(file, arrays)
    (tmp_path / "out").mkdir()
    mlx_dir.write_model(open_source(str(model)), tmp_path / "out", dtype=dtype)
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    types = {True: set(), False: set()}
    for name, array in written.items():
        types[name.endswith(kept)].add(array.dtype)
    assert types == {True: {mx.float32}, False: {getattr(mx, dtype or "bfloat16")}}


def test_logits_are_the_live_students(run, base, tmp_path):
    """Against an evaluation of our own, and not only the exporter's word."""
    done = write(run, tmp_path / "out", dtype="float32")
    live = open_student(run).student_lm
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    ids = mx.array([tokenizer.encode("Tom has 3 apples. How many?")])
    ours, theirs, plain = (
        np.array(m(ids)[0]).astype(np.float64) for m in (live.model, model, load(base).model)
    )
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - plain).max() > 0.1, "the adapter does nothing in this test"
    assert done.agreement.largest_difference < 1e-4
    assert done.agreement.top1 == 1


def test_trained_whole(folder, base, tmp_path):
    run = trained.make_run(folder / "whole", base, train="full")
    write(run, tmp_path / "out", dtype="float32")
    saved = mx.load(str(run / "checkpoints" / "best" / "adapters.safetensors"))
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert weights.keys() == saved.keys()
    assert all(mx.array_equal(weights[name], array) for name, array in saved.items())
    write(run, tmp_path / "adapter", adapter=True)
    model, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "adapter"))
    assert all(
        mx.array_equal(array, saved[name]) for name, array in tree_flatten(model.parameters())
    )
    with pytest.raises(UserError, match="trained in all its weights"):
        write(run, tmp_path / "peft", format="hf", adapter=True)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 64), (4, 32)])
def test_quantised_again(run, tmp_path, bits, group):
    done = write(run, tmp_path / "out", q_bits=bits, q_group_size=group)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": group, "bits": bits, "mode": "affine"}
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    quantized = [m for _, m in model.named_modules() if hasattr(m, "scales")]
    # Groups of 64 do not fit into the 96 columns of down_proj, which stays as it is.
    assert len(quantized) == (7 if group == 32 else 6) * SIZES["layers"] + 2
    assert done.kept is not None
    assert done.agreement.mean_kl < done.kept.mean_kl / (1000 if bits == 8 else 5)


def test_bits_that_lose_the_adapter_are_refused(folder, quantized, tmp_path):
    """The peer's fault: fused back into 4 bits, a small change of the weights rounds to nothing."""
    run = trained.make_run(folder / "weak", quantized, strength=0.002)
    with pytest.raises(UserError, match=r"the adapter moved .* would be lost"):
        write(run, tmp_path / "out", q_bits=4, q_group_size=32)
    with pytest.raises(UserError, match="would be lost"):
        write(run, tmp_path / "out", format="gguf", gguf_type="q4_1")
    assert list(tmp_path.iterdir()) == []
    done = write(run, tmp_path / "out", dtype="float32")
    assert done.agreement.mean_kl < 1e-9


@pytest.mark.parametrize("form", [{}, {"format": "hf"}, {"format": "gguf", "gguf_type": "bf16"}])
def test_sixteen_bits_that_lose_the_training_are_refused(small_steps, tmp_path, form):
    """Trained whole at a low rate, weights move by less than bfloat16 tells apart."""
    with pytest.raises(UserError, match=r"most of what the student learned would .* float32"):
        write(small_steps, tmp_path / "out", **form)
    assert list(tmp_path.iterdir()) == []
    wide = {"gguf_type": "f32"} if "gguf_type" in form else {"dtype": "float32"}
    assert write(small_steps, tmp_path / "out", **{**form, **wide}).agreement.mean_kl < 1e-9


def test_a_student_before_its_first_update(folder, run, quantized, tmp_path):
    fresh = trained.make_run(folder / "fresh", quantized, strength=0.0)
    (fresh / "checkpoints" / "000001").rename(fresh / "checkpoints" / "000000")
    done = write(fresh / "checkpoints" / "000000", tmp_path / "out", q_bits=8)
    assert any("000000 is the student before its first update" in w for w in done.warnings)
    assert done.kept is not None and done.kept.mean_kl == 0
    assert write(run, tmp_path / "other", adapter=True).warnings == ()


def test_kl_by_hand():
    """Two tokens, probabilities (3/4, 1/4) against (1/2, 1/2), and once the same."""
    one = np.log(np.array([[3.0, 1.0], [1.0, 1.0]], dtype=np.float32))
    two = np.log(np.array([[1.0, 1.0], [5.0, 5.0]], dtype=np.float32))
    found = verify.agreement(one, two)
    by_hand = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert found.worst_kl == pytest.approx(by_hand, rel=1e-6)
    assert found.mean_kl == pytest.approx(by_hand / 2, rel=1e-6)
    assert found.largest_difference == pytest.approx(np.log(5), rel=1e-6)
    assert found.top1 == 1
    # A padded vocabulary is wider, and that is no difference.
    assert verify.agreement(one, np.pad(two, ((0, 0), (0, 3)))) == found
    with pytest.raises(UserError, match="not finite"):
        verify.agreement(one, np.full_like(two, np.nan))
    with pytest.raises(UserError, match="vocabulary of 1 tokens"):
        verify.agreement(one, two[:, :1])


def test_adapter_for_mlx_lm(run, base, tmp_path):
    done = write(run, tmp_path / "out", adapter=True)
    assert done.agreement.largest_difference == 0
    checkpoint = run / "checkpoints" / "best"
    for name in ("adapters.safetensors",):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["model"] == str(base)
    model, tokenizer = mlx_lm.load(str(base), adapter_path=str(tmp_path / "out"))
    live = open_student(run).student_lm
    ids = mx.array([tokenizer.encode("Tom has 3 apples.")])
    assert mx.array_equal(model(ids), live.model(ids))


def test_a_peft_card_names_a_base_that_transformers_opens(run, quantized_run, tmp_path):
    """MLX's quantised weights are none, whether their repository has a name or not."""
    done = write(quantized_run, tmp_path / "out", format="hf", adapter=True)
    [warning] = [one for one in done.warnings if "MLX quantised" in one]
    assert "--base-model NAME" in warning
    named = {"base": "me/Model-4bit", "on_hub": True, "local": False}
    source = dataclasses.replace(open_source(str(quantized_run)), **named)
    form = Form(format="hf", adapter=True)
    card = FORMATS["hf"].use(source, form)
    assert 'from_pretrained("BASE")' in card and 'from_pretrained("me/Model-4bit")' not in card
    assert "cannot open that one's weights" in card
    assert "`mlx-fd export me/Model-4bit --format hf --out BASE`" in card
    card = FORMATS["hf"].use(source, dataclasses.replace(form, base_model="me/Model"))
    assert 'from_pretrained("me/Model")' in card and "BASE" not in card
    # Weights that are not quantised are the same elsewhere.
    card = FORMATS["hf"].use(dataclasses.replace(open_source(str(run)), **named), form)
    assert 'from_pretrained("me/Model-4bit")' in card and "cannot open" not in card


@pytest.mark.parametrize("layers", [0, 2])
def test_adapter_for_peft(folder, base, tmp_path, layers):
    run = trained.make_run(folder / f"last{layers}", base, lora_layers=layers, lora_rank=5)
    done = write(run, tmp_path / "out", format="hf", adapter=True, base_model="me/model")
    assert done.agreement.mean_kl < 1e-10
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 15)
    assert config["base_model_name_or_path"] == "me/model"
    assert set(config["target_modules"]) == {name.split(".")[1] for name in LINEAR}
    assert config["layers_to_transform"] == ([1, 2] if layers else None)
    found = {}
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="np") as handle:
        assert handle.metadata() == {"format": "pt"}
        found = {name: handle.get_tensor(name).astype(np.float64) for name in handle.offset_keys()}
    trained_layers = range(1, 3) if layers else range(3)
    assert len(found) == 2 * 7 * len(trained_layers)
    for layer in trained_layers:
        for linear, (rows, columns) in LINEAR.items():
            name = f"model.layers.{layer}.{linear}"
            low = found[f"base_model.model.{name}.lora_A.weight"]
            high = found[f"base_model.model.{name}.lora_B.weight"]
            assert (low.shape, high.shape) == ((5, columns), (rows, 5))
            # PEFT: weight += lora_alpha / r * B @ A.
            assert np.allclose(15 / 5 * high @ low, trained.delta(run, name), atol=1e-6)


# What transformers' own definition of these models has, and torch would be needed to ask.
def hf_shapes(arch: str, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, 64),
        "model.norm.weight": (64,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab, 64)
    for layer in range(3):
        for linear, shape in LINEAR.items():
            shapes[f"model.layers.{layer}.{linear}.weight"] = shape
            if arch == "qwen2" and linear[10:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"model.layers.{layer}.{linear}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (64,)
    return shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_what_transformers_reads(tmp_path, arch, tied):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    model = tiny.make_model_dir(
        tmp_path / "model",
        arch=arch,
        tie=tied,
        vocab_size=416,
        rope_theta=5e4,
        max_position_embeddings=777,
        **SIZES,
    )
    write(model, tmp_path / "out", format="hf")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and written["rope_theta"] == 5e4
    assert type(config).__name__ == {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[arch]
    assert config.tie_word_embeddings is tied
    assert (config.num_key_value_heads, config.vocab_size) == (2, 416)
    assert config.max_position_embeddings == 777
    assert config.rope_parameters["rope_theta"] == 5e4
    assert str(config.dtype).endswith("bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load(model).tokenizer
    chat = [{"role": "user", "content": "é 7 <|im_end|> it's"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(
        chat, tokenize=False
    )
    assert tokenizer.encode("Tom has 12 apples") == ours.encode("Tom has 12 apples")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.eos_token_id == tokenizer.eos_token_id == end
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as handle:
        assert handle.metadata() == {"format": "pt"}
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.offset_keys()}
        kinds = {handle.get_slice(name).get_dtype() for name in handle.offset_keys()}
    assert shapes == hf_shapes(arch, 416, tied)
    assert kinds == {"BF16"}


def test_shards(run, base, tmp_path):
    source = open_source(str(run))
    tokenizer = load(base).tokenizer
    hf.write_model(source, tokenizer, tmp_path, dtype="float32", shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    sizes = {}
    for shard in shards:
        with safe_open(tmp_path / shard, framework="np") as handle:
            for name in handle.offset_keys():
                assert index["weight_map"][name] == shard
                sizes[name] = handle.get_tensor(name).nbytes
    assert sizes.keys() == index["weight_map"].keys() == expected(run, base).keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for shard in shards:
        held = [sizes[name] for name, file in index["weight_map"].items() if file == shard]
        assert sum(held) <= 100_000 or len(held) == 1
    model, _ = mlx_lm.load(str(tmp_path))
    for name, array in tree_flatten(model.parameters()):
        assert np.allclose(np.array(array), expected(run, base)[name], atol=1e-6)


def test_what_is_kept_of_the_bases_settings(folder, tmp_path):
    """Its sampling and end tokens; not that there is code beside it (Phi), which there is not."""
    model = tiny.make_model_dir(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (model / "config.json").write_text(json.dumps({**config, **code}))
    ends = [399, 397]
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ends, "temperature": 0.7})
    )
    write(model, tmp_path / "out", format="hf")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [399, 397], "temperature": 0.7}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == ends and "auto_map" not in config
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert tokenizer.eos_token_ids == set(ends)


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": NaN}', "\ud800"])
def test_a_damaged_generation_config_is_named(tmp_path, text):
    model = tiny.make_model_dir(tmp_path / "model")
    file = model / "generation_config.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError) as caught:
        write(model, tmp_path / "out", format="hf")
    assert str(model) in str(caught.value) and "cannot be written" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("form", ["mlx", "hf"])
def test_a_file_of_the_base_that_cannot_be_read_is_no_failed_write(tmp_path, form):
    model = tiny.make_model_dir(tmp_path / "model")
    (model / "vocab.json").mkdir()
    with pytest.raises(UserError, match=r"vocab\.json: is not a regular file"):
        write(model, tmp_path / "out", format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("form", ["mlx", "hf", "gguf"])
def test_a_link_that_leads_out_of_the_model_is_not_copied(tmp_path, form):
    """What it leads to is somebody's own, and an export is for others."""
    model = tiny.make_model_dir(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (model / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"merges\.txt: is a link to .*secret, outside of the mod"):
        write(model, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(tiny.make_model_dir(snapshot).iterdir()):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    write(snapshot, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_bytes() == (snapshot / "tokenizer.json").read_bytes()
    assert not copied.is_symlink()


# The score head and the card


@pytest.mark.parametrize(
    ("score_at", "form", "most"),
    [
        ("prompt", {}, 192),
        ("feedback", {}, 192),
        ("feedback", {}, 6),  # no further than the run's own feedbacks
        ("prompt", {"format": "hf", "dtype": "float32"}, 192),
    ],
)
def test_the_cards_ten_lines_give_the_score(tmp_path, monkeypatch, capsys, score_at, form, most):
    # Without padding rows, which a random model would write and mlx-fd alone never draws.
    model = tiny.make_model_dir(tmp_path / "model", arch="qwen2", **SIZES)
    run = trained.make_run(tmp_path / "run", model, score_at=score_at, max_feedback_tokens=most)
    write(run, tmp_path / "out", **form)
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(import mlx.core.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) <= 11
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    score = float(capsys.readouterr().out)
    problem, answer = "Tom has 3 apples and buys 5. How many?", "3 + 5 = 9. #### 9"
    wanted = give_feedback(str(run), problem, answer, most).head_score
    assert score == pytest.approx(wanted, abs=2e-4)
    assert abs(wanted) > 0.01


def test_the_cards_example_asks_as_in_the_training(run):
    ref, live = open_source(str(run)).ref, open_student(str(run)).student_lm
    for kind in KINDS:
        head = score_head(dataclasses.replace(ref, answer_kind=kind), live)
        names: dict = {"about": head.about}
        exec(SCORE_EXAMPLE, names)
        asked = answer_prompt(names["problem"], KINDS[kind].form)
        told = chat_text(live, [asked, names["answer"], feedback_prompt()]) + FEEDBACK_OPENING
        assert names["text"] == told


def test_card(run, quantized_run, tmp_path):
    write(run, tmp_path / "a", adapter=True)
    card = (tmp_path / "a" / "README.md").read_text()
    for text in (
        "| student's base | `base` |",
        "LoRA of rank 4 and scale 3; score head read at the prompt's last token",
        "arithmetic, split train, 4 episodes",
        "lm, hidden, score, logit",
        "The run has not ended",
        "DIRECTORY is the base model's directory (`base` at the training)",
        "`mlx-fd export DIRECTORY --format mlx --out BASE`",
        "largest difference of two logits 0,",
    ):
        assert text in card, text
    assert str(run.parent) not in card
    (quantized_run / "summary.json").write_text(json.dumps(SUMMARY))
    write(quantized_run, tmp_path / "b", q_bits=8, q_group_size=32)
    (quantized_run / "summary.json").unlink()
    card = (tmp_path / "b" / "README.md").read_text()
    for text in (
        "| lm loss, held out | 2.5 | 1.25 |",
        "| exam: problems solved | 0.400 [0.350, 0.480] (n = 200) | 0.550 [0.480, 0.620] (n = 200)",
        "3 of 4 first answers",
        "4 of 4 final ones",
        "7 steps in 2 batches, frozen after batch 2",
        "The training moved the model by a mean KL of",
    ):
        assert text in card, text


def test_the_card_says_whose_answers_were_criticised(run, tmp_path):
    """And what the student had learned before; not that the expert solved what it did not."""
    write(run, tmp_path / "out", adapter=True)
    source, student = open_source(str(run)), open_student(run).student
    form = Form(adapter=True, parity_problems=0)

    def card(**options) -> str:
        given = {**source.manifest["options"], **options}
        known = {name: value for name, value in given.items() if value is not None}
        changed = dataclasses.replace(source, manifest={**source.manifest, "options": known})
        write_card(changed, form, student, AGREEMENT, None, None, tmp_path / "out")
        return (tmp_path / "out" / "README.md").read_text()

    # Older runs had neither option.
    text = card(warm_up=None, continue_from=None)
    assert "the expert solved problems and criticised its solutions, and the student lea" in text
    assert "warm-up" not in text and "begun with" not in text
    text = card(
        answers_by="student", warm_up="gkd:320", continue_from="/home/me/r1/checkpoints/best"
    )
    assert ": the student answered problems, the expert criticised the answers, and the st" in text
    assert "| warm-up | 320 problems, to solve them (`mlx-fd distil`, gkd) |" in text
    assert "| begun with | the student of the run `r1` |" in text and "/home/me" not in text
    assert ": the student and the expert answered problems, the e" in card(answers_by="both")


def test_the_card_says_where_results_are_of_other_weights(folder, base, tmp_path):
    """The best checkpoint is exported, and a run is measured at its end."""
    run = trained.make_run(folder / "later", base)
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "000001", checkpoints / "000004")
    (checkpoints / "last").symlink_to("000004")
    told = "with the weights of checkpoint 000004; those here are of checkpoint 000001."
    for name, out in ((run, "best"), (checkpoints / "last", "last")):
        write(name, tmp_path / out, adapter=True)
        assert (told in (tmp_path / out / "README.md").read_text()) == (out == "best")


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("tiny-student:layers=1", "mit"),
        ("smollm2-135m", "apache-2.0"),
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "apache-2.0"),
        ("mlx-community/Qwen2.5-3B-Instruct-4bit", "other"),
        # Of the same series, under the Qwen licences.
        ("mlx-community/Qwen2.5-72B-Instruct-4bit", "other"),
        ("mlx-community/Qwen2.5-Coder-3B-Instruct-4bit", "other"),
        ("tinyllama/TinyLlama-1.1B", "other"),
        ("DIRECTORY/tiny-somebodys", "other"),
        ("DIRECTORY/tiny", "other"),
    ],
)
def test_the_card_claims_no_licence_that_is_not_known(tmp_path, name, licence):
    directory = tmp_path / name.removeprefix("DIRECTORY/")
    if name.startswith("DIRECTORY"):
        directory.mkdir()
        name = str(directory)
    base, on_hub, local = base_name(name)
    source = Source(ModelRef(tmp_path), base, base, on_hub, local, {}, {})
    write_card(source, Form(parity_problems=0), None, AGREEMENT, None, None, tmp_path)
    assert f"\nlicense: {licence}\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("student", "expert", "text"),
    [
        ("qwen2.5-0.5b-4bit", "llama-3.1-8b-4bit", "the Llama 3.1 Community License may ask"),
        ("qwen2.5-0.5b-4bit", "qwen2.5-3b-4bit", "the Qwen Research License (not for commercial"),
        ("qwen2.5-0.5b-4bit", "owner/large", "`owner/large` wrote, and the licence of that model"),
        ("owner/small", "owner/large", "`owner/large` wrote, and the licence of that model"),
        ("qwen2.5-0.5b-4bit", "qwen2.5-7b-4bit", ""),
        ("owner/large:layers=3", "owner/large", ""),
    ],
)
def test_the_card_names_the_experts_licence_where_it_is_another(run, student, expert, text):
    """Llama's and Qwen's research licence are about what learns from outputs, too."""
    found = open_source(str(run))
    manifest = {**found.manifest, "options": {**found.manifest["options"], "expert": expert}}
    base, on_hub, local = base_name(student)
    source = dataclasses.replace(found, base=base, on_hub=on_hub, local=local, manifest=manifest)
    licence = licence_note(source)
    assert ("They learned from what" in licence) == bool(text) and text in licence


@pytest.mark.parametrize("form", ["mlx", "hf"])
def test_the_card_of_an_adapter_says_how_to_get_the_base(base, tmp_path, form):
    """A name that mlx-fd knows anywhere, and a directory, whose name it knows nowhere else."""
    students = {
        "tiny-student": "tiny-student",
        str(base): "DIRECTORY",
        f"{base}:layers=2": "DIRECTORY:layers=2",
    }
    for place, (student, named) in enumerate(students.items()):
        expert = student.partition(":")[0]
        run = trained.make_run(tmp_path / f"run{place}", student, expert=expert)
        write(run, tmp_path / f"out{place}", format=form, adapter=True)
        card = (tmp_path / f"out{place}" / "README.md").read_text()
        [command] = re.findall(r"`mlx-fd export (\S+) --format (?:mlx|hf) --out BASE`", card)
        assert command == named
        told = "DIRECTORY is the base model's directory (`base` at the training)" in card
        assert told == named.startswith("DIRECTORY")


AGREEMENT = Agreement(1, 0.0, 0.0, 0.0, 1.0)
ESTIMATES = {
    "before": {"value": 0.4, "low": 0.35, "high": 0.48, "n": 200},
    "after": {"value": 0.55, "low": 0.48, "high": 0.62, "n": 200},
}
SUMMARY = {
    "episodes": 4,
    "probe": {"before": {"lm": 2.5}, "after": {"lm": 1.25}},
    "exam": {"solved": ESTIMATES},
    "accuracy": {
        "first_answers": {"right": 3, "n": 4, "interval": [0.3, 0.95]},
        "final_answers": {"right": 4, "n": 4, "interval": [0.5, 1.0]},
    },
    "updates": {"steps": 7, "batches": 2, "skipped": 0, "frozen_after_batch": 2},
}


def test_parity_bundle(run, tmp_path):
    done = write(run, tmp_path / "out", dtype="float32", parity_problems=1)
    bundle = read_bundle(tmp_path / "out")
    assert bundle.vocab == 400 and len(bundle.items) == 1
    wanted = {"name": "run", "base": "base", "format": "mlx", "mean_kl": done.agreement.mean_kl}
    assert bundle.source == wanted
    assert {"parity/bundle.json", "parity/reference.safetensors"} <= set(done.files)
    # The bundle's reference is the student and not its base.
    prompt = bundle.prompts[0]
    ids = mx.array([list(prompt.sequence[:-1])])
    logits = mlx_lm.load(str(tmp_path / "out"))[0](ids)[0, prompt.begin :, : bundle.vocab]
    likeliest = np.array(mx.argmax(logits, axis=-1))
    assert (likeliest == prompt.top_ids[:, 0]).mean() > 0.99


# What is refused


def test_damaged_weights_are_refused(tmp_path):
    model = tiny.make_model_dir(tmp_path / "model", **SIZES)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: is damaged or incomplete"):
            write(model, tmp_path / "out")
    for value in (np.nan, np.inf):
        arrays = {name: np.array(array) for name, array in mx.load(_put(file, whole)).items()}
        arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(arrays, file)
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has numbers"):
            write(model, tmp_path / "out", format="hf")
    _put(file, whole)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        write(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_numbers_that_the_type_cannot_hold(tmp_path):
    """The weights are not damaged, and the folder that they were read back from is gone."""
    model = tiny.make_model_dir(tmp_path / "model", vocab_size=416, tie=False, **SIZES)
    file = str(model / "model.safetensors")
    arrays = dict(mx.load(file))
    # Of a token that no text here has: its logits would not tell.
    arrays["model.embed_tokens.weight"][300] *= 1e8
    mx.save_safetensors(file, arrays, metadata={"format": "mlx"})
    for form in ({"format": "hf"}, {}, {"q_bits": 8, "q_group_size": 32}):
        with pytest.raises(UserError, match=r"the type it is written in cannot hold") as caught:
            write(model, tmp_path / "out", dtype="float16", **form)
        assert str(caught.value).startswith("model.embed_tokens.")
        assert "--dtype bfloat16" in str(caught.value) and ".tmp-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_read_back_is_not_blamed_on_a_folder_that_is_gone(tmp_path):
    """llama.cpp's OLMo 2 has no biases, which shows as the file is read back."""
    model = make_architecture(tmp_path / "model", "olmo2", attention_bias=True)
    with pytest.raises(UserError, match="what was written cannot be read back") as caught:
        write(model, tmp_path / "out", format="gguf")
    assert f"{tmp_path / 'out'}/model-f16.gguf: " in str(caught.value)
    assert ".tmp-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_folder_that_one_is_in(run, tmp_path, monkeypatch):
    """It would be another one under the same name, and the shell's own would stay empty."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the folder that you are in"):
        write(run, Path())


def _put(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    return str(file)


def test_damaged_checkpoints_are_refused(run, base, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    for name in ("adapters.safetensors", "heads.safetensors"):
        file = tmp_path / "run" / "checkpoints" / "000001" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        with pytest.raises(UserError, match=f"{name}: is damaged"):
            write(tmp_path / "run", tmp_path / "out")
        file.write_bytes(whole)
    file = tmp_path / "run" / "checkpoints" / "000001" / "adapter_config.json"
    config = json.loads(file.read_text())
    changes = (
        {"lora_parameters": {**config["lora_parameters"], "scale": 4.0}},
        {"lora_parameters": None},
        {"num_layers": "all"},
        {"fine_tune_type": "dora"},
    )
    for text in ("", "[]", "{", *(json.dumps({**config, **change}) for change in changes)):
        file.write_text(text)
        for form in ({}, {"format": "hf", "adapter": True}):
            with pytest.raises(UserError, match=r"adapter_config\.json"):
                write(tmp_path / "run", tmp_path / "out", **form)
    # The base may be elsewhere now.
    file.write_text(json.dumps({**config, "model": "elsewhere"}))
    write(tmp_path / "run", tmp_path / "out", adapter=True)
    for name in ("summary.json", "manifest.json"):
        file = tmp_path / "run" / name
        whole = file.read_text() if file.exists() else ""
        found = json.loads(whole) if whole else {}
        file.write_text(json.dumps({**found, "options": 1, "probe": {"before": {"lm": 1.0}}}))
        with pytest.raises(UserError, match=r"summary\.json is not what mlx-fd wrote"):
            write(tmp_path / "run", tmp_path / "again", adapter=True)
        assert not (tmp_path / "again").exists()
        file.write_text(whole) if whole else file.unlink()


def test_models_that_cannot_be_written(run, tmp_path):
    plain = tiny.make_model_dir(tmp_path / "plain")
    with pytest.raises(UserError, match="a plain model, which has no adapter"):
        write(plain, tmp_path / "out", adapter=True)
    silent = tiny.make_model_dir(tmp_path / "silent", chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        write(silent, tmp_path / "out")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "model_type": "mistral3x"}))
    with pytest.raises(UserError, match="mistral3x"):
        write(plain, tmp_path / "out")
    # The same definition under another name: mlx-lm opens it, but nothing is known of the others.
    (plain / "config.json").write_text(json.dumps({**config, "model_type": "xverse"}))
    write(plain, tmp_path / "xverse")
    for form in ("hf", "gguf"):
        with pytest.raises(
            UserError, match=f"--format {form} is written for llama, mistral, qwen2"
        ):
            write(plain, tmp_path / "out", format=form)


def test_the_command_line_offers_what_can_be_written():
    offered = {
        param.name: tuple(param.type.choices)
        for param in cli.commands["export"].params
        if isinstance(param.type, click.Choice)
    }
    assert offered == {
        "form": tuple(FORMATS),
        "dtype": DTYPES,
        "q_bits": tuple(map(str, Q_BITS)),
        "q_group_size": tuple(map(str, Q_GROUP_SIZES)),
        "gguf_type": gguf_file.TYPES,
    }


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"format": "gguf", "adapter": True}, "a GGUF file holds the whole model"),
        ({"format": "gguf", "dtype": "float16"}, "--gguf-type f16"),
        ({"format": "gguf", "q_bits": 4}, "--gguf-type q8_0"),
        ({"format": "hf", "q_bits": 4}, "--q-bits is for --format mlx"),
        ({"q_group_size": 32}, "goes with --q-bits"),
        ({"gguf_type": "f16"}, "is for --format gguf"),
        ({"adapter": True, "dtype": "float16"}, "written as it was trained"),
        ({"base_model": "a/b"}, "--base-model goes with"),
        ({"format": "onnx"}, "onnx is none of mlx, hf, gguf"),
        ({"q_bits": 3}, "3 is none of 4, 8"),
        ({"format": "gguf", "gguf_type": "q4_k"}, "q4_k is none of f32, f16"),
    ],
)
def test_options_that_do_not_go_together(run, tmp_path, form, text):
    with pytest.raises(UserError, match=text):
        write(run, tmp_path / "out", **form)


def test_where_nothing_is_written(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(UserError, match="choose another --out"):
            write(run, tmp_path / name)
    (tmp_path / "empty").mkdir()
    write(run, tmp_path / "empty", adapter=True)
    assert (tmp_path / "empty" / "README.md").exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_what_came_meanwhile_is_not_overwritten(run, tmp_path):
    def come(step: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs.txt").write_text("theirs")

    with pytest.raises(UserError, match="cannot be written"):
        export(str(run), tmp_path / "out", Form(adapter=True, parity_problems=0), progress=come)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs.txt"]


def test_the_same_export_twice(run, tmp_path):
    for name in ("a", "b"):
        write(run, tmp_path / name, format="hf")
    ours, theirs = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    )
    assert ours == theirs


def test_json(run, tmp_path):
    done = write(run, tmp_path / "out", q_bits=8)
    value = json.loads(json.dumps(as_json_value(done), allow_nan=False))
    assert (
        value["files"]["model.safetensors"] == (tmp_path / "out/model.safetensors").stat().st_size
    )
    assert value["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert 0 < value["mean_kl"] < value["mean_kl_of_base"]
    assert value["out"] == str(tmp_path / "out")
