"""The objectives against float64 numpy on a vocabulary of three tokens, value and gradient."""

from __future__ import annotations

import dataclasses
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_fd.training.selfdistill import objectives
from mlx_fd.training.selfdistill.learning import loss_value, total
from mlx_fd.training.selfdistill.methods import METHODS, configured
from mlx_fd.training.selfdistill.reading import teacher_targets
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats, Text
from mlx_fd.training.selfdistill.token_weights import TokenWeights, echo_weights, token_weights

V = 3
LENGTHS = (3, 2, 4, 1)
GROUPS = (0, 0, 1, 1)
REWARDS = (1.0, 0.0, 0.0, 1.0)
ECHO_LENGTHS = (2, 3)
MOST = 5  # tokens an attempt may have
STEP = 1e-5


def log_softmax(rows):
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


class Case:
    """Random logits [T, 3] of everyone for four attempts at two problems, and the drawn tokens."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)

        def logits(lengths):
            return [rng.normal(scale=1.5, size=(n, V)).astype(np.float32) for n in lengths]

        self.tokens = [rng.integers(V, size=n) for n in LENGTHS]
        self.student = logits(LENGTHS)
        self.old = [z + rng.normal(scale=0.3, size=z.shape) for z in self.student]
        self.teacher = logits(LENGTHS)
        self.base = logits(LENGTHS)
        # One wrong hint for the first attempt, two for the second, none for the others.
        self.wrong = [logits([3]), logits([2, 2]), [], []]
        # The third attempt teaches nothing.
        self.taught = (True, True, False, True)
        self.echo_tokens = [rng.integers(V, size=n) for n in ECHO_LENGTHS]
        self.echo_student = logits(ECHO_LENGTHS)
        self.echo_teacher = logits(ECHO_LENGTHS)


def picked(logits, tokens, warmth):
    """log p of tokens, float64."""
    rows = log_softmax(np.asarray(logits, np.float64) / warmth)
    return rows[np.arange(len(tokens)), tokens]


# ------------------------------------------------------------------- the independent computation


def outcomes(student, teacher, support, k, tail, warmth, chosen_by):
    """Log-probabilities of the outcomes that are compared, of one token's two distributions."""
    q, p = log_softmax(student / warmth), log_softmax(teacher / warmth)
    if support == "all":
        return q, p
    chosen = np.argsort(-chosen_by)[:k]
    if len(chosen) == len(q):
        return q, p
    rest = [i for i in range(len(q)) if i not in chosen]
    if not tail:
        return log_softmax(q[chosen]), log_softmax(p[chosen])
    return tuple(np.append(row[chosen], np.log(np.exp(row[rest]).sum())) for row in (q, p))


def divergence(q, p, kind, beta, clip):
    """Of log-probabilities q (student) and p (teacher), each outcome's share cut at clip."""
    if kind == "forward":
        terms = np.exp(p) * (p - q)
    elif kind == "reverse":
        terms = np.exp(q) * (q - p)
    else:
        m = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
        terms = beta * np.exp(p) * (p - m) + (1 - beta) * np.exp(q) * (q - m)
    return np.minimum(terms, clip or math.inf).sum()


def matched(students, teachers, fixed, options, weights):
    """Sum over texts and tokens of weight times divergence."""
    kind = "forward" if options.objective == "echo" else options.objective
    value = 0.0
    for z, zt, z0, row in zip(students, teachers, fixed, weights, strict=True):
        for t in range(len(z)):
            by = np.asarray(zt[t] if options.support == "teacher" else z0[t])
            q, p = outcomes(
                np.asarray(z[t], np.float64), np.asarray(zt[t], np.float64), options.support,
                options.loss_top_k, options.tail, options.temperature, by,
            )  # fmt: skip
            value += row[t] * divergence(q, p, kind, options.jsd_beta, options.token_clip)
    return value


