"""What is measured on an engine, against float64 arithmetic over the whole vocabulary."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_map

from mlx_fd import problems
from mlx_fd.export.bundle import make_bundle
from mlx_fd.export.engines.mlx import MlxEngine
from mlx_fd.export.measures import coarse_kl, measure
from mlx_fd.models.loading import load
from support.tiny import make_model_dir


def distributions(rng, rows, vocab, sharpness):
    logits = rng.standard_normal((rows, vocab)) * sharpness
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def test_with_every_token_known_it_is_the_divergence_itself():
    rng = np.random.default_rng(0)
    p, q = (distributions(rng, 20, 50, 3) for _ in range(2))
    np.testing.assert_allclose(coarse_kl(p, q), kl(p, q), atol=1e-9)


def test_the_tail_is_one_outcome():
    rng = np.random.default_rng(1)
    p, q = (distributions(rng, 20, 500, 3) for _ in range(2))
    top = np.argsort(-p, -1)[:, :64]
    kept_p, kept_q = (np.take_along_axis(x, top, -1) for x in (p, q))
    merged = [
        np.concatenate([kept, np.log1p(-np.exp(kept).sum(-1, keepdims=True))], -1)
        for kept in (kept_p, kept_q)
    ]
    np.testing.assert_allclose(coarse_kl(kept_p, kept_q), kl(*merged), atol=1e-9)


def test_worked_by_hand():
    # Known: 1/2 against 1/4; the rest, 1/2 against 3/4, is the tail.
    p, q = np.log([[0.5, 0.25]]), np.array([[np.log(0.25), np.nan]])
    wanted = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(coarse_kl(p, q), [wanted], rtol=1e-12)
    assert np.isnan(coarse_kl(p, np.full((1, 2), np.nan))).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.floats(0.1, 30), st.floats(0, 1))
def test_it_never_exceeds_the_divergence_and_is_never_negative(seed, kept, sharpness, known):
    rng = np.random.default_rng(seed)
    p = distributions(rng, 5, 100, sharpness)
    q = distributions(rng, 5, 100, sharpness)
    top = np.argsort(-p, -1)[:, :kept]
    engine = np.take_along_axis(q, top, -1)
    engine[rng.random(engine.shape) > known] = np.nan
    found = coarse_kl(np.take_along_axis(p, top, -1), engine)
    found = np.where(np.isnan(found), 0.0, found)
    assert (found >= 0).all()
    # The floor under the tail is worth its size times the largest log-ratio.
    assert (found <= kl(p, q) + 1e-5).all()
    same = np.take_along_axis(p, top, -1)
    assert (coarse_kl(same.astype(np.float32), same) < 1e-6).all()


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory):
    """A bundle of a model, and an engine with the same model after a blow to its weights."""
    folder = make_model_dir(tmp_path_factory.mktemp("m") / "model", arch="qwen2", vocab_size=448)
    reference = load(folder)
    chosen = problems.load().problems[:1]
    bundle = make_bundle(reference, problems=chosen, seed=0, source={})
    engine = MlxEngine(folder, bundle)
    mx.random.seed(0)
    model = engine._loaded.model
    model.update(
        tree_map(lambda w: w + 0.03 * mx.random.normal(w.shape), model.trainable_parameters())
    )
    mx.eval(model.parameters())
    return bundle, reference, engine


def whole(model, sequence, vocab):
    logits = np.array(model(mx.array([sequence]))[0]).astype(np.float64)[:-1, :vocab]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_an_engine_is_measured_as_two_plain_passes_say(perturbed):
    bundle, reference, engine = perturbed
    found = measure(engine, bundle, (), lambda done, total: None)
    mine, same, clear, following, theirs = [], [], [], [], []
    for prompt in bundle.prompts:
        p, q = (
            whole(model, prompt.sequence, bundle.vocab)[prompt.begin :]
            for model in (reference.model, engine._loaded.model)
        )
        top = np.argsort(-p, -1)[:, :64]
        kept = [np.take_along_axis(x, top, -1) for x in (p, q)]
        tails = [np.log1p(-np.exp(x).sum(-1, keepdims=True)) for x in kept]
        mine.append(kl(*(np.concatenate([x, t], -1) for x, t in zip(kept, tails, strict=True))))
        same.append(p.argmax(-1) == q.argmax(-1))
        first, second = np.sort(p, -1)[:, [-1, -2]].T
        clear.append(first - second >= 0.1)
        own = len(prompt.greedy)
        rows = np.arange(len(p))[-own:]
        following.append(q[rows, prompt.greedy])
        theirs.append(p[rows, prompt.greedy])
    mine, same = np.concatenate(mine), np.concatenate(same)
    clear = np.concatenate(clear)
    assert 0 < clear.sum() < len(clear)
    assert found["clear"] == {"agreeing": int(same[clear].sum()), "n": int(clear.sum())}
    assert found["kl"]["n"] == len(mine) == sum(prompt.positions for prompt in bundle.prompts)
    np.testing.assert_allclose(found["kl"]["mean"], mine.mean(), rtol=1e-3)
    np.testing.assert_allclose(found["kl"]["worst"], mine.max(), rtol=1e-3)
    assert found["kl"]["mean"] > 1e-3
    assert found["top1"] == {"agreeing": int(same.sum()), "n": len(same)}
    for name, values in (("engine", following), ("reference", theirs)):
        wanted = np.exp(-np.concatenate(values).mean())
        np.testing.assert_allclose(found["perplexity"][name], wanted, rtol=1e-4)


def test_the_greedy_count_stops_where_the_two_part(perturbed):
    bundle, _, engine = perturbed
    parted = []
    for prompt in bundle.prompts:
        tokens, agreed = list(prompt.tokens), 0
        for wanted in prompt.greedy:
            token = int(whole(engine._loaded.model, [*tokens, 0], bundle.vocab)[-1].argmax())
            if token != wanted:
                break
            tokens.append(token)
            agreed += 1
        assert engine.score_continuation(prompt).agreed == agreed
        if agreed < len(prompt.greedy):
            parted.append(agreed + 1)
    found = measure(engine, bundle, (), lambda done, total: None)["greedy"]
    assert (found["diverged"], found["first_divergence"]) == (len(parted), min(parted))


def test_problems_are_judged_and_paired_with_the_references_answers(perturbed):
    bundle, reference, engine = perturbed
    calls = []
    asked = [*bundle.items, problems.load().problems[5]]
    found = measure(engine, bundle, asked, lambda *done: calls.append(done))["accuracy"]
    assert found["engine"]["n"] == 2 and found["reference"]["n"] == 1
    assert calls[-1] == (len(bundle.prompts) + 2,) * 2
    assert [done for done, _ in calls] == list(range(len(calls)))
    again = MlxEngine(reference.path, bundle)
    found = measure(again, bundle, bundle.items, lambda done, total: None)["accuracy"]
    assert found["same_answer"] == 1 and found["engine"] == found["reference"]
