"""Programs that have to pass tests, which are run (:mod:`mlx_fd.problems.execution`).

The shapes are those of HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732).
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import textwrap
from typing import Any

from mlx_fd.problems import Problem, execution
from mlx_fd.problems.kinds import AnswerKind, is_right, read_final, register_kind
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

_MARK = "```"
# Behind the name a title may stand.
_LANGUAGE = re.compile(r"[ \t]*+(?:(?:python3?|py)(?:[ \t:{][^\n]*+)?+)?[ \t\r]*+\n", re.IGNORECASE)
_DEFINES = re.compile(r"^[ \t]*+(?:async[ ]++)?(?:def|class)[ ]", re.MULTILINE)
_FUNCTION = re.compile(r"^[ \t]*+(?:async[ ]++)?def[ ]++(\w++)", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async[ ]++)?(?:def|class)[ ]++(\w++)", re.MULTILINE)
_BEGINS = re.compile(r"\s*+(?:async[ ]|def[ ]|class[ ]|import[ ]|from[ ]|@)")
_WORD = re.compile(r"\b[A-Za-z_]\w*+")
_CHECKED = re.compile(r"^check\((\w{1,80})\)\s*+\Z", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import [^\n]*+(?:\n|\Z)", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LONGEST = 20_000  # characters of a program
_MOST_TRIED = 16  # reference solutions, each of which may take as long as a reply


def block_of(text: str, wanted: frozenset[str] = frozenset()) -> str | None:
    """The program in a reply: its last block that defines what is wanted, with its helpers.

    Where none does, the last block that defines something, else the last one. Helpers are earlier
    blocks that define a name of which it speaks. A block that is not closed goes on to the end.
    Without a block the whole text is taken where it is Python.

    Args:
        text: the reply.
        wanted: names that the tests call.
    """
    pieces = without_thoughts(text).split(_MARK)
    blocks = [
        _unindented(piece[language.end() :])
        for piece in pieces[1::2]
        if (language := _LANGUAGE.match(piece)) is not None
    ]
    if not blocks:
        whole = pieces[0] if len(pieces) == 1 else ""
        return whole if _DEFINES.search(whole) and _is_python(whole) else None
    solving = [at for at, block in enumerate(blocks) if wanted & set(_DEFINED.findall(block))]
    if not solving:
        return ([block for block in blocks if _DEFINES.search(block)] or blocks)[-1]
    solution = blocks[solving[-1]]
    own = set(_DEFINED.findall(solution))
    missing = set(_WORD.findall(solution)) - own
    helpers = [
        block
        for block in blocks[: solving[-1]]
        if (names := set(_DEFINED.findall(block))) & missing and not names & own
    ]
    return "\n".join([*helpers, solution])


def _unindented(block: str) -> str:
    """A block without the indentation of a list that it stands in; a body keeps its own."""
    return textwrap.dedent(block) if _BEGINS.match(block) else block


def _called(tests: str) -> frozenset[str]:
    """The names that tests call, those that are theirs or Python's aside."""
    tree = ast.parse(tests)
    own = {one.name for one in ast.walk(tree) if isinstance(one, _DEFINITIONS)}
    names = {
        one.func.id
        for one in ast.walk(tree)
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
    }
    checked = _CHECKED.search(tests)
    wanted = {checked[1]} if checked else names - own
    return frozenset(name for name in wanted if not hasattr(builtins, name))


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _read(text: str, problem: Problem, how: str) -> str | None:
    block = block_of(text, _called(problem.answer))
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
    # These come before anything else of a program.
    futures = "".join(f"{line.strip()}\n" for line in _FUTURE.findall(final))
    # A reply's own "if __name__ == '__main__'" is not run, the tests' own is.
    rest = _FUTURE.sub("", final)
    return f"{futures}{before}\n{rest}\n\n__name__ = '__main__'\n{problem.answer}\n"


@functools.lru_cache(maxsize=4)  # a command loads its problems more than once
def try_solutions(problems: tuple[Problem, ...]) -> tuple[int, tuple[str, ...]]:
    """Run reference solutions of problems, evenly spread ones where there are many.

    Returns:
        How many were tried, and the ids of those that fail their own tests.
    """
    solved = [problem for problem in problems if problem.solution]
    count = min(len(solved), _MOST_TRIED)
    tried = [solved[place * len(solved) // count] for place in range(count)]
    failing = (one.id for one in tried if not is_right(read_final(one.solution, one), one))
    return count, tuple(failing)


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
