"""GGUF files as llama.cpp itself quantises and splits them, and files in several parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlx_fd.models.backend import backend
from support.architectures import make_architecture
from support.gguf_files import write_gguf

backend()

import mlx.core as mx  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, verify  # noqa: E402
from mlx_fd.export.source import open_source  # noqa: E402
from mlx_fd.models import gguf as gguf_module  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.gguf_tokens import PRETOKENIZERS  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.models.resolve import resolve  # noqa: E402

# A multiple of 256: K-quants have blocks of that many weights.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def exported(folder: Path, name: str, **options: Any) -> Path:
    model = make_architecture(folder / "model", name, **WIDE, **options)
    source = open_source(str(model))
    file = folder / "m.gguf"
    gguf_file.write_file(source, load(source.ref.model).tokenizer, file, kind="f16")
    return file


def quantized(file: Path, kind: str) -> Path:
    """A file as llama.cpp's own quantiser makes it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    out = file.with_name(f"{kind}.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = 1
    names = (str(path).encode() for path in (file, out))
    assert llama_cpp.llama_model_quantize(*names, parameters) == 0
    return out


@pytest.mark.parametrize(
    ("name", "kind", "has"),
    [
        ("llama", "Q4_K_M", {"Q4_K", "Q6_K"}),
        ("llama", "Q2_K", {"Q2_K", "Q3_K"}),
        ("llama", "Q5_K_M", {"Q5_K"}),
        ("llama", "Q5_0", {"Q5_0"}),
        ("llama", "IQ4_XS", {"IQ4_XS"}),
        ("qwen3_moe", "Q4_K_M", {"Q4_K", "Q6_K"}),
    ],
)
def test_what_llama_cpp_quantised_is_the_same_model(tmp_path, name, kind, has):
    """Against llama.cpp on the same file; it rounds what it multiplies to 8 bits."""
    options = {"mlp_only_layers": [], "moe_intermediate_size": 256} if name == "qwen3_moe" else {}
    file = quantized(exported(tmp_path, name, **options), kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert has <= kinds
    convert(file, tmp_path / "back")
    loaded = load(tmp_path / "back")
    chat = verify.role_chat(loaded)
    import llama_cpp

    engine = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    engine.eval(list(chat))
    theirs = np.array(engine.scores[: len(chat) - 1])
    ours = verify.logits_of(loaded, chat)
    found, lost = (
        verify.agreement(ours, other)
        for other in (theirs, verify.logits_of(load(tmp_path / "model"), chat))
    )
    # Far nearer to the file than the file is to what it was made of.
    assert found.mean_kl < 0.02 and found.mean_kl < 0.3 * lost.mean_kl


def in_parts(file: Path, most: int) -> list[Path]:
    """The same model in several files, as the gguf package writes them."""
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(None, arch, split_max_tensors=most)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(file.with_name("parts.gguf"))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(file.parent.glob("parts-*.gguf"))


def weights(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found.update(mx.load(str(file)))
    return found


def test_parts_are_one_model(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    parts = in_parts(tmp_path / "m.gguf", 8)
    assert len(parts) == 3
    convert(tmp_path / "m.gguf", tmp_path / "whole")
    wanted = weights(tmp_path / "whole")
    for number, part in enumerate(parts):
        convert(part, tmp_path / f"out{number}")
        found = weights(tmp_path / f"out{number}")
        assert found.keys() == wanted.keys()
        assert all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)


def test_parts_have_one_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "own"))
    write_gguf(tmp_path / "m.gguf")
    first, second, _ = in_parts(tmp_path / "m.gguf", 8)
    path = resolve(str(first))
    assert path.name.startswith("parts-") and resolve(str(second)) == path


def test_a_part_alone_is_refused_with_the_reason(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    first, second, third = in_parts(tmp_path / "m.gguf", 8)
    renamed = first.rename(tmp_path / "renamed.gguf")
    for file, reason in (
        (second, r"part 1 of 3 is missing \(parts-00001-of-00003\.gguf\)"),
        (renamed, "it says that it is one of 3 parts"),
    ):
        with pytest.raises(UserError, match=reason):
            convert(file, tmp_path / "out")
    renamed.rename(first)
    third.unlink()
    with pytest.raises(UserError, match="part 3 of 3 is missing"):
        convert(first, tmp_path / "out")
    write_gguf(third)
    with pytest.raises(UserError, match="is in two parts"):
        convert(first, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "one")
    monkeypatch.setattr(gguf_module, "_SHARD_BYTES", 50_000)
    convert(tmp_path / "m.gguf", tmp_path / "several")
    wanted, found = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert found.keys() == wanted.keys()
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert index["weight_map"].keys() == wanted.keys() and len(files) > 3
    assert files == {path.name for path in (tmp_path / "several").glob("*.safetensors")}
    tokens = mx.array([[3, 4, 5]])
    one, other = (load(tmp_path / name).model(tokens) for name in ("one", "several"))
    assert mx.array_equal(one, other).item()


def test_a_type_that_nobody_can_read_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.1.ffn_up.weight"
    # After the name: the number of dimensions (4 bytes), two of them (8 each), and the type.
    at = whole.index(name) + len(name) + 20
    assert whole[at] == gguf.GGMLQuantizationType.F32
    whole[at] = gguf.GGMLQuantizationType.I32
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(UserError, match="tensors of type I32 are not supported"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


TEXTS = [
    "Tom's 12345 apples cost $3.50, he'LL say: don't!!\n\n  Two  spaces\tand a tab \n",
    "HelloWorld camelCase ABCdef XMLHttpRequest aB Ab I'm we'VE",
    "naïve café ÉCOLE straße 日本語のテキスト Привет МИР 🙂👍🏽 x²",
    "def f(x):\n    return {'a': [1, 2]}  # ok/\r\n\r\n\t\tend   ",
    "100 000,5 % 1/2 ½ 3e-10 __init__ ->=> <tag/> ...",
]


@pytest.mark.parametrize("kind", sorted(PRETOKENIZERS))
def test_llama_cpp_splits_text_alike(tmp_path, kind):
    """What each name of a split stands for in llama.cpp, asked of it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    write_gguf(tmp_path / "m.gguf", pre=kind)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    used = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS:
        wanted = used.encode(text, add_special_tokens=False).ids
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == wanted, text
