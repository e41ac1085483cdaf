"""One batch of self-distillation: attempts, their contexts, an update, the rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_fd.config import Config, Method
from mlx_fd.errors import UserError
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.distill import Update
from mlx_fd.models import ranks
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import are_graded, form_of, known
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.runs.events import Event, Step, Warned
from mlx_fd.runs.records.self_distillation import AttemptRow, SelfMetricsRow
from mlx_fd.runs.self_distillation_summary import (
    WRONG,
    attempts_summary,
    expert_answers,
    students_own,
)
from mlx_fd.training.checkpoint import RunState, finite, stop_row, update_row, with_probe
from mlx_fd.training.diverged import check_weights, diverged
from mlx_fd.training.selfdistill.combination import EXPERT, SELF, TRUTH
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, Materials, View
from mlx_fd.training.selfdistill.health import health_of
from mlx_fd.training.selfdistill.learning import learn, nearness
from mlx_fd.training.selfdistill.playbook import Playbook
from mlx_fd.training.selfdistill.reading import (
    Expert,
    forward_teacher_and_student,
    read,
    token_logprobs,
    wants_teacher,
)
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats, Text
from mlx_fd.training.selfdistill.rollouts import as_read, echoes_of, grade_answers, sample_rollouts
from mlx_fd.training.selfdistill.teacher import (
    TEACHER_WEIGHTS,
    Weights,
    adapter_swapped,
    keeps_teacher,
    next_teacher,
)
from mlx_fd.training.selfdistill.token_weights import TokenWeights

# The generator's log-probabilities and a second reading's differ in their last digits only.
_LOGPROB_TOLERANCE = 0.05

Report = Callable[[Event], None]


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        student: the trainable parts around its language model.
        student_lm: that language model with its tokenizer.
        critic: a frozen model, where there is one.
    """

    student: Student
    student_lm: Loaded
    critic: Loaded | None = None

    def expert(self, options: Method) -> Loaded | None:
        """The teacher, where it is another model than the student."""
        return self.critic if options.self_teacher == EXPERT else None


@dataclass
class Learner:
    """All that a batch works with; the teacher's weights move on."""

    models: Models
    optimizer: optim.Optimizer
    teacher: Weights
    config: Config
    report: Report
    playbook: Playbook = field(default_factory=Playbook)
    expert: Expert | None = None

    def extra(self) -> tuple[dict[str, Weights], dict[str, Any]]:
        """What a checkpoint holds beside the student: the teacher's weights, the playbook."""
        arrays = {TEACHER_WEIGHTS: self.teacher} if keeps_teacher(self.config.selfdistill) else {}
        return arrays, {"playbook": self.playbook.to_json()}

    def on_progress(self, batch: int, step: str) -> Callable[[int], None]:
        """What reports the tokens of a batch's step."""
        return lambda tokens: self.report(Step(batch, step, tokens))


def step_seeds(config: Config, batch: int, what: str) -> Callable[[int], int]:
    """The seeds of a batch's draws for one thing, by the number of the call to the generator."""
    return lambda call: derive_seed(config.episode.seed, batch, ranks.step_name(f"{what}/{call}"))


def build_views(learner: Learner, groups: Sequence[Sequence[Attempt]], batch: int) -> list[View]:
    """What the self-teacher reads about each attempt; each rank asks about its share of them."""
    config = learner.config
    options = config.selfdistill
    materials = Materials(
        critic=learner.models.student_lm if options.critic == SELF else learner.models.critic,
        truth=options.critic == TRUTH,
        critic_sees=options.critic_sees,
        critic_tokens=config.generation.max_feedback_tokens,
        reference_style=options.reference_style,
        playbook=learner.playbook,
        most_wrong=options.wrong_hints,
        seed=derive_seed(config.episode.seed, batch, "context"),
    )
    mine = [attempt for group in ranks.share(groups) for attempt in group]
    model = learner.models.student_lm.model
    with adapter_swapped(model, learner.teacher) if options.critic == SELF else nullcontext():
        made = CONTEXTS[options.context].views(mine, materials)
    views = [
        View(student, teacher, tuple(wrong), note)
        for student, teacher, wrong, note in ranks.gather(list(map(dataclasses.astuple, made)))
    ]
    attempts = [attempt for group in groups for attempt in group]
    if options.self_teacher != EXPERT or options.expert_answers == "all":
        return views
    return [
        # What nobody can call wrong is learned from, too.
        dataclasses.replace(view, teacher=None)
        if not attempt.own and attempt.correct is False
        else view
        for view, attempt in zip(views, attempts, strict=True)
    ]


