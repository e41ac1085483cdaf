"""Frontiers by hand and against pymoo; the replay against the gate, threshold by threshold."""

import dataclasses
import itertools
import math
import random
import time

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from mlx_fd.config import GateOptions
from mlx_fd.evaluation.pareto.frontier import hypervolume, knee, non_dominated, product_rule
from mlx_fd.evaluation.pareto.thresholds import Look, replay
from mlx_fd.feedback import gate


def values(*rows):
    return np.array(rows, dtype=np.float64)


# --- dominance ---


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 3), (2, 2), (3, 2)], [True, True, False]),  # as good in one, worse in the other
        ([(1, 1), (1, 1), (1, 2)], [True, True, False]),  # equal points do not dominate each other
        ([(0, 0, 9), (1, 1, 1), (2, 2, 2)], [True, True, False]),
        ([(5,), (3,), (3,), (4,)], [False, True, True, False]),
        ([(1, 1)], [True]),
    ],
)
def test_dominance_by_hand(points, kept):
    assert non_dominated(values(*points)).tolist() == kept


CASES = [(n, d, ties) for n in (1, 2, 12, 40) for d in (2, 3, 5, 8) for ties in (False, True)]


@pytest.fixture(params=CASES, ids=str)
def cloud(request):
    """Random points; with ties, on a grid so coarse that many coordinates and points are equal."""
    n, d, ties = request.param
    rng = np.random.default_rng([n, d, ties])
    return rng.integers(0, 4, (n, d)) / 4.0 if ties else rng.random((n, d))


def test_the_frontier_is_pymoos(cloud):
    front = NonDominatedSorting().do(cloud, only_non_dominated_front=True)
    assert np.flatnonzero(non_dominated(cloud)).tolist() == sorted(front)


def test_the_hypervolume_is_pymoos(cloud):
    for reference in (1.1, 0.7):
        point = np.full(cloud.shape[1], reference)
        assert hypervolume(cloud, point) == pytest.approx(HV(ref_point=point)(cloud), rel=1e-9)


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([(1, 2), (2, 1)], (3, 3), 3.0),  # two rectangles of 2 that share 1
        ([(1, 2), (2, 1), (2, 2)], (3, 3), 3.0),
        ([(1, 2), (1, 2)], (3, 3), 2.0),
        ([(0, 0, 0)], (2, 3, 4), 24.0),
        ([(0, 1, 1), (1, 0, 1), (1, 1, 0)], (2, 2, 2), 4.0),  # three of 2 with a common cube of 1
        ([(3, 0), (0, 4)], (3, 4), 0.0),  # on the reference's planes
        ([(1,), (2,)], (5,), 4.0),
    ],
)
def test_hypervolume_by_hand(points, reference, volume):
    assert hypervolume(values(*points), values(*reference)) == pytest.approx(volume)


def test_a_long_frontier_is_measured_in_seconds():
    rng = np.random.default_rng(0)
    cost = np.linspace(0, 1, 150)
    losses = [np.exp(-3 * cost) * (1 + 0.05 * rng.standard_normal(150)) for _ in range(7)]
    points = np.stack([cost, *losses], axis=1)
    begin = time.perf_counter()
    found = hypervolume(points, np.full(8, 1.1))
    assert time.perf_counter() - begin < 10
    assert found == pytest.approx(HV(ref_point=np.full(8, 1.1))(points), rel=1e-9)


# --- choosing ---


def test_knee_by_hand():
    cost = values(0, 1, 2, 4, 8)
    # Below the line from (0, 1) to (1, 0) by 0, 0.475, 0.6, 0.45, 0.
    loss = values(1.0, 0.4, 0.15, 0.05, 0.0)
    assert knee(cost, loss[:, None]) == 2
    # The same in other units, in another order, and with an objective that never moves.
    order = [3, 0, 4, 2, 1]
    both = np.stack([7 + 100 * loss, np.full(5, 3.0)], axis=1)
    assert knee(1000 + 5 * cost[order], both[order]) == order.index(2)


def test_a_knee_is_of_the_mean_of_all_objectives():
    cost = values(0, 1, 2, 3, 4)
    early, late = values(1, 0.1, 0.06, 0.03, 0), values(1, 0.9, 0.2, 0.1, 0)
    assert knee(cost, early[:, None]) == 1
    assert knee(cost, late[:, None]) == 2
    # Below the line by 0.25, 0.37 and 0.185.
    assert knee(cost, np.stack([early, late], axis=1)) == 2


def test_frontiers_without_a_knee():
    line, cost = values(4, 3, 2, 1, 0) / 4, values(0, 1, 2, 3, 4) / 7
    assert knee(cost, line[:, None]) is None
    assert knee(cost, np.sqrt(line)[:, None]) is None  # falls ever faster
    assert knee(cost[:2], line[:2, None]) is None
    assert knee(np.ones(5), line[:, None]) is None


def test_of_two_knees_alike_the_cheaper():
    cost, loss = values(0, 3, 1, 4), values(4, 0, 2, 0) / 4
    # Below the line from (0, 1) to (4, 0) by 0, 0.25, 0.25, 0.
    assert knee(cost, loss[:, None]) == 2


def test_points_of_one_cost_do_not_move_the_knee():
    cost, loss = values(0, 0, 1, 4, 4), values(1, 9, 0.2, 0, 9)
    assert knee(cost, loss[:, None]) == knee(cost[[0, 2, 3]], loss[[0, 2, 3], None]) + 1 == 2


