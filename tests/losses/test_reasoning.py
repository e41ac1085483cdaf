"""Answer, reasoning and attention losses: by hand, twins, differences, masks."""

import math
from collections import Counter
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_fd.losses.answer import answer_mask, answer_span
from mlx_fd.losses.divergence import Target, fused_linear_divergence
from mlx_fd.losses.reasoning import step_weights
from mlx_fd.losses.spans import token_spans
from mlx_fd.models.attention_taps import LOG_ZERO
from mlx_fd.models.loading import load
from mlx_fd.problems import parsing
from mlx_fd.problems.sources import gsm8k
from support import reference_losses as reference
from support.dense_losses import language_model_loss, logit_loss
from support.loss_numbers import (
    ALL,
    as_type,
    check_batch_is_its_parts,
    check_masked_places_poison_nothing,
    check_nothing_valid_gives_zero,
    numbers,
    pair,
    same_gradient,
    some_mask,
)
from support.summed_losses import attention_matching_loss
from support.tiny import make_model_dir, make_tokenizer

KLS = ("forward", "reverse", "jsd")
SHAPES = [(1, 1, 2), (1, 5, 7), (3, 1, 33), (2, 7, 31)]
DTYPES = ("float32", "bfloat16", "float16")


# --- where tokens stand in a text ---


def sentencepiece_like():
    """Metaspace and byte fallback, as the tokenizers of Llama 2, TinyLlama and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    words = [p.solution for p in gsm8k.load("test").problems[:50]]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def decoder_of(tokenizer):
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)


TOKENIZERS = {"byte-level": make_tokenizer(), "sentencepiece": sentencepiece_like()}
TEXTS = [
    "2 + 3 = 5.\nSo 5 eggs.\n#### 5",
    "na\u00efve \U0001f642\U0001f44d\U0001f3fd x\n#### \u0664\u0662",
    "one",
    "  lead, trail \n\n",
    "caf\u00e9 \u65e5\u672c\u8a9e\n\n\n#### 1,234 eggs<|im_end|>",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text_in_order(name, text):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).ids
    got, spans = token_spans(decoder_of(tokenizer), tokens)
    assert got == decoder_of(tokenizer)(tokens)
    assert len(spans) == len(tokens)
    assert "".join(got[begin:end] for begin, end in spans) == got
    assert all(begin <= end for begin, end in spans)
    # And where a token decodes to something of its own, it stands there.
    for token, (begin, end) in zip(tokens, spans, strict=True):
        alone = decoder_of(tokenizer)([token]).strip()
        if alone and "\ufffd" not in alone:
            assert got[begin:end].strip() == alone


@given(st.text(max_size=40))
def test_spans_cover_any_text(text):
    for tokenizer in TOKENIZERS.values():
        tokens = tokenizer.encode(text).ids
        got, spans = token_spans(decoder_of(tokenizer), tokens)
        assert "".join(got[begin:end] for begin, end in spans) == got


def test_tokens_that_share_a_character():
    """An emoji of four byte tokens: the first stands on it, the others on nothing."""
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer.encode("\U0001f642#").ids
    text, spans = token_spans(decoder_of(tokenizer), tokens)
    assert text == "\U0001f642#"
    assert spans == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 2)]


def test_no_tokens():
    assert token_spans(decoder_of(TOKENIZERS["byte-level"]), []) == ("", [])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "#### 5"),
        ("#### 5", "#### 5"),
        ("so ####5", "####5"),
        ("####\n 5 eggs  \nI hope this helps.", "####\n 5 eggs"),
        ("#### 4\nwait\n#### 5<|im_end|>", "#### 5<|im_end|>"),
        ("#### 5\n#### done", "#### 5"),
        ("##### \u0665", "#### \u0665"),
        ("no mark: 5", None),
        ("#### none", None),
        ("####", None),
        ("", None),
    ],
)
def test_answer_span_by_hand(text, answer):
    span = answer_span(text)
    assert answer == (None if span is None else text[slice(*span)])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is red.\n#### B", "#### B"),
        ("#### Paris, of course \nI hope this helps.", "#### Paris, of course"),
        ("#### A\nwait\n#### B<|im_end|>", "#### B<|im_end|>"),
        ("#### B\n####\n 5", "#### B"),
        ("##### x+y", "#### x+y"),
        ("no mark: B", None),
        ("####  \nB", None),
        ("", None),
    ],
)
def test_answers_that_are_no_numbers(text, answer):
    span = answer_span(text, number=False)
    assert answer == (None if span is None else text[slice(*span)])
    if answer and "<|im_end|>" not in text:
        assert parsing.after_mark(text) == answer.lstrip("# ")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_answer_of_gsm8k_stands_on_the_answers_tokens(name):
    tokenizer = TOKENIZERS[name]
    for problem in gsm8k.load("test").problems[::13]:
        tokens = tokenizer.encode(problem.solution).ids
        text, spans = token_spans(decoder_of(tokenizer), tokens)
        answer = answer_span(text)
        mask = answer_mask(spans, answer)
        weights = step_weights(text, spans, answer)
        chosen = decoder_of(tokenizer)([t for t, m in zip(tokens, mask, strict=True) if m])
        assert str(parsing.final_answer(chosen)) == problem.answer
        rest = decoder_of(tokenizer)([t for t, w in zip(tokens, weights, strict=True) if w])
        assert "####" not in rest
        assert not any(m and w for m, w in zip(mask, weights, strict=True))
        # All but the mark's line are steps, and their weights add up to their number.
        lines = problem.solution.partition("####")[0].splitlines()
        assert sum(weights) == pytest.approx(sum(bool(line.strip()) for line in lines))


def test_splitting_with_a_loaded_tokenizer(tmp_path):
    """mlx-lm's wrapper, with the end-of-turn token that a model writes."""
    tokenizer = load(make_model_dir(tmp_path)).tokenizer
    tokens = [*tokenizer.encode("3 + 5 = 8.\nSo 8.\n#### 8"), tokenizer.eos_token_id]
    text, spans = token_spans(tokenizer.decode, tokens)
    mask = answer_mask(spans, answer_span(text))
    assert mask[-1]
    assert tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m]) == (
        "#### 8<|im_end|>"
    )