def held_out_losses(learner: Learner, problems: Sequence[Problem], batch: int) -> dict[str, float]:
    """The share of held-out problems that the student answers wrong; nothing where nobody knows."""
    if not are_graded(problems):
        return {}
    messages = [answer_prompt(as_read(p, learner.config), form_of(p)) for p in problems]
    right = grade_answers(
        learner.models.student_lm,
        problems,
        messages,
        learner.config,
        learner.on_progress(batch, "probe"),
    )
    return {WRONG: 1 - sum(known(right)) / len(right)}


def run_batch(
    state: RunState,
    problems: Sequence[Problem],
    probe_problems: Sequence[Problem],
    learner: Learner,
    again: Sequence[AttemptRow] = (),
) -> tuple[RunState, list[AttemptRow], SelfMetricsRow]:
    """One batch: the state after it, its rows, its metrics.

    ``again`` are the expert's answers of an earlier epoch, which it does not write again.
    """
    begin = time.perf_counter()
    config, student_lm, number = learner.config, learner.models.student_lm, state.batch
    groups, prefilled = _attempts(learner, problems, number, again)
    seconds = {"attempt": time.perf_counter() - begin}
    views = build_views(learner, groups, number)
    seconds["context"] = time.perf_counter() - begin - seconds["attempt"]
    stats = forward_teacher_and_student(
        student_lm,
        learner.teacher,
        groups,
        views,
        config.selfdistill,
        config.training.micro_batch,
        learner.expert,
    )
    check_stats(stats, number, config)
    updates, weights = _learn(learner, state, groups, views, stats)
    if (remember := CONTEXTS[config.selfdistill.context].remember) is not None:
        attempts = [attempt for group in groups for attempt in group]
        learner.playbook = remember(learner.playbook, attempts, views)
    seconds["learn"] = time.perf_counter() - begin - sum(seconds.values())

    state = dataclasses.replace(
        state,
        batch=number + 1,
        distilled=state.distilled + bool(updates),
        spent=state.spent + len(updates),
    )
    decision = None
    if updates and not state.distilled % config.episode.probe_every:
        losses = held_out_losses(learner, probe_problems, number)
        if losses:
            gate_state, decision = gate.observe_probe(
                state.gate, losses, config.gate, cost=float(state.spent)
            )
            state = dataclasses.replace(state, gate=gate_state, spent=0)
        state = with_probe(state, losses)
    rows = _rows(number, config, groups, views, stats, weights)
    gap = max(row["logprob_gap"] for row in rows)
    if gap > _LOGPROB_TOLERANCE:
        learner.report(
            Warned(
                f"batch {number}: a token's log-probability differs by {gap:.3g} when "
                "recomputed; the policy ratios of this batch are off by as much"
            )
        )
    metrics: SelfMetricsRow = {
        "batch": number,
        "lagging": sum(row["teaches"] for row in rows),
        "weights": {},
        "updates": [update_row(update) for update in updates],
        "probe": state.probe_last if decision else None,
        "stop": stop_row(decision),
        "frozen": state.gate.frozen,
        "attempts": attempts_summary(students_own(rows)),
        "clipped": [round(update.clipped, 6) for update in updates],
        "prefilled": prefilled,
        "distil_seconds": round(seconds["learn"], 3),
        "step_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "seconds": round(time.perf_counter() - begin, 3),
    }
    if (written := expert_answers(rows)) is not None:
        metrics["expert_answers"] = written
    own = [item for row, item in zip(rows, stats, strict=True) if not row.get("by_expert")]
    if (health := health_of(own or stats)) is not None:
        metrics["health"] = health
    return state, rows, metrics


