import importlib.util
import json
import sys

import numpy as np
import pytest

from mlx_fd.errors import UserError
from mlx_fd.evaluation.encoder import load_encoder
from mlx_fd.evaluation.toxicity import load_judge
from support.berts import reference, write

SIX = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
TEXTS = ["the cat sat on the mat.", "a step is wrong", "", "dogs ran"]


def classifier(path, labels, **changes):
    """A random BERT classifier, and its logits of TEXTS in float64."""
    names = {str(k): name for k, name in enumerate(labels)}
    arrays, config = write(path, labels=len(labels), changes={"id2label": names, **changes})
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    tokens = load_encoder(str(path)).tokens(TEXTS)
    first = [reference(arrays, config, ids)[0] for ids in tokens]
    return np.array([linear("classifier", np.tanh(linear("pooler.dense", x))) for x in first])


@pytest.mark.parametrize(
    ("labels", "kind", "exclusive"),
    [
        (SIX, "multi_label_classification", False),
        (SIX, "single_label_classification", True),
        (("neutral", "toxic"), None, True),
        (("toxicity",), None, False),
    ],
)
def test_a_bert_classifier_is_run_in_mlx(tmp_path, labels, kind, exclusive):
    logits = classifier(tmp_path, labels, problem_type=kind)
    found = load_judge(str(tmp_path))(TEXTS)
    column = next(k for k, label in enumerate(labels) if label.startswith("toxic"))
    expected = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, column]
    if not exclusive:
        expected = 1 / (1 + np.exp(-logits[:, column]))
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.judge.startswith(str(tmp_path)) and "BERT in MLX (weights " in found.judge
    assert found.measures == f"the label {labels[column]!r}"
    assert load_judge(str(tmp_path))([]).values == ()


def test_what_is_no_classifier_of_toxic_texts_is_refused(tmp_path):
    write(tmp_path / "bare")
    with pytest.raises(UserError, match="Missing 2 parameters"):
        load_judge(str(tmp_path / "bare"))
    classifier(tmp_path / "mood", ("not-toxic", "happy"))
    with pytest.raises(UserError, match="no label 'toxic'; it has not-toxic, happy"):
        load_judge(str(tmp_path / "mood"))
    config = tmp_path / "mood" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": {"a": "toxic"}}))
    with pytest.raises(UserError, match="does not number the labels"):
        load_judge(str(tmp_path / "mood"))


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(UserError, match=r"mlx-fd\[toxicity\].*pickle"):
        load_judge()


@pytest.mark.skipif(
    importlib.util.find_spec("profanity_check") is None, reason="pip install 'mlx-fd[toxicity]'"
)
def test_the_word_model_knows_an_insult():
    found = load_judge()(["You are a fucking idiot.", "Step 2 is wrong: 3 + 4 is 7, not 8."])
    insult, feedback = found.values
    assert insult > 0.9 and 0 <= feedback < 0.2
    assert found.judge.startswith("alt-profanity-check 1.")
    assert found.measures == "profane or offensive language"
    assert load_judge()([]).values == ()
