"""Problems and where they come from: GSM8K in the package, a generator, files, hub data sets."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_fd.errors import UserError
from mlx_fd.problems.questions import question_key
from mlx_fd.registry import SOURCES

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")
_NO_WORD = re.compile(r"[\W_]+")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Problem:
    """One problem with its reference solution.

    Attributes:
        id: unique in its set, the same on every load: ``gsm8k-train-00017`` is row 17 from 0.
        question: the text a model is asked; choices stand in it.
        solution: the reference solution; where the source has none, its answer.
        answer: what the solution arrives at, in the canonical form of its kind (of a number,
            ``str(Fraction)``); empty where the kind has no right answer.
        kind: a name in :data:`mlx_fd.registry.KINDS`.
        choices: what there is to choose from, where there is.
        also_right: other right answers.
        published: the answer as its source writes it, for those who compare texts; empty: as
            ``answer``.
    """

    id: str
    question: str
    solution: str
    answer: str
    kind: str = "number"
    choices: tuple[str, ...] = ()
    also_right: tuple[str, ...] = ()
    published: str = ""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one split of one source, in the source's order.

    Attributes:
        name: the source as it was named.
        split: the split as it was named.
        problems: at least one.
        sha256: of the published bytes (GSM8K), the file's bytes, or the rows of a hub data set
            written as JSON lines with sorted keys.
        skipped: rows left out because they could not be read.
        reasons: why, each with the number of its rows, the most frequent first.
        unread: columns that say something, and that nothing was taken from.
        tried: reference solutions that were run, where answers are programs.
        failing: ids of problems whose own tests those solutions fail.
    """

    name: str
    split: str
    problems: tuple[Problem, ...]
    sha256: str
    skipped: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    unread: tuple[str, ...] = ()
    tried: int = 0
    failing: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell the user of what was left out, and of solutions that fail."""
        found = []
        if self.unread:
            names = ", ".join(map(repr, self.unread))[:200]
            found.append(f"columns of {self.name} that are not read: {names}")
        if self.skipped:
            found.append(skipped_note(self.name, self.reasons))
        if self.failing:
            found.append(
                f"{len(self.failing)} of {self.tried} reference solutions of {self.name} that were "
                f"tried fail their own tests, so that right answers may be called wrong: "
                f"{', '.join(self.failing[:5])}"
            )
        return tuple(found)


def skipped_note(name: str, reasons: Sequence[tuple[str, int]]) -> str:
    """What to tell the user of rows that were left out, with a count for each reason."""
    count = sum(n for _, n in reasons)
    why = "; ".join(f"{n} {reason}" for reason, n in reasons)
    return f"{count} rows of {name} could not be read and were skipped: {why}"


@dataclass(frozen=True)
class Verdict:
    """The truth about an answer.

    Attributes:
        first_error: the first wrong step from 1, one past the last right step where a step or the
            final number is missing or wrong; 0: all is right.
        kind: one of the source's kinds of error; empty where all is right.
    """

    first_error: int
    kind: str

    @property
    def score(self) -> float:
        """1 for a right answer; else from -1 (the first step is wrong) to -0.2 (the fifth)."""
        if not self.first_error:
            return 1.0
        return round(-1 + 0.2 * min(self.first_error - 1, 4), 1)


def load(
    source: str = "gsm8k",
    split: str = "train",
    *,
    skip_bad_rows: bool = False,
    kind: str = "auto",
    columns: str = "",
) -> ProblemSet:
    """Load the problems of one split.

    Rows have ``question`` (or ``problem``) and ``answer``: a solution that ends in
    ``#### <answer>`` or the answer alone, then with a ``solution`` beside it or without; maybe
    ``choices``, a ``context`` and an ``id``. The names of published data sets are known
    (:data:`mlx_fd.problems.columns.COLUMNS`).

    Args:
        source: a name in :data:`mlx_fd.registry.SOURCES`, a path, or ``owner/name`` of a hub data
            set.
        split: the split to read; a file has only one, whatever it is called.
        skip_bad_rows: count rows that cannot be read instead of refusing the source.
        kind: of the answers in a file or hub data set, a name in
            :data:`mlx_fd.registry.KINDS`; ``"auto"``: told by the rows.
        columns: what a column stands for, where it has another name:
            ``question=prompt,answer=gold``.

    Raises:
        UserError: the source is unknown or cannot be read, the split does not exist, rows are bad
            (the message names file and line of the first ten), or answers are programs and no
            reference solution passes its tests.
    """
    if source in SOURCES:
        found: ProblemSet = SOURCES[source].load(split)
        _check_alike(found)
        return found
    from mlx_fd.problems import files, rows
    from mlx_fd.problems.columns import parse_columns

    reading = rows.Reading(parse_columns(columns), kind, skip_bad_rows)
    path = Path(source).expanduser()
    is_file_name = bool(suffixes_of(path))
    if not is_file_name and not path.exists():
        if not _HUB_NAME.fullmatch(source):
            near = difflib.get_close_matches(source.lower(), list(SOURCES), cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown problems {source!r}: {hint}{_accepted()}")
        return _with_solutions_tried(files.load_hub(source, split, reading))
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f": did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise UserError(f"{source}: there is no such file{hint}")
    if path.is_dir():
        raise UserError(f"{source} is a directory: name one file in it; {_accepted()}")
    if not is_file_name:
        raise UserError(f"{source}: cannot tell what is in it; {_accepted()}")
    return _with_solutions_tried(files.load_file(path, source, split, reading))


def _with_solutions_tried(found: ProblemSet) -> ProblemSet:
    """Problems, with what became of their reference solutions where these are programs.

    Raises:
        UserError: all that were tried fail, as where their tests need what is not installed here.
    """
    from mlx_fd.problems import execution
    from mlx_fd.problems.kinds.code import try_solutions

    if found.problems[0].kind != "code":
        return found
    tried, failing = try_solutions(found.problems)
    if failing and len(failing) == tried:
        raise UserError(
            f"{found.name}: no reference solution passes the tests of its own problem ({tried} "
            f"tried, the first is {failing[0]}), so that no answer would be right; are the "
            f"packages that the tests import installed, and are {execution.SECONDS} seconds and "
            f"{execution.MEMORY >> 30} GiB enough?"
        )
    return replace(found, tried=tried, failing=failing)


def _check_alike(found: ProblemSet) -> None:
    """Refuse a source that has some problems with right answers and some without."""
    from mlx_fd.problems.kinds import are_graded

    if len({are_graded([problem]) for problem in found.problems}) > 1:
        raise UserError(
            f"{found.name}: some of its problems have right answers and some have none (kind "
            "none); make two sources of them"
        )


def suffixes_of(path: Path) -> tuple[str, ...]:
    """What a file of rows ends in: ``.jsonl``, or ``.jsonl`` and ``.gz``; empty: it is none."""
    found = [suffix.lower() for suffix in path.suffixes]
    if found[-1:] and found[-1] in FILE_SUFFIXES:
        return (found[-1],)
    if len(found) > 1 and found[-1] in PACKED_SUFFIXES and found[-2] in FILE_SUFFIXES[:-1]:
        return (found[-2], found[-1])
    return ()


def _accepted() -> str:
    return (
        f"a source is {', '.join(SOURCES)}, a file ending in {', '.join(FILE_SUFFIXES[:-1])} "
        "(each also with .gz or .zst) or .parquet, or a data set of the hub as owner/name "
        "(owner/name:config where it has several)"
    )


def split_parts(split: str) -> tuple[str, ...]:
    """The splits that ``train+Test[:10%]`` adds up, without slices and in lower case."""
    return tuple(part.partition("[")[0].strip().lower() for part in split.split("+"))


def check_split(split: str, train_on_test: bool) -> None:
    """Refuse to train on a test split.

    Args:
        split: as given to :func:`load`; slices and sums (``train+test[:10%]``) are seen through,
            and a hub data set's ``all`` has its test split in it.
        train_on_test: the user's explicit permission.

    Raises:
        UserError: the split is or contains a test split, and there is no permission.
    """
    of_test = any(
        part == "all" or any(word.startswith("test") for word in _NO_WORD.split(part))
        for part in split_parts(split)
    )
    if of_test and not train_on_test:
        raise UserError(
            f"split {split!r} would train on test problems, which makes every later evaluation "
            "on them worthless: use --split train, or say --train-on-test if you mean it"
        )


def probe_and_train(
    problems: ProblemSet, probe_size: int, episodes: int, seed: int, warm_up: int = 0
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:
    """Draw a run's probe problems, the problems it goes through, and those of its warm-up.

    The order depends on the seed alone, so more episodes only go further in the same order and
    the probe stays the same. No probe question comes up again in training, under any id. The
    warm-up's problems are the last of the order, so that they, too, stay the same, and with a
    warm-up or without the run goes through the same ones.

    Args:
        problems: where to draw from.
        probe_size: probe problems, all with different questions.
        episodes: training problems.
        seed: of the shuffle.
        warm_up: problems of the warm-up.

    Returns:
        The probe's problems, the training problems, in order, and the warm-up's.

    Raises:
        UserError: there are not enough problems.
    """
    order = list(problems.problems)
    random.Random(seed).shuffle(order)
    probe: dict[str, Problem] = {}
    for problem in order:
        if len(probe) == probe_size:
            break
        probe.setdefault(question_key(problem.question), problem)
    rest = [problem for problem in order if question_key(problem.question) not in probe]
    if len(probe) < probe_size or len(rest) < episodes + warm_up:
        most = "a smaller probe (--probe-size)"
        if rest and warm_up:
            most = f"at most {len(rest)} of both together"
        elif rest:
            most = f"at most {len(rest)} episodes"
        both = f" and {warm_up} problems of a warm-up" if warm_up else ""
        raise UserError(
            f"{problems.name} ({problems.split}) has {len(order)} problems: after {len(probe)} of "
            f"the {probe_size} held out as probe {len(rest)} are left, but {episodes} episodes"
            f"{both} were asked for; ask for {most}"
        )
    return tuple(probe.values()), tuple(rest[:episodes]), tuple(rest[len(rest) - warm_up :])
