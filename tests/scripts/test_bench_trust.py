"""The bench of trust: what its rows say, and that its table and its plot are theirs."""

import json
import math
from xml.etree import ElementTree

import pytest

from mlx_fd import runs
from support.scripted import script
from support.shell import shell

bench = script("bench_trust")


def row(seed, asked="11111010", agreed="1011-10-", right="11111101"):
    trusted = "00001111"
    return {
        **{"arm": "main", "seed": seed, "date": "2026-11-30", "seconds": 60.0, "lora_rank": 64},
        **{"written": [30, 50, 30, 50, 10, 20, 10, 20], "tokens": [10 * int(x) for x in asked]},
        **{"asked": asked, "trusted": trusted, "agreed": agreed, "right": right},
        "if_asked": "11111111",
        **{"wrong": "1100", "found": ["", "1011"], "solved": ["", "1110"]},
    }


def test_a_row_says_what_was_saved_and_what_came_of_it():
    one = row(0)
    assert bench.saved(one) == pytest.approx(2 / 8)
    assert bench.saved(one, 4) == pytest.approx(2 / 4)
    # Of the audited ones with both verdicts (the sixth was not asked) one differs.
    audited = row(0, asked="11111110", agreed="1011110-")
    assert bench.audits(audited).tolist() == [0.0, 0.0, 1.0]
    # Alone: one right of one; audited: two right of three.
    found = bench.cost(row(0, asked="11111110", right="11111011"))
    assert found.value == pytest.approx(1 - 2 / 3)
    assert found.error == pytest.approx(math.sqrt(2 / 9 / 3 + 0.24 / 5))
    # A run without trust has nothing to say of it.
    assert math.isnan(bench.cost({**one, "trusted": "0" * 8}).value)
    assert bench.saved({**one, "asked": "1" * 8, "tokens": [10] * 8}) == 0


def test_table_and_plot_are_made_of_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(seed)) + "\n" for seed in (0, 1)))
    lines = bench.table(path).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if "|" in line}
    assert cells["expert's feedback tokens saved (%)"][1].strip() == "25.0"
    assert cells["final answers right (%)"][0].strip().startswith("87.5 (")
    assert cells["problems solved (%)"][2].strip() == "75.0"
    written = "expert's tokens a problem, all steps: first half, second"
    assert cells[written][1].strip() == "40, 15"
    assert "2026-11-30, LoRA of rank 64" in lines[0]
    assert cells["episodes before trust"][1].strip() == "4"
    ElementTree.fromstring(bench.plot(path))
    asked = "the same, less had the expert been asked everywhere (points)"
    assert cells[asked][1].strip() == "-12.5"
    # One of the two that the student alone judged was asked of.
    alone = "the same, of problems that the student alone judged (points)"
    assert bench.asking_alone(row(0)).value == 0.0
    assert bench.asking_alone(row(0, right="11111011")).value == -0.5
    assert cells[alone][1].strip() == "+0.0"


def test_what_no_row_says_is_no_line_of_the_table():
    assert bench.table(bench.ROWS) == bench.TABLE.read_text()


def test_an_expert_that_is_asked_again_says_what_it_said(tmp_path):
    sizes = ("--episodes", 2, "--batch-size", 2, "--probe-size", 1, "--kd-steps", 1)
    run = tmp_path / "run"
    done = shell(
        *("loop", "--preset", "tiny", *sizes, "--exam-size", 0, "--own-solutions", 0),
        *("--order", "learn-last", "--gate", "never", "--out", run),
        cwd=tmp_path,
    )
    assert done.status == 0, done
    rows = runs.read_episodes(run)
    again = bench.asked_of(run, rows)
    for row, one in zip(rows, again, strict=True):
        assert one.judged.expert.feedback.text == row["expert_feedback"]["text"]
        assert (one.merged, one.final.text) == (row["merged"], row["final"]["text"])
    # Nobody was trusted: all is as it was.
    assert bench.if_asked(run) == [row["correct_after"] for row in rows]
