"""One batch of episodes, in the order of the method.

:func:`run_batch` reads like :mod:`mlx_fd.feedback.episode`:

1. answer                                   :func:`_first_halves`
2. student's and expert's feedback          likewise
3. the gate                                 :func:`ask_gate`
4. learn; the student's feedback again      :func:`learn_now`, :func:`_second_halves`
5. merge, revise, criticise, final answer   likewise

What this ends in, right final answers, is learned from in the next batch's update. With ``order``
``learn-last`` step 4 comes after step 5, learns from those too, and nothing is said again.

With ``batching`` ``continuous`` each problem goes on as soon as its own turn ends, and steps 4 (its
end) and 5 go along with steps 1 and 2 of the next batch: between two updates nothing else changes.

Of several ranks (:mod:`mlx_fd.models.ranks`) each has a share of the batch's episodes; what the
gate reads and what is learned from are all ranks'.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlx_fd.config import Config
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import Group, Turns
from mlx_fd.feedback.distill import Update
from mlx_fd.feedback.episode import first_half, second_half
from mlx_fd.feedback.rows import episode_row, with_second
from mlx_fd.feedback.samples import Sample, gather_samples
from mlx_fd.feedback.stages import Answered, Judged, StudentFeedback
from mlx_fd.feedback.turns import write_first_answer, write_student_answer
from mlx_fd.feedback.verdicts import Reviewed, tally
from mlx_fd.models import ranks
from mlx_fd.models.metering import metered
from mlx_fd.problems import Problem
from mlx_fd.runs.acceptance import accepted_count
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.metrics import MetricsRow
from mlx_fd.training.answering import Answering, observe, warmed
from mlx_fd.training.checkpoint import RunState, stop_row, trust_row, update_row
from mlx_fd.training.diverged import check_feedback
from mlx_fd.training.gating import ask_gate, gate_row, is_audited, observe_verdicts
from mlx_fd.training.learner import Learner, seeds_of
from mlx_fd.training.learning import (
    after_updates,
    learn_now,
    lessons_of,
    loss_weights,
    measure_learned,
    remembered,
    solutions_of,
)
from mlx_fd.training.work import EXPERT, STUDENT, work_row


@dataclass(frozen=True)
class Begun:
    """A batch after step 2.

    Attributes:
        first: its episodes.
        second: those of the student's answers with ``answers_by`` ``both``, which end here.
    """

    first: list[Reviewed]
    second: list[Reviewed]


@dataclass(frozen=True)
class BatchResult:
    """A batch of episodes that is done.

    Attributes:
        state: where the run stands after it.
        rows: its lines of ``episodes.jsonl``; none in a later epoch.
        metrics: its line of ``metrics.jsonl``.
        samples: what there is to learn from since the batch before, for ``samples.jsonl``.
        ahead: what is there of the next batch, where that was begun.
    """

    state: RunState
    rows: list[EpisodeRow]
    metrics: MetricsRow
    samples: list[Sample]
    ahead: Begun | None = None


def overlaps(number: int, config: Config) -> bool:
    """Whether a batch's end goes along with the beginning of the next one.

    It depends on the batch's number alone: whoever writes beside a text can change the last bit of
    a sum, and a run that was resumed is to be the one that was not. So nothing overlaps where a
    checkpoint is due.
    """
    continuous = config.generation.batching == CONTINUOUS and not config.learns_last
    return continuous and (number + 1) % config.episode.checkpoint_every != 0


def run_batch(
    state: RunState,
    problems: Sequence[Problem],
    learner: Learner,
    begun: Begun | None = None,
    following: Sequence[Problem] = (),
) -> BatchResult:
    """One batch of episodes: steps 1 to 5; with ``profile``, what it did beside the least.

    Args:
        state: where the run stands.
        problems: the batch's.
        learner: the run's.
        begun: what is there of it already.
        following: problems of the next batch, to be begun beside the end of this one; none: it
            begins for itself.
    """
    if not learner.config.episode.profile:
        return _run_batch(state, problems, learner, begun, following)[0]
    views = {EXPERT: learner.pair.expert.view, STUDENT: learner.pair.student.view}
    with metered(views) as meter:
        done, updates = _run_batch(state, problems, learner, begun, following)
    done.metrics["work"] = work_row(meter, done.rows, done.samples, updates, learner.config)
    return done


def _run_batch(
    state: RunState,
    problems: Sequence[Problem],
    learner: Learner,
    begun: Begun | None,
    following: Sequence[Problem],
) -> tuple[BatchResult, list[Update]]:
    begin = time.perf_counter()
    config, before, number = learner.config, state, state.batch
    first = number * config.generation.batch_size + ranks.part(len(problems)).start
    # 1. and 2.
    begun = begun or Begun(*learner.carry_on(_first_halves(state, problems, learner)))
    reviewed, second = begun.first, begun.second
    judged, taught = [one.judged for one in reviewed], [one.taught for one in reviewed]
    check_feedback([one.judged.student for one in (*reviewed, *second)], number, config)
    drawn = [one.judged for one in second] if config.generation.answers_by == "both" else judged
    state = dataclasses.replace(state, answering=_observe_answers(state.answering, drawn, config))
    # 3.
    gate_state, gated = ask_gate(observe_verdicts(state.gate, judged), taught, learner)
    gate_state, gated_second = ask_gate(gate_state, [one.taught for one in second], learner)
    lagging = [index for index, one in gated.items() if one.decision.distil]
    lagging_second = [index for index, one in gated_second.items() if one.decision.distil]
    feedback = gather_samples([gated[index].sample for index in lagging])
    feedback += gather_samples([gated_second[index].sample for index in lagging_second])
    weights = loss_weights(gate_state, learner, number)
    gate_state = gate.set_trust(gate_state, learner.progress(number + 1), config.gate)
    written = sum(ranks.gather([expert_tokens([*judged, *(one.judged for one in second)])]))
    state = dataclasses.replace(state, gate=gate_state, spent=state.spent + written)
    # 4. and 5.
    ahead: Begun | None = None
    if config.learns_last:
        (finished,) = learner.carry_on([_second_halves(number, judged, (), learner)])
        solutions = solutions_of(finished, lagging, learner)
        own = lessons_of(finished, taught, lagging, learner)
        state, updates = learn_now(state, [*feedback, *solutions], weights, learner, own)
        after = measure_learned(gated, lagging if updates else [], learner, number)
        state, decision = after_updates(state, updates, learner, kept=True)
    else:
        state, updates = learn_now(state, feedback, weights, learner, None)
        after = measure_learned(gated, lagging if updates else [], learner, number)
        state, decision = after_updates(state, updates, learner, kept=not following)
        # Where the expert was told the right answer, what the student has of it stays out of this.
        again = [index for index in lagging if updates and reviewed[index].again is None]
        groups = [_second_halves(number, judged, again, learner)]
        groups += _first_halves(state, following, learner) if following else []
        finished, *next_ones = learner.carry_on(groups)
        ahead = Begun(*next_ones) if following else None
        solutions = solutions_of(finished, lagging, learner)
        state = dataclasses.replace(state, replay=remembered(state.replay, solutions, learner))
    check_feedback([one.judged.student for one in finished], state.batch, config)

    trusted = [gate.stands_alone(before.gate, one.student.confidence) for one in judged]
    rows = [
        episode_row(
            one,
            first + index,
            gate_row(gated.get(index), after.get(index), reviewed[index], trusted[index]),
            reviewed[index].to_json(),
        )
        for index, one in enumerate(finished)
    ]
    for index, one in enumerate(second):
        decided = gate_row(gated_second.get(index), None, one, False)
        rows[index] = with_second(rows[index], one.judged, decided, one.to_json())
    learned = sum(ranks.gather([len(lagging) + len(lagging_second)]))
    metrics = batch_metrics(state, learned, weights, updates, decision, begin, written)
    options = warmed(config.generation, before.answering)
    metrics["answer_temperature"] = options.answer_temperature
    outcomes = ranks.gather([one.outcome for one in (*reviewed, *second)])
    metrics["expert_verdicts"] = tally(outcomes)
    rows = ranks.gather(rows)
    if (accepted := accepted_count(rows))["n"]:
        metrics["accepted"] = accepted
    done = BatchResult(state, rows, metrics, [*feedback, *solutions], ahead)
    return done, updates


def _first_halves(state: RunState, problems: Sequence[Problem], learner: Learner) -> list[Group]:
    """Steps 1 and 2 of a batch's episodes; and with ``answers_by`` ``both`` of the student's.

    Args:
        state: where the run stands before the batch.
        problems: the batch's.
        learner: the run's.
    """
    pair, config, number = learner.pair, learner.config, state.batch
    options, problems = warmed(config.generation, state.answering), ranks.share(problems)
    seeds, on_tokens = seeds_of(number, learner), learner.on_tokens(number)

    def needs_expert(answered: Answered, student: StudentFeedback) -> bool:
        # Where there is no trust, and for an audit.
        trusted = gate.stands_alone(state.gate, student.confidence)
        return is_audited(answered.problem, config) or not trusted

    def halves(answers: Iterable[Turns[Answered]]) -> list[Turns[Reviewed]]:
        return [first_half(pair, one, config, needs_expert) for one in answers]

    first = halves(write_first_answer(pair, one, options) for one in problems)
    second: list[Turns[Reviewed]] = []
    # The student's own are only there to learn from.
    if options.answers_by == "both" and not state.gate.frozen:
        second = halves(write_student_answer(pair, one, options) for one in problems)
    return [
        Group(first, seeds, on_tokens),
        Group(second, lambda step: seeds(f"second {step}"), on_tokens),
    ]


def _second_halves(
    number: int, judged: Sequence[Judged], again: Collection[int], learner: Learner
) -> Group:
    """Steps 4, its end, and 5 of a batch's episodes.

    Args:
        number: the batch's.
        judged: its episodes after step 2.
        again: those on which the student learned and gives its feedback again.
        learner: the run's.
    """
    works = [
        second_half(learner.pair, one, learner.config, again=index in again)
        for index, one in enumerate(judged)
    ]
    return Group(works, seeds_of(number, learner), learner.on_tokens(number))


def expert_tokens(judged: Sequence[Judged]) -> int:
    """Tokens of the expert's feedbacks."""
    return sum(sum(one.expert.usage.tokens.values()) for one in judged if one.expert)


def _observe_answers(state: Answering, judged: Sequence[Judged], config: Config) -> Answering:
    scores = [one.expert.feedback.written_score for one in judged if one.expert]
    return observe(state, ranks.gather(scores), config.generation)


def batch_metrics(
    state: RunState,
    lagging: int,
    weights: Mapping[str, float],
    updates: Sequence[Update],
    decision: gate.StopDecision | None,
    begin: float,
    written: int,
) -> MetricsRow:
    """The batch's line of ``metrics.jsonl``; ``state`` is that after it."""
    return {
        "batch": state.batch - 1,
        "lagging": lagging,
        "weights": weights,
        "updates": [update_row(one) for one in updates],
        "probe": state.probe_last if decision else None,
        "stop": stop_row(decision),
        "frozen": state.gate.frozen,
        "trust": trust_row(state.gate.running.trust),
        "expert_tokens": written,
        "answer_temperature": None,
        "distil_seconds": round(sum(one.seconds for one in updates), 3),
        "seconds": round(time.perf_counter() - begin, 3),
    }
