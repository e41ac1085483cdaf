"""GGUF files: read back by our reader, by gguf's own code, and by llama.cpp where it is there."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from tokenizers import pre_tokenizers as pre

from mlx_fd.models.backend import backend
from support import tiny, trained
from support.gguf_files import write_gguf

backend()

import mlx.core as mx  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, verify  # noqa: E402
from mlx_fd.export.exporter import export  # noqa: E402
from mlx_fd.export.form import Form  # noqa: E402
from mlx_fd.export.gguf_tokenizer import read_vocabulary  # noqa: E402
from mlx_fd.export.source import open_source  # noqa: E402
from mlx_fd.feedback.judge import give_feedback, open_student  # noqa: E402
from mlx_fd.models import gguf_reading  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.gguf_layout import interleave  # noqa: E402
from mlx_fd.models.gguf_tokens import (  # noqa: E402
    CONTROL,
    NORMAL,
    PRETOKENIZERS,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
)
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.models.resolve import smollm2_file  # noqa: E402
from support.draws import draws  # noqa: E402
from support.thinkers import TEMPLATES  # noqa: E402

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(model: Path | str, file: Path, kind: str | None = None) -> gguf_file.Written:
    source = open_source(str(model))
    return gguf_file.write_file(source, load(source.ref.model).tokenizer, file, kind=kind)


def stored(path: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array(array) for name, array in mx.load(str(path / "model.safetensors")).items()
    }


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama-tied", {"arch": "llama"}),
    ("llama-untied", {"arch": "llama", "tie": False, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    ("llama-yarn-biases", {"rope_scaling": YARN, "attention_bias": True, "mlp_bias": True}),
    ("llama-wide-heads", {"arch": "llama", "head_dim": 32, "vocab_size": 416}),
    ("qwen2-tied", {"arch": "qwen2", "vocab_size": 416, "rope_theta": 1e6}),
    ("qwen2-untied", {"arch": "qwen2", "tie": False, "vocab_size": 432}),
]


@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_round_trip(tmp_path, name, options):
    """In float32 nothing is rounded, so our reader must bring back the very numbers."""
    model = tiny.make_model_dir(tmp_path / "model", **SIZES, **options)
    write(model, tmp_path / "m.gguf", "f32")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    ours, theirs = stored(model), stored(tmp_path / "back")
    assert ours.keys() == theirs.keys()
    for tensor, array in ours.items():
        assert np.array_equal(theirs[tensor], array), tensor
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (model, tmp_path / "back")
    )
    for key in before.keys() - {"pad_token_id"}:
        assert after[key] == before[key], key
    one, two = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (model, tmp_path / "back"))
    assert one.get_vocab() == two.get_vocab()
    text = "<|im_start|>user\nTom's 12 apples, naïve 日本 🙂\n\n  x<|im_end|>"
    assert one.encode(text).ids == two.encode(text).ids
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == tiny.CHAT_TEMPLATE
    assert (settings["eos_token"], settings["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert "bos_token" not in settings


def test_rows_are_interleaved_as_llama_cpp_wants():
    """Its converter's own three lines (reshape, swap, reshape), on four rows of one head by eye."""
    rows = np.arange(8)[:, None]
    assert interleave(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_1", "q4_0"])
def test_types(tmp_path, kind):
    """Each matrix is within half a step of its type, as gguf's own code reads it."""
    model = tiny.make_model_dir(tmp_path / "model", arch="qwen2", **SIZES)
    done = write(model, tmp_path / "m.gguf", kind)
    assert (done.kinds, done.carried) == ({kind: 15}, 0)
    weights = stored(model)
    for name, target in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor, array = tensors(tmp_path / "m.gguf")[name], weights[target].astype(np.float64)
        if array.ndim == 1:
            assert tensor.tensor_type == Kind.F32 and np.array_equal(tensor.data, array)
            continue
        assert tensor.tensor_type == Kind[kind.upper()]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        groups = np.abs((found - array).reshape(len(array), -1, 32)).max(-1)
        values = array.reshape(len(array), -1, 32)
        largest, spread = np.abs(values).max(-1), values.max(-1) - values.min(-1)
        # Half a step, and what rounding the scale to 16 bits adds at the far end.
        step = {
            "f16": largest * 2.0**-11,
            "bf16": largest * 2.0**-8,
            "q8_0": largest * (1 / 254 + 2.0**-11),
            "q4_1": spread * (1 / 30 + 2.0**-9),
            "q4_0": largest * (1 / 8 + 2.0**-10),
        }[kind]
        assert (groups <= step + 1e-7).all(), name
    assert (
        fields(tmp_path / "m.gguf")["general.file_type"]
        == {
            "f16": 1,
            "bf16": 32,
            "q8_0": 7,
            "q4_1": 3,
            "q4_0": 2,
        }[kind]
    )


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_blocks_come_back_bit_for_bit(tmp_path, arch, kind):
    """A file of each block type, read and written again: the same bytes in every tensor."""
    name = "qwen2" if arch == "qwen2" else "gpt-2"
    write_gguf(tmp_path / "a.gguf", arch=arch, kind=kind, tied=False, pre=name)
    convert(tmp_path / "a.gguf", tmp_path / "model")
    done = write(tmp_path / "model", tmp_path / "b.gguf", kind.name.lower())
    assert done.carried == 16 and done.kinds == {kind.name.lower(): 16}
    ours, theirs = tensors(tmp_path / "b.gguf"), tensors(tmp_path / "a.gguf")
    assert ours.keys() == theirs.keys()
    for tensor, wanted in theirs.items():
        assert ours[tensor].tensor_type == wanted.tensor_type
        assert np.array_equal(ours[tensor].data, wanted.data), tensor


@pytest.mark.parametrize(("group", "dtype"), [(32, "float16"), (64, "float16"), (128, "bfloat16")])
def test_mlx_groups_carry_over(tmp_path, group, dtype):
    """MLX's larger groups are several blocks of 32 with the same scale."""
    sizes = {**SIZES, "hidden": 128, "intermediate": 256}
    model = tiny.make_model_dir(
        tmp_path / "model", quantize=(4, group), dtype=dtype, vocab_size=400, **sizes
    )
    done = write(model, tmp_path / "m.gguf", "q4_1")
    # A bfloat16 may be too small for a float16; with these weights hardly any is.
    assert done.carried == 15 if dtype == "float16" else done.carried > 7
    arrays = mx.load(str(model / "model.safetensors"))
    module = "model.layers.1.mlp.down_proj"
    words = np.array(arrays[f"{module}.weight"])
    integers = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(128, 256)
    scales, biases = (
        np.repeat(np.array(arrays[f"{module}.{part}"].astype(mx.float32)), group, axis=-1)
        for part in ("scales", "biases")
    )
    tensor = tensors(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(found, scales * integers.astype(np.float32) + biases)


def test_what_does_not_fit_is_rounded_anew(tmp_path):
    """8 bits with a free bias, or scales that float16 cannot hold, are no block type's."""
    for name, quantize, dtype in (("a", (8, 32), "float16"), ("b", (4, 32), "float32")):
        model = tiny.make_model_dir(tmp_path / name, quantize=quantize, dtype=dtype, **SIZES)
        done = write(model, tmp_path / f"{name}.gguf", "q8_0")
        assert done.carried == 0 and done.kinds == {"q8_0": 15}
        convert(tmp_path / f"{name}.gguf", tmp_path / f"{name}-back")
        chat = verify.role_chat(load(model))
        ours, theirs = (
            verify.logits_of(load(path), chat) for path in (model, tmp_path / f"{name}-back")
        )
        assert verify.agreement(ours, theirs).mean_kl < 1e-3


def test_only_what_was_trained_is_rounded(tmp_path):
    model = tiny.make_model_dir(tmp_path / "model", quantize=(4, 32), dtype="float16", **SIZES)
    run = trained.make_run(tmp_path / "run", model, lora_layers=1)
    done = write(run, tmp_path / "m.gguf", "q4_1")
    # The embedding and the first of two layers.
    assert done.carried == 8 and done.kinds == {"q4_1": 15}


@pytest.mark.parametrize("kind", [None, "q8_0", "q4_0", "q4_1"])
def test_numbers_that_float16_cannot_hold(tmp_path, kind):
    """Of 4 and 8 bits the scales are in float16."""
    model = tiny.make_model_dir(tmp_path / "model", **SIZES)
    arrays = mx.load(str(model / "model.safetensors"))
    arrays["model.layers.0.mlp.up_proj.weight"] *= 1e9
    mx.save_safetensors(str(model / "model.safetensors"), arrays, metadata={"format": "mlx"})
    name = kind or "f16"
    with pytest.raises(UserError, match=rf"^model\..*up_proj\.weight has numbers that {name} cann"):
        write(model, tmp_path / "out.gguf", kind)
    (tmp_path / "out.gguf").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_that_other_files_than_tokenizer_json_name(tmp_path):
    """transformers takes them from tokenizer_config.json; in the file they are no plain text."""
    model = tiny.make_model_dir(tmp_path / "model", vocab_size=416, **SIZES)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"] = {
        "400": {"content": "<think>", "special": False, **flags},
        "401": {"content": "<|tool|>", "special": True, **flags},
    }
    file.write_text(json.dumps(settings))
    # Of a token in the vocabulary tokenizer.json need not say what it is.
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    first, *content["added_tokens"] = content["added_tokens"]
    content["model"]["vocab"][first["content"]] = first["id"]
    file.write_text(json.dumps(content))
    loaded = load(model)
    out = tmp_path / "out"
    export(str(model), out, Form(format="gguf", parity_problems=0), progress=lambda *_: None)
    fields = gguf.GGUFReader(out / "model-f16.gguf").fields
    tokens, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents()[397:403] for name in ("tokens", "token_type")
    )
    assert tokens == [*tiny.SPECIAL, "<think>", "<|tool|>", "[PAD402]"]
    assert kinds == [CONTROL] * 3 + [USER_DEFINED, CONTROL, UNUSED]
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(out / "model-f16.gguf"), vocab_only=True, verbose=False)
    text = "a<think>b<|tool|>"
    ours = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == ours
    assert {400, 401} <= set(ours)


