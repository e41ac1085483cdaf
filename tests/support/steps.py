"""The exam's questions as a ProcessBench file."""

import json
from dataclasses import asdict

from mlx_fd.evaluation import processbench
from mlx_fd.problems.kinds import is_right, read_final


def processbench_items(exam):
    """The questions in ProcessBench's form: a step for each line of the answer.

    The line with the final number is the last step, and the one with the error where that number
    is wrong, or where a step is missing before it.
    """
    return tuple(
        processbench.Item(
            question.problem.id,
            "mlx-fd arithmetic",
            question.problem.question,
            tuple(question.answer.split("\n")),
            is_right(read_final(question.answer, question.problem), question.problem),
            question.first_error - 1,
        )
        for question in exam
    )


def to_json_lines(items):
    """The text of a file that ``processbench.read`` reads, an item per line."""
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
