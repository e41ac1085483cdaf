"""Judge a file of answers with a distilled student, and say which ones it doubts.

    python examples/judge_many.py RUN ANSWERS.jsonl

RUN is a run directory or any model; each line of the file has a question and an answer. The student
is loaded once and judges eight answers side by side.
"""

import json
import sys
from pathlib import Path

from mlx_fd import UserError, open_student


def main(run: str, file: str) -> None:
    """Print each answer's score, the lowest first."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    student = open_student(run)
    judgements = student.judge([(row["question"], row["answer"]) for row in rows], batch_size=8)
    scored = []
    for row, judgement in zip(rows, judgements, strict=True):
        # A plain model has no score head, and not every text has a score that can be read.
        score = judgement.written_score if judgement.head_score is None else judgement.head_score
        scored.append((0.0 if score is None else score, row["question"], judgement.text))
    for score, question, text in sorted(scored):
        print(f"{score:+.2f}  {question}\n       {text}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except UserError as error:
        sys.exit(f"error: {error}")