def test_models_that_llama_cpp_does_not_have(tmp_path):
    for options, text in (
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "of type dynamic are not written"),
        ({"rope_scaling": {**YARN, "mscale": 2.0}}, "of type yarn with mscale are not written"),
        ({"rope_traditional": True}, "rotates the halves of a head"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "a window"),
    ):
        model = tiny.make_model_dir(tmp_path / "model", **SIZES, **options)
        with pytest.raises(UserError, match=text):
            write(model, tmp_path / "m.gguf")


# The tokenizer


def made(path: Path, change: Any = None, **options) -> Path:
    """A tokenizer.json, changed by a function on the tokenizer or on its JSON."""
    tokenizer = tiny.make_tokenizer(300)
    if change is not None:
        change(tokenizer)
    value = json.loads(tokenizer.to_str())
    for key, part in options.items():
        value["model" if key in value["model"] else key] = (
            {**value["model"], key: part} if key in value["model"] else part
        )
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("kind", sorted(PRETOKENIZERS))
def test_the_split_is_known_again(tmp_path, kind):
    def change(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizer(kind)

    known = PRETOKENIZERS[kind]
    file = made(tmp_path / "tokenizer.json", change, ignore_merges=known.ignore_merges)
    assert PRETOKENIZERS[read_vocabulary(file, 300, "llama").pre] == known
    made(file, change, ignore_merges=not known.ignore_merges)
    other = known._replace(ignore_merges=not known.ignore_merges)
    if other in PRETOKENIZERS.values():
        assert PRETOKENIZERS[read_vocabulary(file, 300, "llama").pre] == other
    else:
        with pytest.raises(UserError, match="no tokenizer that splits text as this one"):
            read_vocabulary(file, 300, "llama")


def test_kinds_of_tokens(tmp_path):
    def change(tokenizer):
        tokenizer.add_tokens([AddedToken("Fixed sentence. ", special=False, normalized=False)])

    file = made(tmp_path / "tokenizer.json", change)
    found = read_vocabulary(file, 304, "qwen2")
    assert found.pre == "qwen2"
    assert found.tokens[297:301] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "Fixed sentence. ",
    ]
    assert found.kinds == [NORMAL] * 297 + [CONTROL] * 3 + [USER_DEFINED] + [UNUSED] * 3
    assert found.tokens[301:] == ["[PAD301]", "[PAD302]", "[PAD303]"]
    assert len(set(found.tokens)) == 304
    assert all(merge.count(" ") == 1 for merge in found.merges)
    with pytest.raises(UserError, match="301 tokens, and the model 300 rows"):
        read_vocabulary(file, 300, "qwen2")


