"""The probe set: a few held-out problems that the gate watches, and the headroom check on them.

The expert's side (its answers, its feedback, what its hidden states say about it) is computed once;
looking at the student again costs one forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.feedback.distill import measure
from mlx_fd.feedback.episode import (
    OnTokens,
    answer,
    derive_seed,
    expert_feedback,
    first_answers,
    judge,
    student_feedback,
)
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample, TeacherOutputs, sample_of, solution_of
from mlx_fd.files import digest_of, write_json, write_with
from mlx_fd.models.student import read_arrays
from mlx_fd.problems import Problem
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.records import HeadroomRow

PROBE_ROWS = "probe.json"
PROBE_ARRAYS = "probe.safetensors"


@dataclass(frozen=True)
class Headroom:
    """Is there something to distil? Counts on the probe problems, before any update.

    A model judges well where its written score is positive on a right first answer and not positive
    on a wrong one.

    Attributes:
        problems: how many there were.
        expert_right: problems the expert answers right, at the temperature of first answers where
            it writes those, greedily where the student does.
        student_right: problems the student answers right.
        expert_judged: answers the expert scored (its score could be read).
        expert_judged_right: those it judged well.
        student_judged: answers the student scored in its text.
        student_judged_right: those it judged well.
    """

    problems: int
    expert_right: int
    student_right: int
    expert_judged: int
    expert_judged_right: int
    student_judged: int
    student_judged_right: int

    def to_json(self) -> HeadroomRow:
        """For the files that keep it."""
        return {
            "problems": self.problems,
            "expert_right": self.expert_right,
            "student_right": self.student_right,
            "expert_judged": self.expert_judged,
            "expert_judged_right": self.expert_judged_right,
            "student_judged": self.student_judged,
            "student_judged_right": self.student_judged_right,
        }

    def concerns(self) -> list[str]:
        """What the user should know before hours are spent; empty where all is well."""
        found = []
        if self.expert_right <= self.student_right:
            found.append(
                f"the expert answers {self.expert_right} of {self.problems} probe problems right, "
                f"the student {self.student_right}: there may be nothing to learn at answering"
            )
        if self.expert_judged * 2 < self.problems:
            found.append(
                f"the expert's score could be read in {self.expert_judged} of {self.problems} "
                "feedbacks: the score loss has little to learn from"
            )
        if self.expert_judged and self.student_judged:
            expert = self.expert_judged_right / self.expert_judged
            student = self.student_judged_right / self.student_judged
            if expert <= student:
                found.append(
                    f"the expert judges {self.expert_judged_right} of {self.expert_judged} answers "
                    f"rightly, the student {self.student_judged_right} of {self.student_judged}: "
                    "its feedback may be no better than the student's"
                )
        return found


@dataclass(frozen=True)
class Probe:
    """The probe set of a run.

    Attributes:
        samples: the expert's feedback on the first answers, ready to measure the student with; and
            where a loss is on solutions, the expert's right ones.
        headroom: the check before the first update.
        seconds: what making it took.
    """

    samples: tuple[Sample, ...]
    headroom: Headroom
    seconds: float = 0.0

    def losses(self, pair: Pair, config: Config) -> dict[str, float]:
        """The student's mean losses on the probe set, as it is now."""
        micro_batch = config.training.micro_batch
        return measure(
            pair.student, pair.expert, self.samples, config.losses, pair.vocab, micro_batch
        )


def _judged(scores: Sequence[float | None], right: Sequence[bool]) -> tuple[int, int]:
    read = [(s, ok) for s, ok in zip(scores, right, strict=True) if s is not None]
    return len(read), sum((score > 0) == ok for score, ok in read)


