"""What two tokenizers have in common, of three real ways to split text."""

import json

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlx_fd.losses.spans import token_spans
from mlx_fd.models.shared_tokens import (
    SharedTokens,
    after_anchor,
    encoded,
    end_of_turn,
    shared_tokens,
    split_alike,
    written,
)

TEXTS = [
    "Score: 0.5\nFeedback: the answer is right, 12 + 30 = 42.",
    " 0.9\nFeedback: the step 3*4=12 is right. She has 12 apples.",
    "#### 42",
    "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e \U0001f642",
]


def byte_level(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|end|>"],
    )
    return tokenizer, trainer


def sentencepiece(vocab_size):
    """As Llama 2 and Gemma do it: a mark for the space, and bytes for what is not known."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def make(name, made, end):
        tokenizer, trainer = made
        tokenizer.train_from_iterator(TEXTS * 20, trainer)
        folder = tmp_path_factory.mktemp(name)
        content = json.loads(tokenizer.to_str())
        # Bytes are no special tokens, but are known before the merges are.
        content["added_tokens"] = [
            token for token in content["added_tokens"] if not token["content"].startswith("<0x")
        ]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder)

    return {
        "small": make("small", byte_level(300), "<|end|>"),
        "large": make("large", byte_level(340), "<|end|>"),
        "marks": make("marks", sentencepiece(320), "<eos>"),
    }


PAIRS = [("small", "large"), ("large", "small"), ("small", "marks"), ("marks", "large")]


def size(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize(("expert", "student"), PAIRS)
def test_shared_tokens_write_the_same(tokenizers, expert, student):
    one, two = tokenizers[expert], tokenizers[student]
    shared = shared_tokens(one, two, (size(one), size(two)))
    assert len(shared) == len(shared.expert) == len(shared.student) > 40
    assert len(set(shared.expert)) == len(set(shared.student)) == len(shared)
    assert (shared.expert[0], shared.student[0]) == (end_of_turn(one), end_of_turn(two))
    for of_expert, of_student in list(zip(shared.expert, shared.student, strict=True))[1:]:
        text = after_anchor(one, [of_expert])
        assert text and text == after_anchor(two, [of_student])
    texts = {after_anchor(one, [token]) for token in shared.expert}
    assert {" ", "4", "S"} <= texts


def test_a_tokenizer_shares_all_text_with_itself(tokenizers):
    one = tokenizers["large"]
    shared = shared_tokens(one, one, (size(one), size(one)))
    assert shared.expert == shared.student
    # What is left out: bytes that are no character.
    left = set(range(size(one))) - set(shared.expert)
    assert left and all("\ufffd" in after_anchor(one, [token]) for token in left)


@pytest.mark.parametrize("name", ["small", "large", "marks"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_its_tokens(tokenizers, name, text):
    tokenizer = tokenizers[name]
    tokens = encoded(tokenizer, text, before="Score:", ended=True)
    assert written(tokenizer, tokens) == (text, True)
    assert written(tokenizer, tokens[:-1]) == (text, False)


@pytest.mark.parametrize(("expert", "student"), PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_that_are_alike_write_the_same_characters(tokenizers, expert, student, text):
    one, two = tokenizers[expert], tokenizers[student]
    theirs, ours = (encoded(tokenizer, text, before="Score:") for tokenizer in (one, two))
    spans = [
        token_spans(lambda ids, t=tokenizer: after_anchor(t, ids), tokens)
        for tokenizer, tokens in ((one, theirs), (two, ours))
    ]
    assert spans[0][0] == spans[1][0] == text
    shared = shared_tokens(one, two, (size(one), size(two)))
    theirs = list(zip(theirs, spans[0][1], strict=True))
    ours = list(zip(ours, spans[1][1], strict=True))
    alike = split_alike(theirs, ours, shared)
    assert len(alike) == len(ours)
    matched = [(at, index) for at, index in enumerate(alike) if index is not None]
    assert matched or text in TEXTS[2:]
    assert [index for _, index in matched] == sorted(index for _, index in matched)
    for at, index in matched:
        (token, span), (other, same) = ours[at], theirs[index]
        assert span == same
        assert text[slice(*span)] == after_anchor(two, [token]) == after_anchor(one, [other])


def test_split_alike_by_hand():
    """12| apples|., and 1|2| apples|!, where the last writes the same character in two halves."""
    shared = SharedTokens((5, 7), (6, 8))
    expert = [(4, (0, 2)), (5, (2, 9)), (3, (9, 10))]
    student = [(1, (0, 1)), (2, (1, 2)), (6, (2, 9)), (3, (9, 10))]
    assert split_alike(expert, student, shared) == [None, None, 1, None]