def test_an_added_token_without_a_row_is_left_out(tmp_path):
    tokenizer = tiny.make_tokenizer()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image_soft_token>"])
    model = tiny.make_model_dir(tmp_path / "m", tokenizer=tokenizer, vocab_size=rows)
    found = read_vocabulary(model / "tokenizer.json", rows, "llama")
    assert len(found.tokens) == rows and "<image_soft_token>" not in found.tokens
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = rows
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has {rows + 1} tokens"):
        read_vocabulary(model / "tokenizer.json", rows, "llama")


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path):
    def other_split(tokenizer):
        tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Split(Regex(r"\w+"), "isolated"), pre.ByteLevel(False, use_regex=False)]
        )

    def gpt2(tokenizer):
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)

    def spaced(tokenizer):
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)

    def lower(tokenizer):
        tokenizer.normalizer = normalizers.Lowercase()

    def stripping(tokenizer):
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])

    for change, arch, text in (
        (other_split, "llama", "no tokenizer that splits text"),
        (spaced, "llama", "no tokenizer that splits text"),
        (gpt2, "qwen2", "a qwen2 model with the split of gpt-2"),
        (lower, "llama", "does not normalise"),
        (stripping, "llama", "'<mask>' takes spaces"),
    ):
        with pytest.raises(UserError, match=text):
            read_vocabulary(made(tmp_path / "tokenizer.json", change), 400, arch)
    for options, text in (
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            "byte-level BPE, Sent",
        ),
        ({"byte_fallback": True}, "text is split by Sequence first"),
        ({"vocab": None}, "no tokenizer.json"),
        ({"added_tokens": [{}]}, "no tokenizer.json"),
    ):
        with pytest.raises(UserError, match=text):
            read_vocabulary(made(tmp_path / "tokenizer.json", **options), 400, "llama")


