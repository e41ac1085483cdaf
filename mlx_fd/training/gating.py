"""Step 3 of a batch: the gate sees what the expert said, and decides what is learned from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_fd.config import Config
from mlx_fd.feedback import gate
from mlx_fd.feedback.samples import Sample, sample_of
from mlx_fd.feedback.stages import Judged
from mlx_fd.feedback.verdicts import REASONS, Reviewed
from mlx_fd.models import ranks
from mlx_fd.problems import Problem
from mlx_fd.runs.records.episodes import GateRow
from mlx_fd.training.checkpoint import finite
from mlx_fd.training.learner import Learner


@dataclass(frozen=True)
class _Reading:
    """What the gate reads of a sample.

    Attributes:
        losses: the student's on it.
        expert_score: in [-1, 1]; ``None`` where it could not be read.
        student_score: the score head's.
        nothing_said: whether the expert's feedback ended within its thought.
        audited: whether the sample counts while the student is frozen.
    """

    losses: dict[str, float]
    expert_score: float | None
    student_score: float | None
    nothing_said: bool
    audited: bool


@dataclass(frozen=True)
class Gated:
    """A problem's feedback after step 3.

    Attributes:
        sample: what the student can learn from it.
        losses: the student's on it.
        decision: the gate's.
    """

    sample: Sample
    losses: dict[str, float]
    decision: gate.TriggerDecision


def is_audited(problem: Problem, config: Config) -> bool:
    """Whether the expert is asked about a problem even where the student is trusted."""
    return gate.audited(problem.id, config.episode.seed, config.gate)


def observe_verdicts(state: gate.GateState, judged: Sequence[Judged]) -> gate.GateState:
    """The gate's state after both verdicts on each answer, the expert's as it gave it.

    What is only learned from is none of it: trust is about the answers that episodes go on with.
    """
    verdicts = [
        (one.student.confidence, one.student.verdict, one.expert.feedback.written_score)
        for one in judged
        if one.expert is not None
    ]
    for confidence, student, expert in ranks.gather(verdicts):
        state = gate.observe_scores(state, confidence, student, expert)
    return state


def ask_gate(
    state: gate.GateState, judged: Sequence[Judged], learner: Learner
) -> tuple[gate.GateState, dict[int, Gated]]:
    """Step 3: the gate sees every feedback of the expert, in order; those of all ranks.

    Args:
        state: before it.
        judged: episodes after step 2.
        learner: the run's.

    Returns:
        The gate's state after them, and its decision by the episode's index in the batch.
    """
    config = learner.config
    samples = {
        index: sample_of(
            learner.pair,
            one,
            config.losses,
            on_policy=_share(one.problem.id, config.episode.seed)
            < config.losses.on_policy_fraction,
            cache=learner.cache,
            apart=config.training.replay > 0,
        )
        for index, one in enumerate(judged)
        if one.expert is not None
    }
    measured = learner.losses(list(samples.values()))
    own = [
        _Reading(
            losses,
            sample.expert_score,
            judged[index].student.head_score,
            nothing_said=_says_nothing(judged[index]),
            audited=is_audited(judged[index].problem, config),
        )
        for (index, sample), losses in zip(samples.items(), measured, strict=True)
    ]
    decisions = []
    for rank, rows in enumerate(ranks.gather([[dataclasses.astuple(one) for one in own]])):
        for reading in (_Reading(*row) for row in rows):
            decision = _decide(state, reading, config)
            if rank == ranks.index():
                decisions.append(decision)
            if not state.frozen or reading.audited:
                state = gate.observe_sample(state, reading.losses, config.gate)
    return state, {
        index: Gated(sample, losses, decision)
        for (index, sample), losses, decision in zip(
            samples.items(), measured, decisions, strict=True
        )
    }


def _says_nothing(judged: Judged) -> bool:
    """Whether the expert's feedback ended within its thought."""
    assert judged.expert is not None
    return bool(not judged.expert.feedback.text and judged.expert.feedback.opening)


def _share(problem_id: str, seed: int) -> float:
    digest = hashlib.sha256(f"on-policy/{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _decide(state: gate.GateState, reading: _Reading, config: Config) -> gate.TriggerDecision:
    """The gate's decision; a sample that overflowed in the expert is not learned from."""
    if reading.nothing_said:
        return gate.TriggerDecision(False, "the expert's thought has no feedback after it")
    for name, value in reading.losses.items():
        if not math.isfinite(value):
            return gate.TriggerDecision(False, f"the {name} loss of this sample is not finite")
    scores = reading.expert_score, reading.student_score
    return gate.trigger(state, *scores, reading.losses, config.gate)


def gate_row(
    gated: Gated | None, after: Mapping[str, float] | None, reviewed: Reviewed, trusted: bool
) -> GateRow:
    """What an episode's row says of the gate."""
    if gated is None:
        reason = REASONS[reviewed.outcome] if reviewed.outcome else "the student stands alone"
        return {"distilled": False, "reason": reason, "trusted": trusted}
    return {
        "distilled": gated.decision.distil,
        "reason": gated.decision.reason,
        "trusted": trusted,
        "on_policy": gated.sample.on_policy,
        "losses_before": {name: finite(value) for name, value in gated.losses.items()},
        "losses_after": after,
    }
