"""The loop of self-distillation: attempts, their contexts, an update, the run directory.

As in :mod:`mlx_fd.training.loop` every draw is seeded by the run's seed and the batch's number, and
all else that a batch depends on is in the checkpoint: a resumed run is the run that was not
stopped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim

from mlx_fd import runs
from mlx_fd.config import Config, Method
from mlx_fd.errors import UserError
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.distill import Update
from mlx_fd.files import clear_unfinished, write_json
from mlx_fd.models import ranks
from mlx_fd.models.checking import check_recompute
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student, read_trained
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import are_graded, form_of, known
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.problems.sources import names_with_truth, truth_of
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.checkpoints import Checkpoint
from mlx_fd.runs.events import Event, Note, Probed, Probing, Started, Step, Warned
from mlx_fd.runs.records import AttemptRow, SelfHeadroomRow, SelfMetricsRow, SelfSummary
from mlx_fd.runs.self_distillation_summary import (
    WRONG,
    attempts_summary,
    expert_answers,
    find_warnings,
    held_out_share,
    students_own,
    summarise,
)
from mlx_fd.training.checkpoint import (
    Done,
    Records,
    Run,
    RunState,
    begin_or_restore,
    finished_summary,
    finite,
    first_state,
    go_back,
    kept,
    run_batches,
    save,
    stop_row,
    update_row,
    with_probe,
    write_summary,
)
from mlx_fd.training.diverged import check_weights, diverged
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, Materials, View
from mlx_fd.training.selfdistill.health import health_of
from mlx_fd.training.selfdistill.learning import (
    Expert,
    RolloutStats,
    Text,
    TokenWeights,
    expert_cache,
    forward_teacher_and_student,
    learn,
    nearness,
    read,
    token_logprobs,
    wants_teacher,
)
from mlx_fd.training.selfdistill.playbook import Playbook
from mlx_fd.training.selfdistill.rollouts import as_read, echoes_of, grade_answers, sample_rollouts
from mlx_fd.training.selfdistill.teacher import (
    Weights,
    adapter_swapped,
    first_teacher,
    next_teacher,
)

TEACHER_WEIGHTS = "teacher.safetensors"
TRUTH, SELF, EXPERT = "truth", "self", "expert"
# What a critic may be that is no model of its own.
NO_MODEL = ("", TRUTH, SELF)
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


@dataclass(frozen=True)
class Headroom:
    """Is there something to learn from oneself? Counts on held-out problems, before any update.

    Where no right answer is known only ``problems`` and ``taught`` are.

    Attributes:
        problems: how many there were.
        right: problems that the student answers right, by one answer drawn as attempts are.
        mixed: problems with right and with wrong attempts, which policies learn from.
        taught: problems with an attempt that the self-teacher has something to read about.
        without: of those, answered right without the context.
        with_context: of those, answered right with it.
        expert: problems that the expert answers right, where it is the teacher.
    """

    problems: int
    right: int | None
    mixed: int | None
    taught: int
    without: int | None
    with_context: int | None
    expert: int | None = None

    @property
    def losses(self) -> dict[str, float]:
        """What the gate watches: the share answered wrong; nothing where that is not known."""
        return {} if self.right is None else {WRONG: 1 - self.right / self.problems}

    def to_json(self) -> SelfHeadroomRow:
        """For the files that keep it."""
        row: SelfHeadroomRow = {
            "problems": self.problems,
            "right": self.right,
            "mixed": self.mixed,
            "taught": self.taught,
            "without": self.without,
            "with_context": self.with_context,
        }
        return row if self.expert is None else {**row, "expert": self.expert}

    def concerns(self, config: Config) -> list[str]:
        """What the user should know before hours are spent; empty where all is well."""
        options, concerns = config.selfdistill, list[str]()
        if self.expert is not None and self.right is not None:
            if self.expert <= self.right:
                concerns.append(
                    f"the expert answers {self.expert} of {self.problems} held-out problems right, "
                    f"the student {self.right}: there may be nothing to learn"
                )
            return concerns
        matches = options.objective not in ("grpo", "contrastive") and options.context != "none"
        if matches and not self.taught:
            concerns.append(
                f"the context {options.context} is empty for all {self.problems} held-out "
                "problems: there is nothing to learn from"
            )
        elif (
            matches
            and self.with_context is not None
            and self.without is not None
            and self.with_context <= self.without
        ):
            concerns.append(
                f"the model answers {self.with_context} of {self.taught} held-out problems right "
                f"with the context {options.context}, {self.without} without: it may be unable "
                "to use that context, and there may be nothing to learn"
            )
        if not matches and options.num_generations > 1 and self.mixed == 0:
            concerns.append(
                f"on each of the {self.problems} held-out problems all attempts are right or "
                "all are wrong: group advantages are zero there"
            )
        return concerns


@dataclass
class _Learner:
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
        arrays = {TEACHER_WEIGHTS: self.teacher} if _keeps_teacher(self.config.selfdistill) else {}
        return arrays, {"playbook": self.playbook.to_json()}

    def on_progress(self, batch: int, step: str) -> Callable[[int], None]:
        return lambda tokens: self.report(Step(batch, step, tokens))


def run(job: Job, models: Models) -> SelfSummary | None:
    """Begin a run or go on with it.

    Args:
        job: its folder, configuration and problems, and who watches.
        models: the student untrained (a checkpoint's weights are put into it).

    Returns:
        The summary, or ``None`` where ``stop`` ended the run early.

    Raises:
        UserError: the run directory cannot be written, or does not fit the run.
    """
    folder, config, report, stop = job.folder, job.config, job.report, job.stop
    probe_problems, problems = job.probe_problems, job.problems
    checkpoint, records = go_back(folder, config, report, redo=job.redo)
    size = config.generation.batch_size
    batches = math.ceil(len(problems) / size)
    total = batches * config.training.epochs
    at_end = checkpoint is not None and (
        checkpoint.batch >= total or checkpoint.state["gate"]["frozen"]
    )
    if (whole := finished_summary(records, at_end, report)) is not None:
        return cast(SelfSummary, whole)
    model = models.student_lm.model
    if config.training.grad_checkpoint:
        check_recompute(models.student_lm.view)
    # The rate is set before each update.
    optimizer = optim.AdamW(
        config.training.lora_rate,
        weight_decay=config.training.weight_decay,
        bias_correction=True,
    )
    optimizer.init(model.trainable_parameters())
    learner = _Learner(
        models=models,
        optimizer=optimizer,
        teacher=first_teacher(model, config.selfdistill),
        config=config,
        report=report,
        expert=_expert(folder, config, models, report),
    )
    # Whatever the checkpoint holds, the student is still untrained here.
    headroom, seconds = _headroom(records, learner, probe_problems, checkpoint is not None)

    def check(state: RunState) -> None:
        _check_student(learner, probe_problems[0], state.batch)

    this = Run(
        records=records,
        config=config,
        student=models.student,
        base=models.student_lm.path,
        optimizer=optimizer,
        report=report,
        stop=stop,
        extra=learner.extra,
        check=check,
    )
    state = begin_or_restore(this, checkpoint, lambda: first_state(config, headroom.losses))
    if checkpoint is not None:
        _restore_teacher(learner, checkpoint)
    if stop():
        return None
    _say_headroom(headroom, config, report)
    report(Probed(state.probe_first, state.probe_last, headroom.to_json()))
    epochs = config.training.epochs

    def problems_before(number: int) -> int:
        epoch, index = divmod(number, batches)
        return epoch * len(problems) + min(index * size, len(problems))

    report(Started(problems_before(state.batch), epochs * len(problems)))

    # From the first batch on: what is worse than at the beginning is worth a warning.
    metrics_so_far = list(runs.read_self_metrics(folder))
    warned = set[str]()

    def new_warnings(state: RunState) -> list[str]:
        held_out = [
            held_out_share(losses, len(probe_problems))
            for losses in (state.probe_first, state.probe_last)
        ]
        vocab = models.student_lm.vocab
        found = find_warnings(metrics_so_far, held_out, config.training.lora_rate, vocab)
        new = {kind: text for kind, text in found.items() if kind not in warned}
        warned.update(new)
        return list(new.values())

    def batch(state: RunState) -> Done:
        epoch, index = divmod(state.batch, batches)
        chunk = problems[index * size : (index + 1) * size]
        written = runs.read_attempts(folder) if epoch and learner.expert is not None else []
        each = config.selfdistill.num_generations
        attempts = range(index * size * each, (index * size + len(chunk)) * each)
        again = [row for row in written if row.get("by_expert") and row["attempt"] in attempts]
        state, rows, metrics = _batch(state, chunk, probe_problems, learner, again)
        metrics_so_far.append(metrics)
        # What the expert wrote in the first epoch is on the disk already.
        new = [row for row in rows if not (epoch and row.get("by_expert"))]
        return Done(
            state=state,
            logs={runs.ATTEMPTS: new, runs.METRICS: [metrics]},
            rows=new,
            metrics=metrics,
            done=problems_before(state.batch),
            total=epochs * len(problems),
            warnings=new_warnings(state),
        )

    reached = run_batches(this, state, batch, total, ends_frozen=True)
    if reached is None:
        return None
    state = reached
    if state.gate.frozen:
        report(Note(f"the gate ends the run: {state.gate.reason}"))
    looking = time.perf_counter()
    state = with_probe(state, _probe(learner, probe_problems, state.batch))
    seconds += time.perf_counter() - looking
    check(state)
    for text in new_warnings(state):
        report(Warned(text))
    with runs.wrap_write_errors(folder):
        save(this, state)
        summary = summarise(
            runs.read_attempts(folder),
            runs.read_self_metrics(folder),
            state.probe_first,
            state.probe_last,
            len(probe_problems),
            headroom.to_json(),
            {"headroom": seconds},
        )
        return write_summary(this, state, summary)


def _headroom(
    records: Records, learner: _Learner, held_out: Sequence[Problem], begun: bool
) -> tuple[Headroom, float]:
    """The check of the untrained student, and its seconds: what is kept of it, or made now."""
    folder, report = records.folder, learner.report
    found = kept(records, runs.HEADROOM, lambda: _load_headroom(folder), begun, report)
    if found is not None:
        return found
    report(Note(f"first probe evaluation: {len(held_out)} held-out problems"))
    begin = time.perf_counter()
    headroom = measure_headroom(learner, held_out)
    seconds = round(time.perf_counter() - begin, 3)
    with runs.wrap_write_errors(folder):
        write_json(folder / runs.HEADROOM, with_digest({**headroom.to_json(), "seconds": seconds}))
    return headroom, seconds


def _expert(folder: Path, config: Config, models: Models, report: Report) -> Expert | None:
    """The expert that teaches, with its cache where there is one."""
    model = models.expert(config.selfdistill)
    if model is None:
        return None
    kept_in = Path(config.losses.teacher_cache or folder / runs.TEACHER)
    clear_unfinished(kept_in)
    cache = expert_cache(
        kept_in,
        model,
        models.student_lm.vocab,
        config.selfdistill,
        lambda text: report(Warned(text)),
    )
    return Expert(model, cache)


def _load_headroom(folder: Path) -> tuple[tuple[Headroom, float], bool] | None:
    """The headroom that is kept, the seconds it took, and whether a digest vouches for it."""
    try:
        content, digested = read_checked(folder / runs.HEADROOM)
    except FileNotFoundError:
        return None
    try:
        # Older versions did not measure how long it took.
        seconds = float(content.pop("seconds", 0.0))
        return (Headroom(**content), seconds), digested
    except (TypeError, AttributeError, ValueError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error


def _restore_teacher(learner: _Learner, checkpoint: Checkpoint) -> None:
    """The teacher's weights and the playbook of a checkpoint whose student is in place."""
    options, model = learner.config.selfdistill, learner.models.student_lm.model
    if _keeps_teacher(options):
        learner.teacher = read_trained(checkpoint.folder / TEACHER_WEIGHTS)
        mx.eval(learner.teacher)
    else:
        learner.teacher = first_teacher(model, options)
    learner.playbook = Playbook.from_json(checkpoint.state["playbook"])


def _keeps_teacher(options: Method) -> bool:
    """Whether the teacher's weights are neither the base model's nor the student's."""
    return options.self_teacher in ("ema", "snapshot")


def _say_headroom(headroom: Headroom, config: Config, report: Report) -> None:
    report(Note(_headroom_says(headroom, config)))
    for concern in headroom.concerns(config):
        report(Warned(concern))


def _headroom_says(headroom: Headroom, config: Config) -> str:
    context = config.selfdistill.context
    if headroom.right is None:
        on_context = (
            f"; the context {context} has something to say on {headroom.taught} of the "
            f"{headroom.problems} held-out problems"
        )
        return "no right answers are known: there is no headroom to measure" + (
            on_context if context != "none" else ""
        )
    text = (
        f"headroom on {headroom.problems} held-out problems: {headroom.right} right; "
        f"{headroom.mixed} with both right and wrong attempts"
    )
    if headroom.expert is not None:
        return f"{text}; the expert: {headroom.expert} right"
    if headroom.taught and context != "none":
        text += (
            f"; of {headroom.taught} with a context ({context}): "
            f"{headroom.without} right without it, {headroom.with_context} with it"
        )
    return text


def _seeds(config: Config, batch: int, what: str) -> Callable[[int], int]:
    return lambda call: derive_seed(config.episode.seed, batch, ranks.step_name(f"{what}/{call}"))


def measure_headroom(learner: _Learner, problems: Sequence[Problem]) -> Headroom:
    """Answers with the context against answers without, by the untrained student."""
    config, student_lm, on_progress = (
        learner.config,
        learner.models.student_lm,
        learner.on_progress(0, "headroom"),
    )
    # Three times through the problems: attempts, answers without the context and with it.
    count = len(problems)
    if not are_graded(problems) and config.selfdistill.context == "none":
        return Headroom(count, None, None, 0, None, None)
    learner.report(Probing(0, 3 * count))
    groups, _ = sample_rollouts(
        student_lm, problems, config, _seeds(config, 0, "headroom"), on_progress
    )
    learner.report(Probing(count, 3 * count))
    views = build_views(learner, groups, 0)
    if not are_graded(problems):
        size = config.selfdistill.num_generations
        has_view = [view.teacher is not None for view in views]
        taught_of = sum(any(has_view[at : at + size]) for at in range(0, len(has_view), size))
        return Headroom(count, None, None, taught_of, None, None)
    plain = grade_answers(
        student_lm,
        problems,
        [answer_prompt(as_read(p, config), form_of(p)) for p in problems],
        config,
        on_progress,
    )
    taught: dict[int, str] = {}
    at = 0
    for index, group in enumerate(groups):
        seen = [view.teacher for view in views[at : at + len(group)] if view.teacher is not None]
        at += len(group)
        if seen:
            taught[index] = seen[0]
    rights = [known(attempt.correct for attempt in group) for group in groups]
    mixed = sum(0 < sum(right) < len(right) for right in rights)
    if (expert := learner.models.expert(config.selfdistill)) is not None:
        learner.report(Probing(2 * count, 3 * count))
        asked = [answer_prompt(p.question, form_of(p)) for p in problems]
        best = known(grade_answers(expert, problems, asked, config, on_progress))
        return Headroom(count, sum(known(plain)), mixed, 0, 0, 0, expert=sum(best))
    # The context may be empty for some.
    learner.report(Probing(2 * count, 2 * count + len(taught)))
    informed = grade_answers(
        student_lm,
        [problems[index] for index in taught],
        list(taught.values()),
        config,
        on_progress,
    )
    return Headroom(
        problems=len(problems),
        right=sum(known(plain)),
        mixed=mixed,
        taught=len(taught),
        without=sum(known(plain[index] for index in taught)),
        with_context=sum(known(informed)),
    )


def build_views(learner: _Learner, groups: Sequence[Sequence[Attempt]], batch: int) -> list[View]:
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


def _probe(learner: _Learner, problems: Sequence[Problem], batch: int) -> dict[str, float]:
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


def _batch(
    state: RunState,
    problems: Sequence[Problem],
    probe_problems: Sequence[Problem],
    learner: _Learner,
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
        losses = _probe(learner, probe_problems, number)
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


def _check_student(learner: _Learner, problem: Problem, batch: int) -> None:
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
    learner: _Learner, problems: Sequence[Problem], number: int, again: Sequence[AttemptRow]
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
        seeds = _seeds(config, number, "attempt")
        groups, prefilled = sample_rollouts(student_lm, problems[:count], config, seeds, progress)
    if again:
        groups = [*groups, *_as_written(again, problems[count:], config)]
    elif expert is not None and problems[count:]:
        seeds = _seeds(config, number, "expert")
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
    learner: _Learner,
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


def check_combination(config: Config) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: options that contradict each other; the message says which.
    """
    options = config.selfdistill
    if options.self_teacher == EXPERT and options.critic in NO_MODEL:
        raise UserError("a teacher that is an expert needs one: mlx-fd distil --expert NAME")
    if options.self_teacher != EXPERT and options.objective == "likelihood":
        raise UserError("--objective likelihood is for what an expert wrote: mlx-fd distil")
    own = config.losses.on_policy_fraction
    if options.objective == "likelihood" and own and not options.policy_weight:
        raise UserError(
            "--objective likelihood learns from the expert's answers alone, and with "
            f"--on-policy-fraction {own:g} the student would answer that part of the problems for "
            "nothing: set it to 0."
        )
    if options.self_teacher == EXPERT and options.objective in ("grpo", "contrastive", "echo"):
        raise UserError(
            f"--objective {options.objective} has no expert; take forward, reverse, jsd, sampled "
            "or likelihood"
        )
    if config.models.train != "lora":
        raise UserError(
            "self-distill trains LoRA (--train lora): its teacher needs the base weights as they "
            "were, and there is one copy of them."
        )
    if config.models.lora_dropout:
        raise UserError(
            "self-distill compares the student with what it was when it wrote, and dropout makes "
            "it another one; set lora_dropout to 0."
        )
    if config.training.epochs != 1 and config.generation.expert_thinking == "on":
        raise UserError(
            "the expert's thoughts are not kept for a second epoch; set epochs to 1, or "
            "expert_thinking to off."
        )
    if config.gate.gate == "published":
        raise UserError("--gate published is for the loop; take always, ema or never.")
    alone = options.num_generations < 2 and options.reward_baseline == "group"
    if options.objective == "grpo" and alone:
        raise UserError(
            "--objective grpo compares attempts at one problem: set --num-generations to 8 (or "
            "--reward-baseline to right)."
        )
    context = CONTEXTS[options.context]
    if options.objective == "contrastive" and not context.gives_wrong_hints:
        names = [name for name, other in CONTEXTS.items() if other.gives_wrong_hints]
        raise UserError(
            f"--objective contrastive needs right and wrong hints: --context {' or '.join(names)}."
        )
    if context.needs_siblings and options.num_generations < 2:
        raise UserError(
            f"--context {options.context} shows other attempts at the same problem: set "
            "--num-generations to 8."
        )
    if context.needs_critic and not options.critic:
        raise UserError(
            f"--context {context.name} needs a critic: name one with --critic, or take the truth "
            "about generated problems with --critic truth."
        )
    if options.critic == TRUTH and truth_of(config.problems.problems) is None:
        raise UserError(f"--critic truth is known for --problems {names_with_truth()} only.")
