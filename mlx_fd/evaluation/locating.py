"""ProcessBench (arXiv 2412.06559): which step of a solution goes wrong first?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import Who
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.processbench import ALL_RIGHT, Item, critique_prompt, f1, predicted_step
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.writing import Sampling
from mlx_fd.runs.records import ItemRow, OutputRow

LABELS = {"student": "Student", "expert": "Expert"}


@dataclass(frozen=True)
class Locating:
    """Solutions in steps, and who looks for the first wrong one.

    Attributes:
        name: of the set.
        items: the solutions.
        systems: ``student``, and ``expert`` where there is one.
    """

    name: str
    items: Sequence[Item]
    systems: tuple[str, ...]

    samples = 1
    shown = ("processbench_f1", "accuracy_on_wrong", "accuracy_on_right", "readable")

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Item]
    ) -> list[Trial]:
        """One batch of replies; greedy, as in their evaluation."""
        who: Who = "expert" if system == "expert" else "student"
        prompts = [critique_prompt(item) for item in chunk]
        sampling = Sampling(bench.target.config.generation.max_answer_tokens)

        def make(pair: Pair) -> list[Trial]:
            return bench.ask(who, pair, prompts, sampling)

        key = {"ask": prompts, "sampling": vars(sampling)}
        return bench.trials(key, len(chunk), [who], make)

    def row(self, item: Item, trial: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a reply beside the reply itself."""
        step = predicted_step(trial.final)
        return {
            "id": item.id,
            "question": item.problem,
            "reference": str(item.label),
            "final": None if step is None else str(step),
            "correct": step == item.label,
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """Their accuracies and F1."""
        only = [samples[0] for samples in rows]
        hits = [float(bool(row["correct"])) for row in only]
        wrong = [float(row["reference"] != str(ALL_RIGHT)) for row in only]
        pairs = list(zip(hits, wrong, strict=True))
        return [
            Measure("processbench_f1", hits, f1, (wrong,), compared=True),
            Measure("accuracy_on_wrong", [hit if bad else math.nan for hit, bad in pairs]),
            Measure("accuracy_on_right", [math.nan if bad else hit for hit, bad in pairs]),
            Measure("readable", [float(row["final"] is not None) for row in only]),
        ]
