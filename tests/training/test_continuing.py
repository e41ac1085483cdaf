"""How many of a file's problems a run that goes on learns from."""

import json

import pytest

from mlx_fd.errors import UserError
from mlx_fd.training.continuing import sizes


@pytest.fixture
def file(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(10)]
    rows.append({**rows[0], "question": "0  +\n1?"})  # the first once more
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"episodes": 8, "probe_size": 2}),
        ({"probe_size": 9}, {"episodes": 1, "probe_size": 9}),
        ({"episodes": 3}, {}),
    ],
)
def test_all_are_learned_from_but_a_few_that_are_held_out(file, given, wanted):
    assert sizes({"problems": file, **given}, 32) == wanted


@pytest.mark.parametrize("probe", [10, 40])
def test_not_all_can_be_held_out(file, probe):
    """It was said of the episodes, which nobody asked for: at least 1, not -30."""
    with pytest.raises(UserError, match=f"--probe-size {probe}: .* ask for at most 9"):
        sizes({"problems": file, "probe_size": probe}, 32)