def test_damaged_tokenizers_never_escape(tmp_path):
    """Any cut, and any value where another belongs, is a message."""
    file = made(tmp_path / "tokenizer.json")
    whole = file.read_text()
    for place in range(0, len(whole) - 1, 997):
        file.write_text(whole[:place])
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            read_vocabulary(file, 400, "llama")
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(draws(300)):
        value = json.loads(whole)
        node: Any = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[rng.integers(len(keys))]
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                break
            node = node[key]
        node[key] = [None, -1, 1 << 40, "x", [], {}, True, 1.5][rng.integers(8)]
        file.write_text(json.dumps(value))
        try:
            read_vocabulary(file, 400, "llama")
        except UserError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_first_token(tmp_path):
    """Whether a text begins with a token of its own is the tokenizer's, not the reader's habit."""
    for name, added in itertools.product(("gpt-2", "llama-bpe"), (True, False)):
        change = {"tokenizer.ggml.add_bos_token": (added, "bool")}
        write_gguf(tmp_path / "a.gguf", pre=name, change=change)
        out = tmp_path / f"{name}-{added}"
        convert(tmp_path / "a.gguf", out)
        write(out, tmp_path / "b.gguf")
        found = fields(tmp_path / "b.gguf")
        assert found["tokenizer.ggml.add_bos_token"] is added
        assert (
            found["tokenizer.ggml.bos_token_id"]
            == fields(tmp_path / "a.gguf")["tokenizer.ggml.bos_token_id"]
        )
        assert PRETOKENIZERS[found["tokenizer.ggml.pre"]] == PRETOKENIZERS[name]


def test_several_end_tokens(tmp_path):
    model = tiny.make_model_dir(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [397, 399]}))
    write(model, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == 399  # the tokenizer's own
    assert found["tokenizer.ggml.eot_token_id"] == 397
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert load(tmp_path / "back").tokenizer.eos_token_ids == {397, 399}


@pytest.mark.parametrize("count", [3, 5])
def test_no_token_that_ends_a_turn_is_lost(tmp_path, count):
    ends = [399, 397, 12, 30, 5][:count]
    model = tiny.make_model_dir(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    export(str(model), tmp_path / "out", Form("gguf"), progress=lambda *_: None)
    convert(next((tmp_path / "out").glob("*.gguf")), tmp_path / "back")
    assert load(tmp_path / "back").tokenizer.eos_token_ids == {*ends}


def test_llama_cpp_is_not_told_of_a_fourth_and_the_user_is(tmp_path):
    model = tiny.make_model_dir(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 5, 12, 30]}))
    done = export(str(model), tmp_path / "out", Form("gguf"), progress=lambda *_: None)
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    [text] = [text for text, number in tokens.items() if number == 30]
    [warning] = [one for one in done.warnings if "end a turn" in one]
    assert f"after {text};" in warning