def group_advantages(rewards, scale, baseline):
    if baseline == "right":
        return np.array([0.0 if reward == 1 else -1.0 for reward in rewards])
    table = np.array(rewards).reshape(2, 2)
    difference = table - table.mean(axis=1, keepdims=True)
    if scale == "group":
        difference = difference / (table.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    elif scale == "batch":
        difference = difference / (table.std(ddof=1) + 1e-4)
    return difference.reshape(-1)


def reference(case, options):
    """The loss as a function of the students' logits (attempts, then echoes), all else fixed."""
    warmth = options.temperature
    now0 = [picked(z, y, warmth) for z, y in zip(case.student, case.tokens, strict=True)]
    old = [picked(z, y, warmth) for z, y in zip(case.old, case.tokens, strict=True)]
    teacher = [picked(z, y, warmth) for z, y in zip(case.teacher, case.tokens, strict=True)]
    base = [picked(z, y, warmth) for z, y in zip(case.base, case.tokens, strict=True)]
    taught = [
        np.array([case.taught[i] and t >= options.skip_tokens for t in range(n)])
        for i, n in enumerate(LENGTHS)
    ]
    many = sum(int(row.sum()) for row in taught)
    stale = [
        np.minimum(np.exp(a - b), options.stale_cap) if options.stale_cap else np.ones(len(a))
        for a, b in zip(now0, old, strict=True)
    ]
    shares = [row * ratio / many for row, ratio in zip(taught, stale, strict=True)]
    echo_share = [np.full(n, 1 / sum(ECHO_LENGTHS)) for n in ECHO_LENGTHS]

    rewards = list(REWARDS)
    if options.objective == "echo":
        near = {
            group: matched([z], [zt], [z], options, [np.full(len(z), 1 / len(z))])
            for group, (z, zt) in enumerate(zip(case.echo_student, case.echo_teacher, strict=True))
        }
        rewards = [
            min(max(r + options.near_bonus * (r > 0) * math.exp(-near[g]), -1), 2)
            for r, g in zip(rewards, GROUPS, strict=True)
        ]
    of_groups = group_advantages(rewards, options.scale_rewards, options.reward_baseline)

    def policy(now):
        advantages = [np.full(n, a) for n, a in zip(LENGTHS, of_groups, strict=True)]
        tokens = sum(LENGTHS)
        if options.loss_type == "grpo":
            weights = [np.full(n, 1 / (n * len(LENGTHS))) for n in LENGTHS]
        elif options.loss_type == "dr_grpo":
            weights = [np.full(n, 1 / (len(LENGTHS) * MOST)) for n in LENGTHS]
        else:
            weights = [np.full(n, 1 / tokens) for n in LENGTHS]
        if options.objective == "contrastive":
            selected = []
            for i, n in enumerate(LENGTHS):
                e = np.zeros(n)
                if case.wrong[i]:
                    rows = np.stack([picked(z, case.tokens[i], warmth) for z in case.wrong[i]])
                    e = teacher[i] - np.log(np.exp(rows).mean(axis=0))
                r = options.contrast_scale * np.tanh(e / options.contrast_tau)
                r = np.clip(r, -options.contrast_clip, options.contrast_clip)
                chosen = np.abs(r) > options.contrast_gate
                moved = of_groups[i] + np.where(chosen, r, 0)
                sign = np.sign(of_groups[i])
                advantages[i] = sign * np.maximum(sign * moved, 0)
                selected.append(chosen)
            # The published code takes attempts without hints of both kinds out of the batch.
            hinted = [bool(hints) for hints in case.wrong]
            tokens = sum(n for n, kept in zip(LENGTHS, hinted, strict=True) if kept)
            count = sum(int(row.sum()) for row, kept in zip(selected, hinted, strict=True) if kept)
            weights = [
                kept * np.where(row, options.contrast_weight / count, 1 / max(tokens - count, 1))
                for row, kept in zip(selected, hinted, strict=True)
            ]
        value = 0.0
        for i in range(len(LENGTHS)):
            before = teacher[i] if options.objective == "echo" and case.taught[i] else old[i]
            ratio = np.exp(now[i] - before)
            if options.importance_sampling_level == "sequence":
                ratio = np.full(len(ratio), np.exp((now[i] - before).mean()))
            free = np.minimum(ratio, options.delta or math.inf)
            cut = np.clip(ratio, 1 - options.epsilon, 1 + options.epsilon_high)
            terms = -np.minimum(free * advantages[i], cut * advantages[i])
            if options.kl_coef:
                ahead = base[i] - now[i]
                terms = terms + options.kl_coef * (np.exp(ahead) - ahead - 1)
            value += (weights[i] * terms).sum()
        return value

    def loss(students, echoes):
        now = [picked(z, y, warmth) for z, y in zip(students, case.tokens, strict=True)]
        value = 0.0
        if options.objective in ("forward", "reverse", "jsd"):
            value += options.match_weight * matched(
                students, case.teacher, case.student, options, shares
            )
        elif options.objective == "sampled":
            for share, a, b, x in zip(shares, teacher, now0, now, strict=True):
                value -= options.match_weight * (share * (a - b) * x).sum()
        elif options.objective == "echo":
            value += options.match_weight * matched(
                echoes, case.echo_teacher, case.echo_student, options, echo_share
            )
        if options.objective in ("grpo", "contrastive"):
            value += policy(now)
        elif options.policy_weight:
            value += options.policy_weight * policy(now)
        return value

    return loss


def numeric_gradient(loss, students, echoes):
    arrays = [np.asarray(z, np.float64).copy() for z in (*students, *echoes)]
    found = [np.zeros_like(z) for z in arrays]
    for array, gradient in zip(arrays, found, strict=True):
        for place in np.ndindex(array.shape):
            value = array[place]
            ends = []
            for step in (STEP, -STEP):
                array[place] = value + step
                ends.append(loss(arrays[: len(students)], arrays[len(students) :]))
            array[place] = value
            gradient[place] = (ends[0] - ends[1]) / (2 * STEP)
    return found


# --------------------------------------------------------------------------- what is under test


def identity_head():
    """A head whose logits are the hidden states."""
    head = nn.Linear(V, V, bias=False)
    head.weight = mx.eye(V)
    head.freeze()
    return head


def computed(case, options):
    """Value and gradient as the package computes them."""
    head = identity_head()
    warmth = options.temperature

    def known(z, zt, tokens, group, reward, **more):
        now = mx.array(picked(z, tokens, warmth))
        wants = zt is not None and options.objective in ("forward", "reverse", "jsd")
        return RolloutStats(
            text=Text((0,), tuple(int(y) for y in tokens)),
            group=group,
            reward=reward,
            finished=True,
            now=now,
            entropy=mx.zeros(len(tokens)),
            teacher=None if zt is None else mx.array(picked(zt, tokens, warmth)),
            targets=teacher_targets((head, head), mx.array(z), mx.array(zt), options, V)
            if wants
            else None,
            **more,
        )

    attempts = [
        known(
            case.student[i],
            case.teacher[i] if case.taught[i] else None,
            case.tokens[i],
            GROUPS[i],
            REWARDS[i],
            old=mx.array(picked(case.old[i], case.tokens[i], warmth)),
            reference=mx.array(picked(case.base[i], case.tokens[i], warmth)),
            wrong=mx.array(np.stack([picked(z, case.tokens[i], warmth) for z in case.wrong[i]]))
            if case.wrong[i]
            else None,
        )
        for i in range(len(LENGTHS))
    ]
    echoes, near = [], None
    if options.objective == "echo":
        echoes = [
            dataclasses.replace(
                known(z, None, y, g, 0.0, old=mx.zeros(len(y))), targets=mx.array(zt)
            )
            for g, (z, zt, y) in enumerate(
                zip(case.echo_student, case.echo_teacher, case.echo_tokens, strict=True)
            )
        ]
        near = {}
        for item, z in zip(echoes, case.echo_student, strict=True):
            n = len(z)
            even = TokenWeights([mx.full((n,), 1 / n)], [mx.zeros(n)], {}, 0.0, [], [])
            found = total(mx.array(z), head, [item], even, options, V)
            near[item.group] = float(found[1])
    weighed = token_weights(attempts, options, MOST, near)
    if echoes:
        weighed = dataclasses.replace(
            weighed,
            matches=[*weighed.matches, *echo_weights(echoes, options)],
            pushes=[*weighed.pushes, *(mx.zeros(n) for n in ECHO_LENGTHS)],
        )
    everything = [*attempts, *echoes]
    states = [*case.student, *(case.echo_student if echoes else [])]
    final = mx.array(np.concatenate(states))

    def loss(final):
        return total(final, head, everything, weighed, options, V)

    (_, matching), grad = mx.value_and_grad(loss)(final)
    lengths = [len(z) for z in states]
    grads = np.split(np.array(grad), np.cumsum(lengths)[:-1])
    return loss_value(weighed, float(matching), options), grads


CASES = [(name, {}) for name in METHODS] + [
    ("opsd-reference", {"loss_top_k": 2}),
    ("opsd-reference", {"loss_top_k": 2, "token_clip": 0.0, "skip_tokens": 1}),
    ("opsd-reference", {"support": "all", "objective": "jsd"}),
    ("opsd-reference", {"support": "all", "objective": "reverse"}),
    ("rcsd", {"loss_top_k": 2}),
    ("sdpo", {"loss_top_k": 2, "jsd_beta": 0.3}),
    ("sdpo", {"objective": "sampled", "policy_weight": 0.9, "match_weight": 0.1}),
    ("resd", {"loss_top_k": 1}),
    ("resd", {"objective": "sampled", "temperature": 1.3}),
    ("grpo", {"kl_coef": 0.1, "loss_type": "grpo", "temperature": 0.8}),
    ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon_high": 0.28}),
    ("grpo", {"importance_sampling_level": "sequence", "scale_rewards": "batch", "delta": 1.05}),
    ("grpo", {"reward_baseline": "right"}),
    ("sdft", {"objective": "reverse"}),
    ("rlcsd", {"contrast_tau": 1.3, "contrast_scale": 0.9, "contrast_clip": 0.5}),
    ("echodistill", {"importance_sampling_level": "token", "temperature": 1.2}),
]


@pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=[f"{n}-{'-'.join(map(str, c.values()))}" for n, c in CASES]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_float64_numpy(name, changes, seed):
    options = dataclasses.replace(configured(name).selfdistill, **changes)
    case = Case(seed)
    loss = reference(case, options)
    echoes = case.echo_student if options.objective == "echo" else []
    value, grads = computed(case, options)
    assert value == pytest.approx(loss(case.student, echoes), rel=2e-5, abs=2e-6)
    expected_slopes = numeric_gradient(loss, case.student, echoes)
    assert max(np.abs(z).max() for z in expected_slopes) > 1e-4
    for ours, theirs in zip(grads, expected_slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-6)


def test_the_sampled_objective_is_the_policy_gradient_of_the_reverse_kl():
    """In expectation over every sequence of three tokens, exactly.

    At each prefix it is the gradient of the next token's KL(pi_S || pi_T), times how likely the
    prefix is; what a token does to later ones is left out, as everywhere in this family.
    """
    rng = np.random.default_rng(3)
    steps = 3
    # A table of logits for each prefix: every sequence of at most two tokens.
    prefixes = [p for n in range(steps) for p in itertools.product(range(V), repeat=n)]
    student = {p: rng.normal(size=V) for p in prefixes}
    teacher = {p: rng.normal(size=V) for p in prefixes}

    def sequence_probability(y):
        return math.exp(sum(log_softmax(student[y[:t]])[y[t]] for t in range(steps)))

    sampled = {p: np.zeros(V) for p in prefixes}
    for y in itertools.product(range(V), repeat=steps):
        now = mx.array([[log_softmax(student[y[:t]])[y[t]] for t in range(steps)]])
        theirs = mx.array([[log_softmax(teacher[y[:t]])[y[t]] for t in range(steps)]])
        ones = mx.ones((1, steps))
        grad = np.array(mx.grad(objectives.sampled_loss)(now, theirs, ones, ones))[0]
        # The package's gradient is by each log-probability; by the logits it is this.
        for t in range(steps):
            q = np.exp(log_softmax(student[y[:t]]))
            by_logits = np.eye(V)[y[t]] - q
            sampled[y[:t]] += sequence_probability(y) * grad[t] * by_logits
    for prefix in prefixes:
        reach = math.exp(
            sum(log_softmax(student[prefix[:t]])[prefix[t]] for t in range(len(prefix)))
        )
        q, p = log_softmax(student[prefix]), log_softmax(teacher[prefix])
        kl = (np.exp(q) * (q - p)).sum()
        exact = reach * np.exp(q) * (q - p - kl)  # d KL(q || p) / d logits
        np.testing.assert_allclose(sampled[prefix], exact, atol=1e-6)
        # And the policy gradient with the per-token advantage A = log p - log q, written out.
        policy = -sum(
            reach * math.exp(q[token]) * (p[token] - q[token]) * (np.eye(V)[token] - np.exp(q))
            for token in range(V)
        )
        np.testing.assert_allclose(sampled[prefix], policy, atol=1e-6)


class TestGrpoAsTrlPublishesIt:
    """Worked by hand from the formulas in TRL's documentation and trainer."""

    def test_advantages(self):
        rewards = mx.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
        found = np.array(objectives.group_advantages(rewards))
        # Mean 1/2, standard deviation with n - 1: sqrt(4 (1/4) / 3) = 0.5773503.
        assert found[0] == pytest.approx(np.array([1, -1, -1, 1]) * 0.5 / 0.5774503, rel=1e-5)
        assert np.array_equal(found[1], np.zeros(4))
        # Mean 1/4, deviation 1/2.
        assert found[2] == pytest.approx([-0.25 / 0.5001] * 3 + [0.75 / 0.5001], rel=1e-6)
        batch = np.array(objectives.group_advantages(rewards, "batch"))
        # Seven of twelve are 1: variance 12/11 (7/12)(5/12).
        spread = math.sqrt(12 / 11 * 7 / 12 * 5 / 12) + 1e-4
        assert batch[2] == pytest.approx(np.array([-0.25, -0.25, -0.25, 0.75]) / spread, rel=1e-5)
        none = np.array(objectives.group_advantages(rewards, "none"))
        assert none[2].tolist() == [-0.25, -0.25, -0.25, 0.75]
        assert np.array(objectives.group_advantages(mx.array([[1.0], [0.0]]))).tolist() == [
            [0],
            [0],
        ]

    # Two attempts of two tokens and one; ratios 1.5, 0.5 and 1.5, advantages 2 and -1.
    now = mx.log(mx.array([[0.6, 0.2], [0.3, 0.9]]))
    old = mx.log(mx.array([[0.4, 0.4], [0.2, 0.1]]))
    mask = mx.array([[1, 1], [1, 0]])
    advantages = mx.array([2.0, -1.0])

    def loss(self, how, clipping=None, **more):
        weights = objectives.aggregation_weights(self.mask, how, 4)
        return objectives.policy_loss(
            *(self.now, self.old, self.advantages, weights, self.mask),
            clipping or objectives.Clipping(),
            **more,
        )

    def test_clipping_and_aggregation(self):
        # min(1.5 * 2, 1.2 * 2) = 2.4; min(0.5 * 2, 0.8 * 2) = 1; min(-1.5, -1.2) = -1.5.
        for how, wanted in (
            ("grpo", -((2.4 + 1) / 2 + -1.5) / 2),
            ("bnpo", -(2.4 + 1 - 1.5) / 3),
            ("dapo", -(2.4 + 1 - 1.5) / 3),
            ("dr_grpo", -(2.4 + 1 - 1.5) / (2 * 4)),
        ):
            value, clipped = self.loss(how)
            assert float(value) == pytest.approx(wanted, rel=1e-6), how
            assert float(clipped) == pytest.approx(1 / 3)
        # DAPO's higher bound: 1.28 * 2 = 2.56.
        value, _ = self.loss("dapo", objectives.Clipping(0.2, 0.28))
        assert float(value) == pytest.approx(-(2.56 + 1 - 1.5) / 3, rel=1e-6)
        # A cap of 1.3 binds where the advantage is negative: min(-1.3, -1.2).
        value, _ = self.loss("dapo", objectives.Clipping(cap=1.3))
        assert float(value) == pytest.approx(-(2.4 + 1 - 1.3) / 3, rel=1e-6)

    def test_the_ratio_of_a_sequence(self):
        # exp of the mean log-ratio: sqrt(1.5 * 0.5) = 0.8660254 for both tokens, and 1.5.
        value, _ = self.loss("bnpo", objectives.Clipping(level="sequence"))
        wanted = -(2 * 2 * math.sqrt(0.75) - 1.5) / 3
        assert float(value) == pytest.approx(wanted, rel=1e-6)

    def test_the_kl_is_k3(self):
        reference = mx.log(mx.array([[0.3, 0.4], [0.3, 0.5]]))
        # reference / now: 1/2, 2, 1: r - log r - 1 = 0.1931472, 0.3068528, 0.
        value, _ = self.loss("bnpo", reference=reference, kl_weight=0.1)
        wanted = -(2.4 + 1 - 1.5) / 3 + 0.1 * (0.1931472 + 0.3068528) / 3
        assert float(value) == pytest.approx(wanted, rel=1e-5)

    def test_on_policy_the_gradient_is_the_advantage(self):
        weights = objectives.aggregation_weights(self.mask, "bnpo", 4)

        def loss(now):
            return objectives.policy_loss(
                now, self.now, self.advantages, weights, self.mask, objectives.Clipping()
            )[0]

        grad = np.array(mx.grad(loss)(self.now))
        np.testing.assert_allclose(grad, [[-2 / 3, -2 / 3], [1 / 3, 0]], atol=1e-6)
        assert float(loss(self.now)) == pytest.approx(-(2 + 2 - 1) / 3)

    def test_nothing_under_the_mask_is_seen(self):
        poisoned = mx.where(self.mask, self.now, math.nan)
        weights = objectives.aggregation_weights(self.mask, "grpo", 4)

        def loss(now):
            return objectives.policy_loss(
                now, poisoned, self.advantages, weights, self.mask, objectives.Clipping()
            )[0]

        assert math.isfinite(float(loss(poisoned)))
        assert np.isfinite(np.array(mx.grad(loss)(poisoned))).all()


def test_a_contrast_never_turns_an_advantage_round():
    contrasts = mx.array([[5.0, -5.0, 0.0001], [5.0, -5.0, 0.0], [9.0, -9.0, 1.0]])
    options = {"tau": 0.02, "scale": 0.5, "clip": 2.0, "gate": 0.02}
    moved, selected = objectives.modulated(mx.array([0.3, -0.3, 0.0]), contrasts, **options)
    np.testing.assert_allclose(
        np.array(moved), [[0.8, 0, 0.3], [0, -0.8, -0.3], [0, 0, 0]], atol=1e-6
    )
    assert np.array(selected).tolist() == [
        [True, True, False], [True, True, False], [True, True, True],
    ]  # fmt: skip
    weights = objectives.contrastive_weights(selected[:2], mx.ones((2, 3)), 0.5)
    np.testing.assert_allclose(np.array(weights), [[0.125, 0.125, 0.5]] * 2)


def test_attempts_without_hints_of_both_kinds_are_left_out_of_rlcsd():
    options = configured("rlcsd").selfdistill
    case = Case(1)
    _, grads = computed(case, options)
    assert [bool(grad.any()) for grad in grads] == [True, True, False, False]
    case.wrong = [[]] * 4
    _, grads = computed(case, options)
    assert not any(grad.any() for grad in grads)


def test_only_wrong_attempts_count_against_a_right_one():
    rewards = mx.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    found = objectives.group_advantages(rewards, baseline="right").tolist()
    assert found == [[0, -1, -1], [0, 0, 0], [-1, -1, -1]]


def test_rewards_are_shaped_within_their_bounds():
    rewards = mx.array([[1.0, 0.0], [2.0, -3.0]])
    found = np.array(objectives.shaped_rewards(rewards, mx.array([math.log(4), 0.0]), 0.5))
    np.testing.assert_allclose(found, [[1.125, 0], [2, -1]], rtol=1e-6)


def test_a_teacher_that_says_nothing_of_a_text_stands_for_no_tokens():
    """Texts with and without a teacher go through the engine side by side."""
    options = configured("sdpo").selfdistill
    case = Case(2)
    value, grads = computed(case, dataclasses.replace(options, loss_top_k=2))
    assert math.isfinite(value)
    assert not grads[2].any()
