"""Converted GGUF files against llama.cpp's conventions: tensors, tokens, text, damage."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from mlx_fd.models.backend import backend
from support import tiny

backend()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm.utils import load_tokenizer  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models import gguf_reading, loading  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.resolve import resolve  # noqa: E402
from support import FIXTURES  # noqa: E402
from support.draws import ALL, draws  # noqa: E402
from support.gguf_files import BASE, DIM, EPSILON, HEADS, KV_HEADS, LAYERS, write_gguf  # noqa: E402

GOLDEN = FIXTURES / "smollm2_llama_cpp.json"


def llama3_divisors(factor: float) -> np.ndarray:
    """Llama 3.1's frequency divisors, by its reference code's three cases."""
    divisors = []
    for i in range(0, DIM, 2):
        wavelength = 2 * np.pi * BASE ** (i / DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def reference(weights: dict[str, np.ndarray], arch: str, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] in float64, in the layout and rotation of llama.cpp itself."""
    steps = np.arange(len(ids))
    angles = steps[:, None] / BASE ** (np.arange(0, DIM, 2) / DIM)
    angles = angles / weights.get("rope_freqs.weight", np.ones(DIM // 2))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rotate(x: np.ndarray) -> np.ndarray:
        # llama rotates neighbouring pairs ("norm"), qwen2 the two halves ("neox").
        pairs = (slice(0, None, 2), slice(1, None, 2))
        if arch == "qwen2":
            pairs = (slice(0, DIM // 2), slice(DIM // 2, None))
        out = np.empty_like(x)
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return out

    x = weights["token_embd.weight"][ids]
    for i in range(LAYERS):
        block = f"blk.{i}"
        h = norm(x, f"{block}.attn_norm")
        q = rotate(linear(h, f"{block}.attn_q").reshape(len(ids), HEADS, DIM))
        k = rotate(linear(h, f"{block}.attn_k").reshape(len(ids), KV_HEADS, DIM))
        v = linear(h, f"{block}.attn_v").reshape(len(ids), KV_HEADS, DIM)
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=1) for z in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(DIM)
        scores = np.where(steps[:, None] >= steps, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(len(ids), -1)
        x = x + linear(mixed, f"{block}.attn_output")
        h = norm(x, f"{block}.ffn_norm")
        gate = linear(h, f"{block}.ffn_gate")
        h = gate / (1 + np.exp(-gate)) * linear(h, f"{block}.ffn_up")
        x = x + linear(h, f"{block}.ffn_down")
    head = weights.get("output.weight", weights["token_embd.weight"])
    return norm(x, "output_norm") @ head.T


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_logits_are_those_of_the_file(tmp_path: Path, arch: str, tied: bool, kind: Kind) -> None:
    pre = "qwen2" if arch == "qwen2" else "gpt-2"
    weights = write_gguf(tmp_path / "m.gguf", arch=arch, kind=kind, tied=tied, pre=pre)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    model = loading.load(tmp_path / "out").model
    ids = [5, 17, 200, 3, 250, 90, 91, 17, 4]
    expected = reference(weights, arch, ids)
    actual = np.array(model(mx.array([ids]))[0])
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotation(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(factor)
    assert 1 < divisors.max() == factor
    weights = write_gguf(tmp_path / "m.gguf", divisors=divisors)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ids = list(range(3, 60))
    expected = reference(weights, "llama", ids)
    actual = np.array(loading.load(tmp_path / "out").model(mx.array([ids]))[0])
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()


def test_other_rotary_tables_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", divisors=np.linspace(1, 8, DIM // 2, dtype=np.float32))
    with pytest.raises(UserError, match="rope_freqs"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_quantised_integers_are_kept(tmp_path: Path) -> None:
    """mx.load reads the same blocks with code of its own."""
    for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
        file = tmp_path / f"{kind.name}.gguf"
        write_gguf(file, kind=kind)
        convert(file, tmp_path / kind.name)
        converted = mx.load(str(tmp_path / kind.name / "model.safetensors"))
        loaded = mx.load(str(file))
        for part in ("weight", "scales", "biases"):
            ours = converted[f"model.layers.1.mlp.up_proj.{part}"]
            assert mx.array_equal(ours, loaded[f"blk.1.ffn_up.{part}"]), (kind, part)
        config = json.loads((tmp_path / kind.name / "config.json").read_text())
        assert config["quantization"]["bits"] == (8 if kind == Kind.Q8_0 else 4)
        assert config["quantization"]["group_size"] == 32


# What each published tokenizer.json makes of these, checked by hand against its regular expression.
SPLITS = {
    "gpt-2": ["ab", "12345", " it", "'s", "  ", " X"],
    "smollm": ["ab", "1", "2", "3", "4", "5", " it", "'s", "  ", " X"],
    "llama-bpe": ["ab", "123", "45", " it", "'s", "  ", " X"],
    "qwen2": ["ab", "1", "2", "3", "4", "5", " it", "'s", "  ", " X"],
}


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_splitting_before_the_merges(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "m.gguf", pre=pre)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "ab12345 it's   X"
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in pieces] == SPLITS[pre]


def test_first_token(tmp_path: Path) -> None:
    for pre, added, begins in (
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ):
        out = tmp_path / f"{pre}-{added}"
        change = {} if added is None else {"tokenizer.ggml.add_bos_token": (added, "bool")}
        write_gguf(tmp_path / "m.gguf", pre=pre, change=change)
        convert(tmp_path / "m.gguf", out)
        tokenizer = load_tokenizer(out)
        bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert (tokenizer.encode("hello")[0] == bos) is begins, (pre, added)
        assert bos not in tokenizer.encode("hello", add_special_tokens=False)


def test_special_and_user_defined_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", types={"<|im_start|>": 4})
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out", eos_token_ids=None)
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert (ids[0], ids[-1]) == (start, end)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|im_start|>hi"
    assert tokenizer.eos_token_ids == {end}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "é 7"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\né 7<|im_end|>\n<|im_start|>assistant\n"


def test_files_that_cannot_be_converted(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("architecture mamba", {"arch": "mamba"}),
        ("kind weird", {"pre": "weird"}),
        ("kind gpt-2 is not supported for qwen2", {"arch": "qwen2"}),
        ("tokenizer model bert", {"change": {"tokenizer.ggml.model": ("bert", "string")}}),
        (
            "tokens of Phi-3 take the spaces",
            {"arch": "phi3", "change": {"tokenizer.ggml.model": ("llama", "string")}},
        ),
        ("scores is missing", {"change": {"tokenizer.ggml.model": ("llama", "string")}}),
        ("block_count is missing", {"drop": ("llama.block_count",)}),
        ("merges is missing", {"drop": ("tokenizer.ggml.merges",)}),
        ("blk.1.ffn_up.weight is missing", {"drop": ("blk.1.ffn_up.weight",)}),
        ("unknown tensor blk.1", {"change": {"llama.block_count": (1, "uint32")}}),
        ("expected", {"change": {"llama.feed_forward_length": (128, "uint32")}}),
        ("is 0", {"change": {"llama.embedding_length": (0, "uint32")}}),
        ("unexpected type", {"change": {"llama.block_count": ("two", "string")}}),
        ("outside the vocabulary", {"change": {"tokenizer.ggml.eos_token_id": (999, "uint32")}}),
        ("merges do not fit", {"change": {"tokenizer.ggml.merges": (["zz yy"], "array")}}),
        ("scaling of type dynamic", {"change": {"llama.rope.scaling.type": ("dynamic", "string")}}),
        ("scaling.factor is missing", {"change": {"llama.rope.scaling.type": ("yarn", "string")}}),
        ("see 64 tokens", {"change": {"llama.attention.sliding_window": (64, "uint32")}}),
        ("softcapping is 30", {"change": {"llama.final_logit_softcapping": (30.0, "float32")}}),
        ("logit_scale is 0.25", {"change": {"llama.logit_scale": (0.25, "float32")}}),
        (
            "yarn_log_multiplier is 0.1",
            {"change": {"llama.rope.scaling.yarn_log_multiplier": (0.1, "float32")}},
        ),
    ]
    for message, options in cases:
        write_gguf(tmp_path / "m.gguf", **options)
        with pytest.raises(UserError, match=message) as caught:
            convert(tmp_path / "m.gguf", tmp_path / "out")
        assert "m.gguf" in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"], "something was left"
    (tmp_path / "text.gguf").write_text("hello there")
    with pytest.raises(UserError, match="not a GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read"):
        convert(tmp_path / "absent.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"llama.rope.scaling.factor": (4.0, "float32")}, 4.0),
        ({"llama.rope.scale_linear": (4.0, "float32")}, 4.0),
        ({"llama.rope.scaling.factor": (1.0, "float32")}, None),
        # Its words for "not at all".
        (
            {
                "llama.rope.scaling.factor": (4.0, "float32"),
                "llama.rope.scaling.type": ("none", "string"),
            },
            None,
        ),
        (
            {
                "llama.attention.sliding_window": (512, "uint32"),
                "llama.logit_scale": (1.0, "float32"),
                "llama.rope.scaling.finetuned": (False, "bool"),
            },
            None,
        ),
    ],
)
def test_positions_are_scaled_where_llama_cpp_scales_them(
    tmp_path: Path, change: dict[str, Any], factor: float | None
) -> None:
    """A factor without a type is of linear scaling, and once had another name."""
    write_gguf(tmp_path / "m.gguf", change=change)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {"type": "linear", "factor": factor} if factor else None
    assert config.get("rope_scaling") == scaling


@pytest.mark.parametrize("order", gguf.GGUFEndian)
def test_metadata_are_read_as_the_gguf_package_reads_them(order, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=order)
    writer.add_string("a.text", "Köln")
    writer.add_array("a.texts", ["one", "", "Köln", "x" * 300])
    for name, values in {
        "a.int32": [-1, 7],
        "a.float32": [0.1, -2.5],
        "a.bool": [True, False],
        "a.one": [7],
    }.items():
        writer.add_array(name, values)
    for kind, value in ((gguf.GGUFValueType.UINT8, 200), (gguf.GGUFValueType.FLOAT64, 1e300)):
        writer.add_key_value(f"a.{kind.name}", [value], gguf.GGUFValueType.ARRAY, sub_type=kind)
    writer.add_uint32("a.last", 5)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = gguf_reading._read(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    found, wanted = (
        [(name, field.contents(), field.types) for name, field in reader.fields.items()]
        for reader in (ours, theirs)
    )
    assert found == wanted and len(found) >= 12
    assert [t.name for t in ours.tensors] == ["t"]
    np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def converts_or_refuses(data: bytes, folder: Path, number: int) -> bool:
    """Whether damaged bytes still convert; anything but a result or a UserError escapes."""
    (folder / "damaged.gguf").write_bytes(data)
    try:
        convert(folder / "damaged.gguf", folder / f"out{number}")
    except UserError:
        return False
    return True


def test_damaged_counts_end_quickly(tmp_path: Path) -> None:
    """A count that cannot be must not be counted to."""
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    huge = (1 << 31) - 1
    for key, skip, size, message in (
        (b"llama.block_count", 4, 4, "only"),
        (b"tokenizer.ggml.token_type", 8, 8, "an array of"),
        (b"tokenizer.ggml.tokens", 8, 8, "an array of"),
        (b"tokenizer.ggml.pre", 4, 8, "ends too early"),
        (b"blk.1.ffn_up.weight", 4, 8, "ends too early"),
    ):
        at = whole.index(key) + len(key) + skip
        damaged = whole[:at] + huge.to_bytes(size, "little") + whole[at + size :]
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        begin = time.monotonic()
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "damaged.gguf", tmp_path / "out")
        assert time.monotonic() - begin < 2, key


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_0)
    whole = (tmp_path / "m.gguf").read_bytes()
    rng = random.Random(0)
    lengths = [0, 3, 4, 8, 16, 24, *(rng.randrange(len(whole)) for _ in range(60))]
    # The file's last bytes are padding after the last tensor.
    lengths.append(len(whole) - 64)
    for length in lengths:
        assert not converts_or_refuses(whole[:length], tmp_path, 0), length


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0)
    whole = (tmp_path / "m.gguf").read_bytes()
    student_lm = gguf.GGUFReader(tmp_path / "m.gguf")
    rng = random.Random(1)
    outcomes = []
    for number in range(draws(250)):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(student_lm.data_offset)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        outcomes.append(converts_or_refuses(bytes(data), tmp_path, number))
    assert any(outcomes)
    assert not all(outcomes)


def test_a_gguf_file_is_a_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "own"))
    file = tmp_path / "my model.gguf"
    weights = write_gguf(file)
    path = resolve(str(file))
    assert path.parent == tmp_path / "own" / "gguf"
    assert path.name.startswith("my-model-")
    made = (path / "config.json").stat().st_mtime_ns
    assert resolve(str(file)) == path
    assert (path / "config.json").stat().st_mtime_ns == made
    model, _ = mlx_lm.load(str(path))
    ids = [1, 2, 3]
    expected = reference(weights, "llama", ids)
    assert np.abs(np.array(model(mx.array([ids]))[0]) - expected).max() < 1e-3
    write_gguf(file, seed=1)
    assert resolve(str(file)) != path


