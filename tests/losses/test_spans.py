"""Where tokens stand in their text: as decoding every prefix says, in linear time."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models

from mlx_fd.losses.spans import token_spans
from mlx_fd.problems.sources import gsm8k
from support.sentencepiece import make_sentencepiece
from support.tiny import make_tokenizer

SMILE = "\U0001f642"
SOLUTIONS = [problem.solution for problem in gsm8k.load("test").problems[:40]]
PARTS = [
    *SOLUTIONS,
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0" * 30,
    SMILE * 40,
    f" {SMILE}\n{SMILE} caf\u00e9 x\n\n",
    "\N{REPLACEMENT CHARACTER}",
    " don't . ' I ' m ? a , b",
    "e\u0301\u200d\u0664\u0662",
    "     ",
]


def wordpiece():
    """BERT's, which joins tokens and takes spaces out of the text that is there already."""
    words = [
        "[UNK]",
        "[CLS]",
        "don",
        "##ing",
        "##s",
        "'",
        "t",
        "n't",
        ".",
        ",",
        "!",
        "the",
        "a",
        "eggs",
        "##é",
        "5",
        "##5",
        "#",
    ]
    tokenizer = Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def tokenizers():
    byte_level = make_tokenizer()
    for skip in (False, True):
        yield f"byte-level {skip}", byte_level, skip
        for prefix in (False, True):
            yield f"bytes {prefix} {skip}", make_sentencepiece(prefix=prefix), skip
    yield "wordpiece", wordpiece(), False


def every_prefix(decode, tokens):
    """The definition."""
    ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
    ends = [min(ends[i:]) for i in range(len(ends))]
    return decode(tokens), list(pairwise([0, *ends]))


def drawn(tokenizer, rng):
    """Tokens of a text, cut anywhere, with others among them."""
    size = tokenizer.get_vocab_size()
    text = "".join(rng.choices(PARTS, k=rng.randint(1, 4)))
    tokens = tokenizer.encode(text).ids[rng.randint(0, 3) :][: rng.randint(1, 260)]
    for _ in range(rng.choice([0, 0, 1, 3, 30])):
        tokens.insert(rng.randint(0, len(tokens)), rng.randrange(size))
    return tokens


@pytest.mark.parametrize(("name", "tokenizer", "skip"), tokenizers(), ids=lambda x: str(x)[:20])
def test_spans_are_those_of_every_prefix(name, tokenizer, skip):
    rng = random.Random(name)

    def decode(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=skip)

    for _ in range(25):
        tokens = drawn(tokenizer, rng)
        assert token_spans(decode, tokens) == every_prefix(decode, tokens)


@pytest.mark.parametrize(("name", "tokenizer", "skip"), tokenizers(), ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("part", [SOLUTIONS[0], SMILE + "\n", "\u65e5"])
def test_few_tokens_are_decoded(name, tokenizer, skip, part):
    """Of each kind a long text: words, runs of bytes, a character for each few tokens."""
    decoded = 0

    def decode(tokens):
        nonlocal decoded
        decoded += len(tokens)
        return tokenizer.decode(tokens, skip_special_tokens=skip)

    tokens = tokenizer.encode(part * 400).ids[:1998]
    text, spans = token_spans(decode, tokens)
    assert decoded < 60 * len(tokens)
    assert spans[-1][1] == len(text)
