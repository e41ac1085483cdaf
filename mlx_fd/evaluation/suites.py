"""Suites: which sets are put before which systems.

``fast`` is one set of problems (and, where the truth about every answer is known, of answers to
judge); ``full`` adds instructions, ProcessBench and transfer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.evaluation import held_out, instructing, processbench
from mlx_fd.evaluation.agreeing import Agreeing
from mlx_fd.evaluation.baselines import BASE, CLEAR, LOOP, STUDENT, SYSTEMS
from mlx_fd.evaluation.choosing import HEAD, MAJORITY, RANDOM, SCORES, Choosing
from mlx_fd.evaluation.following import Following
from mlx_fd.evaluation.held_out import source_of
from mlx_fd.evaluation.instructing import Instructing
from mlx_fd.evaluation.judging import Judging
from mlx_fd.evaluation.locating import TOKENS, Locating
from mlx_fd.evaluation.readers import Readers, load_readers
from mlx_fd.evaluation.shots import examples
from mlx_fd.evaluation.solving import Solving, with_shots, without_shots
from mlx_fd.evaluation.target import Target
from mlx_fd.models.context import Surroundings, context_length, fitting, short_enough
from mlx_fd.problems import execution
from mlx_fd.problems.sources import SOURCES, truth_of

FAST = "fast"
FAST_LIMIT = 100
# Not a run's own: its seed there is its run's.
_EXAM_SEED = 1_000_003

Set = Solving | Choosing | Agreeing | Judging | Locating | Instructing | Following


@dataclass(frozen=True)
class Options:
    """What is asked of an evaluation.

    Attributes:
        suite: ``fast`` or ``full``.
        baselines: whether all systems take part, or the target alone.
        limit: most items of each set; ``None``: 100 in ``fast``, all in ``full``.
        samples: how often each problem is tried.
        temperature: of first answers and bare answers; ``None``: the run's for first answers and
            0 for bare ones, 0.7 where several samples would be alike.
        max_tokens: maximum tokens per answer; ``None``: the run's.
        problems: where the problems come from; ``None``: for who learned from a source with a name
            that source, else GSM8K.
        split: of the problems.
        transfer: a second source of problems.
        instructions: an Alpaca-format file.
        processbench: a file of ProcessBench's format.
        encoder: a BERT for BERTScore and cosines.
        toxicity: a BERT classifier, or ``words``.
        seed: of all draws.
        columns: as for a run; for the problems that ``problems`` names.
        answer_kind: likewise.
        skip_bad_rows: leave out problems that cannot be read or are longer than a model's context.
        best_of: answers to each problem, of which one is picked; 0: none are.
        votes: replies that vote on each ProcessBench item; 1: one greedy reply.
        shots: solved problems before each question.
        forgetting: whether the student follows instructions as well as before its run.
        answers_by: who writes the first answers; ``None``: as in the run.
        thinking: whether the student thinks, ``on`` or ``off``; ``None``: as in the run.
        expert_thinking: likewise the expert.
        max_thinking_tokens: maximum tokens per thought; ``None``: the run's.
    """

    suite: str = FAST
    baselines: bool = False
    limit: int | None = None
    samples: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    problems: str | None = None
    split: str = "test"
    transfer: str | None = None
    instructions: Path | None = None
    processbench: Path | None = None
    encoder: str | None = None
    toxicity: str | None = None
    seed: int = 0
    columns: str = ""
    answer_kind: str = "auto"
    skip_bad_rows: bool = False
    best_of: int = 0
    votes: int = 1
    shots: int = 0
    forgetting: bool = False
    answers_by: str | None = None
    thinking: str | None = None
    expert_thinking: str | None = None
    max_thinking_tokens: int | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Options of the run's configuration that are others here."""
        given = {
            "answers_by": self.answers_by,
            "max_answer_tokens": self.max_tokens,
            "student_thinking": self.thinking,
            "expert_thinking": self.expert_thinking,
            "max_thinking_tokens": self.max_thinking_tokens,
        }
        return {option: value for option, value in given.items() if value is not None}

    @property
    def most_items(self) -> int | None:
        """Most items of each set; ``None``: all."""
        return self.limit or (FAST_LIMIT if self.suite == FAST else None)


Warn = Callable[[str], None]
"""Called with a sentence about problems that are left out."""


