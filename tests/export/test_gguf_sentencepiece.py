"""SentencePiece's tokenizers in GGUF files: against llama.cpp, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from mlx_fd.models.backend import backend
from support.architectures import make_architecture
from support.sentencepiece import TEMPLATE, make_sentencepiece

backend()

from mlx_lm.utils import load_tokenizer  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, verify  # noqa: E402
from mlx_fd.export.gguf_tokenizer import read_vocabulary  # noqa: E402
from mlx_fd.export.source import open_source  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.gguf_sentencepiece import merges_of, scores_of  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402

TEXTS = [
    "Tom has 3 apples. How many apples does Tom have now?",
    "  two  spaces, a tab\tand\n\n\nlines ",
    "naïve 日本 🙂 ▁ <unk> unseen-words: zyx",
    "<start_of_turn>user\nTom buys 5<end_of_turn>\n<start_of_turn>model\n",
    "x",
    "",
]


def make(folder: Path, name: str, *, prefix: bool) -> Path:
    tokenizer = make_sentencepiece(prefix=prefix)
    model = make_architecture(folder / "model", name, vocab_size=512, eos_token_id=1)
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def write(model: Path, file: Path) -> None:
    source = open_source(str(model))
    gguf_file.write_file(source, load(source.ref.model).tokenizer, file, kind="f32")


@pytest.mark.parametrize(("name", "prefix"), [("gemma3_text", False), ("mistral", True)])
def test_llama_cpp_splits_text_alike(tmp_path, name, prefix):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = make(tmp_path, name, prefix=prefix)
    write(model, tmp_path / "m.gguf")
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in TEXTS:
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == wanted, text


@pytest.mark.parametrize(("name", "prefix"), [("gemma3_text", False), ("mistral", True)])
def test_it_comes_back(tmp_path, name, prefix):
    model = make(tmp_path, name, prefix=prefix)
    write(model, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    one, other = (
        Tokenizer.from_file(str(path / "tokenizer.json")) for path in (model, tmp_path / "back")
    )
    # As transformers uses the directory, too.
    used = load_tokenizer(tmp_path / "back")
    for text in TEXTS:
        wanted = one.encode(text, add_special_tokens=False)
        assert other.encode(text, add_special_tokens=False).ids == wanted.ids, text
        assert used.encode(text, add_special_tokens=False) == wanted.ids, text
        assert other.decode(wanted.ids) == one.decode(wanted.ids)
    loaded = load(tmp_path / "back")
    assert verify.role_chat(loaded) == verify.role_chat(load(model))
    assert loaded.tokenizer.eos_token_ids == load(model).tokenizer.eos_token_ids


def test_kinds_of_tokens(tmp_path):
    model = make(tmp_path, "gemma3_text", prefix=False)
    found = read_vocabulary(model / "tokenizer.json", 512, "gemma3")
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", False)
    types = gguf.TokenType
    assert kinds["<unk>"] == types.UNKNOWN and kinds["<0x0A>"] == types.BYTE
    assert kinds["<bos>"] == kinds["<end_of_turn>"] == types.CONTROL
    assert kinds["▁apples"] == types.NORMAL and kinds["[PAD511]"] == types.UNUSED


def test_scores_and_merges_are_each_others():
    """transformers' own function makes the merges; which score stands for which is order alone."""
    pieces = ["ab", "bc", "abc", "cab", "a", "b", "c"]
    scores = {piece: -float(number) for number, piece in enumerate(pieces)}
    merges = generate_merges(scores, list(scores.items()))
    assert merges_of(scores) == merges
    found = scores_of(pieces, merges)
    joined = pieces[:4]
    assert sorted(joined, key=lambda piece: -found[piece]) == joined
    assert all(found[letter] <= min(found[piece] for piece in joined) for letter in "abc")


@pytest.mark.parametrize(
    ("merges", "text"),
    [
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("c", "ab"), ("a", "bc")], "between those"),
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("c", "ab")], "'a' and 'bc' are not merged"),
        ([("a", "c")], "'a' and 'b' are not merged"),
    ],
)
def test_other_orders_have_no_scores(merges, text):
    with pytest.raises(ValueError, match=text):
        scores_of(["ab", "bc", "abc", "cab", "a", "b", "c"], merges)


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path):
    path = tmp_path / "tokenizer.json"

    def changed(**parts: object) -> Path:
        value = json.loads(make_sentencepiece().to_str())
        for name, part in parts.items():
            if name in value["model"]:
                value["model"][name] = part
            else:
                value[name] = part
        path.write_text(json.dumps(value))
        return path

    first = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    for parts, text in (
        ({"normalizer": None, "pre_tokenizer": first}, "prepend_scheme 'first'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "split by Whitespace first"),
        ({"normalizer": {"type": "NFC"}}, "spaces are not marked"),
        ({"merges": []}, "are not merged to"),
    ):
        with pytest.raises(UserError, match=text):
            read_vocabulary(changed(**parts), 512, "gemma3")
    for scheme, prefix in (("never", False), ("always", True)):
        split = {**first, "prepend_scheme": scheme}
        found = read_vocabulary(changed(normalizer=None, pre_tokenizer=split), 512, "gemma3")
        assert found.space_prefix is prefix
