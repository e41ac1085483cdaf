"""Risk control against exact binomials, and its promise in simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

from mlx_fd.feedback.risk import (
    LEVEL,
    LOOK_LEVEL,
    NO_TRUST,
    THRESHOLDS,
    RunningTrust,
    audit,
    binomial_tail,
    fewest_audits,
    last_look,
    look,
    set_threshold,
    upper_bound,
)


def exact_tail(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize(
    ("k", "n", "p"), [(0, 59, "1/20"), (3, 200, "1/50"), (40, 90, "1/2"), (0, 1, "1"), (7, 7, "0")]
)
def test_the_binomial_tail_is_exact(k: int, n: int, p: str) -> None:
    exact = exact_tail(k, n, Fraction(p))
    assert binomial_tail(k, n, float(Fraction(p))) == pytest.approx(float(exact), rel=1e-11)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 59), (1, 93), (5, 100), (99, 100)])
def test_the_bound_is_where_the_exact_tail_is_five_per_cent(k: int, n: int) -> None:
    bound = Fraction(upper_bound(k, n))
    assert float(exact_tail(k, n, bound)) == pytest.approx(1 - LEVEL, rel=1e-9)
    if k == 0:
        assert float(bound) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-12)


def test_nothing_seen_and_nothing_but_disagreement_bound_nothing() -> None:
    assert upper_bound(0, 0) == upper_bound(4, 4) == 1.0


def test_the_fewest_audits_are_those_that_just_pass() -> None:
    n = fewest_audits(0.05)
    # Each of the two starts has half of the 5 %.
    assert upper_bound(0, n, 0.975) <= 0.05 < upper_bound(0, n - 1, 0.975)
    assert set_threshold([0.97] * n, [True] * n, 0.05).threshold == 0.0
    assert set_threshold([0.97] * (n - 1), [True] * (n - 1), 0.05) == NO_TRUST
    assert fewest_audits(1.0) == 0


@pytest.mark.parametrize(("bound", "n"), [(0.1, 55), (0.05, 113), (0.02, 286), (0.01, 574)])
def test_a_look_needs_more_verdicts_than_a_single_threshold(bound: float, n: int) -> None:
    assert fewest_audits(bound, LOOK_LEVEL) == n
    for count, granted in ((n - 1, False), (n, True)):
        state = RunningTrust()
        for _ in range(count):
            state = audit(state, 0.97, True)
        trust = look(state, 0.5, bound, window=n).trust
        assert (trust.threshold is not None) == granted


@pytest.mark.parametrize(("batches", "last"), [(1, 0), (2, 1), (9, 8), (16, 14), (38, 34)])
def test_the_last_look_is_before_the_last_batch(batches: int, last: int) -> None:
    state, looks = RunningTrust(), []
    for done in range(1, batches):
        after = look(state, done / batches, 0.1, 200)
        looks += [done] if after.looks > state.looks else []
        state = after
    assert last_look(batches) == last == max(looks, default=0)


def test_the_threshold_is_the_lowest_of_the_sequence_that_passes() -> None:
    # 0.95 and above: 100 verdicts, none differs; from 0.5 on half of another 100 do.
    confidences = [0.97] * 100 + [0.55] * 100
    agreements = [True] * 100 + [True, False] * 50
    trust = set_threshold(confidences, agreements, 0.05)
    assert (trust.threshold, trust.audited, trust.disagreed) == (0.56, 100, 0)
    assert trust.coverage == 0.5
    assert trust.bound == upper_bound(0, 100)
    assert trust.covers(0.56) and not trust.covers(0.559) and not trust.covers(None)
    # A few unlucky ones at the top do not end it, and one start does not lend to another.
    unlucky = set_threshold([0.97] * 100 + [0.1] * 1000, [False] * 10 + [True] * 1090, 0.05)
    assert (unlucky.threshold, unlucky.disagreed) == (0.0, 10)
    halves = set_threshold([0.97] * 100 + [0.1] * 125, [False] * 5 + [True] * 220, 0.05)
    assert upper_bound(5, 225) < 0.05 < upper_bound(5, 225, 0.975) and halves == NO_TRUST
    # Too few to show anything, and a bound that anything keeps.
    assert set_threshold([0.9] * 50, [True] * 50, 0.05) == NO_TRUST
    assert set_threshold([0.2] * 4, [False] * 4, 1.0).threshold == 0.0
    assert set_threshold([], [], 0.05) == NO_TRUST
    with pytest.raises(ValueError):
        set_threshold([0.5], [], 0.05)


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        # The worst case: every threshold is just above the bound.
        ("just above the bound", lambda c: np.full_like(c, 0.1001)),
        ("falls with confidence", lambda c: 0.6 * (1 - c)),
        ("a step", lambda c: np.where(c > 0.8, 0.03, 0.3)),
        # Where the assumption fails: the most confident are wrong.
        ("confident and wrong", lambda c: np.where(c > 0.97, 0.4, 0.05)),
    ],
)
def test_the_bound_is_broken_in_at_most_five_per_cent(name: str, differs: object) -> None:
    assert callable(differs)
    rng = np.random.default_rng(0)
    many = rng.beta(3, 0.6, 100_000)
    risk = differs(many)
    true_risk = {t: risk[many >= t].mean() for t in THRESHOLDS}
    draws, broken, kept = 400, 0, 0.0
    for _ in range(draws):
        confidences = rng.beta(3, 0.6, 250)
        agreed = rng.random(250) >= differs(confidences)
        trust = set_threshold(confidences.tolist(), agreed.tolist(), 0.1)
        if trust.threshold is not None:
            broken += true_risk[trust.threshold] > 0.1
            kept += trust.coverage
    monte_carlo = 2.6 * math.sqrt(0.05 * 0.95 / draws)
    assert broken / draws <= 0.05 + monte_carlo, name
    if name == "a step":
        # It is not kept by trusting nothing.
        assert kept / draws > 0.5, kept / draws


# ------------------------------------------------------------------------ while something learns


def alone(rng: np.random.Generator, risk: Callable[[float], float], window: int) -> float | None:
    """A run of 960 problems: the true risk where the student stood alone, a tenth audited there.

    Args:
        rng: of all draws.
        risk: progress to the probability that a verdict at the top differs; it is double at 0.
        window: as for :func:`look`.
    """
    state, kept = RunningTrust(), []
    batch, batches = 48, 20
    for number in range(batches):
        confidences = rng.beta(3, 0.6, batch)
        differs = risk(number / batches) * (2 - confidences)
        for confidence, p in zip(confidences.tolist(), differs.tolist(), strict=True):
            if state.trust.covers(confidence) and rng.random() >= 0.1:
                kept.append(p)
            else:
                state = audit(state, confidence, bool(rng.random() >= p))
        state = look(state, (number + 1) / batches, 0.1, window)
    return sum(kept) / len(kept) if kept else None


@pytest.mark.parametrize("window", [150, 1000])
@pytest.mark.parametrize(
    ("name", "risk", "saves"),
    [
        # Just above the bound at every confidence, all the time: each batch is another chance.
        ("above", lambda progress: 0.101, False),
        ("learns", lambda progress: 0.02 + 0.3 * math.exp(-8 * progress), True),
    ],
)
def test_a_run_keeps_the_bound_though_it_looks_again_and_again(
    name: str, risk: Callable[[float], float], saves: bool, window: int
) -> None:
    rng = np.random.default_rng(1)
    found = [alone(rng, risk, window) for _ in range(60)]
    trusted = [share for share in found if share is not None]
    broken = sum(share > 0.1 for share in trusted)
    assert broken / len(found) <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / len(found)), name
    assert not saves or window > 150 or len(trusted) > 0.9 * len(found)


def test_trust_ends_where_a_student_gets_worse() -> None:
    state = RunningTrust()
    for _ in range(200):
        state = audit(state, 0.9, True)
    state = look(state, 0.1, 0.1, 200)
    assert state.trust == NO_TRUST, "no look is due before an eighth of the run"
    state = look(state, 0.125, 0.1, 200)
    assert state.trust.covers(0.0)
    assert RunningTrust.from_json(json.loads(json.dumps(asdict(state)))) == state
    for _ in range(20):
        state = audit(state, 0.9, False)
    state = look(state, 0.13, 0.1, 200)
    assert state.trust == NO_TRUST, "at once, not at the next look"
    assert len(state.verdicts) == 200, "what is long ago is forgotten"
    for _ in range(180):
        state = audit(state, 0.9, True)
    assert look(state, 0.24, 0.1, 200).trust == NO_TRUST
    assert not look(state, 0.5, 0.0, 200).trust.covers(1.0)
    for _ in range(20):
        state = audit(state, 0.9, True)
    assert look(state, 0.25, 0.1, 200).trust.covers(0.9), "it is granted again"


def test_a_look_takes_away_no_trust_that_holds() -> None:
    """The last 200 verdicts show a lower threshold, which older verdicts speak against.

    Nothing was trusted then, although the threshold before held as ever.
    """

    def audited(state: RunningTrust, *verdicts: tuple[int, float, bool]) -> RunningTrust:
        for count, confidence, agreed in verdicts:
            for _ in range(count):
                state = audit(state, confidence, agreed)
        return state

    state = look(audited(RunningTrust(), (120, 0.56, True), (80, 0.53, False)), 0.125, 0.1, 200)
    assert state.trust.threshold == 0.54
    state = audited(state, (60, 0.95, True), (40, 0.45, True), (100, 0.05, False))
    between, looked = look(state, 0.2, 0.1, 200), look(state, 0.25, 0.1, 200)
    assert between.trust.threshold == 0.54 and looked.trust == between.trust
    assert (looked.trust.audited, looked.trust.disagreed) == (180, 0)
