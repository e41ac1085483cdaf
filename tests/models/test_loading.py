"""Loading, and what expert and student share in memory."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mlx_fd.models.backend import backend
from support import tiny

backend()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models import loading  # noqa: E402
from mlx_fd.models.fingerprint import content_hash  # noqa: E402
from mlx_fd.models.loading import load, load_pair  # noqa: E402
from mlx_fd.models.pairing import check_pair  # noqa: E402
from mlx_fd.models.prune import prune  # noqa: E402
from support.thinkers import TEMPLATES  # noqa: E402

on_cpu = pytest.mark.skipif(not backend().on_cpu, reason="what the CPU backend does")


def name_end(path: Path, eos: str | None) -> None:
    """Name another token, or none, as the one that ends a turn."""
    number = tiny.make_tokenizer().token_to_id(eos) if eos else None
    for name, key, value in (
        ("config.json", "eos_token_id", number),
        ("tokenizer_config.json", "eos_token", eos),
    ):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, key: value}))


def tokens(loaded: loading.Loaded) -> mx.array:
    return mx.array([loaded.tokenizer.encode("Tom has 3 apples and buys 5 more")])


def quantized_modules(model: nn.Module) -> int:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return sum(isinstance(module, kinds) for module in model.modules())


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_float32_is_the_same_model(tmp_path: Path, dtype: str) -> None:
    path = tiny.make_model_dir(tmp_path / "m", quantize=(4, 32), dtype=dtype)
    loaded = load(path)
    assert loaded.dtype == mx.float32
    assert quantized_modules(loaded.model) == 0
    assert {v.dtype for _, v in tree_flatten(loaded.model.parameters())} == {mx.float32}
    kept = load(path, dequantize="never")
    assert quantized_modules(kept.model) == 15
    assert kept.dtype == getattr(mx, dtype)
    exact, _ = mlx_lm.load(str(path))
    exact.set_dtype(mx.float32)
    ids = tokens(loaded)
    assert mx.allclose(loaded.model(ids), exact(ids), atol=1e-4)
    assert loaded.config["model_type"] == "llama"
    assert loaded.path == path


@on_cpu
def test_short_memory_keeps_the_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.make_model_dir(tmp_path / "m", quantize=(4, 32), dtype="float16")
    half = tiny.make_model_dir(tmp_path / "h", dtype="float16")
    full = load(path)
    need = sum(v.nbytes for _, v in tree_flatten(full.model.parameters()))
    monkeypatch.setattr(loading, "available_memory", lambda: 2 * need - 8)
    short = load(path)
    assert quantized_modules(short.model) == 15
    assert short.dtype == mx.float32
    assert mx.allclose(short.model(tokens(short)), full.model(tokens(full)), atol=1e-4)
    assert load(half).dtype == mx.float16
    monkeypatch.setattr(loading, "available_memory", lambda: 2 * need + 8)
    assert quantized_modules(load(path).model) == 0


@pytest.mark.parametrize("dequantize", ["auto", "never"])
@pytest.mark.parametrize("tie", [True, False])
def test_same_path_shares_every_array(tmp_path: Path, dequantize: str, tie: bool) -> None:
    path = tiny.make_model_dir(
        tmp_path / "m", arch="qwen2", hidden=128, vocab_size=20000, quantize=(4, 64), tie=tie
    )
    alone = load(path, dequantize=dequantize)
    gc.collect()
    before = mx.get_active_memory()
    size = sum(v.nbytes for _, v in tree_flatten(alone.model.parameters()))
    expert, student = load_pair(path, path, dequantize=dequantize)
    gc.collect()
    assert mx.get_active_memory() - before < 1.1 * size
    theirs = dict(tree_flatten(expert.model.parameters()))
    for name, array in tree_flatten(student.model.parameters()):
        assert array is theirs[name], name
    experts = {id(module) for module in expert.model.modules()}
    assert not experts & {id(module) for module in student.model.modules()}
    ids = tokens(expert)
    assert mx.array_equal(expert.model(ids), student.model(ids))
    # What is put on the student leaves the expert as it was.
    reference = expert.model(ids)
    student.model.model.norm.weight = student.model.model.norm.weight * 2
    assert mx.array_equal(expert.model(ids), reference)
    assert not mx.array_equal(student.model(ids), reference)


@pytest.mark.parametrize("dequantize", ["auto", "never"])
def test_pruned_student_shares_its_layers(tmp_path: Path, dequantize: str) -> None:
    path = tiny.make_model_dir(tmp_path / "m", layers=5, quantize=(4, 32))
    prune(path, 3, tmp_path / "p")
    expert, student = load_pair(path, tmp_path / "p", dequantize=dequantize)
    alone = load(tmp_path / "p", dequantize=dequantize)
    assert mx.array_equal(student.model(tokens(student)), alone.model(tokens(alone)))
    theirs = dict(tree_flatten(expert.model.parameters()))
    for name, array in tree_flatten(student.model.parameters()):
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = {"0": "0", "1": "2", "2": "4"}[parts[2]]
        assert array is theirs[".".join(parts)], name


def test_changed_weights_of_a_pruned_student_stay_its_own(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", layers=3)
    prune(path, 2, tmp_path / "p")
    file = tmp_path / "p" / "model.safetensors"
    weights = mx.load(str(file))
    changed = "model.layers.1.mlp.up_proj.weight"
    weights[changed] = weights[changed] + 1e-3
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    expert, student = load_pair(path, tmp_path / "p")
    shared = {id(v) for _, v in tree_flatten(expert.model.parameters())}
    own = [name for name, v in tree_flatten(student.model.parameters()) if id(v) not in shared]
    assert own == [changed]
    assert mx.array_equal(student.model.model.layers[1].mlp.up_proj.weight, weights[changed])


def test_other_models_share_nothing(tmp_path: Path) -> None:
    a = tiny.make_model_dir(tmp_path / "a", seed=1)
    b = tmp_path / "b"
    shutil.copytree(a, b)
    expert, student = load_pair(a, b)
    theirs = {id(v) for _, v in tree_flatten(expert.model.parameters())}
    assert not theirs & {id(v) for _, v in tree_flatten(student.model.parameters())}
    assert mx.array_equal(expert.model(tokens(expert)), student.model(tokens(student)))


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "unknown")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"llama"', '"no_such_model"'))
    with pytest.raises(UserError, match="mlx-lm has no architecture 'no_such_model'"):
        load(path)
    (path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load(path)
    (path / "config.json").write_text(config)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged or incomplete"):
        load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\*\.safetensors is missing"):
        load(path)


def test_content_hash(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", hidden=256, vocab_size=4000, intermediate=1024)
    original = content_hash(path)
    assert len(original) == 64
    assert content_hash(path) == original
    shutil.copytree(path, tmp_path / "copy")
    assert content_hash(tmp_path / "copy") == original
    data = bytearray((path / "model.safetensors").read_bytes())
    assert len(data) > 3 << 20
    for position in (1 << 19, len(data) - (1 << 19)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (path / "model.safetensors").write_bytes(damaged)
        assert content_hash(path) != original
    (path / "model.safetensors").write_bytes(data)
    assert content_hash(path) == original
    (path / "config.json").write_text("{}")
    assert content_hash(path) != original


def test_a_pruned_model_is_the_same_wherever_its_origin_lies(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", layers=4)
    prune(path, 3, tmp_path / "one")
    shutil.copytree(path, tmp_path / "moved")
    prune(tmp_path / "moved", 3, tmp_path / "two")
    one, two = (tmp_path / name / "config.json" for name in ("one", "two"))
    assert one.read_text() != two.read_text()
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    prune(path, 2, tmp_path / "fewer")
    two.write_text(two.read_text().replace("1e-05", "1e-06"))
    hashes = {content_hash(tmp_path / name) for name in ("m", "one", "two", "fewer")}
    assert len(hashes) == 4


@pytest.mark.model
def test_a_pruned_student_costs_next_to_nothing(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", hidden=512, intermediate=1024, layers=6)
    prune(path, 3, tmp_path / "p")
    gc.collect()
    before = mx.get_active_memory()
    expert = load(path)
    gc.collect()
    alone = mx.get_active_memory() - before
    del expert
    gc.collect()
    pair = load_pair(path, tmp_path / "p")
    gc.collect()
    both = mx.get_active_memory() - before
    assert alone > 5e7
    assert both < 1.01 * alone
    assert len(pair[1].model.layers) == 3


def test_an_added_token_without_a_row_is_plain_text(tmp_path: Path) -> None:
    """Gemma 3 1B and 270M: their tokenizer has <image_soft_token> after the last row."""
    tokenizer = tiny.make_tokenizer()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image_soft_token>"])
    assert tokenizer.token_to_id("<image_soft_token>") == rows
    path = tiny.make_model_dir(tmp_path / "m", tokenizer=tokenizer, vocab_size=rows)
    loaded = load(path)
    assert loaded.vocab == rows
    text = "an <image_soft_token> here<|im_end|>"
    ids = loaded.tokenizer.encode(text)
    assert max(ids) < rows
    assert loaded.tokenizer.decode(ids) == text
    # The other added tokens are what they were.
    assert ids[-1] == tokenizer.token_to_id("<|im_end|>")
    # Beside a model that has a row for it, as Gemma 3 4B has.
    other = tiny.make_model_dir(tmp_path / "o", tokenizer=tokenizer, vocab_size=rows + 64)
    pairing = check_pair(other, path)
    assert (pairing.shared_vocab, pairing.student_vocab) == (rows, rows)
    # A token that texts become is another matter.
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = rows + 7
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"only {rows} rows of logits"):
        load(path)


@pytest.mark.parametrize(
    ("eos", "template", "ends", "said"),
    [
        # As in a GGUF file of Gemma 3: the end of a text alone has an entry.
        ("<|endoftext|>", tiny.CHAT_TEMPLATE, ("<|endoftext|>", "<|im_end|>"), "<|im_end|> ends"),
        (None, tiny.CHAT_TEMPLATE, ("<|im_end|>",), "<|im_end|> ends"),
        ("<|im_end|>", tiny.CHAT_TEMPLATE, ("<|im_end|>",), ""),
        # The model's own end comes behind a mark, as in Command A.
        (
            "<|im_end|>",
            tiny.CHAT_TEMPLATE.replace("<|im_end|>", "<|im_start|><|im_end|>"),
            ("<|im_end|>",),
            "",
        ),
        # A reply ends with text, which many others have in them.
        (
            "<|endoftext|>",
            tiny.CHAT_TEMPLATE.replace("<|im_end|>", "###"),
            ("<|endoftext|>",),
            "",
        ),
    ],
)
def test_turns_end_as_the_chat_template_ends_them(
    tmp_path: Path, eos: str | None, template: str, ends: tuple[str, ...], said: str
) -> None:
    path = tiny.make_model_dir(tmp_path / "m", chat_template=template)
    vocab = tiny.make_tokenizer().get_vocab()
    name_end(path, eos)
    loaded = load(path)
    assert loaded.template.end_tokens == tuple(vocab[end] for end in ends)
    assert loaded.tokenizer.eos_token_ids == {vocab[end] for end in ends}
    assert bool(loaded.notes) == bool(said)
    assert all(said in note for note in loaded.notes)


def test_a_thought_of_gpt_oss_does_not_end_its_turn(tmp_path: Path) -> None:
    """Its template ends earlier replies with the token that ends a thought."""
    harmony, tokenizer = TEMPLATES["harmony"], tiny.make_tokenizer()
    tokenizer.add_special_tokens([*harmony.tokens])
    options = {"tokenizer": tokenizer, "eos": harmony.eos, "chat_template": harmony.source}
    loaded = load(tiny.make_model_dir(tmp_path / "m", **options))
    assert loaded.template.end_tokens == (tokenizer.token_to_id("<|return|>"),)
    assert loaded.notes == ()


def test_a_model_whose_turns_never_end_is_refused(tmp_path: Path) -> None:
    template = tiny.CHAT_TEMPLATE.replace("<|im_end|>", "###")
    path = tiny.make_model_dir(tmp_path / "m", chat_template=template)
    name_end(path, None)
    message = r"nothing says which token ends a turn; write .* eos_token_id into .*generation_con"
    with pytest.raises(UserError, match=message):
        load(path)
    (path / "generation_config.json").write_text('{"eos_token_id": 399}')
    assert load(path).template.end_tokens == (399,)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_texts_are_split_as_tokenizer_json_says(tmp_path: Path, kind: str) -> None:
    """transformers gives these classes splits of its own, whatever the file says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    # Digits by threes, as in Llama 3; words with the marks after them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+\p{P}*|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["First, add 1234.\n\nThen"] * 9, trainer)
    tokenizer.add_special_tokens([*tiny.SPECIAL])
    path = tiny.make_model_dir(tmp_path / "m", tokenizer=tokenizer)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = kind
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load(path)
    assert type(loaded.tokenizer._tokenizer).__name__ == kind
    for text in ("First, add 1234.\n\nThen (2+3)\n", "<|im_start|>user\n12, please<|im_end|>"):
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded.tokenizer.encode(text, add_special_tokens=False) == wanted
        assert loaded.tokenizer.decode(wanted) == text


