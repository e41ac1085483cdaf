"""ProcessBench (arXiv 2412.06559): which step of a solution goes wrong first?

As its authors ask it: in paragraphs with an index from 0, each reply's last box counts, greedily,
or by the majority of several replies at temperature 1 and top-p 0.9. The prompt's words are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import Who
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.processbench import ALL_RIGHT, Item, critique_prompt, f1, predicted_step
from mlx_fd.evaluation.sampling import maj_at_k
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.writing import Sampling
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

LABELS = {"student": "Student", "expert": "Expert"}
TOKENS = 2048
"""Maximum tokens per reply unless the user says otherwise; the authors' is 8,192."""
VOTES_TEMPERATURE, VOTES_TOP_P = 1.0, 0.9


@dataclass(frozen=True)
class Locating:
    """Solutions in steps, and who looks for the first wrong one.

    Attributes:
        name: of the set.
        items: the solutions.
        systems: ``student``, and ``expert`` where there is one.
        samples: replies that vote; 1: one greedy reply.
        max_tokens: maximum tokens per reply.
        temperature: of replies that vote; ``None``: the authors'.
    """

    name: str
    items: Sequence[Item]
    systems: tuple[str, ...]
    samples: int = 1
    max_tokens: int = TOKENS
    temperature: float | None = None

    shown = ("processbench_f1", "accuracy_on_wrong", "accuracy_on_right", "readable")

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Item]
    ) -> list[Trial]:
        """One batch of replies."""
        who: Who = "expert" if system == "expert" else "student"
        prompts = [critique_prompt(item) for item in chunk]
        sampling = Sampling(self.max_tokens)
        if self.samples > 1:
            sampling = Sampling(
                self.max_tokens,
                VOTES_TEMPERATURE if self.temperature is None else self.temperature,
                seed=bench.seeds(batch, sample)("vote"),
                top_p=VOTES_TOP_P,
            )

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
        """Their accuracies and F1: of the majority, where several replies vote."""
        hits = [_vote(samples) for samples in rows]
        wrong = [float(samples[0]["reference"] != str(ALL_RIGHT)) for samples in rows]
        pairs = list(zip(hits, wrong, strict=True))
        single = [float(np.mean([bool(row["correct"]) for row in samples])) for samples in rows]
        voted = [Measure("processbench_f1_single", single, f1, (wrong,))]
        return [
            Measure("processbench_f1", hits, f1, (wrong,), compared=True),
            Measure("accuracy_on_wrong", [hit if bad else math.nan for hit, bad in pairs]),
            Measure("accuracy_on_right", [math.nan if bad else hit for hit, bad in pairs]),
            Measure(
                "readable",
                [float(np.mean([row["final"] is not None for row in samples])) for samples in rows],
            ),
            *(voted if self.samples > 1 else []),
        ]


def _vote(samples: Sequence[OutputRow]) -> float:
    """Whether what most replies name is right; of a tie, the share that is."""
    return maj_at_k([row["final"] for row in samples], samples[0]["reference"].__eq__)