def test_answer_mask_by_hand():
    text = "So 5.\n#### 5"
    answer = answer_span(text)
    assert answer == (6, 12)
    #         So      5.     \n      ##      ##        5   (nothing)
    spans = [(0, 2), (2, 5), (5, 6), (6, 8), (8, 10), (10, 12), (12, 12)]
    assert answer_mask(spans, answer) == [False, False, False, True, True, True, True]
    # A token over the edge writes some of the answer; nothing follows the token before it.
    assert answer_mask([(0, 5), (5, 5), (5, 7), (7, 7)], answer) == [False, False, True, True]
    assert answer_mask(spans, None) == [False] * 7
    assert answer_mask([(0, 0)], answer) == [False]


def test_step_weights_by_hand():
    text = "One two\n\nthree\n#### 3"
    #         One     two      \n      \n      three      \n        ####      3
    spans = [(0, 3), (3, 7), (7, 8), (8, 9), (9, 14), (14, 15), (15, 19), (19, 21)]
    weights = step_weights(text, spans, answer_span(text))
    assert weights == [0.25] * 4 + [0.5] * 2 + [0.0] * 2
    # Without an answer all is reasoning, and the last line is a step.
    assert step_weights(text, spans, None) == [0.25] * 4 + [0.5] * 4
    # A token over the edge is the answer's.
    assert step_weights(text, [(0, 14), (14, 21)], answer_span(text)) == [1.0, 0.0]


