"""The gate: when the student is distilled, with which weights, and when it needs no expert.

Pure: state in, decision and new state out; no MLX, no numpy. Four functions decide about learning,
whichever gate is chosen (``options.gate``):

- :func:`trigger` asks, sample by sample, whether the student lags;
- :func:`observe_sample` then takes note of that sample's losses;
- :func:`observe_probe` takes note of a look at the fixed held-out probe set and decides about
  freezing and thawing;
- :func:`weights` says how much each loss counts.

:func:`stops_below` turns the stop rule round, for choosing a threshold.

The ``ema`` gate in short. Each loss has a :class:`Tracker`; its gain is 1 - EMA / first value. A
loss is *done* when it is on a plateau: it no longer improves for what it costs, which the loop
counts in tokens that the expert wrote. (Or when it has surely fallen by ``stop_threshold``, where
that is below 1.) When all are done and the mean gain is surely at least ``minimum_gain``, learning
no longer pays, and the student freezes. When a loss rises ``regression`` above its level at the
freeze, it thaws. "Surely" means that the noise seen on the curve is allowed for, so that a flat or
merely noisy curve does not freeze the student. A random walk that has really wandered down counts
as fallen: on one curve nothing tells the two apart.

Whether the expert is asked is another question. :func:`observe_scores` takes note of both verdicts
on an answer; by them :func:`set_trust` sets a threshold on the student's confidence, so that no
more than ``max_disagreement`` of its own verdicts differ from the expert's
(:mod:`mlx_fd.feedback.risk`); :func:`stands_alone` says where the expert need not be asked. No
freeze is needed for that: the student goes on learning where the expert is asked, audits among it.

``always`` and ``never`` say what they do; ``published`` is :mod:`mlx_fd.feedback.gate_published`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_fd.config import GateOptions
from mlx_fd.feedback import gate_published, risk
from mlx_fd.feedback.gate_published import PublishedState
from mlx_fd.feedback.risk import RunningTrust

Losses = Mapping[str, float | None]

# One observation may be a lucky one, so the level at the start is the mean of the first few.
START_OBSERVATIONS = 3
# Before this many observations of a loss, its noise is not known well enough to stop on.
SETTLED_OBSERVATIONS = 6
# Longer than the usual ema_decay: a noise estimate that dips by chance would let a curve pass.
NOISE_DECAY = 0.95
# Standard errors by which a gain must be sure, a plateau must be broken, a regression must show.
GAIN_ERRORS = 3.0
PLATEAU_ERRORS = 1.0
REGRESSION_ERRORS = 2.5
# Remaining share of a loss (EMA / first) as it counts in weights and mean gain: one loss that
# vanishes or explodes must not decide alone.
MIN_REMAINING, MAX_REMAINING = 0.05, 2.0
# Audited verdicts that trust rests on, times the share of them that may differ.
AUDITS = 20
_TINY = 1e-9


@dataclass(frozen=True)
class Tracker:
    """One loss as the gate remembers it.

    Attributes:
        count: observations so far.
        first: the first observed value.
        start: mean of the first :data:`START_OBSERVATIONS` observed values.
        ema: exponential moving average, started at ``first``.
        lag: EMA of (value - ema) / ema: how far the EMA trails behind a trend.
        spread: EMA of the square of the same; ``spread - lag ** 2`` is the noise.
        history: (cost so far, EMA) of the last ``plateau_steps`` observations and of the one
            before them, the newest last.
        level: the EMA at the last freeze; ``None`` before any.
        settling: observations for which ``level`` still follows an EMA that goes on falling.
    """

    count: int = 0
    first: float = 0.0
    start: float = 0.0
    ema: float = 0.0
    lag: float = 0.0
    spread: float = 0.0
    history: tuple[tuple[float, float], ...] = ()
    level: float | None = None
    settling: int = 0

    @property
    def remaining(self) -> float:
        """EMA / first value; 1 before any observation."""
        return _ratio(self.ema, self.first)

    @property
    def gain(self) -> float:
        """1 - EMA / first value."""
        return 1.0 - self.remaining


@dataclass(frozen=True)
class GateState:
    """All that the gate remembers.

    Attributes:
        probe: a tracker per loss, fed by :func:`observe_probe`.
        samples: a tracker per loss, fed by :func:`observe_sample`.
        frozen: whether distillation is stopped.
        reason: why the student last froze or thawed; empty before that.
        kd_cost: sum of the costs that :func:`observe_probe` was given, in the caller's unit.
        paid_looks: looks at the probe set before which something was spent.
        running: the student's audited verdicts, and the threshold that they have set.
        published: what the published gate remembers; empty with the other gates.
    """

    probe: dict[str, Tracker]
    samples: dict[str, Tracker]
    frozen: bool = False
    reason: str = ""
    kd_cost: float = 0.0
    paid_looks: int = 0
    running: RunningTrust = field(default_factory=RunningTrust)
    published: PublishedState = field(default_factory=PublishedState)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; floats survive JSON bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GateState:
        """What :meth:`to_json` gave, also after a trip through JSON text."""

        def trackers(group: Mapping[str, Any]) -> dict[str, Tracker]:
            return {
                name: Tracker(**{**item, "history": tuple(tuple(p) for p in item["history"])})
                for name, item in group.items()
            }

        return cls(
            **{
                **value,
                "probe": trackers(value["probe"]),
                "samples": trackers(value["samples"]),
                "running": RunningTrust.from_json(value["running"]),
                "published": PublishedState.from_json(value["published"]),
            }
        )


@dataclass(frozen=True)
class StopDecision:
    """What a look at the probe set led to.

    Attributes:
        action: ``"train"``: go on; ``"freeze"``: the student is, or stays, frozen; ``"thaw"``: it
            was frozen and learns again from now on.
        reason: why, in words and numbers.
        gains: 1 - EMA / first value of each loss observed so far.
        weights: what each loss counts from now on; sum 1.
    """

    action: str
    reason: str
    gains: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True)
class TriggerDecision:
    """Whether a sample shows the student lagging behind the expert, and why."""

    distil: bool
    reason: str


def initial_state(options: GateOptions, names: Sequence[str]) -> GateState:
    """The state before any observation.

    Args:
        options: which gate, and its thresholds and decays.
        names: the losses that are tracked, in the order in which weights are listed.
    """
    return GateState(
        probe={name: Tracker() for name in names},
        samples={name: Tracker() for name in names},
        published=gate_published.initial_state(names if options.gate == "published" else ()),
    )


def trigger(
    state: GateState,
    expert_score: float | None,
    student_score: float | None,
    losses: Losses,
    options: GateOptions,
) -> TriggerDecision:
    """Does this sample show the student lagging? To be called before :func:`observe_sample`.

    Under ``ema`` it lags where the two scores are more than ``score_gap`` apart, or a loss is above
    its EMA over the samples so far; the very first sample lags. With ``options.trigger`` always
    every sample counts as lagging until the student is frozen.

    Args:
        state: before this call; it is left as it is.
        expert_score: in [-1, 1]; ``None`` where it could not be read.
        student_score: the score head's, in [-1, 1]; ``None`` where there is none.
        losses: the sample's losses; a missing one (absent, ``None``, NaN, infinite) says nothing.
        options: which gate, and its thresholds and decays.
    """
    if state.frozen:
        return TriggerDecision(False, "frozen")
    if options.gate in ("always", "never"):
        return TriggerDecision(options.gate == "always", f"gate = {options.gate}")
    if options.trigger == "always":
        return TriggerDecision(True, "trigger = always")
    finite = _finite(losses)
    if options.gate == "published":
        _, skip = gate_published.should_skip(state.published, finite)
        return TriggerDecision(not skip, "published gate: " + ("skip" if skip else "run"))

    if not any(tracker.count for tracker in state.samples.values()):
        return TriggerDecision(True, "first sample")
    lags = []
    if expert_score is not None and student_score is not None:
        gap = abs(expert_score - student_score)
        if gap > options.score_gap:
            lags.append(f"score gap {gap:.3g} > {options.score_gap:.3g}")
    for name, value in finite.items():
        tracker = state.samples[name]
        if tracker.count and value > tracker.ema:
            lags.append(
                f"{name} {value:.4g} is {_ratio(value, tracker.ema) - 1:.1%} above its level "
                f"{tracker.ema:.4g}"
            )
    return TriggerDecision(bool(lags), "; ".join(lags) or "no lag in score or losses")


def observe_sample(state: GateState, losses: Losses, options: GateOptions) -> GateState:
    """Take note of one sample's losses, as they were before any update on it.

    While the student is frozen (call it with audited samples only), a regression thaws it:
    ``frozen`` is then false in the new state, and ``reason`` says why.

    Args:
        state: before this call; it is left as it is.
        losses: the sample's losses; missing ones leave their trackers as they are.
        options: which gate, and its thresholds and decays.
    """
    finite = _finite(losses)
    state = replace(state, samples=_observed(state.samples, finite, options, 0.0, state.frozen))
    if options.gate == "published":
        published, _ = gate_published.should_skip(state.published, finite)
        return replace(state, published=published)
    if options.gate == "ema" and state.frozen:
        regressed = _regressed(state.samples, options)
        if regressed:
            return _thaw(state, f"audited samples regressed: {regressed}")
    return state


def observe_probe(
    state: GateState, losses: Losses, options: GateOptions, cost: float = 1.0
) -> tuple[GateState, StopDecision]:
    """Take note of a look at the probe set; decide whether to go on, freeze or thaw.

    Args:
        state: before this call; it is left as it is.
        losses: mean losses on the probe set; missing ones leave their trackers as they are.
        options: which gate, and its thresholds and decays.
        cost: what was spent on distillation since the last look, in any unit (the loop counts
            tokens that the expert wrote); 0 for a look before which nothing was spent.

    Returns:
        The new state and the decision.
    """
    finite = _finite(losses)
    spent = state.kd_cost + cost
    state = replace(
        state,
        probe=_observed(state.probe, finite, options, spent, state.frozen),
        kd_cost=spent,
        paid_looks=state.paid_looks + (cost > 0),
    )
    was_frozen = state.frozen
    if options.gate == "ema":
        state, reason = (_look_frozen if was_frozen else _look_training)(state, options)
    elif options.gate == "published":
        state, reason = _look_published(state, finite)
    else:
        reason = f"gate = {options.gate}"
    action = "freeze" if state.frozen else "thaw" if was_frozen else "train"
    gains = {name: tracker.gain for name, tracker in _seen(state).items()}
    return state, StopDecision(action, reason, gains, weights(state, options))


def weights(state: GateState, options: GateOptions) -> dict[str, float]:
    """What each loss counts: more where less was gained; sum 1.

    Proportional to EMA / first value on the probe set, clipped to [:data:`MIN_REMAINING`,
    :data:`MAX_REMAINING`]; equal before any observation. A loss that is never observed there (that
    of a score head which reads the student's own feedback) counts what the others do on average:
    else it would come to count nearly everything, while they fall. The published gate has its own.

    Args:
        state: before this call; it is left as it is.
        options: which gate, and its thresholds and decays.
    """
    if options.gate == "published":
        return dict(state.published.weights)
    seen = {
        name: min(max(tracker.remaining, MIN_REMAINING), MAX_REMAINING)
        for name, tracker in _seen(state).items()
    }
    unseen = sum(seen.values()) / len(seen) if seen else 1.0
    shares = {name: seen.get(name, unseen) for name in state.probe}
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def observe_scores(
    state: GateState,
    confidence: float | None,
    student_score: float | None,
    expert_score: float | None,
) -> GateState:
    """Take note of both verdicts on an answer: does the student say what the expert says?

    Two scores say the same where both are positive (the answer is right) or neither is. What is
    missing says nothing.

    Args:
        state: before this call; it is left as it is.
        confidence: the student's, in [0, 1].
        student_score: in [-1, 1].
        expert_score: in [-1, 1]; ``None`` where it could not be read.
    """
    if student_score is None or expert_score is None:
        return state
    same = (student_score > 0) == (expert_score > 0)
    running = risk.audit(state.running, confidence, same)
    return replace(state, running=running)


def may_trust(options: GateOptions) -> bool:
    """Whether the student may come to stand alone; with ``always`` and ``never`` it may not."""
    return options.gate not in ("always", "never") and options.max_disagreement > 0


def fewest_verdicts(options: GateOptions) -> int:
    """The fewest verdicts, all of them the expert's, with which the student may be trusted.

    Args:
        options: those of a run in which it may be (:func:`may_trust`).
    """
    return risk.fewest_audits(options.max_disagreement, risk.LOOK_LEVEL)


def set_trust(state: GateState, progress: float, options: GateOptions) -> GateState:
    """Set the threshold on the student's confidence, after a batch.

    With the gates ``always`` and ``never`` the expert is always asked.

    Args:
        state: before this call; it is left as it is.
        progress: share of the run's episodes that are done, in [0, 1].
        options: which gate, and its thresholds and decays.
    """
    window = options.audit_window or math.ceil(AUDITS / (options.max_disagreement or 1.0))
    allowed = options.max_disagreement if may_trust(options) else 0.0
    running = risk.look(state.running, progress, allowed, window)
    return replace(state, running=running)


def stands_alone(state: GateState, confidence: float | None) -> bool:
    """Whether the student's feedback on an answer needs no expert.

    Args:
        state: before this call; it is left as it is.
        confidence: the student's, in [0, 1]; ``None`` where it has none.
    """
    return state.running.trust.covers(confidence)


def audited(problem_id: str, seed: int, options: GateOptions) -> bool:
    """Whether the expert is asked about this problem although the student stands alone.

    Drawn by hash, so it depends on nothing but the problem and the seed; over many problems a
    share ``audit_fraction`` is drawn.

    Args:
        problem_id: unique within the source.
        seed: of the run: another seed audits other problems.
        options: which gate, and its thresholds and decays.
    """
    digest = hashlib.sha256(f"{seed}:{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.audit_fraction * 2.0**64


def _finite(losses: Losses) -> dict[str, float]:
    return {
        name: value for name, value in losses.items() if value is not None and math.isfinite(value)
    }


def _ratio(value: float, reference: float) -> float:
    # A loss may be 0 from the start (or -1e-8, by rounding): 0 / 0 is "all of it remains".
    return max(value, _TINY) / max(reference, _TINY)


def _observed(
    trackers: Mapping[str, Tracker],
    losses: Mapping[str, float],
    options: GateOptions,
    cost: float,
    frozen: bool,
) -> dict[str, Tracker]:
    """The trackers after one observation of each known loss."""
    return {
        name: _observe(tracker, losses[name], options, cost, frozen) if name in losses else tracker
        for name, tracker in trackers.items()
    }


def _observe(
    tracker: Tracker, value: float, options: GateOptions, cost: float, frozen: bool
) -> Tracker:
    count = tracker.count + 1
    if count == 1:
        first = replace(tracker, count=1, first=value, start=value, ema=value)
        return replace(first, history=((cost, value),))
    start = tracker.start
    if count <= START_OBSERVATIONS:
        start += (value - start) / count
    deviation = _ratio(value, tracker.ema) - 1
    squared = deviation * deviation
    # The first deviation counts whole: noise starts too high and comes down.
    keep = NOISE_DECAY if count > 2 else 0.0
    ema = options.ema_decay * tracker.ema + (1 - options.ema_decay) * value
    level, settling = tracker.level, tracker.settling
    if frozen and settling and level is not None:
        # The EMA trails, so just after the freeze it goes on falling to where the loss already was.
        level, settling = min(level, ema), settling - 1
    return replace(
        tracker,
        count=count,
        start=start,
        ema=ema,
        lag=NOISE_DECAY * tracker.lag + (1 - NOISE_DECAY) * deviation,
        spread=keep * tracker.spread + (1 - keep) * squared,
        history=(*tracker.history, (cost, ema))[-(options.plateau_steps + 1) :],
        level=level,
        settling=settling,
    )


def _noise(tracker: Tracker, options: GateOptions) -> float:
    """Relative standard deviation of one observation around its trend.

    A value's deviation from the EMA before it has the variance of the value plus that of the EMA,
    for white noise (1 + (1 - d) / (1 + d)) = 2 / (1 + d) times the value's.
    """
    variance = max(tracker.spread - tracker.lag**2, 0.0)
    return math.sqrt(variance * (1 + options.ema_decay) / 2)


def _ema_error(options: GateOptions) -> float:
    """Standard deviation of an EMA of white noise of unit variance."""
    return math.sqrt((1 - options.ema_decay) / (1 + options.ema_decay))


def _difference_error(tracker: Tracker, options: GateOptions) -> float:
    """Relative standard deviation of the difference of two EMAs of the loss, far apart."""
    return _noise(tracker, options) * _ema_error(options) * math.sqrt(2)


def _most_remaining(tracker: Tracker, options: GateOptions) -> float:
    """The share of the starting level that may remain, at most, with the noise allowed for.

    EMA / start times 1 + 3 standard errors; start, the mean of k observations, contributes
    noise^2 / k to their square, the EMA noise^2 (1 - d) / (1 + d).
    """
    error = _noise(tracker, options) * math.hypot(
        1 / math.sqrt(min(tracker.count, START_OBSERVATIONS)), _ema_error(options)
    )
    return _ratio(tracker.ema, tracker.start) * (1 + GAIN_ERRORS * error)


def _surely_fallen(tracker: Tracker, options: GateOptions) -> float:
    """The share by which the loss has surely fallen; -inf after a thaw, until it is back."""
    back = tracker.level is None or tracker.ema <= tracker.level * (1 + options.regression)
    return 1 - _most_remaining(tracker, options) if back else -math.inf


def _plateaued(tracker: Tracker, options: GateOptions, usual_cost: float) -> bool:
    """Whether the last ``plateau_steps`` observations improved less than their cost warrants.

    At the run's usual cost per look they must bring ``plateau_gain``, as a share of the first
    value; at twice the cost twice that; and always more than the noise of the difference of two
    EMAs.
    """
    if len(tracker.history) <= options.plateau_steps:
        return False
    (cost_then, then), (cost_now, now) = tracker.history[0], tracker.history[-1]
    spent = cost_now - cost_then
    if spent <= 0:  # Who pays nothing may expect nothing.
        return False
    scale = max(tracker.first, _TINY)
    wanted = options.plateau_gain * spent / (options.plateau_steps * usual_cost)
    error = _difference_error(tracker, options) * max(now, 0.0) / scale
    return (then - now) / scale <= max(wanted, PLATEAU_ERRORS * error)


def _seen(state: GateState) -> dict[str, Tracker]:
    """The trackers of the losses observed on the probe set so far."""
    return {name: tracker for name, tracker in state.probe.items() if tracker.count}


def _unsettled(seen: Mapping[str, Tracker]) -> list[str]:
    """The losses of whose noise too little is known to stop on."""
    early = [name for name, t in seen.items() if t.count < SETTLED_OBSERVATIONS]
    return early if seen else ["any loss"]


def _sure_gain(seen: Mapping[str, Tracker], options: GateOptions) -> float:
    """What the mean gain is surely above."""
    left = [min(_most_remaining(tracker, options), MAX_REMAINING) for tracker in seen.values()]
    return sum(1 - share for share in left) / len(left)


def _usual_cost(state: GateState) -> float:
    return state.kd_cost / max(state.paid_looks, 1)


def stops_below(state: GateState, options: GateOptions) -> float:
    """The ``stop_threshold`` below which the newest look at the probe set freezes the student.

    The ``ema`` gate's rule, solved for the threshold: a loss that is not on a plateau is done below
    the share by which it has surely fallen.

    Args:
        state: the state after that look, not frozen.
        options: the gate's options; their ``stop_threshold`` does not matter.

    Returns:
        -inf where no threshold does, inf where every one does, because all losses are on plateaus.
    """
    seen = _seen(state)
    if _unsettled(seen) or _sure_gain(seen, options) < options.minimum_gain:
        return -math.inf
    usual_cost = _usual_cost(state)
    falling = (t for t in seen.values() if not _plateaued(t, options, usual_cost))
    return min((_surely_fallen(tracker, options) for tracker in falling), default=math.inf)


def _look_training(state: GateState, options: GateOptions) -> tuple[GateState, str]:
    """Freeze, where every loss is done and something was gained."""
    seen = _seen(state)
    early = _unsettled(seen)
    if early:
        return state, f"fewer than {SETTLED_OBSERVATIONS} observations of {', '.join(early)}"
    usual_cost = _usual_cost(state)
    standing = {
        name: "passed"
        if options.stop_threshold < _surely_fallen(tracker, options)
        else "plateau"
        if _plateaued(tracker, options, usual_cost)
        else "falling"
        for name, tracker in seen.items()
    }
    sure_gain = _sure_gain(seen, options)
    account = (
        ", ".join(f"{name} {standing[name]} at gain {t.gain:.1%}" for name, t in seen.items())
        + f"; mean gain surely above {sure_gain:.1%}"
    )
    if "falling" in standing.values():
        return state, f"not every loss is done: {account}"
    if sure_gain < options.minimum_gain:
        return state, f"mean gain not surely {options.minimum_gain:.1%}: {account}"
    reason = f"every loss is done: {account}"
    return _freeze(state, reason, options), reason


def _look_frozen(state: GateState, options: GateOptions) -> tuple[GateState, str]:
    """Thaw, where the probe set shows a regression."""
    regressed = _regressed(state.probe, options)
    if not regressed:
        return state, "frozen, no regression"
    reason = f"probe set regressed: {regressed}"
    return _thaw(state, reason), reason


def _look_published(state: GateState, losses: dict[str, float]) -> tuple[GateState, str]:
    """The published rule; the probe set is the one batch it knows."""
    if state.frozen:
        return state, "published gate: frozen for good"
    published, skip, freeze = gate_published.update_weights(state.published, losses, "probe")
    state = replace(state, published=published)
    if freeze:
        reason = "published gate: every loss 90 % below its mean first value"
        return replace(state, frozen=True, reason=reason), reason
    return state, "published gate: " + ("batch passes" if skip else "batch does not pass")


def _regressed(trackers: Mapping[str, Tracker], options: GateOptions) -> str:
    """The losses above their level at the freeze, in words; empty where there is none."""
    reasons = []
    for name, tracker in trackers.items():
        if tracker.level is None:
            continue
        error = REGRESSION_ERRORS * _difference_error(tracker, options)
        allowed = 1 + options.regression + error
        risen = _ratio(tracker.ema, tracker.level)
        if risen > allowed:
            reasons.append(
                f"{name} {tracker.ema:.4g} is {risen - 1:.1%} above {tracker.level:.4g} at the "
                f"freeze (allowed {allowed - 1:.1%})"
            )
    return ", ".join(reasons)


def _freeze(state: GateState, reason: str, options: GateOptions) -> GateState:
    two_time_constants = round(2 / (1 - options.ema_decay))

    def at_freeze(tracker: Tracker) -> Tracker:
        if not tracker.count:
            return tracker
        return replace(tracker, level=tracker.ema, settling=two_time_constants)

    return replace(
        state,
        frozen=True,
        reason=reason,
        probe={name: at_freeze(tracker) for name, tracker in state.probe.items()},
        samples={name: at_freeze(tracker) for name, tracker in state.samples.items()},
    )


def _thaw(state: GateState, reason: str) -> GateState:
    """Learn again; a plateau must be shown anew."""
    probe = {name: replace(t, history=t.history[-1:]) for name, t in state.probe.items()}
    return replace(state, frozen=False, reason=reason, probe=probe)
