"""The phase schedule: by hand, its shape, and together with the gate's weights."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.config import GateOptions
from mlx_fd.feedback import gate
from mlx_fd.feedback.phases import PhaseSchedule, combined, phase_weights

NAMES = ("lm", "answer", "reasoning", "attention")
SCHEDULE = PhaseSchedule(begin=0.2, end=0.6, floor=0.1)


@pytest.mark.parametrize(
    ("progress", "first", "later"),
    [
        (0.0, 1.0, 0.1),
        (0.2, 1.0, 0.1),
        (0.3, 0.775, 0.325),  # a quarter of the way: 1 - 0.9 / 4 and 0.1 + 0.9 / 4
        (0.4, 0.55, 0.55),
        (0.6, 0.1, 1.0),
        (1.0, 0.1, 1.0),
    ],
)
def test_weights_by_hand(progress, first, later):
    total = 1 + first + 2 * later
    expected = {
        "lm": 1 / total,
        "answer": first / total,
        "reasoning": later / total,
        "attention": later / total,
    }
    assert phase_weights(NAMES, progress, SCHEDULE) == pytest.approx(expected)


def test_correctness_first_reasoning_later():
    early, late = (phase_weights(NAMES, t, PhaseSchedule()) for t in (0.0, 1.0))
    assert early["answer"] > early["reasoning"] == early["attention"]
    assert late["answer"] < late["reasoning"] == late["attention"]


progress = st.floats(0, 1)
schedules = st.builds(
    lambda a, b, floor: PhaseSchedule(begin=min(a, b), end=max(a, b), floor=floor),
    progress,
    progress,
    st.floats(0.01, 1),
)


@given(schedules, progress, progress, st.permutations(NAMES), st.integers(1, 4))
def test_a_distribution_that_moves_one_way(schedule, one, other, order, count):
    names = order[:count]
    before, after = (phase_weights(names, t, schedule) for t in sorted((one, other)))
    for weights in (before, after):
        assert list(weights) == list(names)
        assert sum(weights.values()) == pytest.approx(1)
        assert min(weights.values()) > 0
    if {"answer", "reasoning"} <= set(names):
        ratios = [weights["reasoning"] / weights["answer"] for weights in (before, after)]
        assert ratios[0] <= ratios[1] * (1 + 1e-12)
        assert schedule.floor * (1 - 1e-9) <= ratios[0]
        assert ratios[1] <= (1 + 1e-9) / schedule.floor
    if {"reasoning", "attention"} <= set(names):
        assert before["reasoning"] == before["attention"]


def test_a_jump_where_begin_is_end():
    schedule = PhaseSchedule(begin=0.5, end=0.5, floor=0.5)
    names = ("answer", "reasoning")
    before, after = {"answer": 2 / 3, "reasoning": 1 / 3}, {"answer": 1 / 3, "reasoning": 2 / 3}
    assert phase_weights(names, math.nextafter(0.5, 0), schedule) == pytest.approx(before)
    assert phase_weights(names, 0.5, schedule) == pytest.approx(after)


def test_losses_of_no_phase_and_a_floor_of_one_stay_equal():
    for t in (0.0, 0.5, 1.0):
        four = ("lm", "hidden", "logit")
        assert set(phase_weights(four, t, SCHEDULE).values()) == {1 / 3}
        flat = PhaseSchedule(floor=1.0)
        assert set(phase_weights(NAMES, t, flat).values()) == {0.25}


@pytest.mark.parametrize(
    "wrong",
    [
        {"begin": -0.1},
        {"end": 1.1},
        {"begin": 0.6, "end": 0.5},
        {"begin": math.nan},
        {"floor": 0.0},
        {"floor": 1.5},
        {"correctness": ("lm",), "reasoning": ("lm", "attention")},
    ],
)
def test_schedules_that_make_no_sense(wrong):
    with pytest.raises(ValueError):
        PhaseSchedule(**wrong)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_out_of_range(progress):
    with pytest.raises(ValueError, match="progress"):
        phase_weights(NAMES, progress, SCHEDULE)


def test_no_losses():
    with pytest.raises(ValueError, match="no loss"):
        phase_weights((), 0.5, SCHEDULE)


def test_combined_by_hand():
    product = combined({"answer": 0.25, "reasoning": 0.75}, {"reasoning": 0.4, "answer": 0.6})
    assert product == pytest.approx({"answer": 0.15 / 0.45, "reasoning": 0.3 / 0.45})


weightings = st.lists(st.floats(0.001, 1), min_size=3, max_size=3).map(
    lambda values: dict(zip(("lm", "answer", "reasoning"), values, strict=True))
)


@given(weightings, weightings)
def test_combined_is_a_normalised_product(one, other):
    product = combined(one, other)
    assert sum(product.values()) == pytest.approx(1)
    assert product == pytest.approx(combined(other, one))
    assert product["lm"] / product["answer"] == pytest.approx(
        one["lm"] * other["lm"] / (one["answer"] * other["answer"])
    )
    alone = {name: share / sum(one.values()) for name, share in one.items()}
    assert combined(one) == pytest.approx(alone)
    assert combined(one, dict.fromkeys(one, 0.2)) == pytest.approx(alone)


def test_combined_refuses_other_losses_and_no_weight_at_all():
    with pytest.raises(ValueError, match="different losses"):
        combined({"lm": 1.0}, {"lm": 0.5, "answer": 0.5})
    with pytest.raises(ValueError, match="no loss"):
        combined({"lm": 1.0, "answer": 0.0}, {"lm": 0.0, "answer": 1.0})


@pytest.mark.parametrize("kind", ["ema", "published"])
def test_with_the_gate(kind):
    """The gate's preference for what lags and the schedule's for what has its turn multiply."""
    options = GateOptions(gate=kind)
    state = gate.initial_state(options, NAMES)
    first = dict.fromkeys(NAMES, 1.0)
    state, _ = gate.observe_probe(state, first, options)
    for _ in range(4):
        state, _ = gate.observe_probe(state, {**first, "answer": 0.5, "lm": 0.5}, options)
    lagging = gate.weights(state, options)
    assert lagging["reasoning"] > lagging["answer"]
    schedule = phase_weights(NAMES, 0.0, SCHEDULE)
    both = combined(lagging, schedule)
    assert sum(both.values()) == pytest.approx(1)
    for name in NAMES:
        assert both[name] / both["attention"] == pytest.approx(
            lagging[name] * schedule[name] / (lagging["attention"] * schedule["attention"])
        )
    if kind == "ema":
        assert both["answer"] > both["reasoning"]