def test_white_space_makes_no_steps():
    text = "\n\n a\n \n b "
    spans = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 9), (9, 9), (9, 10)]
    assert step_weights(text, spans, None) == [1 / 6] * 6 + [1 / 3] * 3
    assert step_weights(" \n", [(0, 1), (1, 2)], None) == [0.5, 0.5]
    assert step_weights("", [], None) == []


@given(st.text(alphabet="a5#\n .", max_size=30), st.data())
def test_every_token_is_at_most_one_of_the_two(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    edges = [0, *cuts, len(text)]
    spans = list(pairwise(edges))
    answer = answer_span(text)
    mask, weights = answer_mask(spans, answer), step_weights(text, spans, answer)
    assert len(mask) == len(weights) == len(spans)
    assert not any(m and w for m, w in zip(mask, weights, strict=True))
    assert sum(weights) == pytest.approx(round(sum(weights)))
    sizes = Counter(weights)
    assert all(count % round(1 / w) == 0 for w, count in sizes.items() if w)
    if answer is None:
        assert all(weights)


# --- answer matching ---


def identity(width):
    """A head whose logits are the hidden states."""
    head = nn.Linear(width, width, bias=False)
    head.weight = mx.eye(width)
    head.freeze()
    return head


def answer_matching_loss(logits, targets, mask):
    target = Target.tokens(targets, mask=mask)
    total, _ = fused_linear_divergence(logits, identity(logits.shape[-1]), target)
    return total, mask.astype(mx.bool_).any(axis=1).astype(mx.float32).sum()


def test_answer_by_hand():
    # p = (1/2, 1/4, 1/4). First sample: ln 2 + ln 4; second: no answer; third: ln 4.
    logits = mx.log(mx.array([[[0.5, 0.25, 0.25]] * 3] * 3))
    targets = mx.array([[0, 2, 1], [0, 0, 0], [1, 0, 0]])
    mask = mx.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    total, count = pair(answer_matching_loss(logits, targets, mask))
    assert (total, count) == (pytest.approx(5 * math.log(2), rel=1e-6), 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_answer_against_twin(shape, dtype):
    logits, exact = as_type(numbers(1, *shape), dtype)
    targets = np.random.default_rng(2).integers(0, shape[-1], shape[:2])
    mask = some_mask(3, *shape[:2])
    result = pair(answer_matching_loss(logits, mx.array(targets), mx.array(mask)))
    assert result == pytest.approx(reference.answer_matching_loss(exact, targets, mask), rel=1e-5)


def test_answer_gradient():
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    mask = np.array([[0, 1, 1], [0, 0, 0]])
    same_gradient(
        lambda x: answer_matching_loss(x, mx.array(targets), mx.array(mask)),
        lambda x: reference.answer_matching_loss(x, targets, mask),
        numbers(4, 2, 3, 5),
    )


def test_answer_and_rest_are_the_language_model_loss():
    logits, targets = mx.array(numbers(1, 3, 6, 9)), mx.zeros((3, 6), mx.int32)
    mask, valid = mx.array(some_mask(2, 3, 6)), mx.ones((3, 6))
    answer = answer_matching_loss(logits, targets, mask)[0].item()
    rest = language_model_loss(logits, targets, valid - mask)[0].item()
    whole = language_model_loss(logits, targets, valid)[0].item()
    assert answer + rest == pytest.approx(whole, rel=1e-5)


# --- reasoning path ---


def reasoning_path_loss(student, teacher, weights, *, kl, **options):
    heads = [identity(logits.shape[-1]) for logits in (student, teacher)]
    target = Target.teacher(teacher, heads[1], mask=weights, kind=kl, **options)
    return fused_linear_divergence(student, heads[0], target)


def reason(student, teacher, weights, kl="forward", temperature=1.0, standardize=False):
    vocab = min(student.shape[-1], teacher.shape[-1])
    return reasoning_path_loss(
        student,
        teacher,
        mx.array(weights),
        kl=kl,
        temperature=temperature,
        vocab=vocab,
        standardize=standardize,
    )


def test_reasoning_by_hand():
    """Two steps of one and three tokens count the same: (D1 + (D2 + D3 + D4) / 3) / 2."""
    student = mx.log(mx.array([[[0.5, 0.5]] * 5]))
    teacher = mx.log(mx.array([[[0.75, 0.25], *[[0.5, 0.5]] * 2, [0.75, 0.25], [0.9, 0.1]]]))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    total, count = pair(reason(student, teacher, [[1, 1 / 3, 1 / 3, 1 / 3, 0]]))
    assert total == pytest.approx(4 / 3 * divergence, rel=1e-5)
    assert count == pytest.approx(2)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("standardize", [False, True])
def test_reasoning_against_twin(kl, shape, standardize):
    batch, tokens, vocab = shape
    weights = np.abs(numbers(1, batch, tokens)) * some_mask(1, batch, tokens)
    options = {"kl": kl, "temperature": 1.7, "vocab": vocab, "standardize": standardize}
    for dtype in DTYPES:
        student, student64 = as_type(numbers(2, batch, tokens, vocab + 3), dtype)
        teacher, teacher64 = as_type(numbers(3, batch, tokens, vocab + 1), dtype)
        result = pair(reasoning_path_loss(student, teacher, mx.array(weights), **options))
        expected = reference.reasoning_path_loss(student64, teacher64, weights, **options)
        # With two tokens, standardised rows are (1, -1) or (-1, 1), so both may agree exactly.
        assert result == pytest.approx(expected, rel=5e-5, abs=1e-5)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("standardize", [False, True])
def test_reasoning_gradient(kl, standardize):
    weights = np.array([[0.25, 0, 1.0], [0.5, 0.5, 0]])
    teacher = numbers(2, 2, 3, 8)
    options = {"kl": kl, "temperature": 2.0, "vocab": 5, "standardize": standardize}
    same_gradient(
        lambda x: reasoning_path_loss(x, mx.array(teacher), mx.array(weights), **options),
        lambda x: reference.reasoning_path_loss(x, teacher, weights, **options),
        numbers(1, 2, 3, 6),
    )


@pytest.mark.parametrize("kl", KLS)
def test_equal_weights_are_the_logit_loss(kl):
    student, teacher = mx.array(numbers(1, 2, 5, 9)), mx.array(numbers(2, 2, 5, 9))
    mask = some_mask(3, 2, 5).astype(np.float32)
    same = pair(reason(student, teacher, mask, kl, 3.0))
    options = {"kl": kl, "temperature": 3.0, "vocab": 9, "standardize": False}
    assert same == pytest.approx(pair(logit_loss(student, teacher, mx.array(mask), **options)))


# --- attention matching ---


def log_rows(scores, xp=np):
    """Causal log-softmax of scores [B, H, Q, K]; the last query sees all keys."""
    queries, keys = scores.shape[-2:]
    seen = np.tril(np.ones((queries, keys), bool), keys - queries)
    if xp is np:
        shifted = np.where(seen, scores, -np.inf)
        shifted = shifted - shifted.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    shifted = mx.where(mx.array(seen), scores, LOG_ZERO)
    return shifted - mx.logsumexp(shifted, axis=-1, keepdims=True)


def attend(student, teacher, mask, heads="mean"):
    return attention_matching_loss(student, teacher, mx.array(mask), heads=heads)


def test_attention_by_hand():
    # One layer, one query of two keys. Two student heads, mean (0.5, 0.5); one teacher head.
    student = mx.log(mx.array([[[[0.9, 0.1]], [[0.1, 0.9]]]]))
    teacher = mx.log(mx.array([[[[0.75, 0.25]]]]))
    by_mean = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert pair(attend([student], [teacher], [[1]])) == (pytest.approx(by_mean, rel=1e-5), 1)
    # Aligned: both student heads go with the only teacher head.
    first = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    second = 0.75 * math.log(0.75 / 0.1) + 0.25 * math.log(0.25 / 0.9)
    total, _ = pair(attend([student], [teacher], [[1]], "aligned"))
    assert total == pytest.approx((first + second) / 2, rel=1e-5)


def test_heads_and_layers_of_the_same_place_are_compared():
    """Heads 0 and 1 of two go with 0 and 2 of three; layers 0 and 1 of two with 0 and 3 of four."""
    layers = [log_rows(numbers(i, 1, 3, 4, 4)) for i in range(4)]
    student = [layers[0][:, [0, 2]], layers[3][:, [0, 2]]]
    arrays = [mx.array(layer) for layer in student], [mx.array(layer) for layer in layers]
    assert pair(attend(*arrays, np.ones((1, 4)), "aligned")) == (pytest.approx(0, abs=1e-6), 4)
    swapped = [mx.array(layer[:, [1, 0]]) for layer in student]
    assert pair(attend(swapped, arrays[1], np.ones((1, 4)), "aligned"))[0] > 0.1
    # The mean over heads does not know their order.
    shuffled = [mx.array(layer[:, [2, 0, 1]]) for layer in layers]
    assert pair(attend(shuffled, arrays[1], np.ones((1, 4))))[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("heads", ["mean", "aligned"])
@pytest.mark.parametrize(
    ("layers", "n_heads", "queries", "keys"),
    [
        ((1, 1), (1, 1), 1, 1),
        ((2, 5), (3, 8), 4, 4),
        ((3, 2), (4, 2), 3, 7),
        ((1, 3), (5, 5), 7, 7),
    ],
)
def test_attention_against_twin(heads, layers, n_heads, queries, keys):
    mask = some_mask(0, 2, queries)
    for dtype in DTYPES:
        ours, theirs = (
            [
                as_type(log_rows(numbers(10 * side + i, 2, n_heads[side], queries, keys)), dtype)
                for i in range(layers[side])
            ]
            for side in (0, 1)
        )
        result = pair(attend([x for x, _ in ours], [x for x, _ in theirs], mask, heads))
        expected = reference.attention_matching_loss(
            [x for _, x in ours], [x for _, x in theirs], mask, heads=heads
        )
        # In half precision the rows do not quite sum to 1, in neither of the two.
        assert result == pytest.approx(expected, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("heads", ["mean", "aligned"])
def test_keys_that_the_student_does_not_see(heads):
    """A window of the student's: of the teacher's distribution the part within it."""
    ours, theirs = (log_rows(numbers(side, 1, 2, 5, 5)) for side in (0, 1))
    window = np.triu(np.ones((5, 5), bool), -1)
    ours = np.where(window, ours, -np.inf)
    ours = ours - np.log(np.exp(ours).sum(axis=-1, keepdims=True))
    got = pair(attend([mx.array(ours)], [mx.array(theirs)], np.ones((1, 5)), heads))
    wanted = reference.attention_matching_loss([ours], [theirs], np.ones((1, 5)), heads=heads)
    assert got == pytest.approx(wanted, rel=1e-4)
    assert 0 < got[0] < 10
    # The other way round nothing is lost: what the student sees beside it counts as it did.
    got = pair(attend([mx.array(theirs)], [mx.array(ours)], np.ones((1, 5)), heads))
    wanted = reference.attention_matching_loss([theirs], [ours], np.ones((1, 5)), heads=heads)
    assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("heads", ["mean", "aligned"])
def test_attention_gradient(heads):
    mask = np.array([[1, 0, 1], [1, 1, 1]])
    teacher = [log_rows(numbers(i, 2, 4, 3, 5)) for i in range(3)]

    def layers(x, xp):
        return [log_rows(x, xp), log_rows(2 * x[:, ::-1], xp)]

    same_gradient(
        lambda x: attend(layers(x, mx), [mx.array(t) for t in teacher], mask, heads),
        lambda x: reference.attention_matching_loss(layers(x, np), teacher, mask, heads=heads),
        numbers(9, 2, 2, 3, 5),
    )


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    st.sampled_from(["mean", "aligned"]),
)
def test_attention_is_not_negative_and_zero_for_equals(seed, length, scale, heads):
    student, teacher = (
        log_rows(mx.array(numbers(seed + i, 1, 2, length, length, scale=scale)), mx) for i in (0, 1)
    )
    total, count = pair(attend([student], [teacher], np.ones((1, length)), heads))
    assert math.isfinite(total)
    assert total >= -1e-5
    assert count == length
    itself = pair(attend([student], [student], np.ones((1, length)), heads))[0]
    assert itself == pytest.approx(0, abs=1e-5)


def test_one_key_leaves_nothing_to_match():
    rows = mx.zeros((2, 3, 1, 1))
    assert pair(attend([rows], [rows[:, :2]], np.ones((2, 1)))) == (0, 2)


def test_unseen_keys_may_be_infinite():
    scores, teacher = numbers(1, 1, 2, 3, 3), mx.array(log_rows(numbers(2, 1, 3, 3, 3)))
    finite, infinite = log_rows(mx.array(scores), mx), mx.array(log_rows(scores))
    assert np.isneginf(np.array(infinite)).any()
    for heads in ("mean", "aligned"):
        values = [pair(attend([x], [teacher], np.ones((1, 3)), heads)) for x in (finite, infinite)]
        assert values[0] == pytest.approx(values[1])
        grad = mx.grad(lambda x, how=heads: attend([x], [teacher], np.ones((1, 3)), how)[0])
        assert np.isfinite(np.array(grad(infinite))).all()


def test_attention_refuses_what_cannot_be_compared():
    rows = mx.zeros((1, 2, 3, 3))
    with pytest.raises(ValueError, match="heads must be"):
        attend([rows], [rows], np.ones((1, 3)), "all")
    with pytest.raises(ValueError, match="at least one layer"):
        attend([], [rows], np.ones((1, 3)))
    with pytest.raises(ValueError, match="same queries and keys"):
        attend([rows], [mx.zeros((1, 2, 3, 4))], np.ones((1, 3)))


# --- what all of them promise ---


def every_loss(seed, batch, tokens):
    """name -> (student values, their mask, loss of values and rows); the last sample is empty."""
    vocab = 6
    mask = some_mask(seed, batch, tokens)
    mask[-1] = False
    weights = mask * np.abs(numbers(seed + 1, batch, tokens))
    targets = np.random.default_rng(seed).integers(0, vocab, (batch, tokens))
    teacher = numbers(seed + 2, batch, tokens, vocab + 2)
    looks = log_rows(numbers(seed + 3, batch, 3, tokens, tokens))
    return {
        "answer": (
            numbers(seed + 4, batch, tokens, vocab),
            mask,
            lambda x, r: answer_matching_loss(x, mx.array(targets[r]), mx.array(mask[r])),
        ),
        "reasoning": (
            numbers(seed + 5, batch, tokens, vocab),
            mask,
            lambda x, r: reason(x, mx.array(teacher[r]), weights[r], "jsd", 2.0),
        ),
        # Queries first, so that the mask says which rows are bad.
        "attention": (
            np.swapaxes(log_rows(numbers(seed + 6, batch, 2, tokens, tokens)), 1, 2),
            mask,
            lambda x, r: attend([mx.swapaxes(x, 1, 2)], [mx.array(looks[r])], mask[r]),
        ),
    }


NAMES = list(every_loss(0, 2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_eight_is_four_batches_of_two(name):
    values, _, loss = every_loss(7, 8, 5)[name]
    check_batch_is_its_parts(values, loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_places_poison_nothing(name, poison):
    check_masked_places_poison_nothing(*every_loss(3, 4, 5)[name], poison)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_gives_zero(name):
    values, _, loss = every_loss(5, 3, 2)[name]
    check_nothing_valid_gives_zero(values, loss, slice(2, 3))


def test_masked_teachers_and_targets_poison_nothing():
    mask = np.array([[1, 0, 1], [0, 0, 0]])
    teacher, looks = numbers(2, 2, 3, 5), log_rows(numbers(3, 2, 2, 3, 3))
    teacher[mask == 0] = np.nan
    np.swapaxes(looks, 1, 2)[mask == 0] = np.nan
    targets = np.array([[0, -100, 3], [-100, 10**6, -1]])

    def total(x):
        rows = log_rows(mx.broadcast_to(x[:, None, :, :3], (2, 4, 3, 3)), mx)
        return (
            answer_matching_loss(x, mx.array(targets), mx.array(mask))[0]
            + reason(x, mx.array(teacher), mask, "reverse")[0]
            + attend([rows], [mx.array(looks)], mask)[0]
        )

    value, grad = mx.value_and_grad(total)(mx.array(numbers(1, 2, 3, 4)))
    assert math.isfinite(value.item())
    assert np.isfinite(np.array(grad)).all()
    assert np.array(grad)[mask == 1].any()
    assert not np.array(grad)[mask == 0].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gradients_have_the_inputs_type(name, dtype):
    values, _, loss = every_loss(11, 3, 4)[name]
    half, exact = as_type(values, dtype)
    grad = mx.grad(lambda x: loss(x, ALL)[0])(half)
    assert grad.dtype == half.dtype
    expected = mx.grad(lambda x: loss(x, ALL)[0])(mx.array(exact.astype(np.float32)))
    np.testing.assert_allclose(
        np.array(grad.astype(mx.float32)), np.array(expected), rtol=1e-2, atol=1e-3
    )


def test_no_gradient_reaches_the_teacher():
    student, teacher = mx.array(numbers(1, 1, 2, 5)), mx.array(numbers(2, 1, 2, 5))
    rows = log_rows(mx.array(numbers(3, 1, 2, 2, 2)), mx)
    for loss, at in (
        (lambda t: reason(student, t, [[1, 0.5]])[0], teacher),
        (lambda t: attend([rows], [t], [[1, 1]])[0], rows + 0.1),
    ):
        assert not np.array(mx.grad(loss)(at)).any()


def test_huge_logits():
    """Up to 1e4 in size, value and gradient stay finite and right."""
    student, teacher = numbers(1, 2, 3, 9, scale=4e3), numbers(2, 2, 3, 11, scale=4e3)
    mask, targets = np.ones((2, 3)), np.zeros((2, 3), int)
    for loss, twin in (
        (
            lambda x: answer_matching_loss(x, mx.array(targets), mx.array(mask)),
            lambda x: reference.answer_matching_loss(x, targets, mask),
        ),
        (
            lambda x: reason(x, mx.array(teacher), mask, "forward", 2.0),
            lambda x: reference.reasoning_path_loss(
                x, teacher, mask, kl="forward", temperature=2.0, vocab=9, standardize=False
            ),
        ),
    ):
        assert pair(loss(mx.array(student))) == pytest.approx(twin(student), rel=1e-5, abs=1e-6)
        grad = np.array(mx.grad(lambda x, f=loss: f(x)[0])(mx.array(student)))
        assert np.isfinite(grad).all()


def test_the_twin_of_the_logit_loss_is_the_reference():
    """One weight of 1: the twin of the reasoning loss is that of the logit loss, T^2 and all."""
    student, teacher = numbers(1, 1, 1, 5), numbers(2, 1, 1, 5)
    options = {"kl": "reverse", "temperature": 3.0, "vocab": 5, "standardize": False}
    assert reference.reasoning_path_loss(student, teacher, [[1.0]], **options) == pytest.approx(
        reference.logit_loss(student, teacher, [[1]], **options)
    )
