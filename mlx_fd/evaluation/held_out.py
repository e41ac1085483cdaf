"""Whether a run's student has learned from the problems that it is put before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_fd import problems
from mlx_fd.evaluation.target import Target
from mlx_fd.files import digest_of
from mlx_fd.problems import Problem
from mlx_fd.problems.questions import question_digest, question_key
from mlx_fd.problems.sources import SOURCES
from mlx_fd.runs.learned import read_questions
from mlx_fd.runs.manifest import learned_rows
from mlx_fd.runs.records.manifest import LearnedRow

DEFAULT_SOURCE = "gsm8k"


def source_of(target: Target, named: str | None) -> str:
    """Where an evaluation's problems come from.

    Args:
        target: who is evaluated; one that learned from a source with a name gets that one.
        named: what the user asked for, if anything.
    """
    learned = [target.config.problems.problems, *(row["name"] for row in _learned(target))]
    return named or next((name for name in learned if name in SOURCES), DEFAULT_SOURCE)


def learned_from(target: Target, source: str, split: str) -> LearnedRow | None:
    """What the run, or one that it goes on with, learned from of these problems.

    A file has one split, whatever it is called; a copy of it is the same file. Slices of one split
    may have nothing in common: there the questions tell.

    Returns:
        The first source that has some of them; ``None``: nothing was learned from them.

    Raises:
        UserError: questions have to be compared, and cannot be loaded.
    """
    overlap = _in_file if _is_file(source) else _in_source
    return next((row for row in _learned(target) if overlap(row, source, split)), None)


def _learned(target: Target) -> list[LearnedRow]:
    return [] if target.manifest is None else learned_rows(target.config, target.manifest)


def _in_file(learned: LearnedRow, source: str, _split: str) -> bool:
    path, of_run = (Path(name).expanduser().resolve() for name in (source, learned["name"]))
    return path == of_run or digest_of(path) == learned["sha256"]


def _in_source(learned: LearnedRow, source: str, split: str) -> bool:
    if source != learned["name"] or split == learned["split"]:
        return source == learned["name"]
    parts = [set(problems.split_parts(one)) for one in (split, learned["split"])]
    if not parts[0] & parts[1] and "all" not in parts[0] | parts[1]:
        return False
    if "[" not in split + learned["split"]:
        return True
    asked = [
        {
            question_key(problem.question)
            for problem in problems.load(
                source, one, skip_bad_rows=True, kind="none", columns=learned["columns"]
            ).problems
        }
        for one in (split, learned["split"])
    ]
    return bool(asked[0] & asked[1])


def unlearned(target: Target, found: Sequence[Problem]) -> list[Problem]:
    """Those of some problems whose questions the run did not learn from, in whatever source."""
    if target.run is None:
        return list(found)
    learned = read_questions(target.run)
    return [problem for problem in found if question_digest(problem.question) not in learned]


def distinct(found: Sequence[Problem]) -> list[Problem]:
    """The first problem of each question: one that comes again tells nothing new."""
    firsts: dict[str, Problem] = {}
    for problem in found:
        firsts.setdefault(question_key(problem.question), problem)
    return list(firsts.values())


def repeated(source: str, split: str, found: Sequence[Problem]) -> list[str]:
    """What there is to say of problems some of which are asked again; arguments as below."""
    again = len(found) - len(distinct(found))
    if not again:
        return []
    return [
        f"{source} ({split}): {again} of these {len(found)} problems repeat the question of an "
        "earlier one; intervals take all for different problems and are too narrow: leave the "
        "repeated ones out"
    ]


def learned_elsewhere(
    target: Target, source: str, split: str, found: Sequence[Problem]
) -> list[str]:
    """What there is to say of problems some of which the run learned from in another source.

    Args:
        target: who is evaluated.
        source: theirs.
        split: of it.
        found: they.
    """
    known = len(found) - len(unlearned(target, found))
    # Of the source itself all is said.
    if not known or learned_from(target, source, split):
        return []
    return [
        f"{source} ({split}): the run learned from {known} of these {len(found)} problems in "
        "another source; on them nothing is measured that holds for others: leave them out"
    ]


def _is_file(source: str) -> bool:
    """Whether problems come from a file: a folder may be called as a source or a data set is."""
    return source not in SOURCES and Path(source).expanduser().is_file()


def concerns(
    target: Target, named: str | None, split: str, transfer: str | None = None
) -> list[str]:
    """What makes an evaluation worth less than it looks.

    Args:
        target: who is evaluated.
        named: the problems that the user asked for, if any.
        split: of them.
        transfer: a second source of problems.
    """
    source = source_of(target, named)
    asked = dict.fromkeys(one for one in (source, transfer) if one is not None)
    found = [
        _was_learned_from(one, row["split"])
        for one in asked
        if (row := learned_from(target, one, split)) is not None
    ]
    learned = [row["name"] for row in _learned(target)]
    if found or not learned or named is not None or source in learned:
        return found
    return [
        f"the run learned from {learned[0]}, and what follows is on {source}; name "
        "problems like its own that it has not seen (--problems)"
    ]


def _was_learned_from(source: str, split: str) -> str:
    of, other = f", split {split}", "another --split or "
    if _is_file(source):
        of = other = ""
    return (
        f"the run learned from these problems ({source}{of}): what follows is no measure of "
        f"what it does on others; choose {other}other problems"
    )
