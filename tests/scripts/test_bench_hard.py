"""The bench of an expert that is often wrong: its table is its rows'."""

import json

import numpy as np
import pytest
from scipy import stats

from support.scripted import script

bench = script("bench_hard")


def test_the_table_is_made_of_the_rows(tmp_path):
    rng = np.random.default_rng(0)
    expert = rng.random((3, 40)) < 0.6
    # The loop mends every second wrong answer of each seed, and spoils the first right one.
    loop = expert.copy()
    for row in loop:
        wrong, right = np.flatnonzero(~row), np.flatnonzero(row)
        row[wrong[::2]], row[right[0]] = True, False

    def system(first, last, tokens):
        bits = {"first": bench.bits(first), "right": bench.bits(last)}
        return {**bits, "expert_tokens": tokens, "student_tokens": 0, "seconds": 4.0}

    rows = [
        {
            **{"seed": seed, "episodes": 8, "expert_feedback_tokens": 100},
            "systems": {
                name: system(expert[seed], loop[seed] if name == "loop" else expert[seed], 400)
                for name in bench.SYSTEMS
            },
        }
        for seed in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    lines = bench.table(path).splitlines()[4:]
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("|")
    }
    more = 100 * (loop.mean(axis=1) - expert.mean(axis=1)).mean()
    assert f"- loop, final answers less CLEAR: **{more:+.1f} (" in "\n".join(lines)
    assert list(cells) == [bench.NAMES[name] for name in bench.SYSTEMS]
    assert float(cells["bare expert"][0]) == pytest.approx(100 * expert.mean(), abs=0.05)
    mended, of = int((loop & ~expert).sum()), int((~expert).sum())
    assert cells["loop, final answers"][4:6] == [f"{mended} of {of}", f"3 of {expert.sum()}"]
    apart = 100 * (loop.mean(axis=1) - expert.mean(axis=1))
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    said = cells["loop, final answers"][1].strip("*")
    value, bounds = said.split(" ", 1)
    assert float(value) == pytest.approx(apart.mean(), abs=0.05)
    # Of so few runs the spread of the problems may be the larger one.
    got = [float(bound) for bound in bounds.strip("()").split(" to ")]
    assert got[0] <= low + 0.05 and got[1] >= high - 0.05
    assert cells["bare expert"][6:] == ["10", "0", "0.10"]
    assert cells["Self-Refine"][1] == "+0.0 (the same in each run)"


def test_the_table_in_the_docs_is_that_of_its_rows():
    assert bench.TABLE.read_text() == bench.table(bench.ROWS)