def test_qwen2_makes_nfc_of_a_text_whatever_its_file_says(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([])
    path = tiny.make_model_dir(tmp_path / "m", arch="qwen2", tokenizer=tokenizer)
    encode = load(path).tokenizer.encode
    assert encode("caf\u0065\u0301") == encode("caf\u00e9")


def test_fp8_without_scales_is_no_model(tmp_path: Path) -> None:
    """MLX reads such numbers as the bytes that they are: 0 to 255 in the weights' place."""
    path = tiny.make_model_dir(tmp_path / "model")
    file, name = path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = mx.load(str(file))
    arrays = {key: np.array(value) for key, value in weights.items()}
    arrays[name] = np.array(mx.to_fp8(weights[name]))
    save_file(arrays, file)
    content = file.read_bytes()
    assert content.count(b'"U8"') == 1
    # As long as that, for the header's length stands before it.
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"').rstrip()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(UserError, match=rf"{name} is of .*uint8, .*FP8 without scales"):
        load(path)


@pytest.mark.parametrize("name", ["model [4bit]", "model*", "what?", "mod\u00e8le 1"])
def test_a_folder_is_opened_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    path = tiny.make_model_dir(tmp_path / "plain")
    wanted = load(path).model(mx.array([[3, 5]]))
    found = load(path.rename(tmp_path / name))
    assert found.path == tmp_path / name
    assert mx.array_equal(found.model(mx.array([[3, 5]])), wanted)