def make_sets(target: Target, options: Options, warn: Warn = lambda text: None) -> list[Set]:
    """The sets of a suite, with the systems that meet them.

    Args:
        target: the student, its expert and the run they are of.
        options: the suite, its size and its files.
        warn: told what is left out.

    Raises:
        UserError: a file or source that cannot be read, or baselines without an expert.
    """
    _check_options(target, options)
    source = source_of(target, options.problems)
    readers = load_readers(options.encoder, options.toxicity)
    solved = _solving(target, options, readers, source, options.split, warn)
    _check_expert_has_a_part(target, options, graded=solved.graded)
    sets: list[Set] = [solved]
    kind = solved.items[0].kind
    if target.answer_kind not in (None, kind):
        warn(
            f"answers of {solved.name} are read as {kind}, and the run learned from answers of the "
            f"kind {target.answer_kind}: its student is asked in another form than it knows "
            "(--answer-kind chooses the kind)"
        )
    if not solved.graded:
        warn(
            f"{solved.name} has no right answers: nothing here says how many replies are right"
            + (", and judging is compared with the expert's verdicts" if target.expert else "")
        )
        if target.expert is not None:
            judging = (STUDENT, CLEAR) if target.run else (STUDENT,)
            sets.append(Agreeing(f"{solved.name}/verdicts", solved.items, judging))
    if options.best_of:
        sets.append(_choosing(target, options, solved))
    if options.forgetting:
        most = target.config.generation.max_answer_tokens
        sets.append(Following((STUDENT, CLEAR), most))
    if (truth := truth_of(source)) is not None:
        asked = truth.questions(len(solved.items), _EXAM_SEED, options.split)
        sets.append(Judging(f"{source}/first errors", asked, _judges(target, options)))
    if options.suite == FAST:
        return sets
    if options.instructions is not None:
        sets.append(_instructing(target, options, options.instructions, readers, warn))
    if options.processbench is not None:
        sets.append(_locating(target, options, options.processbench, warn))
    elsewhere = [
        (known.name, known.transfer_split) for known in SOURCES.values() if known.transfer_split
    ]
    if options.transfer is not None:
        elsewhere.append((options.transfer, options.split))
    asked_already = (source, options.split)
    sets += [
        _solving(target, options, readers, *one, warn)
        for one in dict.fromkeys(elsewhere)
        if one != asked_already
    ]
    return _told_apart(sets)


def _solving(
    target: Target, options: Options, readers: Readers, source: str, split: str, warn: Warn
) -> Solving:
    """The problems of a source that fit into the models."""
    skip = options.skip_bad_rows
    how = {"kind": options.answer_kind, "columns": options.columns}
    found = problems.load(source, split, skip_bad_rows=skip, **how)
    questions = [problem.question for problem in found.problems]
    shots = examples(source, split, options.shots, asked=questions, **how)
    for text in found.notes:
        warn(text)
    if found.problems[0].kind == "code":
        warn(execution.isolation_note())
    taken = found.problems if skip else found.problems[: options.most_items]
    read = dataclasses.replace(found, problems=tuple(with_shots(taken, shots)))
    fits, notes = fitting(read, _paths(target), target.config, skip=skip, option="")
    for text in notes:
        warn(text)
    name = Path(source).stem if found.name == source and "/" in source else found.name
    items = without_shots(fits.problems, shots)[: options.most_items]
    about = held_out.learned_elsewhere(target, source, split, items)
    for text in (*about, *held_out.repeated(source, split, items)):
        warn(text)
    return Solving(
        name=f"{name}/{split}",
        items=items,
        systems=_solvers(target, options),
        samples=options.samples,
        readers=readers,
        shots=shots,
    )


def _instructing(
    target: Target, options: Options, file: Path, readers: Readers, warn: Warn
) -> Instructing:
    """The instructions of a file."""
    found = instructing.read(file, skip_bad_rows=options.skip_bad_rows, warn=warn)
    items = found[: options.most_items]
    texts, most = [item.prompt for item in items], target.config.generation.max_answer_tokens
    items = _short_enough(target, options, file, items, texts, most, warn)
    return Instructing(file.stem, items, _writers(options), readers)


def _locating(target: Target, options: Options, file: Path, warn: Warn) -> Locating:
    """The items of a ProcessBench file."""
    items = processbench.read(file)[: options.most_items]
    texts = [processbench.critique_prompt(item) for item in items]
    most = options.max_tokens or _reply_tokens(_paths(target))
    return Locating(
        name=file.stem,
        items=_short_enough(target, options, file, items, texts, most, warn),
        systems=_writers(options),
        samples=options.votes,
        max_tokens=most,
        temperature=options.temperature,
    )


def _short_enough(
    target: Target,
    options: Options,
    file: Path,
    items: Sequence[Any],
    texts: Sequence[str],
    most: int,
    warn: Warn,
) -> tuple[Any, ...]:
    """Items that leave room for a reply.

    Args:
        target: the models.
        options: whether what is too long is left out, or refused.
        file: where they are from.
        items: they.
        texts: what is asked with each.
        most: tokens of a reply.
        warn: told what is left out.
    """
    around = Surroundings("", most + target.config.generation.thought_tokens)
    ids, skip = [item.id for item in items], options.skip_bad_rows
    indices, notes = short_enough(str(file), ids, texts, _paths(target), around, skip=skip)
    for text in notes:
        warn(text)
    return tuple(items[index] for index in indices)


