"""Judge a file of answers with a distilled student, and say which ones it doubts.

    python examples/judge_many.py RUN ANSWERS.jsonl

RUN is a run directory or any model; each line of the file has a question and an answer. The student
is loaded once and judges eight answers side by side. Not every text has a score that can be read.
"""

import json
import math
import sys
from pathlib import Path

from mlx_fd import UserError, open_student


def main(run: str, file: str) -> None:
    """Print each answer's score, the lowest first, and at the end those without one."""
    with Path(file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    student = open_student(run)
    judgements = student.judge([(row["question"], row["answer"]) for row in rows], batch_size=8)
    scored = []
    for row, judgement in zip(rows, judgements, strict=True):
        # A plain model has no score head.
        score = judgement.written_score if judgement.head_score is None else judgement.head_score
        shown = "unreadable" if score is None else f"{score:+.2f}"
        scored.append(
            (math.inf if score is None else score, shown, row["question"], judgement.text)
        )
    for _, shown, question, text in sorted(scored):
        print(f"{shown}  {question}\n       {text}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except UserError as error:
        sys.exit(f"error: {error}")