def test_product_rule_by_hand():
    assert product_rule(values(1, 2, 4), values(9, 4, 3)) == 1
    # The published sweep's costs are all the same, so that only the loss decides.
    assert product_rule(values(5, 5, 5), values(9, 4, 3)) == 2


# --- replay ---


def curves(seed, noise, floors, decays, count):
    draw = random.Random(str((seed, noise)))
    return [
        {
            name: 2 * (floor + (1 - floor) * decay**step) * max(1 + noise * draw.gauss(0, 1), 1e-3)
            for name, floor, decay in zip("abcd", floors, decays, strict=False)
        }
        for step in range(count)
    ]


def stops(losses, options, costs):
    """The batch after which the gate itself freezes, fed look by look."""
    state = gate.initial_state(options, list(losses[0]))
    state, _ = gate.observe_probe(state, losses[0], options, cost=0.0)
    for batch, (seen, cost) in enumerate(zip(losses[1:], costs, strict=True), 1):
        state, decision = gate.observe_probe(state, seen, options, cost=cost)
        if decision.action == "freeze":
            return batch
    return None


FALLING = [(0.1, 0.05, 0.3, 0.0), (0.9, 0.8, 0.95, 0.97)]
RUNS = {
    "falling": (*FALLING, 60, GateOptions()),
    "quick gate": (*FALLING, 60, GateOptions(ema_decay=0.5, minimum_gain=0.0)),
    # One loss that never moves blocks until its plateau.
    "one flat": ((0.1, 1.0), (0.9, 0.9), 60, GateOptions(ema_decay=0.7)),
    # All end on plateaus, so that every threshold stops in the end.
    "plateaus": ((0.2, 0.4), (0.7, 0.8), 90, GateOptions(ema_decay=0.7, plateau_steps=10)),
}


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("kind", RUNS)
def test_the_replay_is_the_gate_at_every_threshold(kind, noise):
    floors, decays, count, options = RUNS[kind]
    losses = curves(kind, noise, floors, decays, count)
    costs = [float(1 + step % 3) for step in range(1, count)]
    looks = [
        Look(batch, seen, cost)
        for batch, (seen, cost) in enumerate(zip(losses[1:], costs, strict=True), 1)
    ]
    # Whatever the run's own gate and threshold were.
    asked = dataclasses.replace(options, gate="always", stop_threshold=0.9)
    outcomes = replay(losses[0], looks, asked)

    def really(threshold):
        return stops(losses, dataclasses.replace(options, stop_threshold=threshold), costs)

    assert outcomes[0].low == 0.0
    assert outcomes[-1].high == 1.0
    for outcome in outcomes:
        assert outcome.low <= outcome.stop_threshold <= outcome.high
        inside = (outcome.stop_threshold, outcome.low, math.nextafter(outcome.high, 0))
        assert {really(threshold) for threshold in inside} == {outcome.stopped_after_batch}
    for one, other in itertools.pairwise(outcomes):
        assert one.high == other.low
        assert other.stopped_after_batch is None or (
            one.stopped_after_batch < other.stopped_after_batch
        )
    # No outcome is missing.
    grid = {really(step / 150) for step in range(151)}
    assert grid <= {outcome.stopped_after_batch for outcome in outcomes}
    assert really(1.0) == outcomes[-1].stopped_after_batch


def test_every_threshold_stops_a_run_that_ends_on_plateaus():
    floors, decays, count, options = RUNS["plateaus"]
    losses = curves("plateaus", 0.0, floors, decays, count)
    looks = [Look(batch, seen, 1.0) for batch, seen in enumerate(losses) if batch]
    outcomes = replay(losses[0], looks, options)
    assert outcomes[-1].stopped_after_batch is not None
    assert len(outcomes) > 3


def test_no_threshold_stops_a_flat_run_or_a_short_one():
    flat = [Look(batch, {"a": 1.0, "b": 2.0}, 1.0) for batch in range(1, 100)]
    assert [o.stopped_after_batch for o in replay({"a": 1.0, "b": 2.0}, flat, GateOptions())] == [
        None
    ]
    falling = [Look(batch, {"a": 0.5**batch}, 1.0) for batch in range(1, 7)]
    # Six observations, that before the first update among them, are the fewest to stop on.
    counts = [len(replay({"a": 1.0}, falling[:n], GateOptions(ema_decay=0.3))) for n in (4, 5, 6)]
    assert counts == [1, 2, 3]


def test_a_threshold_has_no_more_digits_than_it_needs():
    losses = curves("digits", 0.0, (0.0,), (0.9,), 40)
    looks = [Look(batch, seen, 1.0) for batch, seen in enumerate(losses) if batch]
    outcomes = replay(losses[0], looks, GateOptions(ema_decay=0.3))
    assert len({o.stop_threshold for o in outcomes}) == len(outcomes) > 20
    for outcome in outcomes[:-1]:
        wide = outcome.high - outcome.low > 0.01
        assert len(f"{outcome.stop_threshold:g}") <= (4 if wide else 8)


def test_a_loss_that_is_never_seen_holds_nothing_up():
    first = {"a": 1.0}
    looks = [Look(batch, {"a": 0.7**batch}, 1.0) for batch in range(1, 20)]
    assert len(replay(first, looks, GateOptions(ema_decay=0.5))) > 5
