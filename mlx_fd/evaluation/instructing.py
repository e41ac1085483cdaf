"""Instructions with a reference text, in Alpaca's format: how close does a model's text come?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import roles
from mlx_fd.baselines import Trial
from mlx_fd.baselines.trials import Who
from mlx_fd.episode import Pair
from mlx_fd.errors import UserError
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cache import Rows
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.text import bleu, chrf, rouge
from mlx_fd.generation import Sampling, opening

LABELS = {"student": "Student", "expert": "Expert"}
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


def read(path: Path) -> tuple[Instruction, ...]:
    """Instructions of a JSON array or of JSON lines.

    Raises:
        UserError: the file cannot be read, or a row is not one of Alpaca's.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}; {_COLUMNS}") from error
    if not rows:
        raise UserError(f"{path}: is empty; {_COLUMNS}")
    return tuple(_instruction(path, place, row) for place, row in enumerate(rows))


def _instruction(path: Path, place: int, row: Any) -> Instruction:
    fields = row if isinstance(row, dict) else {}
    instruction, given, output = (
        fields.get(name, "") for name in ("instruction", "input", "output")
    )
    if not all(isinstance(text, str) for text in (instruction, given, output)) or not (
        instruction.strip() and output.strip()
    ):
        raise UserError(f"{path}: row {place + 1} is no instruction with its output; {_COLUMNS}")
    prompt = roles.instruction_prompt(instruction, given)
    return Instruction(f"{path.stem}-{place:05d}", prompt, output)


@dataclass(frozen=True)
class Instructing:
    """Instructions, and who follows them.

    Attributes:
        name: of the set.
        items: the instructions.
        systems: ``student``, and ``expert`` where there is one.
    """

    name: str
    items: Sequence[Instruction]
    systems: tuple[str, ...]

    samples = 1
    shown = ("rouge_l", "bleu", "chrf")

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Instruction]
    ) -> list[Trial]:
        """One batch of replies, greedy."""
        who: Who = "expert" if system == "expert" else "student"
        sampling = Sampling(bench.target.config.generation.answer_tokens)

        def make(pair: Pair) -> list[Trial]:
            told = [opening(pair.expert.tokenizer, item.prompt) for item in chunk]
            return bench.ask(who, pair, told, sampling)

        key = {"ask": [item.prompt for item in chunk], "sampling": vars(sampling)}
        return bench.trials(key, len(chunk), [who], make)

    def row(self, item: Instruction, said: Trial, how: str) -> dict[str, Any]:
        """What ``outputs.jsonl`` says of a reply beside the reply itself."""
        return {
            "id": item.id,
            "question": item.prompt,
            "reference": item.output,
            "final": said.final,
            "correct": None,
        }

    def measures(self, rows: Sequence[Rows]) -> list[Measure]:
        """Text metrics against the references."""
        only = [samples[0] for samples in rows]
        said, wanted = [row["final"] for row in only], [row["reference"] for row in only]
        raise NotImplementedError