def test_the_first_of_two_conversions_stays(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    after = (tmp_path / "out" / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.smollm2(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> loading.Loaded:
    return loading.load(smollm2)


@pytest.mark.model
def test_smollm2_tokens_are_llama_cpps(smollm2: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    tokenizer = load_tokenizer(smollm2)
    for case in golden["tokenisation"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
    for case in golden["generation"]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": case["prompt"]}], add_generation_prompt=True
        )
        assert ids == case["prompt_ids"], case["prompt"]


@pytest.mark.model
def test_smollm2_text_is_llama_cpps(loaded: loading.Loaded) -> None:
    """llama.cpp rounds activations to 8 bits, so near ties may fall the other way."""
    golden = json.loads(GOLDEN.read_text())
    assert loaded.dtype == mx.float32
    agreed = total = 0
    for case in golden["generation"][:: 1 if ALL else 3]:
        ids, prompt = case["ids"], case["prompt_ids"]
        logits = loaded.model(mx.array([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
        ours = mx.argmax(logits, axis=-1).tolist()
        for mine, theirs, margin in zip(ours, ids, case["margins"], strict=True):
            assert mine == theirs or margin < 0.5, case["prompt"]
            agreed += mine == theirs
            total += 1
    assert total > (400 if ALL else 120)
    assert agreed / total >= 0.92


@pytest.mark.model
def test_smollm2_writes_llama_cpps_words(loaded: loading.Loaded) -> None:
    golden = json.loads(GOLDEN.read_text())
    clear = [case for case in golden["generation"] if min(case["margins"]) > 0.3]
    assert len(clear) >= 3
    for case in clear if ALL else clear[:3]:
        text = mlx_lm.generate(
            loaded.model, loaded.tokenizer, case["prompt_ids"], max_tokens=len(case["ids"])
        )
        assert text == loaded.tokenizer.decode(case["ids"][:-1])