def check_student(learner: Learner, problem: Problem, batch: int) -> None:
    """Stop a run whose student is lost, before it is saved.

    Weights that are finite can be so large that nothing made of them is: it reads a question, too.

    Args:
        learner: the run's.
        problem: what it reads.
        batch: batches done so far.

    Raises:
        UserError: a weight, or a log-probability, is not finite.
    """
    config, student_lm = learner.config, learner.models.student_lm
    check_weights(learner.models.student, batch, config)
    prompt = first_prompt(student_lm, answer_prompt(as_read(problem, config), form_of(problem)))
    text = Text(prompt[:-1], prompt[-1:])
    ((logprobs, _),) = token_logprobs(
        student_lm.view.head,
        read(student_lm.view, [text], 1),
        [text],
        config.selfdistill,
        student_lm.vocab,
    )
    if not _all_finite([logprobs]):
        raise diverged("log-probabilities are", batch, config)


def check_stats(stats: Sequence[RolloutStats], batch: int, config: Config) -> None:
    """Stop a run whose student or teacher is lost, before its rows are written; all ranks raise.

    Args:
        stats: of a batch's attempts.
        batch: batches done so far, with the one whose update changed the student.
        config: the run's.

    Raises:
        UserError: a log-probability is not finite.
    """
    if not _all_finite([item.now for item in stats]):
        raise diverged("log-probabilities are", batch, config)
    if _all_finite([item.teacher for item in stats if item.teacher is not None]):
        return
    if config.selfdistill.self_teacher in ("base", EXPERT):
        raise UserError(
            f"the teacher's log-probabilities are not finite in batch {batch + 1}, though it does "
            "not train: numbers overflow in it. Take the model in bfloat16, not float16."
        )
    raise diverged("teacher's log-probabilities are", batch, config)


def _all_finite(arrays: Sequence[mx.array]) -> bool:
    return not arrays or bool(mx.isfinite(mx.concatenate(list(arrays))).all().item())


def _attempts(
    learner: Learner, problems: Sequence[Problem], number: int, again: Sequence[AttemptRow]
) -> tuple[list[list[Attempt]], int]:
    """Attempts at a batch's problems, the student's or the expert's, and the tokens read for them.

    The expert writes those of the last problems of a batch, as many as ``on_policy_fraction``
    leaves; where they are not right and only right ones are wanted, nothing is learned from them.
    In a later epoch they are taken from its rows.
    """
    config, student_lm = learner.config, learner.models.student_lm
    expert = learner.models.expert(config.selfdistill)
    progress, count = learner.on_progress(number, "attempt"), len(problems)
    if expert is not None:
        count = round(config.losses.on_policy_fraction * len(problems))
    groups, prefilled = list[list[Attempt]](), 0
    if problems[:count]:
        seeds = step_seeds(config, number, "attempt")
        groups, prefilled = sample_rollouts(student_lm, problems[:count], config, seeds, progress)
    if again:
        groups = [*groups, *_as_written(again, problems[count:], config)]
    elif expert is not None and problems[count:]:
        seeds = step_seeds(config, number, "expert")
        more, read = sample_rollouts(expert, problems[count:], config, seeds, progress, own=False)
        groups, prefilled = [*groups, *more], prefilled + read
    return groups, prefilled


def _as_written(
    rows: Sequence[AttemptRow], problems: Sequence[Problem], config: Config
) -> list[list[Attempt]]:
    """The expert's answers in rows of ``attempts.jsonl``, by problem."""
    size = config.selfdistill.num_generations
    found = [
        Attempt(
            problem=problem,
            question=row["question"],
            tokens=tuple(row["tokens"]),
            text=row["text"],
            final=row["final"],
            correct=row["correct"],
            own=False,
        )
        for row, problem in zip(rows, [one for one in problems for _ in range(size)], strict=True)
    ]
    return [found[begin : begin + size] for begin in range(0, len(found), size)]


