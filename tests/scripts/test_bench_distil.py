"""Who learns to answer fastest: what is read off the rows, by hand."""

import json

import numpy as np
import pytest

from mlx_fd.runs.events import BatchDone
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_distil")


def row(arm, seed, rights, seconds=(0, 10, 20), generated=(0, 100, 300)):
    zero = {"expert": 0, "problems": 16, "updates": 1}
    points = [
        {"seconds": second, "generated": tokens, "right": right, **zero}
        for second, tokens, right in zip(seconds, generated, rights, strict=True)
    ]
    return {"arm": arm, "seed": seed, "points": points}


def test_answers_are_read_between_two_looks(bench, tmp_path):
    of_sft = [row("sft", seed, ("0000", "1000", "1110")) for seed in (0, 1)]
    of_loop = [
        row("loop", seed, ("0000", "0000", "1111"), (0, 5, 30), (0, 50, 200)) for seed in (0, 1)
    ]
    assert np.array_equal(bench.at(of_sft[0], "seconds", 15), [1, 0.5, 0.5, 0])
    assert np.array_equal(bench.at(of_sft[0], "generated", 50), [0.5, 0, 0, 0])
    every = of_sft + of_loop
    assert bench.least(every, "seconds") == 20 and bench.least(every, "generated") == 200
    assert bench.accuracy(of_sft, "seconds", 20).value == 0.75
    # The loop is at 15 of its 25 seconds between its last two looks.
    found = bench.difference(of_loop, of_sft, "seconds", 20)
    assert found.value == pytest.approx(0.6 - 0.75) and found.n == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in every))
    lines = bench.table(rows).splitlines()
    assert "Equal tokens: 200" in lines[0] and "Equal seconds: 20" in lines[0]
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| sft", "| loop"]
    assert lines[-2].split(" | ")[1].startswith("50.0 (") and "| 60.0 (" in lines[-1]


def test_tokens_are_counted_by_who_writes_them(bench):
    metrics = {"updates": [{}, {}]}
    attempts = [{"id": "a", "tokens": [1, 2, 3]}, {"id": "b", "tokens": [1], "by_expert": True}]
    counted = bench._counts(BatchDone(2, 4, attempts, metrics))
    assert counted == {"generated": 4, "expert": 1, "problems": 2, "updates": 2}
    tokens = {"answer": 5, "student_feedback": 7, "expert_feedback": 11, "final": 2}
    counted = bench._counts(BatchDone(1, 4, [{"id": "a", "answer": {}, "tokens": tokens}], metrics))
    assert counted == {"generated": 25, "expert": 13, "problems": 1, "updates": 2}
