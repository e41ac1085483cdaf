"""Programs that have to pass tests, which are run (:mod:`mlx_fd.problems.execution`).

The shapes are those of HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732).
"""

from __future__ import annotations

import ast
import re
from typing import Any

from mlx_fd.problems import Problem, execution
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

_MARK = "```"
_LANGUAGE = re.compile(r"[ \t]*+(?:python3?|py)?[ \t]*+\n", re.IGNORECASE)
_DEFINES = re.compile(r"^[ \t]*+(?:async[ ]++)?(?:def|class)[ ]", re.MULTILINE)
_FUNCTION = re.compile(r"^[ \t]*+def[ ]++(\w++)", re.MULTILINE)
_CHECKED = re.compile(r"^check\((\w{1,80})\)\s*+\Z", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LONGEST = 20_000  # characters of a program


def block_of(text: str) -> str | None:
    """The program in a reply: its last block that defines something, else its last block.

    A block that is not closed goes on to the end. Without a block the whole text is taken where it
    is Python.
    """
    pieces = without_thoughts(text).split(_MARK)
    blocks = []
    for piece in pieces[1::2]:
        language = _LANGUAGE.match(piece)
        if language is not None:
            blocks.append(piece[language.end() :])
    if not blocks:
        whole = pieces[0] if len(pieces) == 1 else ""
        return whole if _DEFINES.search(whole) and _is_python(whole) else None
    defining = [block for block in blocks if _DEFINES.search(block)]
    return (defining or blocks)[-1]


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _read(text: str, problem: Problem, how: str) -> str | None:
    block = block_of(text)
    if block is None or len(block) > _LONGEST:
        return None
    return block.strip("\n").rstrip() or None


def program_of(final: str, problem: Problem) -> str:
    """A reply's code with what it is to go with: what the question has before it, and the tests."""
    before, checked = "", _CHECKED.search(problem.answer)
    if checked is not None:
        name = checked[1]
        head, defined, _ = problem.question.partition(f"def {name}(")
        if defined:
            # What is completed, or the imports and helpers above what is written anew.
            anew = any(found[1] == name for found in _FUNCTION.finditer(final))
            before = head if anew else problem.question
    return f"{before}\n{final}\n\n{problem.answer}\n"


def calls_check(tests: str) -> bool:
    """Whether tests are HumanEval's, which end in ``check(NAME)``."""
    return _CHECKED.search(tests) is not None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(answer, str) or "assert" not in answer:
        raise ValueError("no tests with 'assert' in 'test' or 'test_list'")
    if not _is_python(answer):
        raise ValueError("its tests are not Python")
    run = [part for part in ast.parse(answer).body if not isinstance(part, _DEFINITIONS)]
    if not any(isinstance(one, ast.Assert | ast.Call) for part in run for one in ast.walk(part)):
        raise ValueError("nothing runs its tests; check(...) needs 'entry_point'")
    return answer


register_kind(
    AnswerKind(
        name="code",
        help="a program in Python that passes the tests, which are run where that is allowed",
        order=50,
        form=Form(
            end="Write the whole solution in one block of ```python, without tests.", steps=False
        ),
        read=_read,
        same=lambda final, problem: execution.passes(program_of(final, problem)),
        gold=_gold,
        available=execution.check_allowed,
        exclusive=False,
    )
)