def _learn(
    learner: Learner,
    state: RunState,
    groups: Sequence[Sequence[Attempt]],
    views: Sequence[View],
    stats: Sequence[RolloutStats],
) -> tuple[list[Update], TokenWeights | None]:
    """The batch's optimiser steps; the teacher follows each."""
    config = learner.config
    options, training, student_lm = config.selfdistill, config.training, learner.models.student_lm
    on_progress = learner.on_progress(state.batch, "learn")
    updates: list[Update] = []
    first: TokenWeights | None = None
    expert = learner.expert
    teacher_head = expert.model.view.head if expert is not None else None
    if config.gate.gate == "never":
        return updates, first
    echoes: list[RolloutStats] = []
    if options.objective == "echo":
        echoes = echoes_of(
            student_lm,
            learner.teacher,
            groups,
            views,
            config,
            learner.on_progress(state.batch, "echo"),
        )
    for step in range(training.kd_steps):
        done = state.distilled * training.kd_steps + step
        if step:
            stats = forward_teacher_and_student(
                student_lm, learner.teacher, groups, views, options, training.micro_batch, expert
            )
            check_stats(stats, state.batch + 1, config)
        rise = min(1.0, (done + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        learner.optimizer.learning_rate = training.lora_rate * rise
        near = nearness(student_lm, echoes, options, training.micro_batch) if echoes else None
        update, weights = learn(
            student_lm, learner.optimizer, stats, config, near, echoes, teacher_head
        )
        first = first or weights
        if update is None:
            break
        updates.append(update)
        on_progress(sum(len(item.text.target) for item in stats))
        learner.teacher = next_teacher(learner.teacher, student_lm.model, options, done + 1)
    return updates, first


def _rows(
    number: int,
    config: Config,
    groups: Sequence[Sequence[Attempt]],
    views: Sequence[View],
    stats: Sequence[RolloutStats],
    weights: TokenWeights | None,
) -> list[AttemptRow]:
    """The batch's lines of ``attempts.jsonl``."""
    first = number * config.generation.batch_size * config.selfdistill.num_generations
    attempts = [attempt for group in groups for attempt in group]
    teaches = weights.teaches() if weights else [False] * len(attempts)
    rows: list[AttemptRow] = []
    for index, (attempt, view, item) in enumerate(zip(attempts, views, stats, strict=True)):
        advantages = item.advantages
        final = attempt.final
        rows.append(
            {
                "attempt": first + index,
                "id": attempt.problem.id,
                "question": attempt.question,
                "reference": attempt.problem.answer or None,
                "text": attempt.text,
                "tokens": list(attempt.tokens),
                "final": None if final is None else str(final),
                "correct": attempt.correct,
                "finished": item.finished,
                "teacher": view.teacher if wants_teacher(config.selfdistill) else None,
                "note": view.note,
                "wrong": len(view.wrong),
                "teaches": teaches[index],
                "reward": None
                if attempt.correct is None
                else weights.rewards[index]
                if weights
                else item.reward,
                "group_advantage": (
                    weights.group_advantages[index]
                    if weights and weights.group_advantages
                    else None
                ),
                "mean_abs_advantage": _mean(None if advantages is None else mx.abs(advantages)),
                "negative_advantage": _mean(None if advantages is None else advantages < 0),
                "entropy": _mean(item.entropy),
                "logprob": _mean(item.now),
                "logprob_gap": float(mx.abs(item.old - item.now).max()),
            }
        )
        if not attempt.own:
            rows[-1]["by_expert"] = True
        if attempt.thought:
            rows[-1]["thought"] = attempt.thought
    return rows


def _mean(values: mx.array | None) -> float | None:
    return None if values is None else finite(float(values.astype(mx.float32).mean()))
