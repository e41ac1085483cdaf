"""Processes that the package starts import nothing from the user's folder."""

import ast

import pytest

from support import ROOT

FILES = [
    path
    for folder in ("mlx_fd", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "sys.executable" in path.read_text("utf-8")
]


def commands(path):
    """What stands behind ``sys.executable`` in each list that has it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.List, ast.Tuple)):
            words = [ast.unparse(word) for word in node.elts]
            if "sys.executable" in words:
                yield [word.strip("'") for word in words[words.index("sys.executable") + 1 :]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_taken_from_the_current_folder(path):
    """`python -m` has that folder first: a `numpy.py` there was imported by each run of a sweep."""
    for first, *rest in commands(path):
        # A script's own folder is what stands first otherwise; those of the package have none.
        own_file = "-m" not in (first, *rest) and "scripts" in path.parts
        assert first in ("-P", "-I") or own_file, [first, *rest]


def test_all_such_processes_are_looked_at():
    found = {path.stem for path in FILES if any(commands(path))}
    assert {"sweep", "compare", "execution", "math_worker", "template_sandbox"} <= found
