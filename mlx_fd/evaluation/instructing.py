"""Instructions with a reference text, in Alpaca's format: how close does a model's text come?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import Who
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.measures import Known, Measure
from mlx_fd.evaluation.readers import Readers
from mlx_fd.evaluation.text import bleu, chrf, rouge
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.writing import Sampling
from mlx_fd.problems import prompts, skipped_note
from mlx_fd.problems.files import json_rows, listed
from mlx_fd.problems.rows import BadRow, reasons_of
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

LABELS = {"student": "Student", "expert": "Expert"}
_FIELDS = ("instruction", "input", "output")
_COLUMNS = "each row has instruction and output, and may have input"


@dataclass(frozen=True)
class Instruction:
    """One row of an instruction file.

    Attributes:
        id: its place in the file.
        prompt: what the model is asked: the instruction, and the text that it is about.
        output: the reference.
    """

    id: str
    prompt: str
    output: str


def read(
    path: Path, *, skip_bad_rows: bool = False, warn: Callable[[str], None] = lambda text: None
) -> tuple[Instruction, ...]:
    """Instructions of a JSON array or of JSON lines.

    Args:
        path: the file.
        skip_bad_rows: leave out rows that are not Alpaca's, such as those without an output.
        warn: told how many were left out, and why.

    Raises:
        UserError: the file cannot be read, or a row is not one of Alpaca's.
    """
    good: list[Instruction] = []
    bad: list[BadRow] = []
    for index, (where, row) in enumerate(json_rows(path)):
        try:
            good.append(_instruction(f"{path.stem}-{index:05d}", row))
        except ValueError as error:
            bad.append(BadRow(where, str(error)))
    if bad and not (good and skip_bad_rows):
        raise UserError(
            f"{path}: {len(bad)} of {len(bad) + len(good)} rows cannot be read:\n  {listed(bad)}\n"
            f"Correct them, or skip them with --skip-bad-rows ({_COLUMNS})"
        )
    if not good:
        raise UserError(f"{path} has no instruction; {_COLUMNS}")
    if bad:
        warn(skipped_note(str(path), reasons_of(bad)))
    return tuple(good)


def _instruction(name: str, row: dict[str, Any] | str) -> Instruction:
    if isinstance(row, str):
        raise ValueError(row)
    instruction, given, output = ("" if row.get(c) is None else row[c] for c in _FIELDS)
    for column, text in zip(_FIELDS, (instruction, given, output), strict=True):
        if not isinstance(text, str) or not (text.strip() or column == "input"):
            raise ValueError(f"no text in {column!r}")
    return Instruction(name, prompts.instruction_prompt(instruction, given), output)


@dataclass(frozen=True)
class Instructing:
    """Instructions, and who follows them.

    Attributes:
        name: of the set.
        items: the instructions.
        systems: ``student``, and ``expert`` where there is one.
        readers: of the texts.
    """

    name: str
    items: Sequence[Instruction]
    systems: tuple[str, ...]
    readers: Readers

    samples = 1
    shown = ("rougeL", "bleu", "chrf", "bertscore_f1")

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Instruction]
    ) -> list[Trial]:
        """One batch of replies, greedy."""
        who: Who = "expert" if system == "expert" else "student"
        sampling = Sampling(bench.target.config.generation.max_answer_tokens)

        def make(pair: Pair) -> list[Trial]:
            return bench.ask(who, pair, [item.prompt for item in chunk], sampling)

        key = {"ask": [item.prompt for item in chunk], "sampling": vars(sampling)}
        return bench.trials(key, len(chunk), [who], make)

    def row(self, item: Instruction, candidates: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a reply beside the reply itself."""
        return {
            "id": item.id,
            "question": item.prompt,
            "reference": item.output,
            "final": candidates.final,
            "correct": None,
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure | Known]:
        """Text metrics against the references."""
        only = [samples[0] for samples in rows]
        candidates = [row["final"] or "" for row in only]
        wanted = [row["reference"] for row in only]
        overlap = rouge(candidates, wanted)
        return [
            *(Measure(name, values, compared=name == "rougeL") for name, values in overlap.items()),
            Known("bleu", bleu(candidates, wanted).estimate),
            Known("chrf", chrf(candidates, wanted).estimate),
            *self.readers.nearness(candidates, wanted),
            *self.readers.toxicity(candidates),
        ]
