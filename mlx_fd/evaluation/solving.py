"""A set of problems that systems solve: accuracy, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fd.evaluation.baselines import LOOP, SYSTEMS, Trial
from mlx_fd.evaluation.baselines.trials import Who
from mlx_fd.evaluation.bench import Bench, Uses, outside_code
from mlx_fd.evaluation.cache import Rows, asked
from mlx_fd.evaluation.calibration import roc_auc
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.readers import Readers
from mlx_fd.evaluation.sampling import maj_at_k, pass_at_k
from mlx_fd.evaluation.text import rouge
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import Answered, Usage
from mlx_fd.feedback.turns import answer, as_student
from mlx_fd.feedback.two_tokenizers import to_expert
from mlx_fd.models.conversation import Conversation, without_repeated_eos
from mlx_fd.models.generation import said
from mlx_fd.problems import Problem, parsing, prompts
from mlx_fd.problems.kinds import are_graded, form_of, is_right, read_final, votes
from mlx_fd.problems.kinds.text import token_f1
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow


@dataclass(frozen=True)
class Solving:
    """Problems, and the systems that solve them.

    Attributes:
        name: ``gsm8k/test``.
        items: the problems.
        systems: names in :data:`mlx_fd.evaluation.baselines.SYSTEMS`, the one that is compared
            first.
        samples: how often each problem is tried.
        readers: of the texts.
        shots: what stands before each question.
    """

    name: str
    items: Sequence[Problem]
    systems: tuple[str, ...]
    samples: int
    readers: Readers
    shots: str = ""

    @property
    def graded(self) -> bool:
        """Whether its problems have right answers."""
        return are_graded(self.items)

    @property
    def shown(self) -> tuple[str, ...]:
        """Measures for the terminal's table."""
        if not self.graded:
            return ("rougeL", "cut", "score")
        votes = (f"maj@{self.samples}", f"pass@{self.samples}") if self.samples > 1 else ()
        return ("accuracy", "accuracy_strict", "accuracy_flexible", "token_f1", *votes)

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return SYSTEMS[system].label

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Problem]
    ) -> list[Trial]:
        """One batch of a system's trials."""
        chunk = with_shots(chunk, self.shots)
        found = SYSTEMS[system]
        options = bench.target.config.generation
        by: Uses
        if found.begins_with == "first":
            by, temperature = first_by(bench), bench.first_temperature
        else:
            by, temperature = found.begins_with, bench.bare_temperature
        who: Who = "expert" if by == "expert" else "student"
        begun = answers_of(bench, by, temperature, batch, sample, chunk)
        seeds = bench.seeds(batch, sample)

        def make(pair: Pair) -> list[Trial]:
            answered = [
                answered_by(pair, *both, who, options.answer_filter)
                for both in zip(chunk, begun, strict=True)
            ]
            return found.run(bench.setting(pair, who), answered, seeds, bench.progress)

        uses: list[Uses] = [by] if found.begins_with != "first" else ["expert"]
        uses += [found.amateur] if found.amateur else []
        config, alone = bench.target.config, None
        if system == LOOP and bench.target.threshold is not None:
            # The finals of its own solutions are compared with the answer's.
            alone = [bench.target.threshold, config.gate.own_solutions, options.answer_filter]
        key = {
            "system": system,
            "questions": asked(chunk),
            "answers": content_digest([row["tokens"] for row in begun]),
            "answered_by": who,
            "generation": dataclasses.asdict(
                dataclasses.replace(options, answers_by="expert", answer_filter="auto")
            ),
            "score_at": config.models.score_at,
            "target_score": config.episode.target_score,
            "check_alone": config.episode.check_alone,
            "student_weight": config.episode.student_weight,
            "alone": alone,
            "seed": [bench.seed, batch, sample],
            **outside_code(system),
        }
        return bench.trials(key, len(chunk), uses, make)

    def row(self, problem: Problem, trial: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a trial beside the trial itself.

        Args:
            problem: its answer says what is right.
            trial: the final answer and the first one.
            how: how a final number is read.
        """
        if not self.graded:
            return {
                "id": problem.id,
                "question": problem.question,
                "reference": problem.solution,
                "final": None,
                "correct": None,
            }
        final = read_final(trial.final, problem, how)
        first = read_final(trial.turns["answer"], problem, how)
        gold = f"#### {problem.published or problem.answer}"
        # The harness's filters look for numbers, without units.
        strict, flexible = (
            parsing.lm_eval_match(trial.final, gold, filter)
            if problem.kind == "number" and parsing.lm_eval_readable(gold, filter)
            else None
            for filter in ("strict", "flexible")
        )
        return {
            "id": problem.id,
            "question": problem.question,
            "reference": problem.answer,
            "final": final,
            "correct": is_right(final, problem),
            "strict": strict,
            "flexible": flexible,
            "first_correct": is_right(first, problem),
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """What a system got.

        Args:
            rows: of each problem, its samples.
        """
        firsts = [samples[0] for samples in rows]
        measures = self._graded(rows) if self.graded else self._ungraded(rows)
        measures += self.readers.likeness(firsts)
        return measures + self.readers.toxicity([row["turns"][row["last"]] for row in firsts])

    def _ungraded(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """What can be said where no right answer is known."""
        firsts = [samples[0] for samples in rows]
        wanted = [row["reference"] for row in firsts]
        measures = []
        if all(text.strip() for text in wanted):
            likeness = rouge([row["turns"][row["last"]] for row in firsts], wanted)["rougeL"]
            measures.append(Measure("rougeL", likeness, compared=True))
        scores = [_known(row["score"]) for row in firsts]
        if not all(map(math.isnan, scores)):
            measures.append(Measure("score", scores))
        return measures

    def _graded(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """What is right, by value and by the harness's filters."""

        def mean_of(right: Callable[[OutputRow], bool | None]) -> list[float]:
            return [float(np.mean([bool(right(row)) for row in samples])) for samples in rows]

        accuracy = mean_of(lambda row: row["correct"])
        measures = [Measure("accuracy", accuracy, compared=True)]
        by_filter = {
            "accuracy_strict": [_known_mean([row.get("strict") for row in of]) for of in rows],
            "accuracy_flexible": [_known_mean([row.get("flexible") for row in of]) for of in rows],
        }
        measures += [
            Measure(name, shares)
            for name, shares in by_filter.items()
            if not all(map(math.isnan, shares))
        ]
        if all(problem.kind == "text" for problem in self.items):
            measures.append(Measure("token_f1", list(map(_token_f1, self.items, rows))))
        measures.append(Measure("first_accuracy", mean_of(lambda row: row["first_correct"])))
        k = self.samples
        if k > 1:
            right = [sum(bool(row["correct"]) for row in samples) for samples in rows]
            measures += [
                Measure(f"avg@{k}", accuracy),
                Measure(f"maj@{k}", list(map(majority, self.items, rows))),
                Measure(f"pass@{k}", [pass_at_k(count, k, k) for count in right]),
            ]
        # How well the scores tell right first answers from wrong ones; one answer to each problem.
        scores = [_known(samples[0]["score"]) for samples in rows]
        if not all(map(math.isnan, scores)):
            positive = [float(bool(samples[0]["first_correct"])) for samples in rows]
            measures.append(Measure("score_roc_auc", scores, roc_auc, (positive,)))
        return measures


def _token_f1(problem: Problem, samples: Sequence[OutputRow]) -> float:
    """The mean F1 of the words of some replies with the nearest right answer's (SQuAD)."""
    golds = (problem.answer, *problem.also_right)
    return float(np.mean([max(token_f1(row["final"] or "", g) for g in golds) for row in samples]))


def with_shots(found: Sequence[Problem], shots: str) -> Sequence[Problem]:
    """Problems as the models read them, with examples before each question."""
    if not shots:
        return found
    return [dataclasses.replace(one, question=f"{shots}{one.question}") for one in found]


def without_shots(found: Sequence[Problem], shots: str) -> tuple[Problem, ...]:
    """What :func:`with_shots` was given."""
    return tuple(
        dataclasses.replace(one, question=one.question.removeprefix(shots)) for one in found
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _known_mean(right: Sequence[bool | None]) -> float:
    """The share of a problem's samples that are right; NaN where nothing says so."""
    return math.nan if None in right else float(np.mean([bool(one) for one in right]))


def first_by(bench: Bench) -> Who:
    """Who writes the first answers."""
    return "student" if bench.target.config.generation.answers_by == "student" else "expert"


def majority(problem: Problem, samples: Sequence[OutputRow]) -> float:
    """The probability that the vote of some replies to a problem is right."""
    cast = votes([row["final"] for row in samples], problem)
    right = {vote for vote, row in zip(cast, samples, strict=True) if row["correct"]}
    return maj_at_k(cast, right.__contains__)


def answers_of(
    bench: Bench,
    by: Uses,
    temperature: float,
    batch: int,
    sample: int,
    chunk: Sequence[Problem],
) -> Rows:
    """A model's answers to a batch, as rows; whoever else needs them finds them in the cache."""
    options = bench.target.config.generation
    if by != "expert":
        options = as_student(options)
    key = {
        "answers": asked(chunk),
        "tokens": options.max_answer_tokens,
        "temperature": temperature,
        "penalty": options.expert_repetition_penalty,
        "sequential": options.sequential,
        "seed": [bench.seed, batch, sample] if temperature else None,
    }

    def make(pair: Pair) -> Rows:
        answered = answer(
            pair.expert if by == "expert" else pair.student_lm,
            chunk,
            options,
            bench.seeds(batch, sample)("answer"),
            bench.progress,
            temperature=temperature,
            keep=False,
        )
        return [
            {
                "tokens": list(one.answer.tokens),
                "text": one.answer.text,
                "prefilled": one.usage.prefilled["answer"],
                "seconds": one.usage.seconds["answer"],
                "capped": list(one.usage.capped),
                "written": one.usage.tokens["answer"],
                "thoughts": one.usage.thoughts,
                "closed": list(one.usage.closed),
            }
            for one in answered
        ]

    return bench.rows(key, len(chunk), [by], make)


def answered_by(
    pair: Pair, problem: Problem, row: dict[str, Any], who: Who, how: str = "auto"
) -> Answered:
    """An answered problem, to go on from.

    Its keys and values are not kept, so every system reads the answer anew, whoever wrote it and
    whenever: what comes next does not depend on what was in the cache.

    Args:
        pair: the models.
        problem: what was asked.
        row: the answer, of :func:`answers_of`.
        who: wrote it.
        how: how a final number is read.
    """
    tokens = tuple(row["tokens"])
    if who == "student":
        tokens = to_expert(pair, tokens)
    asked = prompts.answer_prompt(problem.question, form_of(problem))
    chat = said(pair.expert, asked, tokens)
    conversation = Conversation(chat)
    return Answered(
        problem,
        prompts.Answer(row["text"], read_final(row["text"], problem, how), tokens),
        conversation,
        without_repeated_eos(conversation, feedback_request(pair.expert)),
        Usage(
            {"answer": row["written"]},
            {"answer": row["prefilled"]},
            {"answer": row["seconds"]},
            tuple(row["capped"]),
            row["thoughts"],
            tuple(row["closed"]),
        ),
        by_student=who == "student",
    )
