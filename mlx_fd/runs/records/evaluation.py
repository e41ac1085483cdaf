"""An evaluation's files: ``outputs.jsonl`` and ``eval.json``."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from mlx_fd.runs.records.parts import EstimateRow, ThoughtColumns


class TrialRow(ThoughtColumns):
    """What every line of ``outputs.jsonl`` has of a system's attempt.

    Attributes:
        turns: what was written, by step.
        last: the step whose text is the final answer.
        score: the score that the first answer was given; null where there is none.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        seconds: this problem's share of the batch's time, by step.
        by: whose tokens they are, by step.
        capped: steps that ended at the token limit.
    """

    turns: dict[str, str]
    last: str
    score: float | None
    tokens: dict[str, int]
    prefilled: dict[str, int]
    seconds: dict[str, float]
    by: dict[str, str]
    capped: list[str]


class ItemRow(TypedDict):
    """What a set says of an item; which of the later fields it has, the kind of set decides.

    Attributes:
        id: the problem's.
        question: the problem's text.
        reference: the right answer, the first wrong step, or the reference text; empty where there
            is none.
        final: what was read in the final text; null where nothing could be.
        correct: whether that is right; null where nothing is right or wrong.
        strict: whether lm-evaluation-harness's strict filter finds it right; null likewise, and
            where no reply can match the gold answer: it is no number, or has a unit, % or a slash.
        flexible: whether its flexible filter does; null likewise.
        first_correct: whether the first answer was right; null likewise.
        deserved: the score that the judged answer deserves.
        written_score: the score in the feedback's text; null where none could be read.
        expert_score: the score in the expert's feedback on the same answer; null likewise.
    """

    id: str
    question: str
    reference: str
    final: str | None
    correct: bool | None
    strict: NotRequired[bool | None]
    flexible: NotRequired[bool | None]
    first_correct: NotRequired[bool | None]
    deserved: NotRequired[float]
    written_score: NotRequired[float | None]
    expert_score: NotRequired[float | None]


class OutputRow(ItemRow, TrialRow):
    """A line of ``outputs.jsonl``: one trial.

    Attributes:
        set: name of the set.
        system: name of the system.
        sample: index of the sample, from 0.
    """

    set: str
    system: str
    sample: int


class CostsRow(TypedDict):
    """What a system cost.

    Attributes:
        cost: means per problem, by name.
        cost_estimates: the same with intervals.
    """

    cost: dict[str, float]
    cost_estimates: dict[str, EstimateRow]


class SystemRow(CostsRow):
    """A system of an evaluation set.

    Attributes:
        name: its name.
        label: what tables call it.
        measures: by name.
    """

    name: str
    label: str
    measures: dict[str, EstimateRow]


class DifferenceRow(TypedDict):
    """The difference of two systems in a measure.

    Attributes:
        difference: first minus other.
        p: two-sided; null where there was no test.
        test: the test's name.
    """

    difference: EstimateRow
    p: float | None
    test: str


class PairRow(DifferenceRow):
    """The difference, and of what.

    Attributes:
        measure: what is compared.
        system: the first system.
        against: the other.
    """

    measure: str
    system: str
    against: str


class ComparisonRow(PairRow):
    """Two systems on the same problems.

    Attributes:
        p_holm: p after Holm's correction over the set.
    """

    p_holm: float | None


class EvaluationSetRow(TypedDict):
    """A set of an evaluation.

    Attributes:
        name: its name.
        n: its items.
        systems: what each got.
        comparisons: the first system against each other one.
    """

    name: str
    n: int
    systems: list[SystemRow]
    comparisons: list[ComparisonRow]


class EvaluationFile(TypedDict):
    """``eval.json``.

    Attributes:
        format: of the file.
        target: what was evaluated.
        suite: the suite's name.
        asked: all that tells it from another evaluation.
        created: when, in UTC.
        versions: as in the manifest.
        models: name and digest of each model.
        seed: of all draws.
        k: samples of each problem.
        temperature: of first and of bare answers.
        answers_by: who gave the first answers.
        stands_alone: whether the student stood alone where it was confident enough.
        text_models: the models that measured texts.
        sets: the results.
    """

    format: int
    target: str
    suite: str
    asked: dict[str, Any]
    created: str
    versions: dict[str, str]
    models: dict[str, dict[str, str]]
    seed: int
    k: int
    temperature: dict[str, float]
    answers_by: str
    stands_alone: bool
    text_models: dict[str, str]
    sets: list[EvaluationSetRow]
