import math

import pytest

from mlx_fd.evaluation.text import bleu, chrf, rouge

# The example of sacrebleu's documentation, whose numbers it prints.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_rouge_by_hand():
    """By stems: all six words of the one, in order, are six of the seven of the other."""
    scores = rouge(["The dog runs on the grass."], ["The dog is running on the grass"])
    assert scores["rouge1"] == pytest.approx([2 * 6 / 6 * 6 / 7 / (6 / 6 + 6 / 7)])
    assert scores["rouge2"] == pytest.approx([2 * 4 / 5 * 4 / 6 / (4 / 5 + 4 / 6)])
    assert scores["rougeL"] == scores["rouge1"]
    swapped = rouge(["on the grass the dog runs"], ["The dog runs on the grass"])
    assert swapped["rouge1"] == [1.0] and swapped["rougeL"] == pytest.approx([0.5])


def test_rouge_takes_the_best_reference_and_knows_empty_texts():
    scores = rouge(["a b c", ""], [["x y z", "a b c"], ["a b"]])
    assert scores == {"rouge1": [1.0, 0.0], "rouge2": [1.0, 0.0], "rougeL": [1.0, 0.0]}


def test_bleu_by_hand():
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples; no four of 3, which is smoothed to half a one."""
    found = bleu(["the cat is on the mat"], ["the cat sat on the mat"])
    assert found.estimate.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)
    short = bleu(["the cat sat on"], ["the cat sat on the mat"])
    assert short.estimate.value == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_published_numbers():
    words, characters = bleu(PREDICTIONS, REFERENCES), chrf(PREDICTIONS, REFERENCES)
    assert words.estimate.value == pytest.approx(48.53, abs=0.005)
    assert characters.estimate.value == pytest.approx(59.73, abs=0.005)
    assert words.signature.startswith("nrefs:2|bs:1000|seed:")
    assert "|case:mixed|eff:no|tok:13a|smooth:exp|version:" in words.signature
    assert "|nc:6|nw:0|" in characters.signature
    for found in (words, characters):
        assert 0 <= found.estimate.low < found.estimate.value < found.estimate.high
        assert found.estimate.n == 3
    assert bleu(PREDICTIONS, REFERENCES) == words


def test_references_may_be_of_different_number_and_texts_of_any_script():
    uneven = [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2]]
    assert "nrefs:var" in bleu(PREDICTIONS, uneven).signature
    assert chrf(["четыре яблока"], ["четыре яблока"]).estimate.value == pytest.approx(100)
    nothing = bleu(["", "x"], ["a b", "y"]).estimate
    assert (nothing.value, nothing.n) == (0, 2) and math.isnan(nothing.low + nothing.high)


def test_what_rouge_cannot_read_has_no_rouge():
    """Two texts that are the same were none of each other's words."""
    texts = ["東京は日本の首都です", "Tokyo is its capital"]
    for values in rouge(texts, texts).values():
        assert math.isnan(values[0]) and values[1] == 1.0
    # Of several references one that can be read is enough.
    assert rouge(["東京"], [["東京", "Tokyo"]])["rougeL"] == [0.0]


def test_one_text_has_no_interval():
    for metric in (bleu, chrf):
        one = metric(["the cat sat on the mat"], ["the cat sat on the mat"]).estimate
        assert one.value == pytest.approx(100) and math.isnan(one.low + one.high)


@pytest.mark.parametrize("metric", [rouge, bleu, chrf])
@pytest.mark.parametrize("references", [["a"], ["a", []], [["a"], ["b"], ["c"]]])
def test_a_prediction_without_reference_is_refused(metric, references):
    with pytest.raises(ValueError, match="at least one reference"):
        metric(["a", "b"], references)
    with pytest.raises(ValueError, match="must be predictions"):
        metric([], [])