def make_probe(
    pair: Pair,
    problems: Sequence[Problem],
    config: Config,
    on_tokens: OnTokens,
    on_problems: Callable[[int], None] = lambda done: None,
) -> Probe:
    """Run both models over the probe problems, in batches of the run's size.

    Args:
        pair: the models; the student untrained.
        problems: held out from the run's.
        config: token limits, seed, losses.
        on_tokens: called with a step's name and its new tokens.
        on_problems: called after each batch with the number of problems evaluated so far.
    """
    begun = time.perf_counter()
    options, size = config.generation, config.generation.batch_size
    samples: list[Sample] = []
    counts = [0] * 6
    for number, begin in enumerate(range(0, len(problems), size)):
        chunk = problems[begin : begin + size]
        seeds = _seeds(config.episode.seed, number)
        answered = first_answers(pair, chunk, options, seeds("answer"), on_tokens)
        students = student_feedback(pair, answered, options, seeds("student_feedback"), on_tokens)
        experts = expert_feedback(pair, answered, options, seeds("expert_feedback"), on_tokens)
        judged = judge(answered, students, dict(enumerate(experts)))
        answered = [one.answered for one in judged]
        own = answer(
            pair.student_lm,
            chunk,
            options,
            seeds("student_answer"),
            on_tokens,
            temperature=options.student_temperature,
            keep=False,
        )
        right = [one.is_correct for one in answered]
        best = answered
        if options.answers_by == "student":
            best = answer(pair.expert, chunk, options, 0, on_tokens, temperature=0.0, keep=False)
        expert_scores = [one.feedback.written_score for one in experts]
        student_scores = [one.feedback.written_score for one in students]
        found = [
            sum(one.is_correct for one in best),
            sum(one.is_correct for one in own),
            *_judged(expert_scores, right),
            *_judged(student_scores, right),
        ]
        counts = [so_far + more for so_far, more in zip(counts, found, strict=True)]
        samples.extend(sample_of(pair, one, config.losses) for one in judged)
        if config.losses.on_solutions:
            samples.extend(
                solution_of(pair, one.problem, one.answer, config.losses)
                for one in best
                if one.is_correct
            )
        on_problems(begin + len(chunk))
    seconds = round(time.perf_counter() - begun, 3)
    return Probe(tuple(samples), Headroom(len(problems), *counts), seconds)


def _seeds(seed: int, number: int) -> Callable[[str], int]:
    return lambda step: derive_seed(seed, number, f"probe/{step}")


def save_probe(probe: Probe, folder: Path) -> None:
    """Keep the probe set in the run directory; the JSON file is written last."""
    arrays: dict[str, mx.array] = {}
    rows = []
    for place, sample in enumerate(probe.samples):
        named = sample.expert.arrays()
        arrays |= {f"{place}/{name}": array for name, array in named.items()}
        rows.append(sample.to_json())
    digest = write_with(folder / PROBE_ARRAYS, lambda path: mx.save_safetensors(str(path), arrays))
    content = {
        "sha256": digest,
        "headroom": probe.headroom.to_json(),
        "seconds": probe.seconds,
        "samples": rows,
    }
    write_json(folder / PROBE_ROWS, with_digest(content))


def load_probe(folder: Path) -> tuple[Probe, bool] | None:
    """The probe set that :func:`save_probe` kept, and whether a digest vouches for all of it.

    Returns:
        ``None`` where there is none.

    Raises:
        ChangedFile: it is not what was written.
    """
    try:
        content, digested = read_checked(folder / PROBE_ROWS)
    except FileNotFoundError:
        return None
    try:
        if content["sha256"] != digest_of(folder / PROBE_ARRAYS):
            raise ChangedFile(f"something changed {PROBE_ARRAYS}")
        arrays = read_arrays(folder / PROBE_ARRAYS)
        of_samples: list[dict[str, mx.array]] = [{} for _ in content["samples"]]
        for name, array in arrays.items():
            place, _, what = name.partition("/")
            of_samples[int(place)][what] = array
        samples = tuple(
            Sample.from_json(row, TeacherOutputs.of(named))
            for row, named in zip(content["samples"], of_samples, strict=True)
        )
        mx.eval(of_samples)
        # Older versions did not measure how long it took.
        seconds = float(content.get("seconds", 0.0))
        return Probe(samples, Headroom(**content["headroom"]), seconds), digested
    except ChangedFile:
        raise
    except FileNotFoundError as error:
        raise ChangedFile(f"{PROBE_ARRAYS} is missing") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, UserError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error
