"""What a batch did beside the least that it could have done, in tokens and steps.

The least: each token of a conversation is read once by each model that has it before it, but not
what the model wrote itself; writing takes as many steps as its tokens fill places of the batch;
the expert reads each text that is learned from once; and each sample of an update is read once, no
padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_fd.config import Config
from mlx_fd.feedback.distill import Update
from mlx_fd.feedback.samples import Sample
from mlx_fd.models.metering import LEARNING, MEASURING, READING, WRITING, Meter
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.metrics import WorkRow

EXPERT, STUDENT = "expert", "student"


def work_row(
    meter: Meter,
    rows: Sequence[EpisodeRow],
    samples: Sequence[Sample],
    updates: Sequence[Update],
    config: Config,
) -> WorkRow:
    """A batch's work.

    Args:
        meter: was open while it was done.
        rows: of its episodes; where ranks share a batch there is no profile.
        samples: what there is to learn from since the batch before.
        updates: the batch's.
        config: of the run.
    """
    places = config.generation.places or config.generation.batch_size
    written = {
        of: sum(sum(_of(of, row, config).values()) for row in rows) for of in (EXPERT, STUDENT)
    }
    writing = (WRITING, EXPERT), (WRITING, STUDENT)
    done: dict[str, float] = {
        "expert_prompts": meter.read[WRITING, EXPERT],
        "student_prompts": meter.read[WRITING, STUDENT],
        "steps": sum(meter.steps[key] for key in writing),
        "written": sum(meter.written[key] for key in writing),
        "expert_texts": meter.read[READING, EXPERT],
        "measured": meter.read[MEASURING, STUDENT],
        "learned": meter.read[LEARNING, STUDENT],
    }
    least: dict[str, float] = {
        "expert_prompts": sum(_expert_prompts(row, config) for row in rows),
        "student_prompts": sum(_student_prompts(row, config) for row in rows),
        "steps": sum(math.ceil(tokens / places) for tokens in written.values()),
        "written": sum(written.values()),
    }
    least["expert_texts"] = sum(len(sample.target) for sample in samples)
    least["measured"] = 0
    least["learned"] = sum(update.read for update in updates)
    return {
        "counts": {name: {"done": int(done[name]), "least": int(least[name])} for name in done},
        "seconds": {name: round(value, 3) for name, value in meter.seconds.items()},
        "processor_seconds": {name: round(value, 3) for name, value in meter.processor.items()},
    }


def _of(model: str, row: EpisodeRow, config: Config) -> dict[str, int]:
    """Tokens that a model wrote in an episode, by step, in their order."""
    return {
        step: tokens for step, tokens in row["tokens"].items() if _writer(step, config) == model
    }


def _writer(step: str, config: Config) -> str:
    if step.removeprefix("second_").startswith("student_") or step == "second_answer":
        return STUDENT
    return STUDENT if step == "answer" and config.generation.answers_by == "student" else EXPERT


def _expert_prompts(row: EpisodeRow, config: Config) -> int:
    """Tokens that the expert has to read in an episode."""
    wrote, read = _of(EXPERT, row, config), row["prefilled"]
    steps = list(wrote)
    # A prompt's last token is read by the first step of writing.
    if not config.generation.sequential or not steps:
        return sum(read[step] - 1 for step in steps)
    # Its own solution is by itself; of all else the last turn's prompt is the whole conversation.
    apart = [step for step in steps if step == "expert_solution"]
    steps = [step for step in steps if step not in apart]
    whole = read[steps[-1]] - sum(wrote[step] for step in steps[:-1]) - len(steps) if steps else 0
    return whole + sum(read[step] - 1 for step in apart)


def _student_prompts(row: EpisodeRow, config: Config) -> int:
    """Tokens that the student has to read in an episode; its own answer it has before it."""
    wrote, read = _of(STUDENT, row, config), row["prefilled"]
    total = sum(read[step] - 1 for step in wrote)
    for prefix in ("", "second_"):
        answer, feedback = f"{prefix}answer", f"{prefix}student_feedback"
        if answer in wrote and feedback in wrote:
            total -= min(read[answer] + wrote[answer], read[feedback] - 1)
    return total