def _told_apart(sets: Sequence[Set]) -> list[Set]:
    """Sets under different names: files in two folders may be called alike."""
    found: dict[str, Set] = {}
    for one in sets:
        name, number = one.name, 1
        while name in found:
            number += 1
            name = f"{one.name} ({number})"
        # The instructions with a form are not of a file.
        if isinstance(one, Following):
            found[name] = one
        else:
            found[name] = dataclasses.replace(one, name=name)
    return list(found.values())


def check_problems(options: Options) -> None:
    """Refuse problems that cannot be read, before a model is fetched for them.

    Raises:
        UserError: they cannot, or their answers are programs that may not be run.
    """
    for source in (options.problems, options.transfer):
        if source is not None and source not in SOURCES:
            problems.load(
                source,
                options.split,
                skip_bad_rows=options.skip_bad_rows,
                kind=options.answer_kind,
                columns=options.columns,
            )


def _check_options(target: Target, options: Options) -> None:
    """Refuse what would be measured on nothing."""
    if options.baselines and target.expert is None:
        raise UserError("--baselines: the baselines need an expert; name one with --expert")
    if options.suite == FAST:
        for name in ("transfer", "instructions", "processbench"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} belongs to the full suite; add --suite full")
    if options.answers_by == "expert" and target.expert is None:
        raise UserError("--answers-by expert: there is no expert; name one with --expert")
    later = target.config.generation
    drawn = options.temperature != 0 or later.expert_temperature or later.student_temperature
    if options.samples > 1 and not drawn:
        raise UserError("--k: greedy samples are all alike; leave --temperature 0 out")
    if options.votes > 1 and options.processbench is None:
        raise UserError("--votes is for ProcessBench; name a file with --processbench")
    if options.votes > 1 and options.temperature == 0:
        raise UserError("--votes: greedy replies are all alike; leave --temperature 0 out")
    if options.best_of and options.temperature == 0:
        raise UserError("--best-of: greedy answers are all alike; leave --temperature 0 out")
    if options.forgetting and target.checkpoint is None:
        raise UserError(
            "--forgetting compares a run's student with what it was before the run; name a run"
        )


def _check_expert_has_a_part(target: Target, options: Options, *, graded: bool) -> None:
    """Refuse an expert that would do nothing, and a word on first answers that nobody goes on from.

    Raises:
        UserError: the student answers alone.
    """
    if target.helps_expert or options.baselines or options.best_of:
        return
    if options.answers_by is not None:
        raise UserError(
            "--answers-by: nobody goes on from first answers here; add --baselines or --best-of, "
            "or leave it out"
        )
    if target.expert is not None and graded:
        raise UserError(
            "--expert: it has no part in this evaluation; add --baselines, or leave it out"
        )


def _choosing(target: Target, options: Options, solved: Solving) -> Choosing:
    """The same problems with several answers each."""
    if not solved.graded:
        raise UserError(
            f"--best-of: {solved.name} has no right answers, so no pick can be said to be right"
        )
    by_score = tuple(name for name in SCORES if name != HEAD or target.scores)
    return Choosing(
        name=f"{solved.name}, best of {options.best_of}",
        items=solved.items,
        systems=(*by_score, MAJORITY, RANDOM),
        samples=options.best_of,
        shots=solved.shots,
    )


def _paths(target: Target) -> list[Path]:
    """The directories of the models."""
    return [path for path in (target.student, target.expert) if path is not None]


def _writers(options: Options) -> tuple[str, ...]:
    """Who replies where nobody helps."""
    return (STUDENT, "expert") if options.baselines else (STUDENT,)


def _reply_tokens(paths: Sequence[Path]) -> int:
    """Maximum tokens of a reply on a ProcessBench item: half of the shortest context at most."""
    contexts = [length for path in paths if (length := context_length(path)) is not None]
    return min([TOKENS, *(length // 2 for length in contexts)])


def _solvers(target: Target, options: Options) -> tuple[str, ...]:
    others = tuple(name for name, system in SYSTEMS.items() if system.is_baseline)
    baselines = others if options.baselines else ()
    if target.helps_expert:
        return (LOOP, *baselines, STUDENT)
    return (STUDENT, BASE, *baselines) if target.run else (STUDENT, *baselines)


def _judges(target: Target, options: Options) -> tuple[str, ...]:
    critics = tuple(name for name, system in SYSTEMS.items() if system.stages is not None)
    baselines = ("expert", *critics) if options.baselines else ()
    # Beside a student that learned from itself stands what it was, as in the set it solves.
    amateur = (CLEAR,) if target.run and (baselines or not target.helps_expert) else ()
    return (STUDENT, *amateur, *baselines)