def test_a_list_of_end_tokens_outside_the_vocabulary_is_refused(tmp_path):
    model = tiny.make_model_dir(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 5, 12, 30]}))
    write(model, tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    listed = b"".join(token.to_bytes(4, "little") for token in (399, 5, 12))
    assert data.count(listed) == 1
    bad = data.replace(listed, listed[:8] + (400).to_bytes(4, "little"))
    (tmp_path / "bad.gguf").write_bytes(bad)
    with pytest.raises(UserError, match="end_token_ids"):
        convert(tmp_path / "bad.gguf", tmp_path / "back")


@pytest.mark.model
def test_smollm2s_own_file_comes_back_bit_for_bit(tmp_path_factory, tmp_path):
    """Its embedding is Q8_0 and all else Q4_1: 211 matrices and 61 vectors."""
    model = tiny.smollm2(tmp_path_factory)
    done = write(model, tmp_path / "m.gguf", "q4_1")
    assert done.kinds == {"q8_0": 1, "q4_1": 210} and done.carried == 211
    files = [gguf_reading._read(path) for path in (tmp_path / "m.gguf", smollm2_file())]
    ours, theirs = ({tensor.name: tensor for tensor in file.tensors} for file in files)
    assert ours.keys() == theirs.keys() and len(ours) == 272
    for name, wanted in theirs.items():
        assert ours[name].tensor_type == wanted.tensor_type, name
        assert np.array_equal(ours[name].data, wanted.data), name
    after, before = (
        {name: field.contents() for name, field in file.fields.items()} for file in files
    )
    told = ("general.", "GGUF.", "llama.attention.key_length", "llama.attention.value_length")
    for name in before.keys() | after.keys():
        assert name.startswith(told) or after[name] == before[name], name


# llama.cpp itself


def llama(file: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(file), n_ctx=2048, logits_all=True, verbose=False, n_threads=1)


def against_llama_cpp(name: str, file: Path) -> verify.Agreement:
    """The live model against llama.cpp on the same text, which both split themselves."""
    live = open_student(name).student_lm
    chat = verify.role_chat(live)
    engine = llama(file)
    text = live.tokenizer.decode(list(chat))
    assert tuple(engine.tokenize(text.encode(), add_bos=False, special=True)) == chat
    assert engine.token_eos() in live.tokenizer.eos_token_ids
    engine.eval(list(chat))
    theirs = np.array(engine.scores[: len(chat) - 1])
    return verify.agreement(verify.logits_of(live, chat), theirs)


@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_llama_cpp_on_random_models(tmp_path, name, options):
    pytest.importorskip("llama_cpp")
    model = tiny.make_model_dir(tmp_path / "model", **SIZES, **options)
    write(model, tmp_path / "m.gguf")
    found = against_llama_cpp(str(model), tmp_path / "m.gguf")
    assert found.mean_kl < 1e-3 and found.top1 >= 0.98


@pytest.mark.parametrize("model", ["tiny", "tiny-student", "trained"])
def test_llama_cpp_on_the_tiny_pair(tmp_path, model):
    """Tokens that are whole sentences, Qwen's split in a llama; before and after a training."""
    pytest.importorskip("llama_cpp")
    name = str(trained.make_run(tmp_path / "run", "tiny-student")) if model == "trained" else model
    for kind, kl, top1 in (("f16", 1e-3, 0.99), ("q8_0", 0.01, 0.95)):
        write(name, tmp_path / f"{kind}.gguf", kind)
        found = against_llama_cpp(name, tmp_path / f"{kind}.gguf")
        assert found.mean_kl < kl and found.top1 >= top1, (kind, found)


def thinker(folder: Path) -> Path:
    """A model whose template leaves a thought out only where it is told to, and writes its end."""
    kind, tokenizer = TEMPLATES["qwen3"], tiny.make_tokenizer()
    tokens = [AddedToken(token, special=True, normalized=False) for token in kind.tokens]
    tokenizer.add_special_tokens(tokens)
    ends = kind.source.replace("'<|im_end|>\n'", "eos_token + '\n'")
    assert ends != kind.source
    return tiny.make_model_dir(folder, tokenizer=tokenizer, chat_template=ends, **SIZES)


@pytest.mark.parametrize(
    ("score_at", "thinks"), [("prompt", False), ("feedback", False), ("prompt", True)]
)
def test_the_cards_lines_give_the_score_in_llama_cpp(
    tmp_path, monkeypatch, capsys, score_at, thinks
):
    pytest.importorskip("llama_cpp")
    model = thinker(tmp_path / "model") if thinks else "tiny-student"
    run = trained.make_run(tmp_path / "run", model, score_at=score_at)
    form = Form(format="gguf", gguf_type="f32", parity_problems=0)
    export(str(run), tmp_path / "out", form, progress=lambda *_: None)
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(import llama_cpp.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    problem, answer = "Tom has 3 apples and buys 5. How many?", "3 + 5 = 9. #### 9"
    wanted = give_feedback(str(run), problem, answer, 192).head_score
    # llama.cpp keeps keys and values in float16.
    assert float(capsys.readouterr().out) == pytest.approx(wanted, abs=5e-3)
    assert abs(wanted) > 0.01
